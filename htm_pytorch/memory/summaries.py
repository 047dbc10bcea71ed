"""Summaries of chunks: means, summed in float32 at least."""

import torch
from torch import Tensor


def summarise(
    contents: Tensor,
    step_mask: Tensor | None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the summaries [B, M, D]: sums of the valid steps over (count + eps).

    Zero where no step is valid. They have the dtype of the contents unless another one is named.
    """
    chunks, chunk_size = contents.shape[1:3]
    made = contents.dtype if dtype is None else dtype
    sums = torch.promote_types(torch.promote_types(contents.dtype, torch.float32), made)
    if step_mask is None and sums == contents.dtype:
        return contents.sum(2) / (chunk_size + eps) if eps else contents.mean(2)
    # In pieces: masking and casting copy, and a copy of the whole memory would double it.
    piece = max(64, -(-chunks // 16))
    parts = contents.split(piece, 1)
    if step_mask is None:
        total = torch.cat([part.sum(2, dtype=sums) for part in parts], 1)
        return (total / (chunk_size + eps)).to(made)
    pairs = zip(parts, step_mask.split(piece, 1), strict=True)
    masked = (part.masked_fill(~mask[..., None], 0.0).sum(2, dtype=sums) for part, mask in pairs)
    count = step_mask.sum(2).clamp(min=1)[..., None]
    return (torch.cat(list(masked), 1) / (count.to(sums) + eps)).to(made)


def count_steps(valid: Tensor, step_mask: Tensor | None, chunk_size: int) -> Tensor:
    """Return how many steps chunks [...] hold that can be recalled; `step_mask` is [..., C]."""
    return valid * (chunk_size if step_mask is None else step_mask.sum(-1))
