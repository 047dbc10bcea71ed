"""What environments hand over, copied, as they may write into it again, and checked."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from htm_pytorch.rl.observations import Nested, nested


class Outcome(NamedTuple):
    """What a step brought, in arrays of our own."""

    reward: np.ndarray
    """[B] float64."""
    terminated: np.ndarray
    """[B] bool."""
    truncated: np.ndarray
    """[B] bool, never where it is terminated."""


def stepped(vector: VectorEnv, name: str, actions: Any) -> tuple[Nested, Outcome, dict[str, Any]]:
    """Step B environments; return the observation, as they gave it, the outcome and the info.

    Raises:
        ValueError: of theirs, said to be theirs; or an outcome that is not one number a row.
    """
    with _theirs(name, "step"):
        observed, reward, terminated, truncated, info = vector.step(actions)
    rows = vector.num_envs
    earned = _row_values(name, "rewards", reward, rows, np.float64)
    ended = _row_values(name, "terminated", terminated, rows, bool)
    cut = _row_values(name, "truncated", truncated, rows, bool)
    return observed, Outcome(earned, ended, cut & ~ended), info


def began(vector: VectorEnv, name: str, **given: Any) -> tuple[Nested, dict[str, Any]]:
    """Reset environments; return the observation, as they gave it, and the info.

    Raises:
        ValueError: of theirs, said to be theirs.
    """
    with _theirs(name, "reset"):
        return vector.reset(**given)


@contextlib.contextmanager
def _theirs(name: str, where: str) -> Iterator[None]:
    """Say of a ValueError whose it is; it would be read as one of ours, about an option."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"env: {name} raised a ValueError in its {where}: {error}; --debug shows where"
        ) from error


def final_rows(name: str, given: Any, batch: Nested, ended: np.ndarray) -> Nested:
    """Return a batch of observations whose rows [B] that `ended` are the final ones `given`.

    Args:
        name: of the environment.
        given: nested as the batch is, or rows of objects, None where a row did not end.
        batch: of first observations, copied.
        ended: [B] bool, one of them at least.

    Raises:
        ValueError: there are not as many rows.
    """
    for row in np.flatnonzero(ended):

        def place(part: np.ndarray, value: Any, row: int = int(row)) -> None:
            part[row] = value

        try:
            nested(place, batch, _row_of(given, batch, int(row), len(ended)))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"env: expected info['final_obs'] of {name} to have {len(ended)} rows that are "
                f"observations where an episode ended, as row {row}, got {type(given).__name__} "
                f"({error})"
            ) from error
    return batch


def copied(observed: Nested) -> Nested:
    """Return a batch of observations in arrays of their own."""
    return nested(lambda part: np.array(np.asarray(part)), observed)


def action_counts(name: str, info: dict[str, Any], rows: int) -> np.ndarray:
    """Return where an action counts, bool [B], as `info` says; without that, everywhere.

    Raises:
        ValueError: it says something else than one bool an environment.
    """
    counts = info.get("action_counts")
    if counts is None:
        return np.ones(rows, bool)
    said = np.broadcast_to(np.asarray(info.get("_action_counts", True), bool), rows)
    given = np.asarray(counts)
    if given.dtype == object and given.shape == (rows,):
        # Of environments of which not all say it.
        given = np.array([one is None or one for one in given])
    if given.dtype != bool or given.shape not in ((), (rows,)):
        raise ValueError(
            f"env: expected info['action_counts'] of {name} to be a bool, of a vector environment "
            f"{rows} of them, got {counts!r}"
        )
    return np.where(said, given, True)


def check_finite(name: str, first_row: int, what: str, given: Nested) -> None:
    """Refuse what is not finite; rows are counted from `first_row`, among all of a training.

    Args:
        name: of the environment.
        first_row: of these.
        what: they are.
        given: tensors [B, ...] as the agent gets them, where a large float64 is infinite.

    Raises:
        ValueError: names the environment, the row, what is not finite and where.
    """

    def check(part: Tensor, place: str) -> None:
        # Quick: with a number that is not finite no sum is. Of finite ones it may overflow.
        if not part.is_floating_point() or torch.isfinite(part.sum()):
            return
        wrong = ~torch.isfinite(part)
        if wrong.any():
            row = first_row + int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"env: expected finite {what}{place and f' at {place}'}, got "
                f"{part[wrong][0].item()} from the environment {name} in row {row}; a wrapper of "
                "the environment can replace it"
            )

    _each(check, given, "")


def _each(function: Callable[[Any, str], None], value: Nested, place: str) -> None:
    """Call a function with each leaf and where it is, `a.b[0]`."""
    if isinstance(value, dict):
        for key, part in value.items():
            _each(function, part, f"{place}.{key}".lstrip("."))
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            _each(function, part, f"{place}[{number}]")
    else:
        function(value, place)


def _row_values(name: str, what: str, given: Any, rows: int, kind: type) -> np.ndarray:
    """Return numbers or bools, one a row, as an array of their own."""
    try:
        made = np.array(np.asarray(given), kind)
    except (TypeError, ValueError) as error:
        raise ValueError(f"env: expected {what} of {name} to be numbers, got {given!r}") from error
    if made.shape != (rows,):
        raise ValueError(
            f"env: expected {what} of {name} to be {rows}, one a row, got shape {made.shape}"
        )
    return made


def _row_of(given: Any, like: Nested, row: int, rows: int) -> Nested:
    """Return one row's observation of a batch [B], nested as Gymnasium's are or rows of objects."""
    if isinstance(like, dict) and isinstance(given, dict):
        return {key: _row_of(given[key], like[key], row, rows) for key in like}
    if isinstance(like, tuple) and isinstance(given, tuple) and len(given) == len(like):
        return tuple(_row_of(v, part, row, rows) for v, part in zip(given, like, strict=True))
    size = getattr(given, "__len__", None)
    if size is None or size() != rows:
        raise ValueError("not so many rows")
    return _as_nested(given[row], like)


def _as_nested(value: Any, like: Nested) -> Nested:
    """Return one row's observation nested as the batch is: its arrays may be objects."""
    if isinstance(like, dict):
        return {key: _as_nested(value[key], like[key]) for key in like}
    if isinstance(like, tuple):
        return tuple(_as_nested(v, part) for v, part in zip(value, like, strict=True))
    return value
