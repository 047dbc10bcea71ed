"""A run on disk: tensors in one safetensors file, written whole or not at all; never pickle."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.files import load_tensors, save_tensors

KIND = "htm-agent"


def save_checkpoint(
    path: str | os.PathLike[str],
    agent: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    *,
    config: str,
    progress: dict[str, Any],
) -> None:
    """Write all that the rest of the training depends on; `progress` must fit JSON."""
    tensors = {f"agent.{name}": tensor for name, tensor in agent.state_dict().items()}
    for number, parts in optimizer.state_dict()["state"].items():
        for name, tensor in parts.items():
            tensors[f"optimizer.{number}.{name}"] = tensor
    tensors["generator"] = generator.get_state()
    save_tensors(path, KIND, tensors, config=config, progress=json.dumps(progress))


class Checkpoint:
    """What `save_checkpoint` wrote, read and checked.

    Raises:
        FileNotFoundError: no such file.
        MemoryFileError: a ValueError; truncated, or not a checkpoint of this format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._tensors, metadata = load_tensors(path, KIND)
        try:
            self.config: str = metadata["config"]
            self.progress: dict[str, Any] = json.loads(metadata["progress"])
        except (KeyError, json.JSONDecodeError) as error:
            raise MemoryFileError(f"path: {str(path)!r} lacks its record ({error})") from error

    def restore_agent(self, agent: nn.Module) -> None:
        """Load the weights.

        Raises:
            MemoryFileError: they are another model's.
        """
        try:
            agent.load_state_dict(self._under("agent."))
        except RuntimeError as error:
            raise MemoryFileError(
                f"path: {str(self.path)!r} holds another model: {error}"
            ) from error

    def restore_training(
        self, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Load the optimizer's state and the generator of actions and batches."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._under("optimizer.").items():
            number, _, part = name.partition(".")
            state.setdefault(int(number), {})[part] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        generator.set_state(self._tensors["generator"])

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(prefix)
        }
