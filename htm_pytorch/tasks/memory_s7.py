"""MiniGrid's memory, 7 squares wide; needs the extra `tasks`."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="minigrid:MiniGrid-MemoryS7-v0").replace(
        observe=("image", "direction"),
        num_envs=32,
        epochs=4,
        frames=2_000_000,
        learning_rate=5e-4,
        stop_at=0.93,
    )
)
