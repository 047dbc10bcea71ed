"""The Ballet as a batch of environments stepped by array operations, the same task as `ballet`."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from htm_pytorch.envs import ballet_tables as tables
from htm_pytorch.envs.ballet import (
    Level,
    ObservationKind,
    check_arguments,
    check_level,
    make_observation_space,
    solo_period,
)
from htm_pytorch.envs.levels import check_options
from htm_pytorch.envs.levels_vector import check_levels, checked_actions, marked_rows

_SQUARES = tables.BOARD**2
_PICTURE_BYTES = _SQUARES * tables.TILE**2 * 3
_STRIP_BYTES = tables.TILE * 3
_STRIPS = _PICTURE_BYTES // _STRIP_BYTES
_OUT_OF_VIEW = 1 << 40
_START = tables.AGENT_START[0] * tables.BOARD + tables.AGENT_START[1]
_STATE = ("frame", "agent", "home", "dance", "colour", "shape", "target", "ended")


class BalletVectorEnv(VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]):
    """A batch of Ballet environments.

    Each plays the task of `BalletEnv`, where spaces, rewards and arguments are described; here they
    are batched over `num_envs`. From the same levels and actions both give the same results.

    ## Levels and seeds
    One Generator draws the levels of all environments, uniformly but in an order of its own, so a
    seed does not give the levels that it gives `BalletEnv`. The same seed and actions give the same
    results. `reset(options={"levels": [...]})` plays given levels, one `Level` an environment.

    ## Autoreset
    `AutoresetMode.NEXT_STEP`: the step after an end ignores the action and returns the first
    observation of a new episode with reward 0, neither terminated nor truncated. `observe()`
    returns the present observation again.

    ## Information
    `info["action_counts"]`, bool [num_envs], says where the next action does anything: once the
    dance is named. Texts would cost more than the step: look them up in `INSTRUCTIONS`.

    ## Saving
    `state_dict()` holds all that the future depends on; loaded into an environment of the same
    arguments it continues exactly.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/Ballet-v0", num_envs=64, num_dancers=2)
    ```

    `num_envs`, and those of `BalletEnv`.
    """

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        num_dancers: int = 2,
        dance_delay: int = 16,
        max_steps: int | None = None,
        observation: ObservationKind = "image",
        render_mode: str | None = None,
    ) -> None:
        if not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ValueError(f"num_envs must be an integer of at least 1, got {num_envs!r}")
        self.max_steps = check_arguments(
            num_dancers, dance_delay, max_steps, observation, render_mode
        )
        self.num_envs = int(num_envs)
        # Where Gymnasium's own batches have it, which others read.
        self.autoreset_mode = AutoresetMode.NEXT_STEP
        self.num_dancers = num_dancers
        self.dance_delay = dance_delay
        self.render_mode = render_mode
        self.single_observation_space = make_observation_space(observation)
        self.single_action_space = spaces.Discrete(len(tables.DIRECTIONS))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._observation_kind: ObservationKind = observation
        period = solo_period(dance_delay, self.max_steps)
        self.choice_step = num_dancers * period
        self._soloist, self._solo_moves = _schedule(num_dancers, period, self.max_steps)
        self._rows = np.arange(self.num_envs)
        self._soloist_rows = self._rows * num_dancers
        self._started = False
        self._frame = np.zeros(self.num_envs, np.int64)
        self._agent = np.full(self.num_envs, _START)
        self._ended = np.zeros(self.num_envs, bool)
        self._target = np.zeros(self.num_envs, np.int64)
        self._home, self._dance, self._colour, self._shape = np.zeros(
            (4, self.num_envs, num_dancers), np.int64
        )
        self._derive()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin episodes anew, drawn from the Generator or given as `options["levels"]`.

        All of them, or those that `options["reset_mask"]`, bool [num_envs], marks.
        """
        given = check_options(options, "levels", "reset_mask")
        rows = marked_rows(given.get("reset_mask"), self.num_envs, self._started)
        levels = given.get("levels")
        if levels is not None:
            check_levels(levels, self.num_envs)
            levels = [check_level(level, self.num_dancers) for level in levels]
        super().reset(seed=seed)
        if levels is None:
            self._draw_levels(rows)
        else:
            self._take_levels([levels[row] for row in rows], rows)
        self._frame[rows] = 0
        self._agent[rows] = _START
        self._ended[rows] = False
        self._started = True
        return self.observe(), self._info()

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment; those that had ended begin a new episode instead."""
        self._require_started()
        actions = checked_actions(actions, self.num_envs, tables.STAY)
        choosing = self._frame >= self.choice_step
        moves = np.where(choosing, actions, tables.STAY)
        self._agent = _next_square().take(self._agent * (tables.STAY + 1) + moves)
        self._frame += 1
        if self._ended.any():
            self._begin(np.flatnonzero(self._ended))
        touched = self._home == self._agent[:, None]
        terminated = touched.any(axis=1)
        reward = touched.ravel()[self._soloist_rows + self._target].astype(np.float64)
        truncated = (self._frame >= self.max_steps) & ~terminated
        self._ended = terminated | truncated
        return self.observe(), reward, terminated, truncated, self._info()

    def observe(self) -> dict[str, np.ndarray]:
        """Return the present observation, in arrays of its own."""
        self._require_started()
        instruction = np.where(self._frame >= self.choice_step, self._words, 0)
        view = self._pictures() if self._observation_kind == "image" else self._symbols()
        return {self._observation_kind: view, "instruction": instruction}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return the picture of each agent if `render_mode` is `"rgb_array"`."""
        return None if self.render_mode is None else tuple(map(tables.draw, self._symbols()))

    def levels(self) -> list[Level]:
        """Return the level that each environment is playing."""
        self._require_started()
        squares = np.stack(np.divmod(self._home, tables.BOARD), axis=-1).tolist()
        dances, targets = self._dance.tolist(), self._target.tolist()
        colours, shapes = self._colour.tolist(), self._shape.tolist()
        return [
            Level(
                positions=tuple((row, column) for row, column in squares[index]),
                dances=tuple(dances[index]),
                colours=tuple(colours[index]),
                shapes=tuple(shapes[index]),
                target=targets[index],
            )
            for index in range(self.num_envs)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Copy everything the future depends on.

        Returns:
            Arrays by name, and under `"generator"` a dict that JSON can hold.
        """
        self._require_started()
        state: dict[str, Any] = {name: getattr(self, f"_{name}").copy() for name in _STATE}
        state["arguments"] = self._arguments()
        state["generator"] = self.np_random.bit_generator.state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()` of an environment of the same arguments.

        The observation is not part of the state; `observe()` returns it. The kind of observation
        may differ.
        """
        expected = {*_STATE, "arguments", "generator"}
        if state.keys() != expected:
            raise ValueError(f"state must have the entries {sorted(expected)}, got {sorted(state)}")
        names = ("num_envs", "num_dancers", "dance_delay", "max_steps")
        for name, ours, saved in zip(names, self._arguments(), state["arguments"], strict=True):
            if ours != saved:
                raise ValueError(f"state was saved with {name}={saved}, this has {name}={ours}")
        arrays = {}
        for name in _STATE:
            present = getattr(self, f"_{name}")
            arrays[name] = np.array(state[name], present.dtype, order="C")
            if arrays[name].shape != present.shape:
                raise ValueError(
                    f"state[{name!r}] must have shape {present.shape}, got {arrays[name].shape}"
                )
        self.np_random.bit_generator.state = state["generator"]
        for name, array in arrays.items():
            setattr(self, f"_{name}", array)
        self._started = True
        self._derive()

    def _info(self) -> dict[str, Any]:
        return {"action_counts": self._frame >= self.choice_step}

    def _arguments(self) -> np.ndarray:
        return np.array([self.num_envs, self.num_dancers, self.dance_delay, self.max_steps])

    def _require_started(self) -> None:
        if not self._started:
            raise gymnasium.error.ResetNeeded("Call reset() first: there are no levels yet.")

    def _begin(self, which: np.ndarray) -> None:
        self._draw_levels(which)
        self._frame[which] = 0
        self._agent[which] = _START

    def _draw_levels(self, which: np.ndarray) -> None:
        count = len(which)
        self._target[which] = self.np_random.integers(self.num_dancers, size=count)
        squares = self._draw_distinct(count, len(tables.DANCER_SQUARES))
        self._home[which] = _dancer_squares()[squares]
        self._dance[which] = self._draw_distinct(count, len(tables.DANCES))
        self._colour[which] = self._draw_distinct(count, len(tables.COLOURS))
        self._shape[which] = self._draw_distinct(count, len(tables.SHAPES))
        self._derive(which)

    def _draw_distinct(self, count: int, size: int) -> np.ndarray:
        return self.np_random.random((count, size)).argsort(axis=1)[:, : self.num_dancers]

    def _take_levels(self, chosen: Sequence[Level], rows: np.ndarray) -> None:
        if not chosen:
            return
        self._home[rows] = np.array([level.positions for level in chosen]) @ (tables.BOARD, 1)
        self._dance[rows] = [level.dances for level in chosen]
        self._colour[rows] = [level.colours for level in chosen]
        self._shape[rows] = [level.shapes for level in chosen]
        self._target[rows] = [level.target for level in chosen]
        self._derive(rows)

    def _derive(self, which: np.ndarray | None = None) -> None:
        """Recompute what follows from the levels: the dancers' symbols and the words."""
        if which is None:
            which = self._rows
            self._looks = np.empty((self.num_envs, self.num_dancers), np.int16)
            self._words = np.empty(self.num_envs, np.int64)
        look = self._shape[which] * len(tables.COLOURS) + self._colour[which]
        self._looks[which] = tables.FIRST_DANCER + look
        self._words[which] = self._dance[which, self._target[which]] + 1

    def _dancers(self) -> np.ndarray:
        """Return where the dancers stand now, [num_envs, num_dancers]."""
        squares = self._home.copy()
        soloists = self._soloist_rows + self._soloist.take(self._frame)
        dances = self._dance.ravel().take(soloists)
        moves = self._solo_moves.take(self._frame)
        squares.ravel()[soloists] += _dance_steps().take(dances * (tables.DANCE_LENGTH + 1) + moves)
        return squares

    def _symbols(self) -> np.ndarray:
        # One square more than needed: dancers out of view are written there.
        size = self.num_envs * _SQUARES
        flat = np.empty(size + 1, np.int16)
        symbols = flat[:-1].reshape(self.num_envs, _SQUARES)
        np.take(_rooms(), self._agent, axis=0, out=symbols, mode="clip")
        where = _view_squares().take(self._agent[:, None] * _SQUARES + self._dancers())
        where += self._rows[:, None] * _SQUARES
        flat[np.minimum(where, size)] = self._looks
        return symbols.reshape(self.num_envs, tables.BOARD, tables.BOARD)

    def _pictures(self) -> np.ndarray:
        # As in _symbols, with a square more than needed; a tile is 9 strips, a line of it each.
        size = self.num_envs * _STRIPS
        tile = np.arange(tables.TILE)
        flat = np.empty(size + tables.TILE * tables.BOARD, f"V{_STRIP_BYTES}")
        pictures = flat[:size].view(np.uint8).reshape(self.num_envs, _PICTURE_BYTES)
        np.take(_room_pictures(), self._agent, axis=0, out=pictures, mode="clip")
        where = _view_strips().take(self._agent[:, None] * _SQUARES + self._dancers())
        where += self._rows[:, None] * _STRIPS
        np.minimum(where, size, out=where)
        strips = self._looks[..., None].astype(np.int64) * tables.TILE + tile
        flat[where[..., None] + tile * tables.BOARD] = _tile_strips().take(strips)
        side = tables.BOARD * tables.TILE
        return pictures.reshape(self.num_envs, side, side, 3)


def _schedule(num_dancers: int, period: int, max_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """List for each frame who dances (the last one after the end) and its moves so far."""
    frames = np.arange(max_steps + 1)
    soloist = np.minimum(frames // period, num_dancers - 1)
    moves = np.minimum(frames - soloist * period + 1, tables.DANCE_LENGTH)
    return soloist, moves


# Boards, squares and moves below are flat: square = row * BOARD + column.


@cache
def _next_square() -> np.ndarray:
    rows, columns = np.divmod(np.arange(_SQUARES), tables.BOARD)
    moves = np.array([*tables.DIRECTIONS.values(), (0, 0)])
    to_row, to_column = rows[:, None] + moves[:, 0], columns[:, None] + moves[:, 1]
    last = tables.BOARD - 1
    free = (to_row > 0) & (to_row < last) & (to_column > 0) & (to_column < last)
    return np.where(free, to_row * tables.BOARD + to_column, np.arange(_SQUARES)[:, None])


@cache
def _dancer_squares() -> np.ndarray:
    return np.array(tables.DANCER_SQUARES) @ (tables.BOARD, 1)


@cache
def _dance_steps() -> np.ndarray:
    return tables.DANCE_OFFSETS @ (tables.BOARD, 1)


@cache
def _rooms() -> np.ndarray:
    return tables.ROOMS.reshape(_SQUARES, _SQUARES)


@cache
def _room_pictures() -> np.ndarray:
    return np.stack([tables.draw(room).ravel() for rooms in tables.ROOMS for room in rooms])


@cache
def _view_squares() -> np.ndarray:
    """Find where in the view from a square another square is seen, [from, to]."""
    rows, columns = np.divmod(np.arange(_SQUARES), tables.BOARD)
    row = rows - rows[:, None] + tables.BOARD // 2
    column = columns - columns[:, None] + tables.BOARD // 2
    seen = (row >= 0) & (row < tables.BOARD) & (column >= 0) & (column < tables.BOARD)
    return np.where(seen, row * tables.BOARD + column, _OUT_OF_VIEW)


@cache
def _view_strips() -> np.ndarray:
    """Like `_view_squares`, as the number of the first strip of the square in the picture."""
    squares = _view_squares()
    row, column = np.divmod(squares, tables.BOARD)
    strip = row * tables.TILE * tables.BOARD + column
    return np.where(squares == _OUT_OF_VIEW, _OUT_OF_VIEW, strip)


@cache
def _tile_strips() -> np.ndarray:
    return tables.TILES.reshape(-1, _STRIP_BYTES).view(f"V{_STRIP_BYTES}").ravel()
