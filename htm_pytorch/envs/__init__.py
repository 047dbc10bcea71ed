"""Environments, which importing this package registers with gymnasium.

They are `htm_pytorch/Ballet-v0` and `htm_pytorch/CartPolePositions-v0`.
"""

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
from htm_pytorch.envs.cartpole_positions import CartPolePositionsEnv

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
    "CartPolePositionsEnv",
    "Level",
]

gymnasium.register(
    "htm_pytorch/Ballet-v0",
    entry_point="htm_pytorch.envs.ballet:BalletEnv",
    vector_entry_point="htm_pytorch.envs.ballet_vector:BalletVectorEnv",
)
gymnasium.register(
    "htm_pytorch/CartPolePositions-v0",
    entry_point="htm_pytorch.envs.cartpole_positions:CartPolePositionsEnv",
    max_episode_steps=500,
)
