"""Names of objects that nobody heard before, asked for after others were named."""

import json
from typing import TYPE_CHECKING

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

if TYPE_CHECKING:
    from htm_pytorch.rl import Parts


def _parts() -> "Parts":
    from htm_pytorch.rl import Parts
    from htm_pytorch.tasks.symbols_parts import BindingEncoder

    return Parts(BindingEncoder)


TASK = Task(
    TrainConfig(env="htm_pytorch.envs:htm_pytorch/RapidBinding-v0").replace(
        # With others in between from the beginning, 4,000,000 frames did not leave chance.
        curriculum=tuple(json.dumps({"distractions": [0, most]}) for most in range(3)),
        promote_at=(2.8,),
        # Few updates of many episodes: of 64 at once nothing is learned.
        num_envs=512,
        rollout="episodes",
        steps=80,
        # What is done changes nothing but the reward of the step.
        discount=0.0,
        # What is bound together comes in one step, so a chunk is a step.
        window=1,
        mem_chunk_size=1,
        mem_chunks=16,
        topk_mems=4,
        # Every question is answered at once; what was bound is all there is to store.
        reconstruction_weight=0.0,
        # With 2 one training of two stayed where one place of three can be told.
        epochs=4,
        entropy_weight=0.03,
        final_entropy=0.1,
        frames=10_000_000,
        average_over=2_000,
        stop_at=2.94,
        eval_episodes=500,
    ),
    _parts,
)
