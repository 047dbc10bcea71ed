"""The k best chunks of each query: scores in tiles, the best kept on chip, never a [Q, M] array."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.memory import fading
from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    add_dot,
    by_last,
    common_type,
    divide_up,
    power_of_two,
    processors,
)
from htm_pytorch.ops.triton_kernels.sources import Source

NOTHING = tl.constexpr(-(2**63))
"""Below every key, and so are the next `LISTED` numbers: places in a list that are still free."""
LISTED = tl.constexpr(2**32)

LEAK = tl.constexpr(fading.LEAK)

BLOCK = 64
"""Chunks of a tile, and queries of a program where there are many."""


@triton.jit
def _key(score, chunk):
    """One integer that orders by score, NaN above all, and of equal ones the older chunk first."""
    # Minus zero equals zero.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(score != score, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - chunk).to(tl.int64)


@triton.jit
def _score(key):
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _chunk(key):
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _faded(products, ceiling, decay, ages):
    """Do what `Fading.scores` does."""
    above = products - ceiling[:, None]
    bend = tl.log(1.0 + tl.exp(-tl.abs(above)))
    limited = tl.minimum(products, ceiling[:, None]) - bend
    limited += LEAK * (tl.maximum(above, 0.0) + bend)
    return limited - decay[:, None] * ages


@triton.jit
def keep_kernel(
    route,
    summaries,
    valid,
    chunk_mask,
    ceiling,
    decay,
    ages,
    keys,
    route_by_batch,
    route_by_query,
    summaries_by_batch,
    summaries_by_chunk,
    valid_by_batch,
    mask_by_batch,
    mask_by_query,
    ages_by_batch,
    ages_by_query,
    queries,
    first,
    count,
    each,
    splits,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FADES: tl.constexpr,
    RESUME: tl.constexpr,
):
    """Keep the keys of the best chunks of one split, unsorted, for a block of queries.

    With `RESUME`, go on with those that the chunks before `first` left.
    """
    blocks = tl.cdiv(queries, BLOCK_Q)
    split, row = tl.program_id(1), (tl.program_id(0) // blocks).to(tl.int64)
    owner = row * (1 - SHARED)
    q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    listed = tl.arange(0, K)
    places = keys + ((row * queries + q)[:, None] * splits + split) * K + listed[None, :]
    if RESUME:
        best = tl.load(places, (q < queries)[:, None], other=NOTHING)
    else:
        best = tl.zeros([BLOCK_Q, K], tl.int64) + (NOTHING + 1) + listed[None, :]
    if FADES:
        limit = tl.load(ceiling + row * queries + q, q < queries, other=0.0)
        rate = tl.load(decay + row * queries + q, q < queries, other=0.0)
    begin = split * each
    end = tl.minimum(begin + each, count)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        allowed = (q < queries)[:, None] & (m < end)[None, :]
        if HAS_VALID:
            usable = tl.load(valid + owner * valid_by_batch + m, m < end, other=0)
            allowed &= (usable != 0)[None, :]
        if HAS_MASK:
            places_seen = row * mask_by_batch + q.to(tl.int64)[:, None] * mask_by_query
            places_seen += (first + m)[None, :]
            allowed &= tl.load(chunk_mask + places_seen, allowed, other=0) != 0
        if tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0:
            scores = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
            for depth in range(0, D, BLOCK_D):
                d = depth + tl.arange(0, BLOCK_D)
                mine = route + row * route_by_batch + q.to(tl.int64)[:, None] * route_by_query
                a = tl.load(mine + d[None, :], (q < queries)[:, None] & (d < D)[None, :], other=0.0)
                theirs = summaries + owner * summaries_by_batch
                theirs += m.to(tl.int64)[None, :] * summaries_by_chunk
                b = tl.load(theirs + d[:, None], (m < end)[None, :] & (d < D)[:, None], other=0.0)
                scores = add_dot(scores, a, b, TYPE)
            if FADES:
                places_aged = row * ages_by_batch + q.to(tl.int64)[:, None] * ages_by_query
                age = tl.load(ages + places_aged + (first + m)[None, :], allowed, other=0.0)
                scores = _faded(scores, limit, rate, age)
            found = tl.where(allowed, _key(scores, (first + m)[None, :]), NOTHING)
            top = tl.max(found, 1)
            worst = tl.min(best, 1)
            # Most tiles of a long memory hold nothing better than what is kept.
            while tl.max((top > worst).to(tl.int32), 0) > 0:
                leaves = (best == worst[:, None]) & (top > worst)[:, None]
                best = tl.where(leaves, top[:, None], best)
                found = tl.where(found == top[:, None], NOTHING, found)
                top = tl.max(found, 1)
                worst = tl.min(best, 1)
    tl.store(places, best, (q < queries)[:, None])


@triton.jit
def merge_kernel(
    keys,
    picked,
    weights,
    queries,
    k,
    width,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Take the k best of all splits' keys, best first, and their softmax."""
    x = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    w, j = tl.arange(0, BLOCK_W), tl.arange(0, K)
    inside = (x < queries)[:, None] & (w < width)[None, :]
    found = tl.load(keys + x[:, None] * width + w[None, :], inside, other=NOTHING)
    best = tl.zeros([BLOCK_Q, K], tl.int64) + NOTHING
    for rank in range(k):
        top = tl.max(found, 1)
        found = tl.where(found == top[:, None], NOTHING, found)
        best = tl.where(j[None, :] == rank, top[:, None], best)
    kept = best > NOTHING + LISTED
    first = tl.max(best, 1)
    scores = tl.where(kept, _score(best) - _score(first)[:, None], 0.0)
    shares = tl.where(kept, tl.exp(scores), 0.0)
    total = tl.sum(shares, 1)
    shares /= tl.where(total == 0.0, 1.0, total)[:, None]
    place = x[:, None] * k + j[None, :]
    inside = (x < queries)[:, None] & (j < k)[None, :]
    tl.store(picked + place, tl.where(kept, _chunk(best), -1), inside)
    tl.store(weights + place, shares, inside)


def keep_launch(few: bool, fades: bool, k: int, dim: int, type_: Any) -> Launch:
    """Say how `keep_kernel` is compiled, but for flags: for few queries a program, or for many."""
    wide = 32 if type_ == tl.float32 else 128 if few else 64
    blocks = {
        "K": power_of_two(k),
        "BLOCK_Q": 16 if few else BLOCK,
        # Ages and what is made of them take registers as well.
        "BLOCK_M": BLOCK // 2 if fades else BLOCK,
        "BLOCK_D": min(power_of_two(dim, 16), wide),
    }
    warps = 4 if few and type_ != tl.float32 else 8
    return Launch({"D": dim, "TYPE": type_, **blocks}, num_warps=warps, num_stages=3)


def merge_launch(k: int, width: int) -> Launch:
    """Say how `merge_kernel` is compiled, for lists of `width` keys."""
    wide = power_of_two(width)
    return Launch({"K": k, "BLOCK_Q": max(1, 1024 // wide), "BLOCK_W": wide})


def pick(
    route: Tensor,
    source: Tensor,
    valid: Tensor | None,
    step_mask: Tensor | None,
    chunk_mask: Tensor | None,
    ceiling: Tensor | None,
    decay: Tensor | None,
    ages: Tensor | None,
    k: int,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the k best chunks and their weights [B, Q, K], best first; -1, of weight 0, else."""
    batch, queries, dim = route.shape
    picked = route.new_empty(batch, queries, k, dtype=torch.int64)
    weights = route.new_empty(batch, queries, k, dtype=torch.float32)
    if not picked.numel():
        return picked, weights
    route = by_last(route)
    chunk_mask = None if chunk_mask is None else by_last(chunk_mask)
    ceiling, decay = (None if part is None else part.contiguous() for part in (ceiling, decay))
    if ages is not None:
        ages = by_last(ages).expand(batch, queries, -1)
    scored = Source(source, valid, step_mask, chunk_size, eps)
    stored = source.dtype if scored.held else torch.float32
    tiles = divide_up(scored.piece, BLOCK)
    # Where large blocks are too few for all processors, small ones find their best sooner, too.
    scarce = batch * divide_up(queries, BLOCK) * tiles < processors(route)
    few = queries <= 16 or k > 64 or scarce
    launch = keep_launch(few, ages is not None, k, dim, common_type(route.dtype, stored))
    sizes = launch.constants
    blocks = divide_up(queries, sizes["BLOCK_Q"])
    # Enough programs for all processors; few enough to be merged at once.
    wanted = divide_up(2 * processors(route), batch * blocks)
    most = min(tiles, max(1, 2048 // sizes["K"]))
    splits = max(1, min(wanted, most))
    keys = torch.empty(batch, queries, splits, sizes["K"], dtype=torch.int64, device=route.device)
    for first, count in scored.pieces():
        summaries = scored.summaries(first, count)
        usable = scored.valid
        keep_kernel[(blocks * batch, splits)](
            route,
            summaries,
            usable,
            chunk_mask,
            ceiling,
            decay,
            ages,
            keys,
            route.stride(0),
            route.stride(1),
            summaries.stride(0),
            summaries.stride(1),
            0 if usable is None else usable.stride(0),
            0 if chunk_mask is None else chunk_mask.stride(0),
            0 if chunk_mask is None else chunk_mask.stride(1),
            0 if ages is None else ages.stride(0),
            0 if ages is None else ages.stride(1),
            queries,
            first,
            count,
            divide_up(divide_up(count, splits), sizes["BLOCK_M"]) * sizes["BLOCK_M"],
            splits,
            SHARED=scored.rows == 1 < batch,
            HAS_VALID=usable is not None,
            HAS_MASK=chunk_mask is not None,
            FADES=ages is not None,
            RESUME=first > 0,
            **launch.options(),
        )
    width = splits * sizes["K"]
    launch = merge_launch(sizes["K"], width)
    merge_kernel[(divide_up(batch * queries, launch.constants["BLOCK_Q"]),)](
        keys,
        picked,
        weights,
        batch * queries,
        k,
        width,
        **launch.options(),
    )
    return picked, weights
