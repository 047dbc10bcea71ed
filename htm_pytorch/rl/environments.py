"""Any Gymnasium environment, as B rows in lockstep whose episodes are whole, one after another.

Every observation of an episode, the final one included, is one step of its row. Of the three ways
in which vector environments begin the next episode, NEXT_STEP gives that by itself. In the others
the first observations of the rows that ended come as a step of their own, at which the other rows
do not exist.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from htm_pytorch.rl.observations import Nested
from htm_pytorch.rl.received import action_counts, began, copied, final_rows, stepped
from htm_pytorch.rl.space import ACTION_BOUND, units_of

PERIODS = 4.0 * 2 ** np.arange(12)
"""Of the clock, in steps: neighbours differ, and no two of 8,192 steps are alike."""


class Seen(NamedTuple):
    """What the rows show at one step, and what the step to it brought."""

    observation: Nested
    """[B, ...] each."""
    is_first: np.ndarray
    """[B] bool, the first observation of an episode."""
    exists: np.ndarray | None
    """[B] bool, False where a row waits for others; None: everywhere True."""
    acts: np.ndarray
    """[B] bool, where an action counts; never at a final observation."""
    reward: np.ndarray
    """[B] float64."""
    terminated: np.ndarray
    """[B] bool."""
    truncated: np.ndarray
    """[B] bool."""

    @property
    def ended(self) -> np.ndarray:
        """[B] bool, the final observation of an episode."""
        return self.terminated | self.truncated


class Environments:
    """B environments in lockstep.

    Where an action counts, `info["action_counts"]` of the environment says, [B] bool or one bool
    an environment; without it, everywhere.

    Args:
        vector: the environments, in one of Gymnasium's three autoreset modes.
        observe: parts of a Dict observation to keep; default all.
        see_previous: observations are a Dict of `observation`, `previous_action`, one-hot where it
            is a choice, else in units of the policy, and zeros at the first step, and
            `previous_reward`.
        see_time: observations are a Dict of `observation` and `time`, sines and cosines [2 K] of
            the step in its episode, whose periods are 4 steps and twice as long each.

    Raises:
        ValueError: another autoreset mode, or a part that is not there.
    """

    def __init__(
        self,
        vector: VectorEnv,
        observe: tuple[str, ...] = (),
        see_previous: bool = False,
        see_time: bool = False,
    ):
        mode = vector.metadata.get("autoreset_mode")
        try:
            mode = AutoresetMode(mode)
        except ValueError:
            raise ValueError(
                f"env: expected one of the autoreset modes {[m.name for m in AutoresetMode]} in "
                f"the metadata of the vector environment, got {mode!r}"
            ) from None
        self.vector = vector
        self.mode: AutoresetMode = mode
        self.num_envs: int = vector.num_envs
        self.name: str = getattr(vector.spec, "id", type(vector.unwrapped).__name__)
        self.action_space: spaces.Space[Any] = vector.single_action_space
        self._observe, self._sees_previous, self._sees_time = observe, see_previous, see_time
        if isinstance(self.action_space, spaces.Box):
            units = units_of(self.action_space, ACTION_BOUND)
            self._middle, self._scale = (part.ravel() for part in units)
        self._time = np.zeros(self.num_envs, np.int64)
        self.observation_space = self._space(vector.single_observation_space)
        self._none = np.zeros(self.num_envs, bool)
        self._last: Seen | None = None
        self._following: Seen | None = None
        self._actions: Any = None

    def reset(self, seeds: list[int]) -> Seen:
        """Begin new episodes in all rows, from a seed a row."""
        rows = _rows_of(self.vector)
        observed, info = began(self.vector, self.name, seed=seeds if rows else seeds[0])
        self._actions, self._following = None, None
        nothing = np.zeros(self.num_envs)
        every = ~self._none
        return self._seen(observed, every, None, info, nothing, self._none, self._none)

    def step(self, actions: Any) -> Seen:
        """Do the actions [B, ...] of the rows that exist, and return what is seen next."""
        last, following = self._last, self._following
        if last is None:
            raise gymnasium.error.ResetNeeded("Call reset() first: there are no episodes yet.")
        if last.exists is None or self._actions is None:
            self._actions = actions
        else:
            rows = last.exists.reshape(-1, *(1,) * (np.ndim(actions) - 1))
            self._actions = np.where(rows, actions, self._actions)
        if following is not None:
            self._following, self._last = None, following
            return following
        observed, outcome, info = stepped(self.vector, self.name, self._actions)
        firsts, ended, first = self._none, outcome.terminated | outcome.truncated, None
        if self.mode == AutoresetMode.NEXT_STEP:
            firsts = last.ended
        elif ended.any():
            observed, *first = self._apart(observed, ended, info)
        seen = self._seen(observed, firsts, None, info, *outcome)
        if first is not None:
            nothing = np.zeros(self.num_envs)
            self._following = self._seen(
                first[0], ended, ended, first[1], nothing, self._none, self._none
            )
            self._last = seen
        return seen

    def close(self) -> None:
        """Give back what the environments hold."""
        self.vector.close()

    def _apart(
        self, observed: Nested, ended: np.ndarray, info: dict[str, Any]
    ) -> tuple[Nested, Nested, dict[str, Any]]:
        """Return the final and the first observations of the rows that ended, and their info."""
        final = copied(observed)
        if self.mode == AutoresetMode.DISABLED:
            first, info = began(self.vector, self.name, options={"reset_mask": ended.copy()})
            return final, first, info
        if "final_obs" not in info:
            raise ValueError(
                "env: expected info['final_obs'] of an environment that resets in the step of the "
                f"end, got {sorted(info)}"
            )
        final = final_rows(self.name, info["final_obs"], final, ended)
        return final, observed, info

    def _seen(
        self,
        observed: Nested,
        is_first: np.ndarray,
        exists: np.ndarray | None,
        info: dict[str, Any],
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> Seen:
        if self._observe:
            observed = {name: observed[name] for name in self._observe}
        there = ~self._none if exists is None else exists
        self._time = np.where(is_first, 0, self._time + there)
        more: dict[str, np.ndarray] = {}
        if self._sees_previous:
            more["previous_action"] = self._previous_action(is_first)
            more["previous_reward"] = np.where(is_first, 0, reward).astype(np.float32)[:, None]
        if self._sees_time:
            angles = 2 * np.pi * self._time[:, None] / PERIODS
            more["time"] = np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
        if more:
            observed = {"observation": observed, **more}
        acts = action_counts(self.name, info, self.num_envs) & ~(terminated | truncated)
        acts = acts if exists is None else acts & exists
        seen = Seen(observed, is_first, exists, acts, reward, terminated, truncated)
        self._last = seen
        return seen

    def _space(self, space: spaces.Space[Any]) -> spaces.Space[Any]:
        if self._observe:
            parts = dict(space) if isinstance(space, spaces.Dict) else {}
            missing = [name for name in self._observe if name not in parts]
            if missing:
                raise ValueError(f"observe: expected some of {sorted(parts)}, got {missing}")
            space = spaces.Dict({name: parts[name] for name in self._observe})
        more: dict[str, spaces.Space[Any]] = {}
        if self._sees_previous:
            size = spaces.flatdim(self.action_space)
            more["previous_action"] = spaces.Box(-np.inf, np.inf, (size,), np.float32)
            more["previous_reward"] = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        if self._sees_time:
            more["time"] = spaces.Box(-1, 1, (2 * len(PERIODS),), np.float32)
        return spaces.Dict({"observation": space, **more}) if more else space

    def _previous_action(self, is_first: np.ndarray) -> np.ndarray:
        """Return the actions [B, N] that led here, choices one-hot."""
        size = spaces.flatdim(self.action_space)
        if self._actions is None:
            return np.zeros((self.num_envs, size), np.float32)
        flat = np.asarray(self._actions).reshape(self.num_envs, -1)
        space = self.action_space
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            nvec = np.atleast_1d(space.n if isinstance(space, spaces.Discrete) else space.nvec)
            offsets = np.concatenate([[0], np.cumsum(nvec.ravel())[:-1]])
            made = np.zeros((self.num_envs, size), np.float32)
            np.put_along_axis(made, flat - np.ravel(space.start) + offsets, 1, axis=1)
            flat = made
        elif isinstance(space, spaces.Box):
            flat = (flat - self._middle) / self._scale
        return np.where(is_first[:, None], 0, flat).astype(np.float32)


def _rows_of(vector: VectorEnv) -> bool:
    """Say whether it is made of single environments, each with a generator of its own."""
    made_of_single = gymnasium.vector.SyncVectorEnv | gymnasium.vector.AsyncVectorEnv
    return isinstance(vector.unwrapped, made_of_single)


Make = Callable[[int], Environments]
