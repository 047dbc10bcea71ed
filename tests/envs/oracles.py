"""Policies with perfect memory or none, and what they earn."""

from collections.abc import Callable
from typing import Any

import numpy as np


def returns(vector: Any, policy: Callable[[Any, Any], np.ndarray], seed: int = 0) -> np.ndarray:
    """Return what the first episode of each environment earns.

    The policy is called with the observation and the info of each step.
    """
    seen, info = vector.reset(seed=seed)
    earned = np.zeros(vector.num_envs)
    over = np.zeros(vector.num_envs, bool)
    while not over.all():
        seen, reward, terminated, truncated, info = vector.step(policy(seen, info))
        earned += reward * ~over
        over |= terminated | truncated
    return earned


def assert_chance(outcomes: np.ndarray, chance: float) -> None:
    """Refuse a mean of independent outcomes more than 4 standard errors from `chance`."""
    error = np.sqrt(outcomes.var() / outcomes.size)
    assert abs(outcomes.mean() - chance) < 4 * max(error, 1e-9), (outcomes.mean(), error)
