"""How tiles of steps, heads and positions are read, zero where not there, and multiplied.

Rows of a tile are steps, columns are heads: then tensor cores take the steps from where they were
copied to, and the few heads of a query pad no dimension that has many.
"""

import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    add_dot,
    by_last,
    capability,
    common_type,
    divide_up,
    dot,
    power_of_two,
    there_in_chunk,
)

ROWS = 64
"""Steps of a tile in half precision: the least that a Hopper GPU multiplies from shared memory."""
WIDEST = 512
"""Steps of which a tile stays on chip whole; half as wide in chunks of several tiles."""
SUMS = 8 * 2**10
"""Numbers that a program sums, heads times the width; half of it in float32 and long chunks."""


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
def store_sums(
    base, by_head, heads, first, sums, D: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr
):
    """Store sums [WIDTH, BLOCK_H] where `load_heads` would load their transpose."""
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = first + tl.arange(0, WIDTH)
    places = base + h.to(tl.int64)[None, :] * by_head + d[:, None]
    value = sums.to(base.dtype.element_ty)
    tl.store(places, value, (h < heads)[None, :] & (d < D)[:, None])


@triton.jit
def words_kernel(
    step_mask,
    picked,
    words,
    mask_by_batch,
    pairs_by_row,
    missing,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Write which steps of a tile are there as the bits of one number.

    A copy to shared memory that runs ahead can wait for one number, not for one byte a step.
    """
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    pair = program // TILES
    step_mask += pair // pairs_by_row * (1 - SHARED) * mask_by_batch
    start = program % TILES * BLOCK_C
    there = there_in_chunk(step_mask, tl.load(picked + pair), start, missing, C, BLOCK_C, True)
    bits = there.to(tl.int64) << tl.arange(0, BLOCK_C).to(tl.int64)
    tl.store(words + program, tl.sum(bits, 0))


@triton.jit
def find_tile(
    picked,
    weights,
    words,
    first,
    last,
    start,
    missing,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Find steps start to start + BLOCK_C of the chunks of picks first to first + GROUPS.

    Returns:
        Numbers of the steps, which of them are there, and the weight of each chunk; none, with
        weight 0, from `last` on.
    """
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    r = tl.arange(0, GROUPS * BLOCK_C)
    c = start + r % BLOCK_C
    chunk = tl.zeros([GROUPS * BLOCK_C], tl.int32) - 1
    word = tl.zeros([GROUPS * BLOCK_C], tl.int64)
    weight = tl.zeros([GROUPS], tl.float32)
    # One number at a time, which costs one register, not one in every thread for every row.
    for i in tl.static_range(GROUPS):
        pair = first + i
        mine = r // BLOCK_C == i
        mine_chunk = tl.load(picked + pair, pair < last, other=-1).to(tl.int32)
        chunk = tl.where(mine, mine_chunk, chunk)
        share = tl.load(weights + pair, pair < last, other=0.0)
        weight = tl.where(tl.arange(0, GROUPS) == i, share, weight)
        if HAS_MASK:
            at = words + pair * TILES + start // BLOCK_C
            word = tl.where(mine, tl.load(at, pair < last, other=0), word)
    n = chunk * C + c - missing
    there = (c < C) & (n >= 0)
    if HAS_MASK:
        there = (word >> (r % BLOCK_C).to(tl.int64)) & 1 != 0
    return n, there, weight


@triton.jit
def load_rows(rows, index, by_row, there, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows, columns first to first + WIDTH. What is not there is not touched."""
    d = first + tl.arange(0, WIDTH)
    inside = there[:, None] & (d < D)[None, :]
    at = index.to(tl.int64) * by_row
    return tl.load(rows + at[:, None] + d[None, :], inside, other=0.0)


@triton.jit
def score(
    m,
    u,
    rows,
    index,
    by_row,
    there,
    base,
    by_head,
    heads,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Multiply rows with a block of heads: tiles at hand where they are whole, elsewhere pieces."""
    if WHOLE:
        return dot(m, tl.trans(u), TYPE)
    total = tl.zeros([index.shape[0], BLOCK_H], tl.float32)
    for first in range(0, D, DEPTH):
        piece = load_rows(rows, index, by_row, there, first, D, DEPTH)
        part = load_heads(base, by_head, heads, first, D, BLOCK_H, DEPTH)
        total = add_dot(total, piece, tl.trans(part), TYPE)
    return total


@triton.jit
def stack(u, g):
    """Put two blocks of heads [H, D] one below the other, for one product with both."""
    both = tl.permute(tl.join(u, g), (2, 0, 1))
    return tl.reshape(both, [2 * u.shape[0], u.shape[1]])


@triton.jit
def score_both(
    m,
    both,
    rows,
    index,
    by_row,
    there,
    base,
    by_head,
    grad,
    grad_by_head,
    heads,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Multiply rows with two blocks of heads, as `score` does with one."""
    if WHOLE:
        total = dot(m, tl.trans(both), TYPE)
    else:
        total = tl.zeros([index.shape[0], 2 * BLOCK_H], tl.float32)
        for first in range(0, D, DEPTH):
            piece = load_rows(rows, index, by_row, there, first, D, DEPTH)
            u = load_heads(base, by_head, heads, first, D, BLOCK_H, DEPTH)
            g = load_heads(grad, grad_by_head, heads, first, D, BLOCK_H, DEPTH)
            total = add_dot(total, piece, tl.trans(stack(u, g)), TYPE)
    return tl.split(tl.permute(tl.reshape(total, [index.shape[0], 2, BLOCK_H]), (0, 2, 1)))


@triton.jit
def in_groups(value, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Split rows [GROUPS * BLOCK_C, H] by the chunk that they are of: [GROUPS, BLOCK_C, H]."""
    return tl.reshape(value, [GROUPS, BLOCK_C, value.shape[1]])


@triton.jit
def in_rows(value):
    """Undo `in_groups`."""
    return tl.reshape(value, [value.shape[0] * value.shape[1], value.shape[2]])


def blocks(call: "Call", *, both: bool) -> Launch:
    """Say how a program over the heads of one query is cut, but for flags.

    `both` is for the way back, where rows meet two blocks of heads.

    In half precision a tile of steps stays whole for both products where tensor cores read shared
    memory themselves, from Hopper GPUs on. Elsewhere one of its factors would fill the registers,
    and in float32, whose products split every factor in two, both: there only pieces fit, and the
    second product reads its tile again.
    """
    probe, steps, positions = call.probe, call.steps, call.positions
    type_ = common_type(probe.dtype, steps.dtype)
    position_type = type_ if positions is None else common_type(probe.dtype, positions.dtype)
    exact = tl.float32 in (type_, position_type)
    wide = power_of_two(call.dim, 16)
    widest = WIDEST if call.chunk_size <= ROWS else WIDEST // 2
    whole = not exact and wide <= widest and capability(probe) >= (9, 0)
    width = wide if whole else min(wide, 256)
    # Softmaxes over several tiles keep two sums at a time, and leave room for less beside them.
    long = call.chunk_size > ROWS // 2
    # Forward, where the rows' bandwidth is the limit, small tiles in flight are worth more than
    # products from shared memory (see docs/performance.md).
    small = not both and not long
    rows = ROWS if whole and not small else ROWS // 4 if exact and long else ROWS // 2
    depth = 256 if whole and both else 64 if whole or not (exact or long) else 32
    sums = SUMS // 2 if exact or call.chunk_size > rows else SUMS
    groups = min(rows // min(power_of_two(call.chunk_size, 16), rows), power_of_two(call.k))
    constants = {
        "C": call.chunk_size,
        "D": call.dim,
        "BLOCK_H": min(power_of_two(call.heads, 16), max(16, sums // width)),
        "GROUPS": groups,
        "BLOCK_C": rows // groups,
        "WIDTH": width,
        "DEPTH": min(wide, depth),
        "TYPE": type_,
        "POSITION_TYPE": position_type,
        "WHOLE": whole,
    }
    large = width >= (512 if whole else 256) and not (whole and small)
    # Whole tiles are asked for when their picks have come. With five stages that is while the tile
    # before is multiplied; with four, after that, and there is room for one tile less. Tiles of
    # one chunk, and pieces, wait for no pick.
    stages = (4 if both else 5) if whole and call.chunk_size <= rows else 3
    return Launch(constants, num_warps=8 if large else 4, num_stages=stages)


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
        self.chunks = divide_up(self.length, chunk_size)
        self.missing = -self.length % chunk_size
        self.mask_by_batch = 0 if self.step_mask is None else self.step_mask.stride(0)
        self.flags = {
            "SHARED": self.rows == 1 < self.batch,
            "HAS_MASK": step_mask is not None,
            "HAS_POSITIONS": positions is not None,
        }

    def grid(self, launch: Launch) -> tuple[int, int]:
        """Return the programs over queries and slices of the width, and over blocks of heads."""
        sizes = launch.constants
        slices = divide_up(self.dim, sizes["WIDTH"])
        return self.batch * self.queries * slices, divide_up(self.heads, sizes["BLOCK_H"])

    def words(self, launch: Launch) -> Tensor | None:
        """Return the mask of the tiles of each pick, as numbers; None where there is no mask."""
        if self.step_mask is None:
            return None
        size = launch.constants["BLOCK_C"]
        tiles = divide_up(self.chunk_size, size)
        words = self.picked.new_empty(self.picked.numel(), tiles)
        words_kernel[(words.numel(),)](
            self.step_mask,
            self.picked,
            words,
            self.mask_by_batch,
            self.queries * self.k,
            self.missing,
            SHARED=self.flags["SHARED"],
            **Launch({"C": self.chunk_size, "BLOCK_C": size}, num_warps=1).options(),
        )
        return words
