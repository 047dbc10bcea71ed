"""`attend` with the kept chunks projected once: for queries so many that they share chunks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from htm_pytorch.memory import ChunkedMemory, Steps
from htm_pytorch.ops import native

# Seconds a floating point operation takes here, over what it takes in a large matrix product:
# measured over the grid of benchmarks/paths.py.
ABSORBED, SHARED = 1.0, 1.0


def is_cheaper(queries: Tensor, memory: ChunkedMemory | Steps, picked: Tensor) -> bool:
    """Whether projecting the chunks that are kept costs less than moving projections to queries."""
    return False


def attend(
    queries: Tensor,
    projections: Tensor,
    memory: ChunkedMemory | Steps,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return the attended values [B, Q, H, E] of the picked chunks [B, Q, K]."""
    kept = _kept(memory, picked)
    rows = kept.rows.to(projections.dtype)
    if positions is not None:
        rows = rows + positions.to(rows.dtype)
    # [U * C, 2 * H * E], as one matrix product.
    projected = linear(rows.flatten(0, 1), projections.flatten(0, 2))
    exact = torch.promote_types(queries.dtype, torch.float32)
    return native.attend_rows(
        queries.to(exact),
        projected.unflatten(-1, projections.shape[:3])[None],
        None if kept.step_mask is None else kept.step_mask.flatten()[None],
        None,
        kept.picked,
        weights.to(exact),
        memory.chunk_size,
    )


class _Kept(NamedTuple):
    rows: Tensor  # [U, C, D], of all rows of the batch; zeros where masked
    step_mask: Tensor | None  # [U, C]
    picked: Tensor  # [B, Q, K], counted among the U


def _kept(memory: ChunkedMemory | Steps, picked: Tensor) -> _Kept:
    """Collect the chunks that any query picked. What others hold, NaN perhaps, is not touched."""
    row = torch.arange(memory.batch, device=picked.device)[:, None, None]
    total = memory.batch * memory.chunks
    slots = torch.where(picked < 0, total, row * memory.chunks + picked)
    is_kept = picked.new_zeros(total + 1, dtype=torch.bool)
    is_kept[slots] = True
    if torch.compiler.is_compiling():
        # How many there are is not known then: all stay, blank where not kept.
        chunks, picked = torch.arange(total, device=picked.device), slots
    else:
        chunks = is_kept[:-1].nonzero()[:, 0]
        picked = (is_kept.cumsum(0) - 1)[slots]
    picked = picked.masked_fill(slots == total, -1)
    if isinstance(memory, ChunkedMemory):
        rows = memory.contents.flatten(0, 1)[chunks]
        mask = None if memory.step_mask is None else memory.step_mask.flatten(0, 1)[chunks]
    else:
        length = memory.steps.shape[1]
        step = torch.arange(memory.chunk_size, device=picked.device) - -length % memory.chunk_size
        step = (chunks % memory.chunks)[:, None] * memory.chunk_size + step
        at = (chunks // memory.chunks)[:, None] * length + step.clamp(min=0)
        rows = memory.steps.flatten(0, 1)[at]
        mask = None if memory.mask is None else memory.mask.flatten()[at]
        if length % memory.chunk_size:
            mask = step >= 0 if mask is None else mask & (step >= 0)
    if torch.compiler.is_compiling():
        blank = ~is_kept[:-1, None]
        mask = (~blank).expand(rows.shape[:2]) if mask is None else mask & ~blank
    if mask is not None:
        rows = rows.masked_fill(~mask[..., None], 0.0)
    return _Kept(rows, mask, picked)
