"""The Ballet as one environment, written to be read; `ballet_vector` is the same task in arrays."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
from gymnasium import spaces

from htm_pytorch.envs import ballet_tables as tables
from htm_pytorch.envs.ballet_tables import INSTRUCTIONS
from htm_pytorch.envs.levels import check_options

ObservationKind = Literal["image", "symbols"]

_MOVES = (*tables.DIRECTIONS.values(), (0, 0))
_ACTIONS = spaces.Discrete(len(_MOVES))
"""One more than agents choose from: to stay."""


class Level(NamedTuple):
    """Who dances where: one entry a dancer, in the order in which they perform.

    Dances, colours and shapes are indices into `DANCES`, `COLOURS` and `SHAPES`; `target` is the
    index of the dancer to find.
    """

    positions: tuple[tuple[int, int], ...]
    dances: tuple[int, ...]
    colours: tuple[int, ...]
    shapes: tuple[int, ...]
    target: int


class BalletEnv(gymnasium.Env[dict[str, Any], int | np.integer]):
    """Dancers perform in turn; afterwards the agent is told a dance and must go to its dancer.

    ## Description
    The agent stands in the middle of a walled room of 9 x 9 squares among 1 to 8 dancers. Each has
    its own square, shape, colour and dance. One after the other they perform a solo of 16 moves,
    each followed by a pause, while the agent can only watch. Then a word names one of the dances
    and the agent must walk to the dancer that performed it. The task is that of Lampinen et al.,
    "Towards mental time travel", 2021 (arXiv 2105.14039), step for step.

    ## Action space
    `Discrete(8)`: 0 N, 1 NE, 2 E, 3 SE, 4 S, 5 SW, 6 W, 7 NW. A move into the wall does nothing.
    `step` also takes 8 (`STAY`), which is not part of the space.

    With `choice = num_dancers * (15 + dance_delay)`, the name of the dance is first seen in the
    observation after `choice` steps. All actions before that are ignored; the one chosen on seeing
    the name is the first to move the agent, and the nearest dancer is 3 moves away.

    ## Observation space
    A `Dict` of two entries:

    - `"image"`: `uint8 [99, 99, 3]`, the 11 x 11 squares around the agent, 9 pixels each. Walls
      are grey, the agent is white, floor and outside are black.
      With `observation="symbols"` instead `"symbols"`: `int16 [11, 11]`, the same squares as 0
      for floor or outside, 1 wall, 2 agent, and `3 + shape * 19 + colour` for a dancer. A dancer
      hides an agent on its square. `TILES[symbols]` is the picture.
    - `"instruction"`: `Discrete(14)`, index into `INSTRUCTIONS`: "watch", then the dances.

    ## Rewards
    1 for touching the dancer that performed the named dance, 0 for everything else.

    ## Starting state
    The first dancer has made its first move. Levels are drawn from the environment's Generator:
    the target, then a shuffle each of squares, dances, colours and shapes. `reset(seed=seed)`
    begins the same levels as `numpy.random.default_rng(seed)` gives the original.
    `reset(options={"level": Level(...)})` plays a given level and draws nothing.

    ## Episode end
    - Terminated: the agent stands on a dancer's square, right or wrong.
    - Truncated: `max_steps` steps were made. A touch on the last step terminates and does not
      truncate.

    ## Information
    `info["instruction"]` is the instruction as text, and `info["action_counts"]` says whether the
    next action does anything: once the dance is named. The attribute `level` shows what is hidden.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/Ballet-v0", num_dancers=2, dance_delay=16)
    ```

    - `num_dancers`: 1 to 8.
    - `dance_delay`: steps between the last move of a dance and the first of the next. As in the
      original, 0 stops the show after the first dance: the choice never comes, and a warning
      says so.
    - `max_steps`: `None` stands for 320 if `dance_delay <= 16`, else 1024.
    - `observation`: `"image"` or `"symbols"`.
    - `render_mode`: `None` or `"rgb_array"`, the agent's picture.

    ## Version history
    - v0: First version.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self,
        num_dancers: int = 2,
        dance_delay: int = 16,
        max_steps: int | None = None,
        observation: ObservationKind = "image",
        render_mode: str | None = None,
    ) -> None:
        self.max_steps = check_arguments(
            num_dancers, dance_delay, max_steps, observation, render_mode
        )
        self.num_dancers = num_dancers
        self.dance_delay = dance_delay
        self.render_mode = render_mode
        self.period = solo_period(dance_delay, self.max_steps)
        self.choice_step = num_dancers * self.period
        self.observation_space = make_observation_space(observation)
        self.action_space = spaces.Discrete(len(tables.DIRECTIONS))
        self._observation_kind: ObservationKind = observation
        self._level: Level | None = None
        self._ended = True

    @property
    def level(self) -> Level:
        """The level being played."""
        if self._level is None:
            raise gymnasium.error.ResetNeeded("Call reset() first: there is no level yet.")
        return self._level

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode, drawn from the Generator or given as `options["level"]`."""
        given = check_options(options, "level").get("level")
        super().reset(seed=seed)
        self._level = self._draw_level() if given is None else check_level(given, self.num_dancers)
        self._frame = 0
        self._agent = tables.AGENT_START
        self._ended = False
        return self._observe(), self._info()

    def step(
        self, action: int | np.integer
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Let a dancer make its move or, once the dance is named, the agent."""
        if self._ended:
            raise gymnasium.error.ResetNeeded("The episode has ended: call reset() before step().")
        if not _ACTIONS.contains(action):
            raise ValueError(f"action must be 0 to {len(_MOVES) - 1}, got {action!r}")
        if self._frame >= self.choice_step:
            row, column = np.add(self._agent, _MOVES[int(action)])
            if 0 < row < tables.BOARD - 1 and 0 < column < tables.BOARD - 1:
                self._agent = (int(row), int(column))
        self._frame += 1
        positions = self.level.positions
        terminated = self._agent in positions
        reward = float(terminated and positions[self.level.target] == self._agent)
        truncated = self._frame >= self.max_steps and not terminated
        self._ended = terminated or truncated
        return self._observe(), reward, terminated, truncated, self._info()

    def render(self) -> np.ndarray | None:
        """Return the agent's picture if `render_mode` is `"rgb_array"`."""
        return None if self.render_mode is None else tables.draw(self._symbols())

    def _draw_level(self) -> Level:
        target = int(self.np_random.integers(self.num_dancers))
        drawn = []
        for size in map(len, (tables.DANCER_SQUARES, tables.DANCES, tables.COLOURS, tables.SHAPES)):
            order = list(range(size))
            self.np_random.shuffle(order)
            drawn.append(tuple(order[: self.num_dancers]))
        squares, dances, colours, shapes = drawn
        positions = tuple(tables.DANCER_SQUARES[square] for square in squares)
        return Level(positions, dances, colours, shapes, target)

    def _symbols(self) -> np.ndarray:
        symbols = tables.ROOMS[self._agent].copy()
        level = self.level
        for order, home in enumerate(level.positions):
            moves = min(max(self._frame - order * self.period + 1, 0), tables.DANCE_LENGTH)
            square = home + tables.DANCE_OFFSETS[level.dances[order], moves]
            row, column = square - self._agent + tables.BOARD // 2
            if 0 <= row < tables.BOARD and 0 <= column < tables.BOARD:
                look = level.shapes[order] * len(tables.COLOURS) + level.colours[order]
                symbols[row, column] = tables.FIRST_DANCER + look
        return symbols

    def _instruction(self) -> int:
        level = self.level
        return level.dances[level.target] + 1 if self._frame >= self.choice_step else 0

    def _observe(self) -> dict[str, Any]:
        view = self._symbols()
        if self._observation_kind == "image":
            view = tables.draw(view)
        return {self._observation_kind: view, "instruction": np.int64(self._instruction())}

    def _info(self) -> dict[str, Any]:
        instruction = self._instruction()
        return {"instruction": INSTRUCTIONS[instruction], "action_counts": instruction > 0}


def check_arguments(
    num_dancers: int,
    dance_delay: int,
    max_steps: int | None,
    observation: str,
    render_mode: str | None,
) -> int:
    """Refuse arguments outside their range; return `max_steps` with its default filled in."""
    if not _is_integer(num_dancers) or not 1 <= num_dancers <= len(tables.DANCER_SQUARES):
        raise ValueError(f"num_dancers must be an integer from 1 to 8, got {num_dancers!r}")
    if not _is_integer(dance_delay) or dance_delay < 0:
        raise ValueError(f"dance_delay must be an integer of at least 0, got {dance_delay!r}")
    if max_steps is None:
        max_steps = 320 if dance_delay <= 16 else 1024
    if not _is_integer(max_steps) or max_steps < 1:
        raise ValueError(f"max_steps must be None or an integer of at least 1, got {max_steps!r}")
    if observation not in get_args(ObservationKind):
        raise ValueError(f"observation must be 'image' or 'symbols', got {observation!r}")
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
    if dance_delay == 0:
        warnings.warn(
            "dance_delay=0 stops the show after the first dance: the choice never comes",
            stacklevel=3,
        )
    return int(max_steps)


def check_level(level: Level, num_dancers: int) -> Level:
    """Refuse a level that cannot be played with `num_dancers`; return it as plain integers."""
    if not isinstance(level, Level):
        raise ValueError(f"level must be a Level, got {level!r}")
    columns = (level.positions, level.dances, level.colours, level.shapes)
    if any(len(column) != num_dancers for column in columns):
        raise ValueError(f"level must describe num_dancers={num_dancers} dancers, got {level}")
    level = Level(
        positions=tuple((int(row), int(column)) for row, column in level.positions),
        dances=tuple(map(int, level.dances)),
        colours=tuple(map(int, level.colours)),
        shapes=tuple(map(int, level.shapes)),
        target=int(level.target),
    )
    if not set(level.positions) <= set(tables.DANCER_SQUARES):
        raise ValueError(f"level.positions must lie in DANCER_SQUARES, got {level.positions}")
    for name, size in _INDEX_SIZES.items():
        if not all(0 <= index < size for index in getattr(level, name)):
            raise ValueError(
                f"level.{name} must be indices from 0 to {size - 1}, got {getattr(level, name)}"
            )
    for name in ("positions", "dances"):
        if len(set(getattr(level, name))) < num_dancers:
            raise ValueError(f"level.{name} must be distinct, got {getattr(level, name)}")
    if not 0 <= level.target < num_dancers:
        raise ValueError(f"level.target must be from 0 to {num_dancers - 1}, got {level.target}")
    return level


def solo_period(dance_delay: int, max_steps: int) -> int:
    """Count the steps from the first move of one dance to the first of the next."""
    # The original's countdown to the next dance only runs from a positive number.
    return tables.DANCE_LENGTH - 1 + dance_delay if dance_delay else max_steps + 1


def make_observation_space(observation: ObservationKind) -> spaces.Dict:
    """Return the space of one environment's observations."""
    side = tables.BOARD
    views: Mapping[str, spaces.Box] = {
        "image": spaces.Box(0, 255, (side * tables.TILE, side * tables.TILE, 3), np.uint8),
        "symbols": spaces.Box(0, tables.NUM_SYMBOLS - 1, (side, side), np.int16),
    }
    return spaces.Dict(
        {observation: views[observation], "instruction": spaces.Discrete(len(INSTRUCTIONS))}
    )


_INDEX_SIZES = {
    "dances": len(tables.DANCES),
    "colours": len(tables.COLOURS),
    "shapes": len(tables.SHAPES),
}


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
