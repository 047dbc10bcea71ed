"""MiniGrid's room whose object says which way to turn later; needs the extra `tasks`."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="minigrid:MiniGrid-MemoryS7-v0").replace(
        # The mission is a text, and the same in all episodes.
        observe=("image", "direction"),
        num_envs=64,
        steps=64,
        epochs=4,
        frames=2_000_000,
        # It has to turn round and look before anything pays.
        entropy_weight=0.03,
        final_entropy=0.1,
        # What the object is, long before it matters.
        reconstruction_weight=0.3,
        # Where all episodes succeed, advantages are noise of one size as any other, and updates by
        # them have spoilt agents that were done.
        target_kl=0.02,
        average_over=2_000,
        # Nearly as good as can be: before, the most probable action may walk in circles.
        stop_at=0.96,
    )
)
