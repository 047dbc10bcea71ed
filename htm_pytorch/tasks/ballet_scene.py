"""How a report shows Ballet: its frames, its words, and whose dance is asked about."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from htm_pytorch.envs import ballet_tables as tables
from htm_pytorch.report.scene import Plot, Scene
from htm_pytorch.rl.environments import Environments


def _frames(observation: dict[str, Any]) -> Tensor | None:
    if "symbols" in observation:
        return torch.from_numpy(np.stack([tables.draw(frame) for frame in observation["symbols"]]))
    return torch.from_numpy(observation["image"].copy()) if "image" in observation else None


def _labels(observation: dict[str, Any]) -> list[str]:
    words = [tables.INSTRUCTIONS[int(word)] for word in observation["instruction"]]
    return [word if word == "watch" else f"who danced {word}?" for word in words]


def _plots(environments: Environments) -> list[Plot]:
    """Return who dances when in each row, and when its target does."""
    vector: Any = environments.vector.unwrapped
    if hasattr(vector, "levels"):
        one, levels = vector, vector.levels()
    else:
        one = vector.envs[0].unwrapped
        levels = [env.unwrapped.level for env in vector.envs]
    period, names = one.choice_step // one.num_dancers, tuple(tables.DANCES)
    # The first observation shows the first dancer after its first move.
    solos = [(n * period, n * period + tables.DANCE_LENGTH) for n in range(one.num_dancers)]
    return [
        Plot(
            solos[level.target],
            tuple(
                (solo, f"dancer {number + 1} does {names[dance]}")
                for number, (solo, dance) in enumerate(zip(solos, level.dances, strict=True))
            ),
        )
        for level in levels
    ]


SCENE = Scene(_frames, _labels, tuple(tables.DIRECTIONS), _plots)
