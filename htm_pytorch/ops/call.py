"""One call of `recall` or `attend`: its arguments, held to the contract and cast once."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory, Home, ShardedMemory, Steps
from htm_pytorch.memory.fading import Fading
from htm_pytorch.memory.home import is_home
from htm_pytorch.ops import operators
from htm_pytorch.ops.recency import Recency, check_recency
from htm_pytorch.shapes import (
    check_at_least,
    check_beside,
    check_device,
    check_floating,
    check_mask,
    check_tensor,
    has_autocast,
)

Memory = ChunkedMemory | Steps | Home
"""What can be recalled from."""


class Call(NamedTuple):
    """What an implementation gets: a memory that is at hand, and what is asked of it."""

    route: Tensor
    """[B, Q, D]."""
    memory: ChunkedMemory | Steps
    k: int
    positions: Tensor | None
    """[C, D]."""
    chunk_mask: Tensor | None
    """[B, Q, M]."""
    is_named: bool
    """Whether the implementation was asked for by its name."""

    dtype: torch.dtype
    """Of sums: at least float32, the route's and the memory's."""
    fading: Fading | None
    """What scores fade by, in the dtype of sums; None: by nothing."""

    @classmethod
    def of(
        cls,
        route: Tensor,
        memory: ChunkedMemory | Steps,
        k: int,
        positions: Tensor | None,
        chunk_mask: Tensor | None,
        impl: str,
        recency: Recency | None = None,
    ) -> Self:
        """Return the call of an implementation by this name, or by "auto"."""
        dtype = torch.promote_types(torch.promote_types(torch.float32, memory.dtype), route.dtype)
        if isinstance(memory, ChunkedMemory):
            dtype = torch.promote_types(dtype, memory._ring.read().summaries.dtype)
        fading = None if recency is None else recency.fading(memory, dtype, route.device)
        return cls(route, memory, k, positions, chunk_mask, impl != "auto", dtype, fading)

    @property
    def chunked(self) -> ChunkedMemory:
        """The memory with its summaries."""
        return self.memory.chunked(self.dtype) if isinstance(self.memory, Steps) else self.memory

    @property
    def places(self) -> Tensor | None:
        """The positions in the dtype of sums."""
        return None if self.positions is None else self.positions.to(self.dtype)


def check(
    route: Tensor,
    memory: Memory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    recency: Recency | None = None,
) -> None:
    """Raise a ValueError that names the argument which does not fit."""
    if not (isinstance(memory, ChunkedMemory | Steps) or is_home(memory)):
        raise ValueError(
            f"memory: expected a ChunkedMemory, Steps or another Home, got {type(memory).__name__}"
        )
    if isinstance(memory, Steps):
        memory.check()
    if isinstance(memory, ChunkedMemory):
        _check_parts(memory)
    check_tensor("route", route, "B Q D", D=memory.dim)
    check_floating("route", route)
    batch, queries, dim = route.shape
    check_at_least("k", k, 1)
    if memory.batch not in (1, batch):
        raise ValueError(f"memory: expected batch 1 or {batch}, got {memory.batch}")
    is_elsewhere = not isinstance(memory, ChunkedMemory | ShardedMemory | Steps)
    if not is_elsewhere and memory.device != route.device:
        raise ValueError(f"memory: expected device {route.device}, got {memory.device}")
    if positions is not None:
        check_tensor("positions", positions, "C D", C=memory.chunk_size, D=dim)
        check_floating("positions", positions)
        check_device("positions", positions, route.device)
    sizes = {"B": batch, "Q": queries, "M": memory.chunks}
    check_mask("chunk_mask", chunk_mask, "B Q M", route.device, **sizes)
    check_recency(recency, route, memory.chunks)


def check_queries(route: Tensor, name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    """Raise a ValueError unless a tensor fits the route."""
    check_tensor(name, tensor, axes, B=route.shape[0], Q=route.shape[1], **sizes)
    check_floating(name, tensor, route.dtype)
    check_device(name, tensor, route.device)


def check_projections(route: Tensor, queries: Tensor, projections: Tensor, dim: int) -> None:
    """Raise a ValueError unless queries and projections fit each other and the route."""
    check_queries(route, "queries", queries, "B Q H E")
    heads, width = queries.shape[2:]
    if not width:
        raise ValueError("queries: expected E >= 1, got 0")
    check_tensor("projections", projections, "P H E D", P=2, H=heads, E=width, D=dim)
    check_beside("projections", projections, queries)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off, inside which sums would be taken in less than they should."""
    # The meta device, for one, has no autocast to turn off.
    if has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _check_parts(memory: ChunkedMemory) -> None:
    """Raise a ValueError unless what is read of a memory fits together."""
    slots, valid, dtypes = memory._ring.read(), memory.valid, operators.DTYPES
    contents, summaries, step_mask = slots.contents, slots.summaries, slots.step_mask
    operators.check_axes("memory.contents", contents, 4)
    batch, chunks, chunk_size, dim = contents.shape
    operators.check("memory.contents", contents, contents.shape, *dtypes)
    operators.check("memory.summaries", summaries, (batch, chunks, dim), *dtypes)
    operators.check("memory.valid", valid, (batch, chunks), torch.bool)
    operators.check("memory.step_mask", step_mask, (batch, chunks, chunk_size), torch.bool)
    for name, part in {"summaries": summaries, "valid": valid, "step_mask": step_mask}.items():
        if part is not None:
            check_device(f"memory.{name}", part, contents.device)
