"""Training agents that remember, on any environment of Gymnasium."""

from typing import TYPE_CHECKING

from htm_pytorch.lazy import on_first_use
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

# The config alone, and with it the help of `htm`, needs no torch.
_MODULE_OF = {
    **dict.fromkeys(("Agent", "Outputs", "Parts", "make_agent"), "agent"),
    **dict.fromkeys(("Evaluation", "evaluate"), "evaluation"),
    "Steps": "observations",
    "train": "training",
}
__getattr__ = on_first_use(__name__, _MODULE_OF)
