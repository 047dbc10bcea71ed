"""Memories that lie elsewhere: score the summaries, fetch the best chunks, recall from those."""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory, Home
from htm_pytorch.ops import kernels, native, reference


class Fetched(NamedTuple):
    """The chunks that any query keeps, as a memory in RAM."""

    memory: ChunkedMemory
    """Of batch 1, with U chunks, oldest first."""
    chunk_mask: Tensor
    """[B, Q, U] bool, those that each query keeps: `recall` keeps them again."""
    numbers: Tensor
    """[U] int64, their numbers in the home."""


@torch.no_grad()
def fetch(route: Tensor, home: Home, k: int, chunk_mask: Tensor | None) -> Fetched:
    """Fetch the k best chunks of each query; to the device of `route` [B, Q, D].

    What was scored here without a gradient is scored again, among the few that were fetched.
    """
    device = home.device
    exact = route.detach().to(device, torch.promote_types(route.dtype, torch.float32))
    mask = None if chunk_mask is None else chunk_mask.to(device)
    if kernels.IS_AVAILABLE and device.type == "cpu":
        chunks, _ = native.pick(exact, home, k, mask)
    else:
        picked = reference.select(exact, home, k, mask)
        chunks = picked.chunks.masked_fill(~picked.kept, -1)
    numbers, place = torch.unique(chunks, return_inverse=True)
    if len(numbers) and numbers[0] < 0:
        # Those of a query that sees fewer: a column to be dropped.
        numbers, place = numbers[1:], place - 1
    keeps = torch.zeros(*chunks.shape[:2], len(numbers) + 1, dtype=torch.bool, device=device)
    keeps.scatter_(2, place % (len(numbers) + 1), True)
    memory = home.fetch(numbers).to(route.device)
    return Fetched(memory, keeps[..., :-1].to(route.device), numbers.to(route.device))
