"""The rapid binding as a batch of environments stepped by array operations."""

from typing import Any

import numpy as np

from htm_pytorch.envs.levels_vector import LevelVectorEnv
from htm_pytorch.envs.rapid_binding import (
    NOTHING,
    OF_DISTRACTION,
    OF_EARLIER_ROUND,
    OF_THIS_ROUND,
    RapidBindingEnv,
    RapidBindingLevel,
    RapidBindingRules,
)


class RapidBindingVectorEnv(LevelVectorEnv[RapidBindingLevel, RapidBindingRules]):
    """A batch of rapid bindings.

    Each plays the task of `RapidBindingEnv`, where spaces, rewards and arguments are described;
    seeds, autoreset and saving are those of `LevelVectorEnv`.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/RapidBinding-v0", num_envs=64)
    ```

    `num_envs`, and those of `RapidBindingEnv`.
    """

    single = RapidBindingEnv
    _round: np.ndarray
    _phase: np.ndarray
    _step: np.ndarray
    """Of the phase."""

    def _beginning(self) -> dict[str, Any]:
        return {"round": 0, "phase": 0, "step": 0}

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        about, *_, word, shift = self._moments()
        right = (about != NOTHING) & ((actions + shift) % self.rules.num_words == word)
        test = self._phase > self._level.distractions[self._rows, self._now()]
        asks = np.where(test, (self._round > 0) * self.rules.num_words, self._distraction_asks())
        self._step += 1
        phase_over = self._step >= self.rules.num_words + asks
        round_over = phase_over & test
        self._step = np.where(phase_over, 0, self._step)
        self._phase = np.where(round_over, 0, self._phase + phase_over)
        self._round = self._round + round_over
        over = self._round >= self.rules.rounds
        return right.astype(np.float64), over, np.zeros_like(over)

    def _distraction_asks(self) -> np.ndarray:
        return (self._phase > 0) * self.rules.distraction_questions

    def _now(self) -> np.ndarray:
        """Return the round, after the last one the last."""
        return np.minimum(self._round, self.rules.rounds - 1)

    def _moments(self) -> tuple[np.ndarray, ...]:
        """Return what the step is about, and round, phase, word and place of the objects."""
        rows, level, now, words = self._rows, self._level, self._now(), self.rules.num_words
        test = self._phase > level.distractions[rows, now]
        later = self._step >= words
        slot = np.where(test, level.asked.shape[2] - 1, self._phase)
        about = np.where(test, OF_THIS_ROUND + later, OF_DISTRACTION * later)
        about = np.where(self._round < self.rules.rounds, about, NOTHING)
        step = rows, now, slot, self._step
        word = np.where(about == NOTHING, np.minimum(self._step, words - 1), level.asked[step])
        of_round = np.where(about == OF_EARLIER_ROUND, level.earlier[rows, now], now)
        return about, of_round, np.where(test, 0, self._phase), word, level.shifts[step]

    def _observe(self) -> dict[str, np.ndarray]:
        rows, level, words = self._rows, self._level, self.rules.num_words
        about, of_round, phase, word, shift = self._moments()
        asks, there = about != NOTHING, self._round < self.rules.rounds
        places = np.arange(words) + np.where(asks, shift, word)[:, None]
        shown = there[:, None] & (asks[:, None] | (np.arange(words) == 0))
        objects = level.objects[rows[:, None], of_round[:, None], phase[:, None], places % words]
        return {
            "asks": asks.astype(np.int64),
            "name": (level.names[rows, of_round, phase, word] * there[:, None]).astype(np.float32),
            "objects": (objects * shown[:, :, None]).astype(np.float32),
        }

    def _info(self) -> dict[str, Any]:
        about = self._moments()[0]
        return {"about": about, "round": self._round.copy(), "action_counts": about != NOTHING}
