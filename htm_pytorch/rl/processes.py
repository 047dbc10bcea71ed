"""Several processes that learn as one: each has some of the environments and their memories.

Only sums travel: of gradients, and of numbers that means are over.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RESTARTS = 3
"""How often a group whose process was killed goes on from its checkpoint by itself."""


class World:
    """The processes of a training; of one, nothing is sent anywhere."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, device: str = "cpu") -> "World":
        """Join the group that a launcher has made, or be alone."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @staticmethod
    def is_first() -> bool:
        """Say whether this process is the one that speaks and writes."""
        return os.environ.get("RANK", "0") == "0"

    def rows(self, total: int) -> range:
        """Return which of all environments are here."""
        if total % self.size:
            raise ValueError(
                f"num_envs: expected a multiple of the {self.size} processes, got {total}"
            )
        here = total // self.size
        return range(self.rank * here, (self.rank + 1) * here)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace all gradients by their sums over all processes, in one message."""
        if self.size == 1:
            return
        owners = list(parameters)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in owners]
        flat = self.sum(torch.cat([part.flatten() for part in parts]))
        for owner, part in zip(owners, flat.split([p.numel() for p in owners]), strict=True):
            owner.grad = part.view_as(owner)

    def gather(self, found: list[Any]) -> list[Any]:
        """Return what all processes found, in order of rank."""
        if self.size == 1:
            return found
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, found)
        return [one for part in everything for one in part]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


def restarted() -> bool:
    """Say whether the launcher has made the group again after one of it was gone."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch(processes: int, arguments: list[str]) -> int:
    """Run `htm` with these arguments in so many processes; return what they exit with."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "--max-restarts", str(RESTARTS)),
        *("-m", "htm_pytorch", *arguments),
    ]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.run(command, env=environment, check=False).returncode
