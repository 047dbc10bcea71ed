"""What the tasks of memory share: a batch of environments that play levels."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from htm_pytorch.envs.levels import L, LevelEnv, R, check_integer, check_options, row_of


def checked_actions(actions: np.ndarray, num_envs: int, last: int) -> np.ndarray:
    """Return actions [num_envs] as an array, if they are integers from 0 to `last`."""
    actions = np.asarray(actions)
    if actions.shape != (num_envs,) or actions.dtype.kind not in "iu":
        raise ValueError(
            f"actions must be {num_envs} integers, got shape {actions.shape} of {actions.dtype}"
        )
    if actions.min() < 0 or actions.max() > last:
        raise ValueError(f"actions must be 0 to {last}, got {actions}")
    return actions


def check_levels(levels: object, num_envs: int) -> None:
    """Refuse what is not one level for each environment."""
    if not isinstance(levels, Sequence) or len(levels) != num_envs:
        got = len(levels) if isinstance(levels, Sequence) else repr(levels)
        raise ValueError(f"levels must be {num_envs}, one an environment, got {got}")


def marked_rows(mask: object, num_envs: int, is_started: bool) -> np.ndarray:
    """Return the numbers of the environments that a `reset_mask` marks; all, where it is None."""
    if mask is None:
        return np.arange(num_envs)
    marked = np.asarray(mask)
    if marked.shape != (num_envs,) or marked.dtype != bool:
        raise ValueError(
            f"options['reset_mask'] must be bool of shape ({num_envs},), got {marked.dtype} of "
            f"{marked.shape}"
        )
    if not is_started and not marked.all():
        raise gymnasium.error.ResetNeeded("Call reset() of all rows first.")
    return np.flatnonzero(marked)


class LevelVectorEnv(VectorEnv[Any, np.ndarray, np.ndarray], Generic[L, R]):
    """A batch of environments that play levels, stepped by array operations.

    Spaces are batched over `num_envs`. From the same levels and actions a batch and single
    environments give the same results, and an environment alone draws the levels of a batch of one
    from the same seed.

    ## Levels and seeds
    One Generator draws the levels of all environments; the same seed and actions give the same
    results. `reset(options={"levels": [...]})` plays given levels, one an environment, and
    `levels()` returns those being played. With `options={"reset_mask": ...}`, bool [num_envs], only
    those begin anew that it marks.

    ## Autoreset
    `AutoresetMode.NEXT_STEP`: the step after an end ignores the action and returns the first
    observation of a new episode with reward 0, neither terminated nor truncated. `observe()`
    returns the present observation again.

    ## Saving
    `state_dict()` holds all that the future depends on; loaded into an environment of the same
    arguments it continues exactly.
    """

    metadata: dict[str, Any] = {
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    single: ClassVar[type[LevelEnv[Any, Any]]]
    """The environment that this is a batch of."""

    def __init__(self, num_envs: int = 1, **arguments: Any) -> None:
        check_integer("num_envs", num_envs, 1)
        self.rules: R = self.single(**arguments).rules
        self.num_envs = int(num_envs)
        self.single_observation_space = self.rules.observations()
        self.single_action_space = self.rules.actions()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._last_action = int(self.rules.actions().n) - 1
        self._rows = np.arange(self.num_envs)
        self._ended = np.zeros(self.num_envs, bool)
        self._start = self._beginning()
        for name, value in self._start.items():
            batch = np.empty((self.num_envs, *np.shape(value)), np.asarray(value).dtype)
            setattr(self, f"_{name}", batch)
        self._level = self.rules.draw(np.random.default_rng(0), self.num_envs)
        self._begin(self._rows)
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes anew, drawn from the Generator or given as `options["levels"]`.

        All of them, or those that `options["reset_mask"]`, bool [num_envs], marks.
        """
        given = check_options(options, "levels", "reset_mask")
        rows = marked_rows(given.get("reset_mask"), self.num_envs, self._started)
        levels = given.get("levels")
        if levels is not None:
            levels = self._checked_levels(levels)
        super().reset(seed=seed)
        if levels is None:
            self._play(rows, self.rules.draw(self.np_random, len(rows)))
        else:
            self._play(rows, self.rules.level(*(field[rows] for field in levels)))
        self._begin(rows)
        self._ended[rows] = False
        self._started = True
        return self.observe(), self._info()

    def step(
        self, actions: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment; those that had ended begin a new episode instead."""
        self._require_started()
        actions = checked_actions(actions, self.num_envs, self._last_action)
        reward, terminated, truncated = self._act(actions)
        if self._ended.any():
            fresh = np.flatnonzero(self._ended)
            self._play(fresh, self.rules.draw(self.np_random, len(fresh)))
            self._begin(fresh)
            reward[fresh] = 0
            terminated[fresh] = truncated[fresh] = False
        self._ended = terminated | truncated
        return self.observe(), reward, terminated, truncated, self._info()

    def observe(self) -> Any:
        """Return the present observation, in arrays of its own."""
        self._require_started()
        return self._observe()

    def levels(self) -> list[L]:
        """Return the level that each environment is playing."""
        self._require_started()
        return [row_of(self._level, index) for index in range(self.num_envs)]

    def state_dict(self) -> dict[str, Any]:
        """Copy everything the future depends on.

        Returns:
            Arrays by name, and under `"generator"` a dict that JSON can hold.
        """
        self._require_started()
        state: dict[str, Any] = {name: array.copy() for name, array in self._arrays().items()}
        state["arguments"] = np.concatenate([np.ravel(v) for v in self._arguments().values()])
        state["generator"] = self.np_random.bit_generator.state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()` of an environment of the same arguments.

        The observation is not part of the state; `observe()` returns it.
        """
        present = self._arrays()
        expected = {*present, "arguments", "generator"}
        if state.keys() != expected:
            raise ValueError(f"state must have the entries {sorted(expected)}, got {sorted(state)}")
        saved = np.asarray(state["arguments"])
        for name, ours in self._arguments().items():
            theirs, saved = np.split(saved, [np.size(ours)])
            if not np.array_equal(np.ravel(ours), theirs):
                raise ValueError(
                    f"state was saved with {name}={theirs.tolist()}, "
                    f"this has {name}={np.ravel(ours).tolist()}"
                )
        arrays = {}
        for name, array in present.items():
            arrays[name] = np.array(state[name], array.dtype, order="C")
            if arrays[name].shape != array.shape:
                raise ValueError(
                    f"state[{name!r}] must have shape {array.shape}, got {arrays[name].shape}"
                )
        self.np_random.bit_generator.state = state["generator"]
        self._level = self.rules.level(*(arrays.pop(f"level_{name}") for name in self._fields()))
        for name, array in arrays.items():
            setattr(self, f"_{name}", array)
        self._started = True

    @abstractmethod
    def _beginning(self) -> dict[str, Any]:
        """Return what changes during an episode, by name: what it is at the beginning.

        The attribute of that name with an underscore holds it for all environments.
        """

    @abstractmethod
    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Do the actions; return rewards, and which terminated and truncated their episode.

        What comes of environments that had ended before is thrown away.
        """

    @abstractmethod
    def _observe(self) -> Any:
        """Return the present observation, in arrays of its own."""

    def _info(self) -> dict[str, Any]:
        return {}

    def _begin(self, which: np.ndarray) -> None:
        for name, value in self._start.items():
            getattr(self, f"_{name}")[which] = value

    def _play(self, rows: np.ndarray, levels: L) -> None:
        for field, new in zip(self._level, levels, strict=True):
            field[rows] = new

    def _checked_levels(self, levels: Sequence[L]) -> L:
        check_levels(levels, self.num_envs)
        checked = [self.rules.check_level(level) for level in levels]
        fields = zip(self._level, zip(*checked, strict=True), strict=True)
        return self.rules.level(*(np.array(new, field.dtype) for field, new in fields))

    def _fields(self) -> list[str]:
        return list(self.rules.limits())

    def _arrays(self) -> dict[str, np.ndarray]:
        level = zip(self._fields(), self._level, strict=True)
        changing = {name: getattr(self, f"_{name}") for name in (*self._start, "ended")}
        return {**{f"level_{name}": field for name, field in level}, **changing}

    def _arguments(self) -> dict[str, Any]:
        return {"num_envs": self.num_envs, **vars(self.rules)}

    def _require_started(self) -> None:
        if not self._started:
            raise gymnasium.error.ResetNeeded("Call reset() first: there are no levels yet.")
