"""Environments. Importing this package registers `htm_pytorch/Ballet-v0` with gymnasium."""

import gymnasium

from htm_pytorch.envs.ballet import BalletEnv, Level
from htm_pytorch.envs.ballet_tables import (
    COLOURS,
    DANCER_SQUARES,
    DANCES,
    INSTRUCTIONS,
    SHAPES,
    STAY,
    TILES,
)
from htm_pytorch.envs.ballet_vector import BalletVectorEnv

__all__ = [
    "COLOURS",
    "DANCER_SQUARES",
    "DANCES",
    "INSTRUCTIONS",
    "SHAPES",
    "STAY",
    "TILES",
    "BalletEnv",
    "BalletVectorEnv",
    "Level",
]

gymnasium.register(
    "htm_pytorch/Ballet-v0",
    entry_point="htm_pytorch.envs.ballet:BalletEnv",
    vector_entry_point="htm_pytorch.envs.ballet_vector:BalletVectorEnv",
)
