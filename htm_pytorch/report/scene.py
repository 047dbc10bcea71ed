"""`Scene`: what a task knows that an agent's observations do not say by themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_pytorch.rl.environments import Environments
from htm_pytorch.rl.observations import Nested, leaves

Range = tuple[int, int]
"""The first of some steps, and the one after the last."""


class Plot(NamedTuple):
    """What is hidden of an episode, known when it begins."""

    asked: Range
    """The steps that the agent will be asked about."""
    acts: tuple[tuple[Range, str], ...] = ()
    """What happens in which steps, in a few words."""

    def label_of(self, step: int) -> str | None:
        """Return what happens in a step; None: nothing that is known."""
        return next((text for (first, end), text in self.acts if first <= step < end), None)


@dataclass(frozen=True)
class Scene:
    """How the episodes of a task are shown; what is left out follows from the observations."""

    frames: Callable[[Nested], Tensor | None] | None = None
    """From observations [T, ...] of one row to pictures [T, H, W, 3] uint8."""
    labels: Callable[[Nested], list[str]] | None = None
    """From observations [T, ...] of one row to a few words on each."""
    actions: Sequence[str] = ()
    """The names of the actions of a Discrete space."""
    plots: Callable[[Environments], list[Plot]] | None = None
    """From environments whose episodes have just begun to what is hidden of each row's."""

    def frames_of(self, observation: Nested) -> Tensor | None:
        """Return pictures of observations [T, ...]; None: there are none."""
        if self.frames is not None:
            return self.frames(observation)
        for leaf in map(np.asarray, leaves(observation)):
            if leaf.ndim == 4 and leaf.dtype == np.uint8 and min(leaf.shape[1:3]) >= 16:
                if leaf.shape[3] == 3:
                    return torch.from_numpy(leaf.copy())
                if leaf.shape[3] == 1:
                    return torch.from_numpy(leaf.copy()).expand(-1, -1, -1, 3).contiguous()
        return None

    def labels_of(self, observation: Nested) -> list[str]:
        """Return a few words on each of observations [T, ...]: of small ones, their numbers."""
        if self.labels is not None:
            return self.labels(observation)
        parts = [leaf.reshape(len(leaf), -1) for leaf in map(np.asarray, leaves(observation))]
        small = [part for part in parts if part.shape[1] <= _MOST_NUMBERS]
        if not small:
            return [""] * len(parts[0])
        return [
            ", ".join(f"{float(number):.3g}" for part in small for number in part[step])
            for step in range(len(small[0]))
        ]

    def action_of(self, action: Any) -> str:
        """Return the name of an action as the environment takes it."""
        array = np.asarray(action)
        if self.actions and array.ndim == 0 and 0 <= int(array) < len(self.actions):
            return self.actions[int(array)]
        return ", ".join(f"{float(number):.3g}" for number in array.ravel())


_MOST_NUMBERS = 8
