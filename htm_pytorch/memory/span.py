"""`Span`: which steps a chunk holds."""

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """The steps of one chunk of a home, by their place in everything that its row was given."""

    chunk: int
    """The number that the chunk has in its home."""
    first_step: int
    """The number of its first step, counted from 0 since the row was emptied."""
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    """How many steps it holds."""
    episode: int
    """The episode of its steps, counted from 0 since the row was emptied."""
    first_time: float | None = None
    """When its first step was, where the home keeps times."""
    last_time: float | None = None
    """When its last step was, where the home keeps times."""
    keys: tuple[str | None, ...] = ()
    """One for each step, oldest first, where some step was stored with a key."""


def no_such_chunks(numbers: Sequence[int]) -> ValueError:
    """Return the error for chunks that hold nothing which can be recalled."""
    return ValueError(f"chunks: expected chunks that can be recalled, got {list(numbers)}")
