"""A past that is given whole, cut into chunks."""

import torch
from torch import Tensor

from htm_pytorch.memory.ring import Slots, copied
from htm_pytorch.memory.summaries import summarise
from htm_pytorch.shapes import (
    check_at_least,
    check_floating,
    check_mask,
    check_not_negative,
    check_tensor,
    may_look_at,
)


def cut(
    steps: Tensor,
    chunk_size: int,
    mask: Tensor | None,
    *,
    borders: str,
    eps: float,
    is_copy: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Slots, Tensor]:
    """Return the chunks of `steps` [B, N, D], and which are valid; see `ChunkedMemory.from_steps`.

    Without `is_copy` they are where the steps are, if N is a multiple of `chunk_size`. Summaries
    have the dtype of the steps unless another one is named.
    """
    check_at_least("chunk_size", chunk_size, 1)
    check_not_negative("eps", eps)
    check_tensor("steps", steps, "B N D")
    check_floating("steps", steps)
    batch, length, dim = steps.shape
    check_mask("mask", mask, "B N", steps.device, B=batch, N=length)
    if borders not in ("oldest", "newest"):
        raise ValueError(f"borders: expected 'oldest' or 'newest', got {borders!r}")
    missing = -length % chunk_size
    if mask is None:
        eps = 0.0
    elif may_look_at(mask) and bool(mask.all()):
        mask = None
    # A short chunk is padded at its oldest end, where positions are largest.
    before = 0 if borders == "newest" else length - length % chunk_size
    if missing:
        if mask is None:
            mask = steps.new_ones(batch, length, dtype=torch.bool)
        steps = _insert(steps, before, missing)
        mask = _insert(mask, before, missing)
    elif is_copy:
        steps, mask = copied(steps), None if mask is None else copied(mask)
    # The number of chunks is spelled out: it could not be inferred for a batch of 0.
    sizes = (batch, steps.shape[1] // chunk_size, chunk_size)
    contents = steps.reshape(*sizes, dim)
    step_mask = None if mask is None else mask.reshape(sizes)
    summaries = summarise(contents, step_mask, eps, dtype)
    valid = (
        steps.new_ones(contents.shape[:2], dtype=torch.bool)
        if step_mask is None
        else step_mask.any(-1)
    )
    place = torch.arange(0, sizes[1] * chunk_size, chunk_size, device=steps.device)
    place = place.repeat(batch, 1)
    if step_mask is not None:
        place = place + step_mask.byte().argmax(-1)
    if missing:
        place = torch.where(place < before, place, place - missing)
    return Slots(contents, summaries, step_mask, place, torch.zeros_like(place)), valid


def _insert(steps: Tensor, before: int, missing: int) -> Tensor:
    padding = steps.new_zeros(steps.shape[0], missing, *steps.shape[2:])
    return torch.cat([steps[:, :before], padding, steps[:, before:]], 1)
