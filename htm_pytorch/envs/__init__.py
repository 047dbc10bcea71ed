"""Environments, which importing this package registers with gymnasium under `htm_pytorch/`.

Tasks of memory, each alone and as a batch: `Ballet-v0`, `TMaze-v0`, `EndlessTMaze-v0`,
`ProofofMemory-v0`, `VisualMatch-v0`, `PairedAssociativeInference-v0`, `RapidBinding-v0` and
`OneShotNavigation-v0`. And `CartPolePositions-v0`.
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
from htm_pytorch.envs.one_shot_navigation import (
    OneShotNavigationEnv,
    OneShotNavigationLevel,
    OneShotNavigationVectorEnv,
)
from htm_pytorch.envs.paired_inference import (
    PairedAssociativeInferenceEnv,
    PairedAssociativeInferenceLevel,
    PairedAssociativeInferenceVectorEnv,
)
from htm_pytorch.envs.proof_of_memory import (
    ProofofMemoryEnv,
    ProofofMemoryLevel,
    ProofofMemoryVectorEnv,
)
from htm_pytorch.envs.rapid_binding import RapidBindingEnv, RapidBindingLevel
from htm_pytorch.envs.rapid_binding_vector import RapidBindingVectorEnv
from htm_pytorch.envs.t_maze import TMazeEnv, TMazeLevel, TMazeVectorEnv
from htm_pytorch.envs.visual_match import VisualMatchEnv, VisualMatchLevel, VisualMatchVectorEnv

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
    "OneShotNavigationEnv",
    "OneShotNavigationLevel",
    "OneShotNavigationVectorEnv",
    "PairedAssociativeInferenceEnv",
    "PairedAssociativeInferenceLevel",
    "PairedAssociativeInferenceVectorEnv",
    "ProofofMemoryEnv",
    "ProofofMemoryLevel",
    "ProofofMemoryVectorEnv",
    "RapidBindingEnv",
    "RapidBindingLevel",
    "RapidBindingVectorEnv",
    "TMazeEnv",
    "TMazeLevel",
    "TMazeVectorEnv",
    "VisualMatchEnv",
    "VisualMatchLevel",
    "VisualMatchVectorEnv",
]

_OF_LEVELS = (
    "EndlessTMaze",
    "OneShotNavigation",
    "PairedAssociativeInference",
    "ProofofMemory",
    "RapidBinding",
    "TMaze",
    "VisualMatch",
)

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
for _name in _OF_LEVELS:
    gymnasium.register(
        f"htm_pytorch/{_name}-v0",
        entry_point=f"htm_pytorch.envs:{_name}Env",
        vector_entry_point=f"htm_pytorch.envs:{_name}VectorEnv",
    )
