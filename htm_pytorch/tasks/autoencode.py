"""POPGym's cards that are to be said backwards, 52 of them; needs the extra `tasks`."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="popgym:popgym-AutoencodeEasy-v0").replace(
        # Which card is asked for depends on nothing but the number of the step.
        see_time=True,
        num_envs=64,
        rollout="episodes",
        steps=400,
        # What is done changes nothing but the reward of the step.
        discount=0.0,
        window=32,
        mem_chunk_size=4,
        mem_chunks=96,
        # Of 8 picks the same ones were the best for all steps, and the others never tried.
        topk_mems=16,
        epochs=4,
        minibatches=8,
        final_learning_rate=0.1,
        # With .01 it decides for some suit wherever it does not know, and then learns no more.
        entropy_weight=0.08,
        final_entropy=0.1,
        frames=1_500_000,
        stop_at=0.95,
        eval_episodes=500,
    )
)
