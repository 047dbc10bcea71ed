"""Ballet, the paper's main task: a demo that takes minutes, with encoders that know its squares."""

from typing import TYPE_CHECKING

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.tasks import Task

if TYPE_CHECKING:
    from htm_pytorch.report.scene import Scene
    from htm_pytorch.rl import Parts


def _parts() -> "Parts":
    from htm_pytorch.rl import Parts
    from htm_pytorch.tasks.ballet_parts import FrameDecoder, FrameEncoder

    return Parts(FrameEncoder, FrameDecoder)


def _scene() -> "Scene":
    from htm_pytorch.tasks.ballet_scene import SCENE

    return SCENE


TASK = Task(
    TrainConfig(env="htm_pytorch.envs:htm_pytorch/Ballet-v0").replace(
        env_args=("num_dancers=2", "dance_delay=2", "observation=symbols"),
        num_envs=256,
        # Shorter than a chunk, as little is open at a choice.
        window=8,
        mem_chunk_size=17,
        mem_chunks=4,
        rollout="episodes",
        steps=1024,
        decisions=3,
        # Dancers stand three squares away.
        action_repeat=3,
        discount=0.9,
        entropy_weight=0.1,
        frames=8_800_000,
        stop_at=0.93,
        average_over=2_000,
        eval_episodes=500,
    ),
    _parts,
    _scene,
)
