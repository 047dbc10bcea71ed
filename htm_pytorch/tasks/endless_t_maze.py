"""Endless T-Maze, of all sixteen settings the one with most to remember and to put out of mind."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="htm_pytorch.envs:htm_pytorch/EndlessTMaze-v0").replace(
        env_args=("length=[1,10]", "num_corridors=10"),
        # With 64 at once and windows of 128 steps, one seed of two stayed at a third.
        num_envs=512,
        rollout="episodes",
        steps=200,
        epochs=4,
        dim=32,
        heads=2,
        window=8,
        mem_chunk_size=8,
        mem_chunks=32,
        entropy_weight=0.02,
        final_entropy=0.1,
        frames=16_000_000,
        average_over=1_000,
        stop_at=9.99,
        eval_episodes=500,
    )
)
