"""Attention inside chunks that are projected once, a chunk with all the queries that picked it.

Picks sorted by chunk are cut into tiles; a program takes one tile and one head. How many tiles
there are is known on the device alone, so that as many programs start as there may be, and the last
find nothing to do. What a query gets from its k chunks is added up in the end, in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.ops.triton_kernels.parts import add_parts
from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    add_dot,
    by_last,
    common_type,
    divide_up,
    dot,
    power_of_two,
    sort_picks,
    there_in_chunk,
)
from htm_pytorch.ops.triton_kernels.tiles import load_rows

PART_BYTES = 256 * 2**20
"""Of the parts of results, one for each pick, that are held at a time: of some heads."""


@triton.jit
def _find_pairs(ordered, starts, tile_starts, chunk_of, tile, slots, BLOCK_R: tl.constexpr):
    """Return the tile's chunk, its picks, and which of them are."""
    slot = tl.load(chunk_of + tile)
    exists = slot < slots
    slot = tl.where(exists, slot, 0)
    first = tl.load(starts + slot) + (tile - tl.load(tile_starts + slot)) * BLOCK_R
    i = first + tl.arange(0, BLOCK_R)
    inside = i < tl.where(exists, tl.load(starts + slot + 1), 0)
    return slot.to(tl.int64), tl.load(ordered + i, inside, other=0).to(tl.int64), inside


@triton.jit
def projected_kernel(
    queries,
    projected,
    step_mask,
    weights,
    ordered,
    starts,
    tile_starts,
    chunk_of,
    parts,
    queries_by_batch,
    queries_by_query,
    queries_by_head,
    projected_by_step,
    projected_by_kind,
    projected_by_head,
    length,
    k,
    slots,
    first_head,
    held_heads,
    scale,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TYPE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Attend from one head of a tile of queries to the chunk they picked; weighted, a part each."""
    part_head = tl.program_id(1)
    head = first_head + part_head
    slot, pair, inside = _find_pairs(
        ordered, starts, tile_starts, chunk_of, tl.program_id(0), slots, BLOCK_R
    )
    x = pair // k
    at = (x // length) * queries_by_batch + (x % length) * queries_by_query
    q = load_rows(queries + head * queries_by_head, at, 1, inside, 0, E, BLOCK_E)
    base = projected + head * projected_by_head
    top = tl.zeros([BLOCK_R], tl.float32) + float("-inf")
    norm = tl.zeros([BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in range(0, C, BLOCK_C):
        there = there_in_chunk(step_mask, slot, start, 0, C, BLOCK_C, HAS_MASK)
        n = slot * C + start + tl.arange(0, BLOCK_C)
        keys = load_rows(base, n, projected_by_step, there, 0, E, BLOCK_E)
        values = load_rows(base + projected_by_kind, n, projected_by_step, there, 0, E, BLOCK_E)
        logits = dot(q, tl.trans(keys), TYPE) * scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.where(top == higher, 1.0, tl.exp(top - higher))
        share = tl.where(there[None, :], tl.exp(logits - higher[:, None]), 0.0)
        norm = norm * shrink + tl.sum(share, 1)
        total = add_dot(total * shrink[:, None], share, values, TYPE)
        top = higher
    weight = tl.load(weights + pair, inside, other=0.0)
    factor = weight / tl.where(norm == 0.0, 1.0, norm)
    e = tl.arange(0, BLOCK_E)
    places = parts + (pair * held_heads + part_head)[:, None] * E + e[None, :]
    value = (total * factor[:, None]).to(parts.dtype.element_ty)
    tl.store(places, value, inside[:, None] & (e < E)[None, :])


@triton.jit
def projected_queries_backward_kernel(
    grad,
    queries,
    projected,
    step_mask,
    weights,
    ordered,
    starts,
    tile_starts,
    chunk_of,
    parts,
    tops,
    scales,
    means,
    grad_by_batch,
    grad_by_query,
    grad_by_head,
    queries_by_batch,
    queries_by_query,
    queries_by_head,
    projected_by_step,
    projected_by_kind,
    projected_by_head,
    length,
    k,
    heads,
    slots,
    first_head,
    held_heads,
    scale,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TYPE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """A part of the gradient of each query of a tile, and what the program over its chunk needs."""
    part_head = tl.program_id(1)
    head = first_head + part_head
    slot, pair, inside = _find_pairs(
        ordered, starts, tile_starts, chunk_of, tl.program_id(0), slots, BLOCK_R
    )
    x = pair // k
    at = (x // length) * queries_by_batch + (x % length) * queries_by_query
    q = load_rows(queries + head * queries_by_head, at, 1, inside, 0, E, BLOCK_E)
    at = (x // length) * grad_by_batch + (x % length) * grad_by_query
    g = load_rows(grad + head * grad_by_head, at, 1, inside, 0, E, BLOCK_E)
    base = projected + head * projected_by_head
    top = tl.zeros([BLOCK_R], tl.float32) + float("-inf")
    norm = tl.zeros([BLOCK_R], tl.float32)
    mean = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, C, BLOCK_C):
        there = there_in_chunk(step_mask, slot, start, 0, C, BLOCK_C, HAS_MASK)
        n = slot * C + start + tl.arange(0, BLOCK_C)
        keys = load_rows(base, n, projected_by_step, there, 0, E, BLOCK_E)
        values = load_rows(base + projected_by_kind, n, projected_by_step, there, 0, E, BLOCK_E)
        logits = dot(q, tl.trans(keys), TYPE) * scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.where(top == higher, 1.0, tl.exp(top - higher))
        share = tl.where(there[None, :], tl.exp(logits - higher[:, None]), 0.0)
        norm = norm * shrink + tl.sum(share, 1)
        slopes = dot(g, tl.trans(values), TYPE)
        mean = mean * shrink + tl.sum(tl.where(there[None, :], share * slopes, 0.0), 1)
        top = higher
    inverse = 1.0 / tl.where(norm == 0.0, 1.0, norm)
    mean *= inverse
    factor = tl.load(weights + pair, inside, other=0.0) * inverse
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in range(0, C, BLOCK_C):
        there = there_in_chunk(step_mask, slot, start, 0, C, BLOCK_C, HAS_MASK)
        n = slot * C + start + tl.arange(0, BLOCK_C)
        keys = load_rows(base, n, projected_by_step, there, 0, E, BLOCK_E)
        values = load_rows(base + projected_by_kind, n, projected_by_step, there, 0, E, BLOCK_E)
        logits = dot(q, tl.trans(keys), TYPE) * scale
        slopes = dot(g, tl.trans(values), TYPE) - mean[:, None]
        share = factor[:, None] * tl.exp(logits - top[:, None])
        grad_logits = tl.where(there[None, :], share * slopes, 0.0)
        total = add_dot(total, grad_logits, keys, TYPE)
    e = tl.arange(0, BLOCK_E)
    places = parts + (pair * held_heads + part_head)[:, None] * E + e[None, :]
    value = (total * scale).to(parts.dtype.element_ty)
    tl.store(places, value, inside[:, None] & (e < E)[None, :])
    tl.store(tops + pair * heads + head, top, inside)
    tl.store(scales + pair * heads + head, factor, inside)
    tl.store(means + pair * heads + head, mean, inside)


@triton.jit
def projected_rows_backward_kernel(
    grad,
    queries,
    projected,
    step_mask,
    ordered,
    starts,
    tops,
    scales,
    means,
    grad_projected,
    grad_by_batch,
    grad_by_query,
    grad_by_head,
    queries_by_batch,
    queries_by_query,
    queries_by_head,
    projected_by_step,
    projected_by_kind,
    projected_by_head,
    length,
    k,
    heads,
    scale,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TYPE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Gradients of keys and values of one head of a tile of a chunk, queries in their order."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    slot = tl.program_id(0).to(tl.int64) // TILES
    start = tl.program_id(0) % TILES * BLOCK_C
    head = tl.program_id(1)
    there = there_in_chunk(step_mask, slot, start, 0, C, BLOCK_C, HAS_MASK)
    c = start + tl.arange(0, BLOCK_C)
    n = slot * C + c
    base = projected + head * projected_by_head
    keys = load_rows(base, n, projected_by_step, there, 0, E, BLOCK_E)
    values = load_rows(base + projected_by_kind, n, projected_by_step, there, 0, E, BLOCK_E)
    grad_keys = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    grad_values = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    end = tl.load(starts + slot + 1)
    for first in range(tl.load(starts + slot), end, BLOCK_R):
        i = first + tl.arange(0, BLOCK_R)
        pair = tl.load(ordered + i, i < end, other=0).to(tl.int64)
        x = pair // k
        at = (x // length) * queries_by_batch + (x % length) * queries_by_query
        q = load_rows(queries + head * queries_by_head, at, 1, i < end, 0, E, BLOCK_E)
        at = (x // length) * grad_by_batch + (x % length) * grad_by_query
        g = load_rows(grad + head * grad_by_head, at, 1, i < end, 0, E, BLOCK_E)
        top = tl.load(tops + pair * heads + head, i < end, other=0.0)
        factor = tl.load(scales + pair * heads + head, i < end, other=0.0)
        mean = tl.load(means + pair * heads + head, i < end, other=0.0)
        inside = (i < end)[:, None] & there[None, :]
        logits = dot(q, tl.trans(keys), TYPE) * scale
        slopes = dot(g, tl.trans(values), TYPE) - mean[:, None]
        share = tl.where(inside, factor[:, None] * tl.exp(logits - top[:, None]), 0.0)
        grad_logits = tl.where(inside, share * slopes, 0.0)
        grad_keys = add_dot(grad_keys, tl.trans(grad_logits), q, TYPE)
        grad_values = add_dot(grad_values, tl.trans(share), g, TYPE)
    e = tl.arange(0, BLOCK_E)
    places = grad_projected + (n[:, None] * 2 * heads + head) * E + e[None, :]
    inside = (c < C)[:, None] & (e < E)[None, :]
    grad_keys = tl.where(there[:, None], grad_keys * scale, 0.0)
    grad_values = tl.where(there[:, None], grad_values, 0.0)
    tl.store(places, grad_keys.to(grad_projected.dtype.element_ty), inside)
    tl.store(places + heads * E, grad_values.to(grad_projected.dtype.element_ty), inside)


class _Tiles(NamedTuple):
    """The picks of each chunk in tiles of R."""

    ordered: Tensor
    starts: Tensor
    tile_starts: Tensor
    """[slots + 1] int32, the first tile of each chunk."""
    chunk_of: Tensor
    """int32, the chunk of each tile, of as many as there may be; `slots` where there is none."""


def _cut(picked: Tensor, slots: int, rows: int) -> _Tiles:
    ordered, starts = sort_picks(picked, 1, slots)
    tiles = (starts.diff() + (rows - 1)) // rows
    ends = tiles.cumsum(0, dtype=torch.int32)
    tile_starts = torch.cat([ends.new_zeros(1), ends])
    most = picked.numel() // rows + min(slots, picked.numel())
    numbers = torch.arange(most, device=picked.device, dtype=torch.int32)
    chunk_of = torch.searchsorted(ends, numbers, right=True, out_int32=True)
    return _Tiles(ordered, starts, tile_starts, chunk_of)


def launch_of(chunk_size: int, width: int, type_: Any) -> Launch:
    """Say how the kernels of this file are compiled, but for flags."""
    exact = type_ == tl.float32
    wide = power_of_two(width, 16)
    constants = {
        "C": chunk_size,
        "E": width,
        "BLOCK_R": 16 if exact else 64,
        "BLOCK_C": min(power_of_two(chunk_size, 16), 32),
        "BLOCK_E": wide,
        "TYPE": type_,
    }
    # A tile of queries is asked for when their picks have come, while the one before is multiplied.
    return Launch(constants, num_warps=8 if exact else 4, num_stages=5)


class _Call:
    def __init__(
        self,
        queries: Tensor,
        projected: Tensor,
        step_mask: Tensor | None,
        picked: Tensor,
        weights: Tensor,
        chunk_size: int,
    ):
        self.queries, self.projected = by_last(queries), by_last(projected)
        self.step_mask = None if step_mask is None else step_mask.contiguous()
        self.picked, self.weights = picked.contiguous(), weights.contiguous()
        self.batch, self.length, self.heads, self.width = queries.shape
        self.k, self.pairs = picked.shape[2], picked.numel()
        self.slots = len(projected) // chunk_size
        type_ = common_type(queries.dtype, projected.dtype)
        self.launch = launch_of(chunk_size, self.width, type_)
        self.tiles = _cut(picked, self.slots, self.launch.constants["BLOCK_R"])
        # Heads at a time, so that the parts stay few.
        by_head = self.pairs * self.width * queries.itemsize
        self.held = min(self.heads, max(1, PART_BYTES // by_head))

    def parts(self, heads: int) -> Tensor:
        """Return room for a part of each pick."""
        return self.queries.new_empty(self.pairs, heads, self.width)

    def add(self, parts: Tensor, out: Tensor, first: int) -> None:
        """Write the sums over the picks of each query."""
        # All heads of a query in one row.
        heads = out[:, :, first : first + parts.shape[1]].flatten(2)[:, :, None]
        add_parts(parts.view(-1, self.k, 1, heads.shape[-1]), heads, self.picked)

    def strides(self) -> tuple[int, ...]:
        """Return those of the queries and of the projected rows."""
        return *self.queries.stride()[:3], *self.projected.stride()[:3]


def attend_projected(
    queries: Tensor,
    projected: Tensor,
    step_mask: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    owners: int,
    scale: float,
) -> Tensor:
    """Return the attended values [B, Q, H, E]; chunks are numbered over all rows of the batch."""
    del owners
    context = queries.new_empty(queries.shape)
    if not (context.numel() and picked.numel() and len(projected)):
        return context.zero_()
    call = _Call(queries, projected, step_mask, picked, weights, chunk_size)
    for first in range(0, call.heads, call.held):
        heads = min(call.held, call.heads - first)
        parts = call.parts(heads)
        projected_kernel[(len(call.tiles.chunk_of), heads)](
            call.queries,
            call.projected,
            call.step_mask,
            call.weights,
            *call.tiles,
            parts,
            *call.strides(),
            call.length,
            call.k,
            call.slots,
            first,
            heads,
            scale,
            HAS_MASK=step_mask is not None,
            **call.launch.options(),
        )
        call.add(parts, context, first)
    return context


def attend_projected_backward(
    grad: Tensor,
    queries: Tensor,
    projected: Tensor,
    step_mask: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    owners: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, projected and weights."""
    del owners
    grad_queries = queries.new_empty(queries.shape)
    grad_projected = projected.new_empty(projected.shape)
    if not (grad_queries.numel() and picked.numel() and len(projected)):
        return grad_queries.zero_(), grad_projected.zero_(), torch.zeros_like(weights)
    call = _Call(queries, projected, step_mask, picked, weights, chunk_size)
    grad = by_last(grad)
    softmaxes = weights.new_zeros(3, call.pairs, call.heads).unbind()
    strides = *grad.stride()[:3], *call.strides()
    for first in range(0, call.heads, call.held):
        heads = min(call.held, call.heads - first)
        parts = call.parts(heads)
        projected_queries_backward_kernel[(len(call.tiles.chunk_of), heads)](
            grad,
            call.queries,
            call.projected,
            call.step_mask,
            call.weights,
            *call.tiles,
            parts,
            *softmaxes,
            *strides,
            call.length,
            call.k,
            call.heads,
            call.slots,
            first,
            heads,
            scale,
            HAS_MASK=step_mask is not None,
            **call.launch.options(),
        )
        call.add(parts, grad_queries, first)
    tiles = divide_up(chunk_size, call.launch.constants["BLOCK_C"])
    projected_rows_backward_kernel[(call.slots * tiles, call.heads)](
        grad,
        call.queries,
        call.projected,
        call.step_mask,
        call.tiles.ordered,
        call.tiles.starts,
        *softmaxes,
        grad_projected,
        *strides,
        call.length,
        call.k,
        call.heads,
        scale,
        HAS_MASK=step_mask is not None,
        **call.launch.options(),
    )
    return grad_queries, grad_projected, softmaxes[2].sum(-1).view(weights.shape)
