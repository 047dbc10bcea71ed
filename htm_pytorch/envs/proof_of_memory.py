"""Proof of Memory: which end of a line pays is shown for two steps, then it has to be known."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from htm_pytorch.envs.levels import LevelEnv, Limits, Rules, check_integer
from htm_pytorch.envs.levels_vector import LevelVectorEnv

END = 5
"""Squares from the middle of the line to either end."""

SHOWN = 2
"""Steps during which the ends are shown, and the agent cannot move."""

_PRIZE, _PENALTY = 1.6, 0.1


class ProofofMemoryLevel(NamedTuple):
    """Where the agent begins, and where it should go."""

    start: np.ndarray
    """Squares to the right of the middle, -2 to 2."""
    goal: np.ndarray
    """The end that pays: -1 the left one, 1 the right one."""


class ProofofMemoryRules(Rules[ProofofMemoryLevel]):
    """The Proof of Memory under its arguments."""

    level = ProofofMemoryLevel

    def __init__(self, max_steps: int) -> None:
        self.max_steps = check_integer("max_steps", max_steps, 1)

    def observations(self) -> spaces.Box:
        """Return `[left end, position, right end]`."""
        return spaces.Box(-1, 1, (3,), np.float32)

    def actions(self) -> spaces.Discrete:
        """Return left and right."""
        return spaces.Discrete(2)

    def limits(self) -> dict[str, Limits]:
        """Return the range of the start and of the goal."""
        return {"start": Limits((), 1 - END, END - 1), "goal": Limits((), -1, 1)}

    def draw(self, generator: np.random.Generator, count: int) -> ProofofMemoryLevel:
        """Draw both uniformly."""
        start = generator.integers(-2, 3, size=count)
        return ProofofMemoryLevel(start, 2 * generator.integers(2, size=count) - 1)

    def check_level(self, level: ProofofMemoryLevel) -> ProofofMemoryLevel:
        """Refuse a goal that is no end, too."""
        level = super().check_level(level)
        if level.goal == 0:
            raise ValueError(f"level.goal must be -1 or 1, got {level.goal}")
        return level


class ProofofMemoryEnv(LevelEnv[ProofofMemoryLevel, ProofofMemoryRules]):
    """Walk to the end of a line that was said to pay; the other one costs.

    ## Description
    The task of MarcoMeter's `ProofofMemory-v0`, which CleanRL's Transformer-XL trains on: a line of
    11 squares. One of its ends pays, the other one costs, and which is which is shown only in the
    first three observations, while the agent cannot move.

    ## Action space
    `Discrete(2)`: 0 left, 1 right. The first two actions do nothing.

    ## Observation space
    `Box`, float32 [3]: `[left end, position, right end]`.

    - `left end`, `right end`: 1 for the one that pays and -1 for the other, and 0 from the fourth
      observation on.
    - `position`: -1 at the left end, 1 at the right one, .2 a square.

    ## Rewards
    1.6 at the end that pays, -1.6 at the other, -.1 for every other step after the first two, which
    earn 0. The best return is `1.6 - .1 * (squares to the end that pays - 1)`: 1.2 on average.

    ## Starting state
    Up to two squares from the middle. Start and goal are drawn uniformly.
    `reset(options={"level": ProofofMemoryLevel(start, goal)})` plays a given level.

    ## Episode end
    - Terminated: the agent is at an end.
    - Truncated: `max_steps` steps were made, the first two included.

    ## Information
    `info["action_counts"]` says whether the next action does anything: not the first two. The
    attribute `level` shows what is hidden.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/ProofofMemory-v0")
    ```

    - `max_steps`: steps at most, 16 in the original.

    ## Version history
    - v0: First version.
    """

    def __init__(self, max_steps: int = 16) -> None:
        super().__init__(ProofofMemoryRules(max_steps))

    def _begin(self) -> None:
        self._time = 0
        self._square = int(self.level.start)

    def _act(self, action: int) -> tuple[float, bool, bool]:
        self._time += 1
        late = self._time >= self.rules.max_steps
        if self._time <= SHOWN:
            return 0.0, False, late
        self._square += 1 if action == 1 else -1
        if abs(self._square) < END:
            return -_PENALTY, False, late
        return _PRIZE if self._square == END * self.level.goal else -_PRIZE, True, False

    def _observe(self) -> np.ndarray:
        goal = int(self.level.goal) if self._time <= SHOWN else 0
        return np.array([-goal, self._square / END, goal], np.float32)

    def _info(self) -> dict[str, Any]:
        return {"action_counts": self._time >= SHOWN}


class ProofofMemoryVectorEnv(LevelVectorEnv[ProofofMemoryLevel, ProofofMemoryRules]):
    """A batch of Proofs of Memory.

    Each plays the task of `ProofofMemoryEnv`, where spaces, rewards and arguments are described;
    seeds, autoreset and saving are those of `LevelVectorEnv`.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/ProofofMemory-v0", num_envs=16)
    ```

    `num_envs`, and those of `ProofofMemoryEnv`.
    """

    single = ProofofMemoryEnv
    _time: np.ndarray
    _moved: np.ndarray

    def _beginning(self) -> dict[str, Any]:
        return {"time": 0, "moved": 0}

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._time += 1
        moves = self._time > SHOWN
        self._moved += np.where(moves, 2 * actions - 1, 0)
        square = self._level.start + self._moved
        terminated = moves & (np.abs(square) >= END)
        end = np.where(square == END * self._level.goal, _PRIZE, -_PRIZE)
        reward = np.where(terminated, end, np.where(moves, -_PENALTY, 0.0))
        return reward, terminated, (self._time >= self.rules.max_steps) & ~terminated

    def _observe(self) -> np.ndarray:
        goal = np.where(self._time <= SHOWN, self._level.goal, 0)
        square = (self._level.start + self._moved) / END
        return np.stack([-goal, square, goal], axis=1).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        return {"action_counts": self._time >= SHOWN}
