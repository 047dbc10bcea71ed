"""Endless T-Maze: corridor after corridor, each with a hint that makes the older ones void."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from htm_pytorch.envs.levels import (
    LevelEnv,
    Limits,
    Rules,
    check_integer,
    check_number,
    check_range,
)
from htm_pytorch.envs.levels_vector import LevelVectorEnv

LEFT, RIGHT, FORWARD = range(3)
"""The actions."""

ENDLESS_SETTINGS: dict[str, dict[str, Any]] = {
    f"{kind}-{length}-{corridors}": {
        "length": [length if kind == "fixed" else 1, length],
        "num_corridors": corridors,
    }
    for kind in ("fixed", "uniform")
    for length in (5, 10)
    for corridors in (1, 3, 5, 10)
}
"""Sixteen settings, arguments by name: fixed or uniform lengths, the longest, and how many."""


class EndlessTMazeLevel(NamedTuple):
    """The corridors, in their order."""

    hints: np.ndarray
    """[corridors], -1 for left or 1 for right."""
    lengths: np.ndarray
    """[corridors], moves to the junction."""


class EndlessTMazeRules(Rules[EndlessTMazeLevel]):
    """The Endless T-Maze under its arguments."""

    level = EndlessTMazeLevel

    def __init__(
        self,
        length: int | Sequence[int],
        num_corridors: int,
        wrong_reward: float,
        step_reward: float,
    ) -> None:
        self.length = check_range("length", length, 1)
        self.num_corridors = check_integer("num_corridors", num_corridors, 1)
        self.wrong_reward = check_number("wrong_reward", wrong_reward, -np.inf)
        self.step_reward = check_number("step_reward", step_reward, -np.inf)

    @property
    def max_steps(self) -> int:
        """Six times the steps that the longest corridors take."""
        return 6 * (self.length[1] + 1) * self.num_corridors

    def observations(self) -> spaces.Box:
        """Return `[x, y, hint]`."""
        return spaces.Box(np.array([0, 0, -1], np.float32), np.ones(3, np.float32))

    def actions(self) -> spaces.Discrete:
        """Return left, right and forward."""
        return spaces.Discrete(3)

    def limits(self) -> dict[str, Limits]:
        """Return the range of hints and lengths."""
        shape = (self.num_corridors,)
        return {"hints": Limits(shape, -1, 1), "lengths": Limits(shape, 1, self.length[1])}

    def draw(self, generator: np.random.Generator, count: int) -> EndlessTMazeLevel:
        """Draw hints and lengths uniformly."""
        shape = (count, self.num_corridors)
        hints = 2 * generator.integers(2, size=shape) - 1
        return EndlessTMazeLevel(hints, generator.integers(*self.length, shape, endpoint=True))

    def check_level(self, level: EndlessTMazeLevel) -> EndlessTMazeLevel:
        """Refuse a hint that is no side, too."""
        level = super().check_level(level)
        if not level.hints.all():
            raise ValueError(f"level.hints must be -1 or 1, got {level.hints}")
        return level


class EndlessTMazeEnv(LevelEnv[EndlessTMazeLevel, EndlessTMazeRules]):
    """Turn at the end of each corridor as the newest hint said.

    ## Description
    The task of "Memory Retention Is Not Enough to Master Memory Tasks in Reinforcement Learning",
    2026 (arXiv 2601.15086), as its published code has it. At the beginning of a corridor a hint
    says left or right. A right turn at its end leads to the next corridor, which has a hint of its
    own; a wrong turn ends the episode. Of many hints that look alike only the newest counts.

    ## Action space
    `Discrete(3)`: 0 left, 1 right, 2 forward. In a corridor a turn does nothing; at a junction
    forward is a wrong turn.

    ## Observation space
    `Box`, float32 [3]: `[x, y, hint]`.

    - `x`: moves from the beginning of the corridor, divided by the greatest `length`.
    - `y`: 0, always.
    - `hint`: -1 for left or 1 for right at the beginning of a corridor, else 0.

    ## Rewards
    1 for a right turn, `wrong_reward` for a wrong one, `step_reward` for every other step.

    ## Starting state
    At the beginning of the first corridor. Hints are drawn uniformly, lengths too.
    `reset(options={"level": EndlessTMazeLevel(hints, lengths)})` plays given corridors.

    ## Episode end
    - Terminated: a wrong turn, or the right turn at the end of the last corridor.
    - Truncated: `6 * (longest + 1) * num_corridors` steps were made.

    ## Information
    `info["corridors"]` is the number of right turns so far. All actions count. The attribute
    `level` shows what is hidden.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/EndlessTMaze-v0", length=[1, 10])
    ```

    - `length`: moves to a junction, or `[least, greatest]` to draw it for each corridor.
    - `num_corridors`: corridors at most.
    - `wrong_reward`, `step_reward`: the paper's are reported to be -1 and -.01. With 0, the
      default, the return is the number of right turns.

    `ENDLESS_SETTINGS` names sixteen settings: {fixed, uniform from 1} x {5, 10} moves x
    {1, 3, 5, 10} corridors. They are ours: those of published tables were not at hand.

    ## Version history
    - v0: First version.
    """

    def __init__(
        self,
        length: int | Sequence[int] = 10,
        num_corridors: int = 5,
        wrong_reward: float = 0.0,
        step_reward: float = 0.0,
    ) -> None:
        super().__init__(EndlessTMazeRules(length, num_corridors, wrong_reward, step_reward))

    def _begin(self) -> None:
        self._time = self._x = self._corridor = 0

    def _act(self, action: int) -> tuple[float, bool, bool]:
        self._time += 1
        late = self._time >= self.rules.max_steps
        if self._x < self.level.lengths[self._corridor]:
            self._x += action == FORWARD
            return self.rules.step_reward, False, late
        if action != (LEFT if self.level.hints[self._corridor] < 0 else RIGHT):
            return self.rules.wrong_reward, True, False
        self._corridor += 1
        self._x = 0
        over = self._corridor == self.rules.num_corridors
        return 1.0, over, late and not over

    def _observe(self) -> np.ndarray:
        hint = 0
        if self._x == 0 and self._corridor < self.rules.num_corridors:
            hint = self.level.hints[self._corridor]
        return np.array([self._x / self.rules.length[1], 0, hint], np.float32)

    def _info(self) -> dict[str, Any]:
        return {"corridors": self._corridor}


class EndlessTMazeVectorEnv(LevelVectorEnv[EndlessTMazeLevel, EndlessTMazeRules]):
    """A batch of Endless T-Mazes.

    Each plays the task of `EndlessTMazeEnv`, where spaces, rewards and arguments are described;
    seeds, autoreset and saving are those of `LevelVectorEnv`.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/EndlessTMaze-v0", num_envs=64)
    ```

    `num_envs`, and those of `EndlessTMazeEnv`.
    """

    single = EndlessTMazeEnv
    _time: np.ndarray
    _x: np.ndarray
    _corridor: np.ndarray

    def _beginning(self) -> dict[str, Any]:
        return {"time": 0, "x": 0, "corridor": 0}

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rules = self.rules
        at_junction = self._x == self._here(self._level.lengths)
        right = at_junction & (2 * actions - 1 == self._here(self._level.hints))
        wrong = at_junction & ~right
        self._time += 1
        self._x = np.where(right, 0, self._x + (~at_junction & (actions == FORWARD)))
        self._corridor = self._corridor + right
        terminated = wrong | (self._corridor == rules.num_corridors)
        truncated = (self._time >= rules.max_steps) & ~terminated
        reward = np.where(at_junction, rules.wrong_reward, rules.step_reward)
        return np.where(right, 1.0, reward), terminated, truncated

    def _observe(self) -> np.ndarray:
        shown = (self._x == 0) & (self._corridor < self.rules.num_corridors)
        observation = np.zeros((self.num_envs, 3), np.float32)
        observation[:, 0] = self._x / self.rules.length[1]
        observation[:, 2] = np.where(shown, self._here(self._level.hints), 0)
        return observation

    def _info(self) -> dict[str, Any]:
        return {"corridors": self._corridor.copy()}

    def _here(self, of_corridors: np.ndarray) -> np.ndarray:
        """Return what belongs to the present corridor; after the last one, to the last."""
        here = np.minimum(self._corridor, self.rules.num_corridors - 1)
        return of_corridors[self._rows, here]
