"""What the tasks of memory share: rules, and one environment; `levels_vector` has the batch.

A level is everything that is drawn for an episode, drawn at its beginning. So an episode is the
same whenever its level and its actions are, alone or in a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar

import gymnasium
import numpy as np
from gymnasium import spaces

L = TypeVar("L", bound=tuple[np.ndarray, ...])
R = TypeVar("R", bound="Rules[Any]")


class Limits(NamedTuple):
    """What a field of a level may hold."""

    shape: tuple[int, ...]
    low: int
    """The least value."""
    high: int
    """The greatest value."""
    distinct: bool = False
    """Whether no two values of a vector may be the same."""


class Rules(ABC, Generic[L]):
    """What a task is under its arguments, which are the attributes."""

    level: type[L]
    """The NamedTuple of arrays that says all of an episode."""

    @abstractmethod
    def observations(self) -> spaces.Space[Any]:
        """Return the space of one environment's observations."""

    @abstractmethod
    def actions(self) -> spaces.Discrete:
        """Return the space of one environment's actions."""

    @abstractmethod
    def limits(self) -> dict[str, Limits]:
        """Return what the fields of a level may hold, in their order."""

    @abstractmethod
    def draw(self, generator: np.random.Generator, count: int) -> L:
        """Draw levels: one whose fields have an axis of `count` in front."""

    def check_level(self, level: L) -> L:
        """Refuse a level that cannot be played under these arguments; return arrays of its own."""
        if not isinstance(level, self.level):
            raise ValueError(f"level must be a {self.level.__name__}, got {level!r}")
        fields = []
        for value, (name, limits) in zip(level, self.limits().items(), strict=True):
            shape, low, high, distinct = limits
            field = np.array(value)
            if field.dtype.kind not in "biu" or field.shape != shape:
                raise ValueError(
                    f"level.{name} must be integers of shape {shape}, "
                    f"got {field.dtype} of shape {field.shape}"
                )
            if field.size and not low <= field.min() <= field.max() <= high:
                raise ValueError(f"level.{name} must be from {low} to {high}, got {value}")
            if distinct and len(np.unique(field)) < field.size:
                raise ValueError(f"level.{name} must be distinct, got {value}")
            fields.append(field)
        return self.level(*fields)


class LevelEnv(gymnasium.Env[Any, int | np.integer], Generic[L, R]):
    """One environment that plays levels; tasks say how it begins, acts, and what it shows."""

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, rules: R) -> None:
        self.rules = rules
        self.observation_space = rules.observations()
        self.action_space = rules.actions()
        self._level: L | None = None
        self._ended = True

    @property
    def level(self) -> L:
        """The level being played."""
        if self._level is None:
            raise gymnasium.error.ResetNeeded("Call reset() first: there is no level yet.")
        return self._level

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, drawn from the Generator or given as `options["level"]`."""
        given = check_options(options, "level").get("level")
        super().reset(seed=seed)
        if given is None:
            self._level = row_of(self.rules.draw(self.np_random, 1), 0)
        else:
            self._level = self.rules.check_level(given)
        self._ended = False
        self._begin()
        return self._observe(), self._info()

    def step(self, action: int | np.integer) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Do an action."""
        if self._ended:
            raise gymnasium.error.ResetNeeded("The episode has ended: call reset() before step().")
        if not self.action_space.contains(action):
            last = int(self.rules.actions().n) - 1
            raise ValueError(f"action must be 0 to {last}, got {action!r}")
        reward, terminated, truncated = self._act(int(action))
        self._ended = terminated or truncated
        return self._observe(), reward, terminated, truncated, self._info()

    @abstractmethod
    def _begin(self) -> None:
        """Set what changes to what it is at the beginning of the level."""

    @abstractmethod
    def _act(self, action: int) -> tuple[float, bool, bool]:
        """Do an action; return its reward, and whether it terminated or truncated the episode."""

    @abstractmethod
    def _observe(self) -> Any:
        """Return the present observation, in arrays of its own."""

    def _info(self) -> dict[str, Any]:
        return {}


def check_options(options: dict[str, Any] | None, *known: str) -> dict[str, Any]:
    """Refuse options of a reset that would be ignored; return the others."""
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options of reset must be a dict, got {options!r}")
    unknown = sorted(map(repr, set(options or {}) - set(known)))
    if unknown:
        raise ValueError(
            f"options of reset must be some of {sorted(known)}, got {', '.join(unknown)}"
        )
    return options or {}


def check_flag(name: str, value: object) -> bool:
    """Refuse what is neither True nor False; return it as `bool`."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Refuse what is not an integer in the range; return it as `int`."""
    if _is_integer(value) and low <= value and (high is None or value <= high):
        return int(value)
    wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise ValueError(f"{name} must be an integer {wanted}, got {value!r}")


def check_range(name: str, value: int | Sequence[int], low: int) -> tuple[int, int]:
    """Refuse what is neither an integer of at least `low` nor two, the first no greater."""
    ends = tuple(value) if isinstance(value, Sequence | np.ndarray) else (value, value)
    if len(ends) != 2 or not all(map(_is_integer, ends)):
        raise ValueError(f"{name} must be an integer or [least, greatest], got {value!r}")
    first, last = map(int, ends)
    if not low <= first <= last:
        raise ValueError(f"{name} must be at least {low}, the least first, got {value!r}")
    return first, last


def check_number(name: str, value: object, low: float, high: float = np.inf) -> float:
    """Refuse what is not a number in the range; return it as `float`."""
    if isinstance(value, int | float | np.number) and low <= value <= high:
        return float(value)
    wanted = f"of at least {low}" if high == np.inf else f"from {low} to {high}"
    raise ValueError(f"{name} must be a number {wanted}, got {value!r}")


def _is_integer(value: object) -> TypeGuard[int | np.integer]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def row_of(level: L, index: int) -> L:
    """Return the level of one environment of a batch, in arrays of its own."""
    return type(level)(*(np.array(field[index]) for field in level))
