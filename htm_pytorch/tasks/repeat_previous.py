"""POPGym's repetition of what was seen a few steps before; needs the extra `tasks`."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="popgym:popgym-RepeatPreviousEasy-v0").replace(
        num_envs=32,
        epochs=4,
        frames=2_000_000,
        learning_rate=5e-4,
        mem_chunk_size=4,
        mem_chunks=16,
        topk_mems=4,
        stop_at=0.95,
    )
)
