"""How tiles of heads, steps and positions are read, zero where not there, and multiplied."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    add_dot,
    by_last,
    common_type,
    dot,
    power_of_two,
)

WHOLE_BYTES = 32 * 2**10
"""Of the largest tile of steps that stays on chip for both of its products."""
SUMS = 16 * 2**10
"""Numbers that a program sums in registers: a block of heads times a slice of the width."""


@triton.jit
def load_heads(
    base, by_head, heads, first, D: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr
):
    """Load a block of heads, columns first to first + WIDTH."""
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = first + tl.arange(0, WIDTH)
    places = base + h.to(tl.int64)[:, None] * by_head + d[None, :]
    return tl.load(places, (h < heads)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_heads(
    base, by_head, heads, first, value, D: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr
):
    """Store what `load_heads` would load."""
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = first + tl.arange(0, WIDTH)
    places = base + h.to(tl.int64)[:, None] * by_head + d[None, :]
    value = value.to(base.dtype.element_ty)
    tl.store(places, value, (h < heads)[:, None] & (d < D)[None, :])


@triton.jit
def there_in_chunk(
    step_mask, chunk, start, missing, C: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Say which steps of a tile exist and may be attended; where no chunk was kept (-1), none."""
    c = start + tl.arange(0, BLOCK_C)
    n = chunk * C + c - missing
    there = (c < C) & (n >= 0)
    if HAS_MASK:
        there &= tl.load(step_mask + n, there, other=0) != 0
    return there


@triton.jit
def load_rows(rows, index, by_row, there, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows, columns first to first + WIDTH. What is not there is not touched."""
    d = first + tl.arange(0, WIDTH)
    inside = there[:, None] & (d < D)[None, :]
    return tl.load(rows + index[:, None] * by_row + d[None, :], inside, other=0.0)


@triton.jit
def multiply(
    base,
    by_head,
    heads,
    rows,
    index,
    by_row,
    there,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Multiply a block of heads with rows, both read in pieces of DEPTH columns."""
    total = tl.zeros([BLOCK_H, index.shape[0]], tl.float32)
    for first in range(0, D, DEPTH):
        a = load_heads(base, by_head, heads, first, D, BLOCK_H, DEPTH)
        b = load_rows(rows, index, by_row, there, first, D, DEPTH)
        total = add_dot(total, a, tl.trans(b), TYPE)
    return total


@triton.jit
def score(
    tile,
    base,
    by_head,
    heads,
    m,
    rows,
    index,
    by_row,
    there,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Multiply a block of heads with rows: tiles at hand where they are whole, pieces elsewhere."""
    if WHOLE:
        return dot(tile, tl.trans(m), TYPE)
    return multiply(base, by_head, heads, rows, index, by_row, there, D, BLOCK_H, DEPTH, TYPE)


def blocks(
    heads: int,
    chunk_size: int,
    dim: int,
    probe: torch.dtype,
    stored: torch.dtype,
    positions: torch.dtype | None,
) -> Launch:
    """Say how a program over the heads of one query is cut, but for flags.

    In half precision a tile of steps stays whole for both products. In float32, whose products
    split every factor in two, only pieces fit: the second product reads its tile again.
    """
    type_ = common_type(probe, stored)
    exact = type_ == tl.float32
    wide = power_of_two(dim, 16)
    whole = not exact and wide <= (1024 if positions is None else 512)
    width = wide if whole else min(wide, 256)
    tile = min(WHOLE_BYTES // (width * stored.itemsize), 64 if whole else 32)
    if not whole and chunk_size > tile:
        # Two sums at a time, as softmaxes go over several tiles.
        tile = 16
    constants = {
        "C": chunk_size,
        "D": dim,
        "BLOCK_H": min(power_of_two(heads, 16), max(16, SUMS // width)),
        "BLOCK_C": max(16, min(power_of_two(chunk_size), tile)),
        "WIDTH": width,
        "DEPTH": wide if whole else min(wide, 32 if chunk_size > tile and exact else 64),
        "TYPE": type_,
        "POSITION_TYPE": type_ if positions is None else common_type(probe, positions),
    }
    large = width >= (64 if exact else 512 if whole else 256)
    return Launch(constants, num_warps=8 if large else 4, num_stages=2)


class Call:
    """What the kernels over one memory have in common: tensors as they must lie, and sizes."""

    def __init__(
        self,
        probe: Tensor,
        steps: Tensor,
        step_mask: Tensor | None,
        positions: Tensor | None,
        picked: Tensor,
        weights: Tensor,
        chunk_size: int,
    ):
        self.probe, self.steps = by_last(probe), by_last(steps)
        self.step_mask = None if step_mask is None else by_last(step_mask)
        self.positions = None if positions is None else positions.contiguous()
        self.picked, self.weights = picked.contiguous(), weights.contiguous()
        self.batch, self.queries, self.heads, self.dim = probe.shape
        self.k, self.chunk_size = picked.shape[2], chunk_size
        self.rows, self.length = steps.shape[:2]
        self.chunks = -(-self.length // chunk_size)
        self.missing = -self.length % chunk_size
        self.flags = {
            "SHARED": self.rows == 1 < self.batch,
            "HAS_MASK": step_mask is not None,
            "HAS_POSITIONS": positions is not None,
        }

    def grid(self, launch: Launch) -> tuple[int, int]:
        """Return the programs over queries and slices of the width, and over blocks of heads."""
        sizes = launch.constants
        slices = triton.cdiv(self.dim, sizes["WIDTH"])
        return self.batch * self.queries * slices, triton.cdiv(self.heads, sizes["BLOCK_H"])

    def memory_strides(self) -> tuple[int, int, int]:
        """Return how far apart rows of the memory, its steps, and rows of its mask are."""
        by_batch = 0 if self.step_mask is None else self.step_mask.stride(0)
        return self.steps.stride(0), self.steps.stride(1), by_batch

    def launch(self) -> Launch:
        """Say how programs over queries are compiled."""
        positions = None if self.positions is None else self.positions.dtype
        sizes: tuple[Any, ...] = (self.heads, self.chunk_size, self.dim)
        return blocks(*sizes, self.probe.dtype, self.steps.dtype, positions)
