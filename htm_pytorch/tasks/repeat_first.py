"""POPGym's repetition of what was seen first, up to 830 steps ago; needs the extra `tasks`."""

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="popgym:popgym-RepeatFirstHard-v0").replace(
        # Nothing else in a card says that it was the first.
        see_time=True,
        num_envs=32,
        # All rows begin together: an eighth of the rollouts has what was first in it.
        steps=104,
        # What is done changes nothing but the reward of the step.
        discount=0.5,
        window=8,
        mem_chunk_size=8,
        mem_chunks=112,
        topk_mems=4,
        entropy_weight=0.02,
        final_entropy=0.1,
        frames=3_000_000,
        stop_at=0.975,
        # Episodes are 8 rollouts long.
        checkpoint_every=400,
        eval_episodes=500,
    )
)
