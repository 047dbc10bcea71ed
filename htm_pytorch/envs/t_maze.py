"""T-Maze: a hint at the beginning of a corridor says which way to turn at its end."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from htm_pytorch.envs.levels import LevelEnv, Limits, Rules, check_flag, check_integer, check_range
from htm_pytorch.envs.levels_vector import LevelVectorEnv

DOWN, UP = -1, 1
"""The sides of the junction, as hints."""

_FREE_MOVES = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
_ADD, _MIX = (
    np.uint64(0x9E3779B97F4A7C15),
    (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)),
)


class TMazeLevel(NamedTuple):
    """A maze."""

    hint: np.ndarray
    """The side of the goal: -1 or 1."""
    length: np.ndarray
    """Moves from the beginning of the corridor to the junction."""
    noise: np.ndarray
    """What the noise of every step follows from."""


class TMazeRules(Rules[TMazeLevel]):
    """The T-Maze under its arguments."""

    level = TMazeLevel

    def __init__(self, length: int | Sequence[int], free: bool, extra_steps: int) -> None:
        self.length = check_range("length", length, 1)
        self.free = check_flag("free", free)
        self.extra_steps = check_integer("extra_steps", extra_steps, 0)
        if extra_steps and not free:
            raise ValueError(f"extra_steps must be 0 unless free=True, got {extra_steps!r}")

    def observations(self) -> spaces.Box:
        """Return `[y, hint, at junction, noise]`."""
        return spaces.Box(np.array([-1, -1, 0, -1], np.float32), np.ones(4, np.float32))

    def actions(self) -> spaces.Discrete:
        """Return two turns, or four directions."""
        return spaces.Discrete(4 if self.free else 2)

    def limits(self) -> dict[str, Limits]:
        """Return the range of hint, length and noise."""
        return {
            "hint": Limits((), DOWN, UP),
            "length": Limits((), 1, 2**62),
            "noise": Limits((), 0, 2**62),
        }

    def draw(self, generator: np.random.Generator, count: int) -> TMazeLevel:
        """Draw each field uniformly."""
        hint = 2 * generator.integers(2, size=count) - 1
        length = generator.integers(self.length[0], self.length[1] + 1, size=count)
        return TMazeLevel(hint, length, generator.integers(2**62, size=count))

    def check_level(self, level: TMazeLevel) -> TMazeLevel:
        """Refuse a hint that is neither side, too."""
        level = super().check_level(level)
        if level.hint == 0:
            raise ValueError(f"level.hint must be -1 or 1, got {level.hint}")
        return level


class TMazeEnv(LevelEnv[TMazeLevel, TMazeRules]):
    """Walk down a corridor and turn to the side that a hint named at its beginning.

    ## Description
    The task is Bakker's (2001), observed as in ELMUR (arXiv 2510.07151): a corridor of `length`
    moves ends in a junction with a goal on one side. The first observation, and no other, shows
    which side.

    ## Action space
    In the corridor the agent walks by itself, whatever the action. At the junction:
    `Discrete(2)`: 0 turns to the side of hint -1, 1 to that of hint 1.

    With `free=True`, `Discrete(4)`: 0 forward, 1 to the side of hint 1, 2 backward, 3 to the side
    of hint -1. A move into a wall does nothing.

    ## Observation space
    `Box`, float32 [4]: `[y, hint, at junction, noise]`.

    - `y`: 0 in the corridor, -1 or 1 at the goals.
    - `hint`: -1 or 1 in the first observation, 0 in all others.
    - `at junction`: 1 when the agent is at the junction for the first time, else 0.
    - `noise`: -1, 0 or 1, drawn anew for every observation. It means nothing.

    ## Rewards
    1 for the goal that was named, 0 for everything else.

    ## Starting state
    At the beginning of the corridor. Hint, length and noise are drawn uniformly.
    `reset(options={"level": TMazeLevel(hint, length, noise)})` plays a given level, of any length.

    ## Episode end
    - Terminated: the agent turned, right or wrong. Without `free` that is after `length + 1` steps.
    - Truncated, only if `free`: `length + 1 + extra_steps` steps were made.

    ## Information
    Without `free`, `info["action_counts"]` says whether the next action does anything: at the
    junction. With it all actions do. The attribute `level` shows what is hidden.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/TMaze-v0", length=[1, 100])
    ```

    - `length`: moves to the junction, or `[least, greatest]` to draw it for each episode.
    - `free`: whether the agent has to walk by itself. ELMUR's does.
    - `extra_steps`: with `free`, steps beyond those of the shortest way. 0 is ELMUR's.

    ## Version history
    - v0: First version.
    """

    def __init__(
        self, length: int | Sequence[int] = 10, free: bool = False, extra_steps: int = 0
    ) -> None:
        super().__init__(TMazeRules(length, free, extra_steps))

    def _begin(self) -> None:
        self._time = self._x = self._y = 0
        self._arrived = self._arrives = False

    def _act(self, action: int) -> tuple[float, bool, bool]:
        length = int(self.level.length)
        if self.rules.free:
            move_x, move_y = _FREE_MOVES[action].tolist()
        elif self._x < length:
            move_x, move_y = 1, 0
        else:
            move_x, move_y = 0, (DOWN, UP)[action]
        if self._x == length:
            self._y = move_y
        self._x = min(max(self._x + move_x, 0), length)
        self._time += 1
        self._arrives = self._x == length and not self._arrived
        self._arrived = self._arrived or self._arrives
        terminated = self._y != 0
        late = self.rules.free and self._time > length + self.rules.extra_steps
        return float(self._y == self.level.hint), terminated, late and not terminated

    def _observe(self) -> np.ndarray:
        hint = self.level.hint if self._time == 0 else 0
        noise = _noise(self.level.noise, np.array(self._time))
        return np.array([self._y, hint, self._arrives, noise], np.float32)

    def _info(self) -> dict[str, Any]:
        if self.rules.free:
            return {}
        return {"action_counts": self._x == int(self.level.length) and self._y == 0}


class TMazeVectorEnv(LevelVectorEnv[TMazeLevel, TMazeRules]):
    """A batch of T-Mazes.

    Each plays the task of `TMazeEnv`, where spaces, rewards and arguments are described; seeds,
    autoreset and saving are those of `LevelVectorEnv`.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/TMaze-v0", num_envs=64, length=[1, 100])
    ```

    `num_envs`, and those of `TMazeEnv`.
    """

    single = TMazeEnv
    _time: np.ndarray
    _x: np.ndarray
    _y: np.ndarray
    _arrived: np.ndarray
    _arrives: np.ndarray

    def _beginning(self) -> dict[str, Any]:
        return {"time": 0, "x": 0, "y": 0, "arrived": False, "arrives": False}

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length = self._level.length
        at_junction = self._x == length
        if self.rules.free:
            move_x, move_y = _FREE_MOVES[actions].T
        else:
            move_x, move_y = 1, 2 * actions - 1
        self._y = np.where(at_junction, move_y, 0)
        self._x = np.clip(self._x + move_x, 0, length)
        self._time += 1
        self._arrives = (self._x == length) & ~self._arrived
        self._arrived |= self._arrives
        terminated = self._y != 0
        truncated = np.zeros_like(terminated)
        if self.rules.free:
            truncated = (self._time > length + self.rules.extra_steps) & ~terminated
        return (self._y == self._level.hint).astype(np.float64), terminated, truncated

    def _observe(self) -> np.ndarray:
        observation = np.empty((self.num_envs, 4), np.float32)
        observation[:, 0] = self._y
        observation[:, 1] = np.where(self._time == 0, self._level.hint, 0)
        observation[:, 2] = self._arrives
        observation[:, 3] = _noise(self._level.noise, self._time)
        return observation

    def _info(self) -> dict[str, Any]:
        if self.rules.free:
            return {}
        return {"action_counts": (self._x == self._level.length) & (self._y == 0)}


def _noise(drawn: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Return -1, 0 or 1, a number scrambled by splitmix64, so that a long maze needs no table."""
    mixed = np.atleast_1d(drawn).astype(np.uint64) + np.atleast_1d(time).astype(np.uint64) * _ADD
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    noise = ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(3)).astype(np.int64) - 1
    return noise.reshape(np.shape(drawn))
