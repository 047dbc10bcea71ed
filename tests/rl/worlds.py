"""Environments for tests; importing registers them with gymnasium."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env[dict[str, Any], Any]):
    """Episodes of 3 to 9 steps, a third of them cut; what is seen and earned tells all of it.

    With `watch` the action counts at every third step only.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self,
        watch: bool = False,
        discrete: bool = False,
        bonus: float = 0.0,
        render_mode: str | None = None,
    ):
        self.bonus, self.render_mode = bonus, render_mode
        self.observation_space = spaces.Dict(
            {"numbers": spaces.Box(-np.inf, np.inf, (3,)), "kind": spaces.Discrete(3)}
        )
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,))
        self.watch = watch

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(3, 10))
        self.cut = bool(self.np_random.random() < 1 / 3)
        self.kind, self.time, self.place = int(self.np_random.integers(3)), 0, 0.0
        return self._seen(), self._info()

    def step(self, action: Any) -> Any:
        self.place += float(np.sum(action))
        self.time += 1
        over = self.time >= self.length
        reward = self.bonus + self.kind + 0.1 * self.place
        return self._seen(), reward, over and not self.cut, over and self.cut, self._info()

    def render(self) -> Any:
        return np.full((8, 8, 3), self.time, np.uint8)

    def _seen(self) -> dict[str, Any]:
        numbers = np.array([self.time / 10, self.place / 10, self.length / 10], np.float32)
        return {"numbers": numbers, "kind": np.int64(self.kind)}

    def _info(self) -> dict[str, Any]:
        return {"action_counts": self.time % 3 == 2} if self.watch else {}


class FailsToDraw(Walk):
    """A walk that draws itself up to some time; `first` is when that fails."""

    def __init__(self, first: int = 0, **options: Any):
        super().__init__(**options)
        self.first = first

    def render(self) -> Any:
        if self.time >= self.first:
            raise RuntimeError("no display")
        return super().render()


class Recall(gymnasium.Env[dict[str, Any], Any]):
    """A number is shown at the first step, and is to be said at the last of 4, of -1 to 1."""

    def __init__(self) -> None:
        parts = {"shown": spaces.Box(-1, 1, (1,)), "now": spaces.Discrete(4)}
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.number, self.time = float(self.np_random.choice([-0.5, 0.5])), 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        over = self.time == 4
        reward = 1 - abs(float(action[0]) - self.number) if over else 0.0
        return self._seen(), reward, over, False, {}

    def _seen(self) -> dict[str, Any]:
        shown = np.array([self.number if self.time == 0 else 0.0], np.float32)
        return {"shown": shown, "now": np.int64(self.time % 4)}


class Scalar(gymnasium.Env[Any, Any]):
    """One number without a dimension is seen; episodes never end by themselves."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, ())
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        return self._seen(), float(action), False, False, {}

    def _seen(self) -> Any:
        return np.array(self.np_random.normal(), np.float32)


gymnasium.register("Test/Walk-v0", entry_point="tests.rl.worlds:Walk")
gymnasium.register("Test/FailsToDraw-v0", entry_point="tests.rl.worlds:FailsToDraw")
gymnasium.register("Test/Recall-v0", entry_point="tests.rl.worlds:Recall")
gymnasium.register("Test/Scalar-v0", entry_point="tests.rl.worlds:Scalar")
