"""One-shot navigation: goal after goal in a place that was never seen before and has no map."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from htm_pytorch.envs.levels import LevelEnv, Limits, Rules, check_integer, check_number
from htm_pytorch.envs.levels_vector import LevelVectorEnv

NORTH, EAST, SOUTH, WEST = range(4)
"""The actions."""


class OneShotNavigationLevel(NamedTuple):
    """A map, how its places look, and where to go; places are numbered row by row."""

    moves: np.ndarray
    """[places, 4], where north, east, south and west lead from a place: to itself at a wall."""
    codes: np.ndarray
    """[places], what is seen at a place; no two are alike."""
    start: np.ndarray
    """The place where the agent begins."""
    goals: np.ndarray
    """[max_steps + 1], the places to go to, one after the other."""


class OneShotNavigationRules(Rules[OneShotNavigationLevel]):
    """The one-shot navigation under its arguments."""

    level = OneShotNavigationLevel

    def __init__(self, size: int, loops: float, num_codes: int, max_steps: int) -> None:
        self.size = check_integer("size", size, 2)
        self.loops = check_number("loops", loops, 0, 1)
        self.num_codes = check_integer("num_codes", num_codes, size**2)
        self.max_steps = check_integer("max_steps", max_steps, 1)

    @property
    def num_places(self) -> int:
        """Places of the map."""
        return self.size**2

    def observations(self) -> spaces.Dict:
        """Return the codes of the place and of the goal."""
        parts = {name: spaces.Discrete(self.num_codes) for name in ("place", "goal")}
        return spaces.Dict(parts)  # pyright: ignore[reportArgumentType]

    def actions(self) -> spaces.Discrete:
        """Return the four directions."""
        return spaces.Discrete(4)

    def limits(self) -> dict[str, Limits]:
        """Return the range of places and codes."""
        last = self.num_places - 1
        return {
            "moves": Limits((self.num_places, 4), 0, last),
            "codes": Limits((self.num_places,), 0, self.num_codes - 1, distinct=True),
            "start": Limits((), 0, last),
            "goals": Limits((self.max_steps + 1,), 0, last),
        }

    def draw(self, generator: np.random.Generator, count: int) -> OneShotNavigationLevel:
        """Draw a tree of random passages and some more; all else uniformly."""
        places, passages = np.arange(self.num_places), self._passages()
        joins = generator.random((count, len(passages))) < self.loops
        order = generator.random(joins.shape).argsort(axis=1)
        rows, groups = np.arange(count), np.tile(places, (count, 1))
        for passage in order.T:
            one, other = (groups[rows, ends] for ends in passages[passage].T)
            joins[rows, passage] |= one != other
            groups = np.where(groups == other[:, None], one[:, None], groups)
        moves = np.tile(places[:, None], (count, 1, 4))
        for (here, there), open_ in zip(passages, joins.T, strict=True):
            out, back = (EAST, WEST) if there == here + 1 else (SOUTH, NORTH)
            moves[:, here, out] = np.where(open_, there, here)
            moves[:, there, back] = np.where(open_, here, there)
        codes = generator.random((count, self.num_codes)).argsort(axis=1)[:, : len(places)]
        # Where a goal is from the one before it, which it never is itself.
        start = generator.integers(len(places), size=(count, 1))
        further = generator.integers(1, len(places), size=(count, self.max_steps + 1))
        goals = (start + further.cumsum(axis=1)) % len(places)
        return OneShotNavigationLevel(moves, codes, start[:, 0], goals)

    def distances(self, level: OneShotNavigationLevel) -> np.ndarray:
        """Return the fewest moves from one place of a level to another, [from, to]."""
        away = np.where(np.eye(self.num_places, dtype=bool), 0.0, np.inf)
        for _ in range(self.num_places):
            away = np.minimum(away, 1 + away[level.moves].min(axis=1))
        return away

    def _passages(self) -> np.ndarray:
        """Return the pairs of neighbours, [passages, 2]."""
        places = np.arange(self.num_places).reshape(self.size, self.size)
        across = np.stack([places[:, :-1], places[:, 1:]], axis=-1).reshape(-1, 2)
        down = np.stack([places[:-1], places[1:]], axis=-1).reshape(-1, 2)
        return np.concatenate([across, down])


class OneShotNavigationEnv(LevelEnv[OneShotNavigationLevel, OneShotNavigationRules]):
    """Find a way to one goal after the other, on a map that each episode draws anew.

    ## Description
    The structure of One-shot StreetLearn (Ritter et al., 2020, arXiv 2006.03662), which "Towards
    mental time travel" uses, on a grid in the place of streets. Every place looks like nothing but
    itself, by a code that means nothing in the next episode. The agent sees the code of its place
    and that of its goal. Which way leads where it has to find out and remember, so that later goals
    are reached faster than the first ones.

    The map is ours: `size` x `size` places, a random tree of passages between neighbours, and each
    other passage with probability `loops`. Moves go by the compass and nothing has to be collected.

    ## Action space
    `Discrete(4)`: 0 north, 1 east, 2 south, 3 west. A move into a wall does nothing.

    ## Observation space
    A `Dict` of two entries:

    - `"place"`: `Discrete(num_codes)`, the code of the place where the agent is.
    - `"goal"`: `Discrete(num_codes)`, the code of the place to go to.

    ## Rewards
    1 for every goal that is reached, 0 for everything else. A goal reached is followed by another.

    ## Starting state
    Map, codes, start and goals are drawn; a goal is never where the agent is.
    `reset(options={"level": OneShotNavigationLevel(...)})` plays a given level.

    ## Episode end
    - Truncated: `max_steps` steps were made. Nothing terminates.

    ## Information
    `info["goals"]` counts the goals reached. All actions count. The attribute `level` shows what is
    hidden, and `rules.distances(level)` how long the shortest ways are.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/OneShotNavigation-v0")
    ```

    - `size`: places along one side of the map.
    - `loops`: 0 for a tree, 1 for no walls.
    - `num_codes`: how many codes there are, 60 in the published task.
    - `max_steps`: steps of an episode, 200 in the published task.

    ## Version history
    - v0: First version.
    """

    def __init__(
        self, size: int = 5, loops: float = 0.3, num_codes: int = 60, max_steps: int = 200
    ) -> None:
        super().__init__(OneShotNavigationRules(size, loops, num_codes, max_steps))

    def _begin(self) -> None:
        self._time = self._reached = 0
        self._place = int(self.level.start)

    def _act(self, action: int) -> tuple[float, bool, bool]:
        self._time += 1
        self._place = int(self.level.moves[self._place, action])
        there = self._place == self.level.goals[self._reached]
        self._reached += int(there)
        return float(there), False, self._time >= self.rules.max_steps

    def _observe(self) -> dict[str, Any]:
        codes, goal = self.level.codes, self.level.goals[self._reached]
        return {"place": np.int64(codes[self._place]), "goal": np.int64(codes[goal])}

    def _info(self) -> dict[str, Any]:
        return {"goals": self._reached}


class OneShotNavigationVectorEnv(LevelVectorEnv[OneShotNavigationLevel, OneShotNavigationRules]):
    """A batch of one-shot navigations.

    Each plays the task of `OneShotNavigationEnv`, where spaces, rewards and arguments are
    described; seeds, autoreset and saving are those of `LevelVectorEnv`.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/OneShotNavigation-v0", num_envs=64)
    ```

    `num_envs`, and those of `OneShotNavigationEnv`.
    """

    single = OneShotNavigationEnv
    _time: np.ndarray
    _reached: np.ndarray
    _place: np.ndarray

    def _beginning(self) -> dict[str, Any]:
        return {"time": 0, "reached": 0, "place": 0}

    def _begin(self, which: np.ndarray) -> None:
        super()._begin(which)
        self._place[which] = self._level.start[which]

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._time += 1
        self._place = self._level.moves[self._rows, self._place, actions]
        there = self._place == self._goals()
        self._reached += there
        late = self._time >= self.rules.max_steps
        return there.astype(np.float64), np.zeros_like(late), late

    def _goals(self) -> np.ndarray:
        return self._level.goals[self._rows, np.minimum(self._reached, self.rules.max_steps)]

    def _observe(self) -> dict[str, np.ndarray]:
        codes, rows = self._level.codes, self._rows
        return {"place": codes[rows, self._place], "goal": codes[rows, self._goals()]}

    def _info(self) -> dict[str, Any]:
        return {"goals": self._reached.copy()}
