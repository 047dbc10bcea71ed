"""`recall` over all chunks at once: for memories so small that gathering costs more."""

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.ops.reference import Selection, chunk_weights, masked_softmax, select


def recall(
    route: Tensor,
    probe: Tensor,
    memory: ChunkedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
) -> tuple[Tensor, Selection, Tensor, Tensor | None]:
    """Compute what `reference.recall` computes, but for the step weights, by two GEMMs a row."""
    picked = select(route, memory, k, chunk_mask)
    batch, queries, heads, dim = probe.shape
    row = torch.arange(memory.batch, device=route.device)[:, None, None]
    weights = chunk_weights(route, memory, picked)

    step_mask = memory.valid[..., None].expand(-1, -1, memory.chunk_size)
    if memory.step_mask is not None:
        step_mask = step_mask & memory.step_mask
    # Zero times NaN is NaN: what no query may see is blanked, what only some may see is added back.
    usable = step_mask[..., None] & memory.contents.isfinite()
    steps = memory.contents.where(usable, 0.0).to(route.dtype)
    if positions is not None:
        steps = steps + positions
    flat = steps.flatten(1, 2)
    step_logits = (probe.flatten(1, 2) @ flat.mT).view(
        batch, queries, heads, memory.chunks, memory.chunk_size
    )
    spread = weights.new_zeros(batch, queries, memory.chunks)
    chosen = spread.scatter_add(2, picked.chunks, picked.kept.to(spread.dtype)) > 0
    spread = spread.scatter_add(2, picked.chunks, weights)
    # Not left to the zeros of `spread`: logits of chunks not kept may overflow.
    attended = masked_softmax(step_logits, (chosen[..., None] & step_mask[:, None])[:, :, None])
    attended = attended * spread[:, :, None, :, None]
    context = (attended.flatten(3).flatten(1, 2) @ flat).view(batch, queries, heads, dim)
    broken = (step_mask[..., None] & ~usable).flatten(2).any(-1)
    poisoned = (broken[row, picked.chunks] & picked.kept).any(-1)
    context = context.masked_fill(poisoned[..., None, None], torch.nan)
    return context, picked, weights, None
