"""A colour that is seen first, and a door of it to be chosen long after."""

import json

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

TASK = Task(
    TrainConfig(env="htm_pytorch.envs:htm_pytorch/VisualMatch-v0").replace(
        # First to look for the door, with time enough; what comes in between grows later.
        curriculum=tuple(
            json.dumps({"explore": explore, "distraction": distraction, "choice": choice})
            for explore, distraction, choice in ((2, 0, 40), (8, 1, 40), (15, 15, 30), (15, 60, 30))
        ),
        promote_at=(0.95,),
        # Of 64 episodes at once too few find a second door for it to be learned.
        num_envs=512,
        rollout="episodes",
        steps=160,
        discount=0.95,
        window=16,
        mem_chunk_size=8,
        mem_chunks=16,
        reconstruction_weight=0.1,
        entropy_weight=0.03,
        final_entropy=0.3,
        frames=20_000_000,
        average_over=2_000,
        stop_at=0.999,
        eval_episodes=500,
    )
)
