"""MarcoMeter's ProofofMemory in CleanRL's budget of 25,000 frames, with as many environments."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="htm_pytorch.envs:htm_pytorch/ProofofMemory-v0").replace(
        num_envs=16,
        steps=64,
        dim=32,
        heads=2,
        # The hint is gone from the window before the agent may move.
        window=2,
        mem_chunk_size=2,
        mem_chunks=8,
        epochs=4,
        learning_rate=3e-3,
        frames=25_000,
        eval_episodes=500,
    )
)
