"""T-Maze: corridors up to 100 long, whose hint is then remembered for 100,000 steps."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="htm_pytorch.envs:htm_pytorch/TMaze-v0").replace(
        env_args=("length=[1,100]",),
        rollout="episodes",
        dim=32,
        heads=2,
        # A hint that is still in the open chunk must be in the window.
        window=16,
        mem_chunk_size=16,
        final_entropy=0.1,
        frames=1_000_000,
        stop_at=0.999,
        average_over=500,
        eval_episodes=500,
    )
)
