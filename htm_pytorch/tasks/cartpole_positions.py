"""CartPole whose velocities are hidden."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="htm_pytorch.envs:htm_pytorch/CartPolePositions-v0").replace(
        num_envs=16,
        steps=128,
        epochs=4,
        frames=400_000,
        learning_rate=5e-4,
        normalize_rewards=True,
        stop_at=450.0,
    )
)
