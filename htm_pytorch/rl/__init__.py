"""The agent of the paper: training on Ballet and judging what it learned."""

from htm_pytorch.rl.agent import Agent, Observations, Outputs
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.evaluate import Evaluation, evaluate
from htm_pytorch.rl.train import train

__all__ = ["Agent", "Evaluation", "Observations", "Outputs", "TrainConfig", "evaluate", "train"]
