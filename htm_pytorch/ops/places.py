"""Memories that are not at hand: what is fetched from elsewhere, and what ranks do together."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.memory import ChunkedMemory, ShardedMemory, Steps
from htm_pytorch.ops import homes, sharded
from htm_pytorch.ops.call import Call, Memory, no_autocast
from htm_pytorch.ops.recency import Recency
from htm_pytorch.shapes import is_transformed


def at_hand(
    route: Tensor,
    memory: Memory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    impl: str,
    recency: Recency | None,
) -> tuple[Call, Tensor | None]:
    """Return a call on a memory in RAM, and the numbers of its chunks if they are others."""
    if isinstance(memory, ChunkedMemory):
        memory = memory.reading()
    if isinstance(memory, ChunkedMemory | Steps):
        return Call.of(route, memory, k, positions, chunk_mask, impl, recency), None
    fetched = homes.fetch(route, memory, k, chunk_mask, recency)
    if recency is not None:
        recency = recency._replace(ages=fetched.ages)
    call = Call.of(route, fetched.memory, k, positions, fetched.chunk_mask, impl, recency)
    return call, fetched.numbers


def together(memory: object) -> AbstractContextManager[object]:
    """Where the ranks of a memory tell each other of arguments that they refuse."""
    if isinstance(memory, ShardedMemory):
        return memory.ranks.refusing(memory.device)
    return nullcontext()


def check_ranks(memory: Memory, impl: str, route: Tensor) -> None:
    """Raise an error unless a `ShardedMemory` can be recalled from in this way."""
    if not isinstance(memory, ShardedMemory):
        return
    if impl not in ("auto", "native", "reference"):
        raise ValueError(
            f"impl: expected 'auto', 'native' or 'reference' over a ShardedMemory, got {impl!r}"
        )
    if is_transformed():
        raise ValueError("memory: expected no ShardedMemory under a torch.func transform, got one")
    if impl == "native" and (error := kernels.refusal(route.device)) is not None:
        raise type(error)(f"impl: 'native' {error}")


def on_ranks(
    route: Tensor,
    probe: Tensor,
    memory: ShardedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    impl: str,
    recency: Recency | None,
    with_weights: bool = False,
) -> sharded.Recalled:
    """Recall from what all ranks hold, by the compiled kernel where a rank has it."""
    with_kernel = impl != "reference" and kernels.refusal(route.device) is None
    with no_autocast(route.device):
        recalled = sharded.recall(
            route,
            probe,
            memory,
            k,
            positions,
            chunk_mask,
            recency,
            with_kernel=with_kernel,
            with_weights=with_weights,
        )
    return recalled._replace(context=recalled.context.to(probe.dtype))
