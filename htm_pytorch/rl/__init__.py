"""Training agents that remember, on any environment of Gymnasium."""

import importlib
from typing import TYPE_CHECKING, Any

from htm_pytorch.rl.config import TrainConfig

if TYPE_CHECKING:
    from htm_pytorch.rl.agent import Agent, Outputs, Parts, make_agent
    from htm_pytorch.rl.evaluation import Evaluation, evaluate
    from htm_pytorch.rl.observations import Steps
    from htm_pytorch.rl.training import train

__all__ = [
    "Agent",
    "Evaluation",
    "Outputs",
    "Parts",
    "Steps",
    "TrainConfig",
    "evaluate",
    "make_agent",
    "train",
]

_PART_OF = {
    **dict.fromkeys(("Agent", "Outputs", "Parts", "make_agent"), "agent"),
    **dict.fromkeys(("Evaluation", "evaluate"), "evaluation"),
    "Steps": "observations",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    # On first use: the config alone, and with it the help of `htm`, needs no torch.
    if name not in _PART_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PART_OF[name]}"), name)
    globals()[name] = found
    return found
