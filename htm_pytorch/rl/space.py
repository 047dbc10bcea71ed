"""What an agent can be made for: the size of a space, and the units of its numbers."""

from typing import Any

import numpy as np
from gymnasium import spaces

MOST_CHOICES = 1_000_000
"""Possibilities of the choices of a space together."""
ACTION_BOUND = 1e30
"""From which on a bound of actions says nothing."""


def check_size(space: spaces.Space[Any], what: str) -> None:
    """Refuse a space of nothing, and one of more choices than an agent has weights for.

    Raises:
        ValueError: names `what` it is of.
    """
    parts = space.spaces if isinstance(space, spaces.Dict | spaces.Tuple) else None
    if (parts is not None and not parts) or 0 in (space.shape or ()):
        raise ValueError(
            f"env: expected {what} of something, got {space}, which is empty; a wrapper of the "
            "environment can leave it out"
        )
    choices = np.sum(getattr(space, "n", getattr(space, "nvec", 0)), dtype=np.float64)
    if not isinstance(space, spaces.MultiBinary) and choices > MOST_CHOICES:
        raise ValueError(
            f"env: expected {what} of at most {MOST_CHOICES:,} possibilities, each of which has "
            f"weights of its own, got {space}; a wrapper of the environment can offer fewer"
        )


def units_of(space: spaces.Box, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle of each dimension of a Box and half its range; 0 and 1 if it has none.

    It has none where a bound is `most` or more, as the largest float stands for no bound.
    """
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    # Where both bounds are the same, any unit will do.
    bounded = (np.abs(low) < most) & (np.abs(high) < most) & (high > low)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    return (low + high) / 2, (high - low) / 2
