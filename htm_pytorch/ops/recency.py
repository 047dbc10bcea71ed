"""`Recency`: how the age of a chunk counts, as the caller says it."""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.fading import Fading, log_ages
from htm_pytorch.memory.home import Numbered, ages_of
from htm_pytorch.shapes import check_device, check_floating, check_tensor, may_look_at


class Recency(NamedTuple):
    """How much a query prefers new chunks, and how relevant any chunk can be.

    Chunks are scored by limited(route . s_j, ceiling) - decay log(1 + age_j), where age_j is how
    many chunks closed after chunk j, and limited(a, c) = a - (1 - 2^-10) log(1 + exp(a - c)).
    """

    ceiling: Tensor
    """[B, Q], of the route's dtype; +infinity where there is none, never -infinity."""
    decay: Tensor
    """[B, Q], of the route's dtype; 0 where all ages are alike."""
    ages: Tensor | None = None
    """[B, Q, M] int64, the age of each chunk as each query sees it; B and Q may be 1. None: the
    ages of now, by the order in which the memory's chunks closed."""

    def fading(self, memory: Numbered, dtype: torch.dtype, device: torch.device) -> Fading:
        """Return what scores of all chunks of a memory fade by, in the dtype of sums."""
        ages = ages_of(memory)[:, None] if self.ages is None else self.ages
        ceiling, decay = (part.to(device, dtype) for part in (self.ceiling, self.decay))
        return Fading(ceiling, decay, log_ages(ages.to(device), dtype))


def check_recency(recency: Recency | None, route: Tensor, chunks: int) -> None:
    """Raise a ValueError unless it fits the route and a memory of so many chunks."""
    if recency is None:
        return
    if not isinstance(recency, Recency):
        raise ValueError(f"recency: expected a Recency, got {type(recency).__name__}")
    batch, queries = route.shape[:2]
    for name, part in {"ceiling": recency.ceiling, "decay": recency.decay}.items():
        check_tensor(f"recency.{name}", part, "B Q", B=batch, Q=queries)
        check_floating(f"recency.{name}", part, route.dtype)
        check_device(f"recency.{name}", part, route.device)
    if may_look_at(recency.ceiling) and (recency.ceiling == -torch.inf).any():
        raise ValueError("recency.ceiling: expected numbers above -infinity, got some of it")
    if recency.ages is not None:
        check_ages("recency.ages", recency.ages, route, chunks)


def check_ages(name: str, ages: Tensor, like: Tensor, chunks: int) -> None:
    """Raise a ValueError unless ages [B, Q, M] fit queries [B, Q, D] and so many chunks."""
    check_tensor(name, ages, "B Q M", M=chunks)
    check_device(name, ages, like.device)
    if ages.dtype != torch.int64:
        raise ValueError(f"{name}: expected dtype torch.int64, got {ages.dtype}")
    for axis, size, most in zip("BQ", ages.shape, like.shape, strict=False):
        if size not in (1, most):
            raise ValueError(f"{name}: expected {axis} of 1 or {most}, got {size}")
