"""Environments, which importing this package registers with gymnasium under `htm_pytorch/`.

Tasks of memory: `Ballet-v0`, `TMaze-v0`, `EndlessTMaze-v0`. And `CartPolePositions-v0`.
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
from htm_pytorch.envs.endless_t_maze import (
    ENDLESS_SETTINGS,
    EndlessTMazeEnv,
    EndlessTMazeLevel,
    EndlessTMazeVectorEnv,
)
from htm_pytorch.envs.levels import LevelEnv
from htm_pytorch.envs.levels_vector import LevelVectorEnv
from htm_pytorch.envs.t_maze import TMazeEnv, TMazeLevel, TMazeVectorEnv

__all__ = [
    "COLOURS",
    "DANCER_SQUARES",
    "DANCES",
    "ENDLESS_SETTINGS",
    "INSTRUCTIONS",
    "SHAPES",
    "STAY",
    "TILES",
    "BalletEnv",
    "BalletVectorEnv",
    "CartPolePositionsEnv",
    "EndlessTMazeEnv",
    "EndlessTMazeLevel",
    "EndlessTMazeVectorEnv",
    "Level",
    "LevelEnv",
    "LevelVectorEnv",
    "TMazeEnv",
    "TMazeLevel",
    "TMazeVectorEnv",
]

_OF_LEVELS = {
    "EndlessTMaze": "endless_t_maze:EndlessTMaze",
    "TMaze": "t_maze:TMaze",
}

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
for _name, _classes in _OF_LEVELS.items():
    gymnasium.register(
        f"htm_pytorch/{_name}-v0",
        entry_point=f"htm_pytorch.envs.{_classes}Env",
        vector_entry_point=f"htm_pytorch.envs.{_classes}VectorEnv",
    )
