"""Ballet with 2, 4 and 8 dancers and delays of 16 and 48, all by one agent."""

import dataclasses
import json
from typing import TYPE_CHECKING

from htm_pytorch.tasks import ballet

if TYPE_CHECKING:
    from htm_pytorch.rl import Parts


def _parts() -> "Parts":
    from htm_pytorch.rl import Parts
    from htm_pytorch.tasks.ballet_parts import FrameDecoder, StageEncoder

    return Parts(StageEncoder, FrameDecoder)


TASK = dataclasses.replace(
    ballet.TASK,
    config=ballet.TASK.config.replace(
        env_args=("observation=symbols",),
        # Of two dancers the one who was not asked about can be recalled, to go to the other: a way
        # that leads nowhere with more, so 4 come first. Long delays cost frames, and come last.
        curriculum=tuple(
            json.dumps({"num_dancers": dancers, "dance_delay": delay})
            for delay, dancers in ((1, 4), (1, 2), (1, 8), (48, 2), (48, 4), (48, 8))
        ),
        rehearse=0.5,
        promote_at=(0.9,),
        # A dance and a delay of 1: one chunk each.
        mem_chunk_size=16,
        # For 8 dancers and delays of 48.
        mem_chunks=40,
        topk_mems=4,
        newest=4,
        steps=1024,
        final_learning_rate=0.1,
        final_entropy=0.1,
        frames=20_000_000,
        stop_at=0.98,
        average_over=1_000,
        checkpoint_every=20,
    ),
    parts=_parts,
)
