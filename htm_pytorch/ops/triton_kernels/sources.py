"""What is scored: summaries as they are held, or means of the steps, a piece at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    by_last,
    divide_up,
    power_of_two,
    there_in_chunk,
)

MEANS_BYTES = 32 * 2**20
"""Of means held at a time, of steps that have no summaries."""


@triton.jit
def means_kernel(
    steps,
    step_mask,
    means,
    seen,
    steps_by_batch,
    steps_by_step,
    mask_by_batch,
    first,
    count,
    missing,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Average the steps of one chunk, and say whether it has any."""
    out = tl.program_id(0).to(tl.int64)
    row, at = out // count, out % count
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = first + at
    begin = chunk * C - missing
    if HAS_MASK:
        step_mask += row * mask_by_batch
    total = tl.zeros([BLOCK_D], tl.float32)
    number = 0
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        there = there_in_chunk(step_mask, chunk, start, missing, C, BLOCK_C, HAS_MASK)
        index = row * steps_by_batch + (begin + c)[:, None] * steps_by_step + d[None, :]
        part = tl.load(steps + index, there[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
        number += tl.sum(there.to(tl.int32), 0)
    total /= tl.maximum(number, 1).to(tl.float32) + eps
    tl.store(means + out * D + d, total, d < D)
    if HAS_MASK:
        tl.store(seen + out, number > 0)


def means_launch(chunk_size: int, dim: int) -> Launch:
    """Say how `means_kernel` is compiled, but for flags."""
    wide = min(power_of_two(dim), 256)
    blocks = {"BLOCK_C": min(power_of_two(chunk_size), 16), "BLOCK_D": wide}
    return Launch({"C": chunk_size, "D": dim, **blocks}, num_stages=2)


class Source:
    """What is scored: summaries that are held, or means, of a piece of the steps at a time."""

    def __init__(
        self,
        source: Tensor,
        valid: Tensor | None,
        step_mask: Tensor | None,
        chunk_size: int,
        eps: float,
    ):
        self.source = by_last(source)
        self.valid = None if valid is None else by_last(valid)
        self.step_mask = None if step_mask is None else by_last(step_mask)
        self.chunk_size = chunk_size
        self.eps = 0.0 if step_mask is None else eps
        self.rows, self.length, self.dim = source.shape
        self.chunks = divide_up(self.length, chunk_size)
        self.held = chunk_size == 1 and step_mask is None
        self.piece = self.chunks
        if not self.held:
            by_chunk = self.rows * self.dim * 4
            self.piece = min(self.chunks, max(1, MEANS_BYTES // by_chunk))
            self.means = source.new_empty(self.rows, self.piece, self.dim, dtype=torch.float32)
            if step_mask is not None:
                self.seen = source.new_empty(self.rows, self.piece, dtype=torch.bool)

    def pieces(self) -> list[tuple[int, int]]:
        """Return the first chunk and the number of chunks of each piece."""
        starts = range(0, self.chunks, max(1, self.piece))
        return [(start, min(self.piece, self.chunks - start)) for start in starts]

    def summaries(self, first: int, count: int) -> Tensor:
        """Return those of some chunks; `valid` is then of these chunks, too."""
        if self.held:
            return self.source
        means = self.means.flatten()[: self.rows * count * self.dim]
        seen = None
        if self.step_mask is not None:
            self.valid = self.seen.flatten()[: self.rows * count].view(self.rows, count)
            seen = self.valid
        launch = means_launch(self.chunk_size, self.dim)
        blocks = divide_up(self.dim, launch.constants["BLOCK_D"])
        means_kernel[(count * self.rows, blocks)](
            self.source,
            self.step_mask,
            means,
            seen,
            self.source.stride(0),
            self.source.stride(1),
            0 if self.step_mask is None else self.step_mask.stride(0),
            first,
            count,
            -self.length % self.chunk_size,
            self.eps,
            HAS_MASK=self.step_mask is not None,
            **launch.options(),
        )
        return means.view(self.rows, count, self.dim)
