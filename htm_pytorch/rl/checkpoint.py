"""The checkpoint of a run: all that its training goes on from, in one file; never pickle."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.files import load_tensors, save_tensors
from htm_pytorch.rl.record import from_json

KIND = "htm-agent"
CHECKPOINT = "checkpoint.safetensors"


def write_checkpoint(
    path: Path,
    agent: nn.Module,
    optimizer: torch.optim.Optimizer,
    metrics: bytes,
    record: dict[str, str],
) -> None:
    """Write weights, the optimizer's state, rows of metrics and a record, whole or not at all.

    Args:
        path: the file.
        agent: whose weights are written.
        optimizer: whose state is.
        metrics: the rows so far.
        record: the config and the progress, as JSON, under these names.
    """
    tensors = {f"agent.{name}": tensor for name, tensor in agent.state_dict().items()}
    for number, parts in optimizer.state_dict()["state"].items():
        for name, tensor in parts.items():
            tensors[f"optimizer.{number}.{name}"] = tensor
    tensors["metrics"] = torch.frombuffer(bytearray(metrics or b"\n"), dtype=torch.uint8)
    names, checksum = json.dumps(sorted(tensors)), _checksum(tensors, record)
    save_tensors(path, KIND, tensors, names=names, checksum=checksum, **record)


class Checkpoint:
    """What `write_checkpoint` wrote, read and checked.

    Raises:
        FileNotFoundError: no such file.
        MemoryFileError: a ValueError; truncated, damaged, or not a checkpoint of this format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._tensors, record = load_tensors(path, KIND)
        wanted = {"config", "progress", "names", "checksum"}
        if missing := sorted(wanted - set(record)):
            raise MemoryFileError(f"path: {str(path)!r} lacks its record of {missing}")
        checksum = record.pop("checksum")
        try:
            missing = sorted(set(json.loads(record.pop("names"))) ^ set(self._tensors))
        except (json.JSONDecodeError, TypeError) as error:
            raise MemoryFileError(f"path: {str(path)!r} is damaged ({error})") from error
        if missing:
            raise MemoryFileError(f"path: {str(path)!r} is damaged: it differs in {missing[:4]}")
        if checksum != _checksum(self._tensors, record):
            raise MemoryFileError(
                f"path: {str(path)!r} is damaged: it is not what its checksum is of"
            )
        self.config = from_json(record["config"], run_dir=self.path.parent)
        self.progress: dict[str, Any] = json.loads(record["progress"])

    @property
    def metrics(self) -> bytes:
        """The rows of metrics.csv up to here."""
        return self._tensors["metrics"].numpy().tobytes().lstrip(b"\n")

    def take_what_fits(self, agent: nn.Module) -> int:
        """Load what fits by name and shape, a module's buffers all or none; count parameters.

        Raises:
            ValueError: next to nothing fits.
        """
        own, weights = agent.state_dict(), self._under("agent.")
        names = {name for name, _ in agent.named_parameters()}
        fits = {n: t for n, t in weights.items() if n in own and own[n].shape == t.shape}
        # A count without the sums that it is of would be wrong.
        whole = {name.rpartition(".")[0] for name in own.keys() - names - fits.keys()}
        fits = {n: t for n, t in fits.items() if n in names or n.rpartition(".")[0] not in whole}
        taken = sum(fits[name].numel() for name in names & fits.keys())
        # A few biases are alike in any two agents.
        if taken < 0.01 * (count := sum(own[name].numel() for name in names)):
            raise ValueError(
                f"init_from: expected a run whose agent is like this one, got "
                f"{str(self.path.parent)!r}: of {count:,} parameters only {taken:,} fit"
            )
        # What is missing stays, or becomes what layers know to be without it.
        agent.load_state_dict(fits, strict=False)
        return taken

    def restore_agent(self, agent: nn.Module) -> None:
        """Load the weights.

        Raises:
            MemoryFileError: they are another model's.
        """
        weights = self._under("agent.")
        try:
            agent.load_state_dict(weights)
        except RuntimeError as error:
            what = " ".join(str(error).split())
            what = what if len(what) <= 300 else f"{what[:300]} ..."
            raise MemoryFileError(
                f"path: {str(self.path)!r} holds another model; where it was trained with parts of "
                f"one's own, evaluate(run_dir, parts=...) takes them: {what}"
            ) from error

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimizer's state."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._under("optimizer.").items():
            number, _, part = name.partition(".")
            state.setdefault(int(number), {})[part] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(prefix)
        }


def checkpoint_of(run_dir: Path | str) -> Checkpoint:
    """Return the checkpoint of a run.

    Raises:
        ValueError: no run there, or a broken one.
    """
    path = Path(run_dir) / CHECKPOINT
    if not path.exists():
        raise ValueError(f"run_dir: expected a run with a {CHECKPOINT}, found none in {run_dir}")
    return Checkpoint(path)


def _checksum(tensors: dict[str, Tensor], record: dict[str, str]) -> str:
    found = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
