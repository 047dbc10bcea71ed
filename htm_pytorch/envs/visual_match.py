"""Passive visual match: a colour is seen, apples are collected, and the door of it is chosen."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from htm_pytorch.envs import visual_match_rooms as rooms
from htm_pytorch.envs.levels import LevelEnv, Limits, Rules, check_integer, check_number
from htm_pytorch.envs.levels_vector import LevelVectorEnv


class VisualMatchLevel(NamedTuple):
    """What is seen first, and what is where later."""

    colour: np.ndarray
    """The colour to remember, 0 to 2."""
    place: np.ndarray
    """On which of the 8 squares around the agent it is seen."""
    apples: np.ndarray
    """[22], 1 on those squares of the second room that have an apple."""
    doors: np.ndarray
    """[3], the colours of the doors from the left to the right."""


class VisualMatchRules(Rules[VisualMatchLevel]):
    """The visual match under its arguments."""

    level = VisualMatchLevel

    def __init__(
        self, distraction: int, explore: int, choice: int, apple_reward: float, door_reward: float
    ) -> None:
        self.distraction = check_integer("distraction", distraction, 0)
        self.explore = check_integer("explore", explore, 1)
        self.choice = check_integer("choice", choice, 1)
        self.apple_reward = check_number("apple_reward", apple_reward, 0)
        self.door_reward = check_number("door_reward", door_reward, 0)

    def phase(self, time: Any) -> Any:
        """Return 0, 1 or 2: the room in which the agent is after `time` steps."""
        return (time >= self.explore) + 1 * (time >= self.explore + self.distraction)

    @property
    def max_steps(self) -> int:
        """The steps of the three phases."""
        return self.explore + self.distraction + self.choice

    def observations(self) -> spaces.Box:
        """Return the 5 x 5 squares around the agent."""
        last = rooms.FIRST_COLOUR + rooms.NUM_COLOURS - 1
        return spaces.Box(0, last, (rooms.SIDE, rooms.SIDE), np.uint8)

    def actions(self) -> spaces.Discrete:
        """Return the four directions."""
        return spaces.Discrete(4)

    def limits(self) -> dict[str, Limits]:
        """Return the range of colours, places and apples."""
        return {
            "colour": Limits((), 0, rooms.NUM_COLOURS - 1),
            "place": Limits((), 0, len(rooms.PLACES) - 1),
            "apples": Limits((len(rooms.SPOTS),), 0, 1),
            "doors": Limits((rooms.NUM_COLOURS,), 0, rooms.NUM_COLOURS - 1, distinct=True),
        }

    def draw(self, generator: np.random.Generator, count: int) -> VisualMatchLevel:
        """Draw colour and place uniformly, 10 apples, and the order of the doors."""
        colour = generator.integers(rooms.NUM_COLOURS, size=count)
        place = generator.integers(len(rooms.PLACES), size=count)
        ranks = generator.random((count, len(rooms.SPOTS))).argsort(axis=1)
        doors = generator.random((count, rooms.NUM_COLOURS)).argsort(axis=1)
        return VisualMatchLevel(colour, place, (ranks < rooms.NUM_APPLES).astype(np.int64), doors)


class VisualMatchEnv(LevelEnv[VisualMatchLevel, VisualMatchRules]):
    """See a colour, collect apples for long, and go through the door of that colour.

    ## Description
    The task of Hung et al., 2018 (arXiv 1810.06721), in two dimensions as in Ni et al., 2023 (arXiv
    2307.03864), with its rooms of 7 x 11 squares. In the first room the agent is walled in beside
    a coloured square. In the second apples can be collected; 21 steps later they are there
    again. In the third are three doors, of all three colours. (Hung et al. show four, and pay 10
    for the right one and 1 for another.)

    ## Action space
    `Discrete(4)`: 0 N, 1 S, 2 W, 3 E. A move into a wall does nothing, and in the first room none
    does anything.

    ## Observation space
    `Box`, uint8 [5, 5]: the squares around the agent. 0 floor or outside, 1 wall, 2 the agent,
    which is always in the middle, 3 apple, 4 to 6 the colours.

    ## Rewards
    `apple_reward` for an apple, `door_reward` for the door of the colour that was seen, 0 for
    everything else.

    ## Starting state
    In the first room. Colour, place, the 10 squares of 22 with an apple, and the order of the doors
    are drawn uniformly. `reset(options={"level": VisualMatchLevel(...)})` plays a given level.

    ## Episode end
    - Terminated: the agent is in a door, right or wrong.
    - Truncated: `choice` steps were made in the third room.

    ## Information
    `info["phase"]` is 0, 1 or 2, the room. `info["success"]` says whether the right door was
    taken. `info["action_counts"]` says whether the next action does anything: not in the first
    room. The attribute `level` shows what is hidden.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/VisualMatch-v0", distraction=250)
    ```

    - `distraction`: steps in the second room; 250 and 500 are published.
    - `explore`, `choice`: steps in the first room, and at most in the third.
    - `apple_reward`, `door_reward`: Ni et al. pay 1 and 5. Without a reward for apples, the
      default, the return is the success.

    ## Version history
    - v0: First version.
    """

    def __init__(
        self,
        distraction: int = 250,
        explore: int = 15,
        choice: int = 15,
        apple_reward: float = 0.0,
        door_reward: float = 1.0,
    ) -> None:
        rules = VisualMatchRules(distraction, explore, choice, apple_reward, door_reward)
        super().__init__(rules)

    def _begin(self) -> None:
        self._time = 0
        self._square = tuple(rooms.STARTS[0].tolist())
        self._eaten: dict[tuple[int, ...], int] = {}
        self._success = False

    def _act(self, action: int) -> tuple[float, bool, bool]:
        phase = self.rules.phase(self._time)
        square = tuple(np.add(self._square, rooms.MOVES[action]).tolist())
        if phase > 0 and not rooms.WALLS[phase][square]:
            self._square = square
        self._time += 1
        objects = self._objects(phase)
        reward = 0.0
        if objects.get(self._square) == rooms.APPLE:
            self._eaten[self._square] = self._time
            reward = self.rules.apple_reward
        elif phase == 2 and self._square in objects:
            self._success = objects[self._square] == rooms.FIRST_COLOUR + self.level.colour
            return float(self.rules.door_reward * self._success), True, False
        if self.rules.phase(self._time) != phase:
            self._square = tuple(rooms.STARTS[self.rules.phase(self._time)].tolist())
        return reward, False, self._time >= self.rules.max_steps

    def _objects(self, phase: int) -> dict[tuple[int, ...], int]:
        """Return what there is beside walls, by its square."""
        level = self.level
        if phase == 0:
            return {
                tuple(rooms.PLACES[level.place].tolist()): rooms.FIRST_COLOUR + int(level.colour)
            }
        if phase == 2:
            doors = map(tuple, rooms.DOORS.tolist())
            return dict(zip(doors, (rooms.FIRST_COLOUR + level.doors).tolist(), strict=True))
        spots = map(tuple, rooms.SPOTS[level.apples == 1].tolist())
        gone = {spot for spot, time in self._eaten.items() if self._time - time <= rooms.RESPAWN}
        return {spot: rooms.APPLE for spot in spots if spot not in gone}

    def _observe(self) -> np.ndarray:
        phase = self.rules.phase(self._time)
        room = rooms.WALLS[phase].astype(np.uint8)
        for square, what in self._objects(phase).items():
            room[square] = what
        room[self._square] = rooms.AGENT
        row, column = self._square
        return np.pad(room, rooms.SEES)[row : row + rooms.SIDE, column : column + rooms.SIDE]

    def _info(self) -> dict[str, Any]:
        phase = int(self.rules.phase(self._time))
        return {"phase": phase, "success": bool(self._success), "action_counts": phase > 0}


class VisualMatchVectorEnv(LevelVectorEnv[VisualMatchLevel, VisualMatchRules]):
    """A batch of visual matches.

    Each plays the task of `VisualMatchEnv`, where spaces, rewards and arguments are described;
    seeds, autoreset and saving are those of `LevelVectorEnv`.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/VisualMatch-v0", num_envs=64)
    ```

    `num_envs`, and those of `VisualMatchEnv`.
    """

    single = VisualMatchEnv
    _time: np.ndarray
    _square: np.ndarray
    _eaten: np.ndarray
    _success: np.ndarray

    def _beginning(self) -> dict[str, Any]:
        long_ago = np.full(len(rooms.SPOTS), -rooms.RESPAWN - 1)
        return {"time": 0, "square": rooms.FLAT_STARTS[0], "eaten": long_ago, "success": False}

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rules, level = self.rules, self._level
        phase = rules.phase(self._time)
        to = self._square + rooms.FLAT_MOVES[actions]
        self._square = np.where((phase > 0) & ~rooms.FLAT_WALLS[phase, to], to, self._square)
        self._time += 1
        eats = self._apples() & (self._square[:, None] == rooms.FLAT_SPOTS) & (phase == 1)[:, None]
        self._eaten[eats] = np.broadcast_to(self._time[:, None], eats.shape)[eats]
        at_door = (self._square[:, None] == rooms.FLAT_DOORS) & (phase == 2)[:, None]
        terminated = at_door.any(axis=1)
        self._success = (at_door & (level.doors == level.colour[:, None])).any(axis=1)
        reward = np.where(eats.any(axis=1), rules.apple_reward, rules.door_reward * self._success)
        now = rules.phase(self._time)
        self._square = np.where(now != phase, rooms.FLAT_STARTS[now], self._square)
        return reward, terminated, (self._time >= rules.max_steps) & ~terminated

    def _apples(self) -> np.ndarray:
        there = self._time[:, None] - self._eaten > rooms.RESPAWN
        return there & (self._level.apples == 1)

    def _observe(self) -> np.ndarray:
        phase = self.rules.phase(self._time)
        board: np.ndarray = rooms.FLAT_WALLS[phase].astype(np.uint8)
        rows = np.flatnonzero(phase == 0)
        places = rooms.FLAT_PLACES[self._level.place[rows]]
        board[rows, places] = rooms.FIRST_COLOUR + self._level.colour[rows]
        rows, spots = np.nonzero(self._apples() & (phase == 1)[:, None])
        board[rows, rooms.FLAT_SPOTS[spots]] = rooms.APPLE
        rows = np.flatnonzero(phase == 2)
        board[rows[:, None], rooms.FLAT_DOORS] = rooms.FIRST_COLOUR + self._level.doors[rows]
        board[self._rows, self._square] = rooms.AGENT
        view = self._square[:, None] + rooms.FLAT_VIEW
        return board[self._rows[:, None], view].reshape(-1, rooms.SIDE, rooms.SIDE)

    def _info(self) -> dict[str, Any]:
        phase = self.rules.phase(self._time)
        return {"phase": phase, "success": self._success.copy(), "action_counts": phase > 0}
