"""What numbers and words the options of a config may be."""

import dataclasses
import math
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_POSITIVE = math.ulp(0.0)
_LARGEST = 1e12
_COUNT = 2**40
_FINAL = ("final_learning_rate", "final_entropy")
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("discount", "trace", "rehearse", *_FINAL), (0, 1)),
    **dict.fromkeys(("learning_rate", "clip", "max_grad_norm"), (_POSITIVE, _LARGEST)),
    **dict.fromkeys(("value_weight", "entropy_weight", "reconstruction_weight"), (0, _LARGEST)),
    **dict.fromkeys(("time_limit", "decisions", "bptt", "eval_every"), (0, _COUNT)),
    **dict.fromkeys(("stop_at", "promote_at"), (-sys.float_info.max, math.inf)),
    "value_clip": (0, _LARGEST),
    "target_kl": (0, _LARGEST),
    "seed": (0, 2**63 - 1),
}

_NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "None",
}


def check_kinds(part: Any) -> None:
    """Refuse what is of another type than its option of the group `part`, or no word of its."""
    for name, hint in get_type_hints(type(part)).items():
        value = getattr(part, name)
        if not _is(value, hint):
            kind = "" if isinstance(value, str) else f" of type {type(value).__name__}"
            raise ValueError(f"{name}: expected {_told(hint)}, got {value!r}{kind}")


def check_range(name: str, value: Any) -> None:
    """Refuse a number outside the range of its option; NaN is outside of all."""
    for one in value if isinstance(value, tuple) else ():
        check_range(name, one)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, most = _RANGES.get(name, (1, _COUNT))
    if not least <= value <= most:
        low = "more than 0" if least == _POSITIVE else f"at least {least}"
        ends = f"{least:g} to {most:g}"
        if math.isnan(value):
            ends = "a number"
        elif most >= _COUNT:
            ends = f"at most {most:g}" if value > most else low
        raise ValueError(f"{name}: expected {ends}, got {value}")


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_is(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(hint)[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _told(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {get_args(hint)}"
    if get_origin(hint) is UnionType:
        return " or ".join(_told(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a tuple, each part {_told(get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return f"a {getattr(hint, '__name__', hint)}"
    return _NAMES.get(hint, str(hint))
