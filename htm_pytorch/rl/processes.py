"""Several processes that learn as one: each has some of the environments and their memories.

Only sums travel: of gradients, and of numbers that means are over.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous


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
            backend = "nccl" if device.startswith("cuda") else "gloo"
            store, rank, size = next(rendezvous("env://"))
            # A group that is made again finds in the store the addresses of those that are gone.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"attempt-{attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        return cls(dist.get_rank(), dist.get_world_size())

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
        with _reached():
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
        with _reached():
            dist.all_gather_object(everything, found)
        return [one for part in everything for one in part]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            with _reached():
                dist.barrier()


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Raise a ConnectionError where the others cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "another process of the training is gone; what it said last tells why"
        ) from error
