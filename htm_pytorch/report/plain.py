"""Numbers and texts of whatever library, as plain Python that JSON and HTML can hold."""

from collections.abc import Callable, Sequence
from typing import Any, cast


def whole(name: str, value: object) -> int:
    """Return a whole number, of Python, NumPy, torch or others, as an int.

    Raises:
        ValueError: names the field.
    """
    got = _item(value)
    if isinstance(got, bool) or not hasattr(got, "__index__"):
        raise ValueError(f"{name}: expected a whole number, got {_spell(value)}")
    return _convert(int, name, "a whole number", got)


def number(name: str, value: object) -> float:
    """Return a real number as a float.

    Raises:
        ValueError: names the field.
    """
    got = _item(value)
    if not (hasattr(got, "__float__") or hasattr(got, "__index__")):
        raise ValueError(f"{name}: expected a number, got {_spell(value)}")
    return _convert(float, name, "a number", got)


def text(name: str, value: object) -> str:
    """Return a text as it is, and a number as a text.

    Raises:
        ValueError: names the field.
    """
    got = _item(value)
    if isinstance(got, int | float):
        return str(got)
    if not isinstance(got, str):
        raise ValueError(f"{name}: expected a str, got {_spell(value)}")
    try:
        got.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected a str that UTF-8 can hold, got {got!r}; "
            "text.encode('utf-8', 'replace').decode() can be held"
        ) from error
    return got


def several(name: str, value: object, wanted: str) -> Sequence[Any]:
    """Return what lies in a sequence, an array or a tensor.

    Raises:
        ValueError: it is none; or one named tuple, which is one thing.
    """
    as_list = getattr(value, "tolist", None)
    found = as_list() if callable(as_list) else value
    if isinstance(found, str) or hasattr(found, "_fields") or not isinstance(found, Sequence):
        raise ValueError(f"{name}: expected {wanted}, got {_spell(value)}")
    return cast(Sequence[Any], found)


def _item(value: object) -> object:
    """Return what a scalar of an array library holds; anything else as it is."""
    item = getattr(value, "item", None)
    try:
        return item() if callable(item) else value
    except (TypeError, ValueError, RuntimeError):
        return value  # Of several numbers; it is none.


def _convert(kind: Callable[[Any], Any], name: str, wanted: str, value: object) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: expected {wanted}, got {_spell(value)}") from error


def _spell(value: object) -> str:
    plain = value is None or isinstance(value, int | float | complex | str)
    return repr(value)[:80] if plain else type(value).__name__
