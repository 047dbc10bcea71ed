"""Tasks with a name of their own: a preset of the training and, where it helps, own encoders."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from htm_pytorch.rl.config import TrainConfig

if TYPE_CHECKING:
    from htm_pytorch.report.scene import Scene
    from htm_pytorch.rl import Parts

TASKS = (
    "autoencode",
    "ballet",
    "ballet-levels",
    "cartpole-positions",
    "endless-t-maze",
    "memory-s7",
    "proof-of-memory",
    "rapid-binding",
    "repeat-first",
    "repeat-previous",
    "t-maze",
    "visual-match",
)
"""Each is a file here, which has a `TASK`."""


@dataclass(frozen=True)
class Task:
    """What `htm train NAME` stands for."""

    config: TrainConfig
    """The preset."""
    parts: "Callable[[], Parts] | None" = None
    """Of the agent's own parts; None: what fits the spaces."""
    scene: "Callable[[], Scene] | None" = None
    """Of how reports show its episodes; None: as the observations say, and a training ends without
    a picture."""


def find(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {TASKS}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TASK


def parts_of(name: str) -> "Parts | None":
    """Return the own parts of a task's agent; None: it has none, or the name is of no task, ""."""
    make = find(name).parts if name else None
    return None if make is None else make()
