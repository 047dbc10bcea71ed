"""`recall` and `attend` that say what was recalled: computed plainly, to be looked at."""

from typing import NamedTuple

from torch import Tensor

from htm_pytorch.memory import ShardedMemory
from htm_pytorch.ops import reference
from htm_pytorch.ops.call import Memory, check, check_projections, check_queries, no_autocast
from htm_pytorch.ops.places import at_hand, check_ranks, on_ranks, together
from htm_pytorch.ops.projected import absorb, read
from htm_pytorch.ops.recency import Recency


class Recall(NamedTuple):
    """What was recalled, for every query."""

    chunks: Tensor
    """[B, Q, K] int64, the chunks kept, best first; -1 where there were fewer than K."""
    chunk_weights: Tensor
    """[B, Q, K], the softmax over the kept chunks; they sum to 1, or to 0 where there is none."""
    step_weights: Tensor
    """[B, Q, H, K, C], the softmax inside each kept chunk; masked steps have 0."""


def recall_with_weights(
    route: Tensor,
    probe: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    recency: Recency | None = None,
) -> tuple[Tensor, Recall]:
    """Do what `recall` does and also return what was recalled, computed plainly."""
    with together(memory):
        check(route, memory, k, positions, chunk_mask, recency)
        check_queries(route, "probe", probe, "B Q H D", D=memory.dim)
        check_ranks(memory, "reference", route)
    if isinstance(memory, ShardedMemory):
        shared = on_ranks(
            route,
            probe,
            memory,
            k,
            positions,
            chunk_mask,
            "reference",
            recency,
            with_weights=True,
        )
        assert shared.step_weights is not None
        return shared.context, Recall(shared.chunks, shared.chunk_weights, shared.step_weights)
    call, numbers = at_hand(route, memory, k, positions, chunk_mask, "reference", recency)
    exact = route.to(call.dtype), probe.to(call.dtype)
    with no_autocast(route.device):
        context, picked, weights, step_weights = reference.recall(
            *exact, call.chunked, k, call.places, call.chunk_mask, call.fading
        )
    chunks = picked.chunks if numbers is None else numbers[picked.chunks]
    chunks = chunks.masked_fill(~picked.kept, -1)
    return context.to(probe.dtype), Recall(chunks, weights, step_weights)


def attend_with_weights(
    route: Tensor,
    queries: Tensor,
    projections: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    recency: Recency | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Recall]:
    """Do what `attend` does and return what was recalled, computed plainly."""
    with together(memory):
        check(route, memory, k, positions, chunk_mask, recency)
        check_projections(route, queries, projections, memory.dim)
    scale = float(queries.shape[3] ** -0.5) if scale is None else scale
    probe = absorb(queries * scale, projections)
    context, recalled = recall_with_weights(
        route, probe, memory, k, positions=positions, chunk_mask=chunk_mask, recency=recency
    )
    return read(context, projections), recalled
