"""The k best chunks of each query: scores in tiles, the best kept on chip, never a [Q, M] array."""

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
    power_of_two,
    processors,
    sort_picks,
)

MEANS_BYTES = 32 * 2**20
"""Of means held at a time, of steps that have no summaries."""
NOTHING = tl.constexpr(-(2**63))
"""Below every key, and so are the next `LISTED` numbers: places in a list that are still free."""
LISTED = tl.constexpr(2**32)


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
    begin = (first + at) * C - missing
    total = tl.zeros([BLOCK_D], tl.float32)
    number = 0
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        there = (c < C) & (begin + c >= 0)
        if HAS_MASK:
            there &= tl.load(step_mask + row * mask_by_batch + begin + c, there, other=0) != 0
        index = row * steps_by_batch + (begin + c)[:, None] * steps_by_step + d[None, :]
        part = tl.load(steps + index, there[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
        number += tl.sum(there.to(tl.int32), 0)
    total /= tl.maximum(number, 1).to(tl.float32) + eps
    tl.store(means + out * D + d, total, d < D)
    if HAS_MASK:
        tl.store(seen + out, number > 0)


@triton.jit
def keep_kernel(
    route,
    summaries,
    valid,
    chunk_mask,
    keys,
    route_by_batch,
    route_by_query,
    summaries_by_batch,
    summaries_by_chunk,
    valid_by_batch,
    mask_by_batch,
    mask_by_query,
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


@triton.jit
def route_backward_kernel(
    grad_scores,
    picked,
    summaries,
    grad_route,
    summaries_by_batch,
    summaries_by_chunk,
    queries,
    k,
    first,
    count,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARED: tl.constexpr,
    RESUME: tl.constexpr,
):
    """Sum the picked summaries, of chunks first to first + count, of one query."""
    x = tl.program_id(0).to(tl.int64)
    owner = (x // queries) * (1 - SHARED)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    if RESUME:
        total += tl.load(grad_route + x * D + d, d < D, other=0.0)
    for rank in range(k):
        m = tl.load(picked + x * k + rank) - first
        here = (m >= 0) & (m < count)
        summary = summaries + owner * summaries_by_batch + m * summaries_by_chunk + d
        value = tl.load(summary, d < tl.where(here, D, 0), other=0.0).to(tl.float32)
        total += tl.where(here, tl.load(grad_scores + x * k + rank), 0.0) * value
    tl.store(grad_route + x * D + d, total, d < D)


@triton.jit
def source_backward_kernel(
    grad_scores,
    route,
    step_mask,
    pairs,
    starts,
    grad_source,
    route_by_batch,
    route_by_query,
    mask_by_batch,
    queries,
    k,
    chunks,
    length,
    missing,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Sum over the queries that picked one chunk; its steps share what their mean gets."""
    slot = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(starts + slot + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(tl.load(starts + slot), end, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        pair = tl.load(pairs + i, i < end, other=0).to(tl.int64)
        x = pair // k
        index = (x // queries) * route_by_batch + (x % queries) * route_by_query
        inside = (i < end)[:, None] & (d < D)[None, :]
        value = tl.load(route + index[:, None] + d[None, :], inside, other=0.0).to(tl.float32)
        share = tl.load(grad_scores + pair, i < end, other=0.0)
        total += tl.sum(share[:, None] * value, 0)
    row = slot // chunks
    begin = (slot % chunks) * C - missing
    number = 0
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        there = (c < C) & (begin + c >= 0)
        if HAS_MASK:
            there &= tl.load(step_mask + row * mask_by_batch + begin + c, there, other=0) != 0
        number += tl.sum(there.to(tl.int32), 0)
    total /= tl.maximum(number, 1).to(tl.float32) + eps
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        exists = (c < C) & (begin + c >= 0)
        there = exists
        if HAS_MASK:
            there &= tl.load(step_mask + row * mask_by_batch + begin + c, there, other=0) != 0
        value = tl.where(there[:, None], total[None, :], 0.0)
        index = (row * length + begin + c)[:, None] * D + d[None, :]
        tl.store(grad_source + index, value, exists[:, None] & (d < D)[None, :])


def keep_launch(queries: int, k: int, dim: int, type_: Any) -> Launch:
    """Say how `keep_kernel` is compiled, but for flags."""
    few = queries <= 16 or k > 64
    wide = 32 if type_ == tl.float32 else 128 if few else 64
    blocks = {
        "K": power_of_two(k),
        "BLOCK_Q": 16 if few else 64,
        "BLOCK_M": 64,
        "BLOCK_D": min(power_of_two(dim, 16), wide),
    }
    warps = 4 if few and type_ != tl.float32 else 8
    return Launch({"D": dim, "TYPE": type_, **blocks}, num_warps=warps, num_stages=3)


def means_launch(chunk_size: int, dim: int) -> Launch:
    """Say how `means_kernel` is compiled, but for flags."""
    wide = min(power_of_two(dim), 256)
    blocks = {"BLOCK_C": min(power_of_two(chunk_size), 16), "BLOCK_D": wide}
    return Launch({"C": chunk_size, "D": dim, **blocks}, num_warps=4, num_stages=2)


class _Source:
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
        self.chunks = -(-self.length // chunk_size)
        self.held = chunk_size == 1 and step_mask is None
        self.piece = self.chunks
        if not self.held:
            by_chunk = self.rows * self.dim * 4
            self.piece = min(self.chunks, max(1, MEANS_BYTES // by_chunk))
            self.means = source.new_empty(self.rows, self.piece, self.dim, dtype=torch.float32)
            if step_mask is not None:
                self.valid = source.new_empty(self.rows, self.piece, dtype=torch.bool)

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
            assert self.valid is not None
            self.valid = self.valid.flatten()[: self.rows * count].view(self.rows, count)
            seen = self.valid
        launch = means_launch(self.chunk_size, self.dim)
        blocks = triton.cdiv(self.dim, launch.constants["BLOCK_D"])
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


def pick(
    route: Tensor,
    source: Tensor,
    valid: Tensor | None,
    step_mask: Tensor | None,
    chunk_mask: Tensor | None,
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
    scored = _Source(source, valid, step_mask, chunk_size, eps)
    stored = source.dtype if scored.held else torch.float32
    launch = keep_launch(queries, k, dim, common_type(route.dtype, stored))
    sizes = launch.constants
    blocks = triton.cdiv(queries, sizes["BLOCK_Q"])
    # Enough programs for all processors, each with some tiles; few enough to be merged at once.
    wanted = triton.cdiv(2 * processors(route), batch * blocks)
    most = min(triton.cdiv(scored.piece, 4 * sizes["BLOCK_M"]), max(1, 2048 // sizes["K"]))
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
            keys,
            route.stride(0),
            route.stride(1),
            summaries.stride(0),
            summaries.stride(1),
            0 if usable is None else usable.stride(0),
            0 if chunk_mask is None else chunk_mask.stride(0),
            0 if chunk_mask is None else chunk_mask.stride(1),
            queries,
            first,
            count,
            triton.cdiv(triton.cdiv(count, splits), sizes["BLOCK_M"]) * sizes["BLOCK_M"],
            splits,
            SHARED=scored.rows == 1 < batch,
            HAS_VALID=usable is not None,
            HAS_MASK=chunk_mask is not None,
            RESUME=first > 0,
            **launch.options(),
        )
    width = splits * sizes["K"]
    block = max(1, 1024 // power_of_two(width))
    merge_kernel[(triton.cdiv(batch * queries, block),)](
        keys,
        picked,
        weights,
        batch * queries,
        k,
        width,
        K=sizes["K"],
        BLOCK_Q=block,
        BLOCK_W=power_of_two(width),
        num_warps=4,
    )
    return picked, weights


def pick_backward(
    grad: Tensor,
    route: Tensor,
    source: Tensor,
    step_mask: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    eps: float,
    to_source: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of route and source; the latter empty where it is not asked for."""
    batch, queries, dim = route.shape
    grad_source = source.new_zeros((0, 0, 0))
    if not (picked.numel() and dim):
        grad_source = source.new_zeros(source.shape) if to_source else grad_source
        return torch.zeros_like(route, memory_format=torch.contiguous_format), grad_source
    grad_scores = weights * (grad - (weights * grad).sum(-1, keepdim=True))
    grad_scores = grad_scores.masked_fill_(picked < 0, 0.0).contiguous()
    picked, route = picked.contiguous(), by_last(route)
    scored = _Source(source, None, step_mask, chunk_size, eps)
    grad_route = torch.empty(route.shape, dtype=torch.float32, device=route.device)
    k = picked.shape[2]
    for first, count in scored.pieces():
        summaries = scored.summaries(first, count)
        route_backward_kernel[(batch * queries,)](
            grad_scores,
            picked,
            summaries,
            grad_route,
            summaries.stride(0),
            summaries.stride(1),
            queries,
            k,
            first,
            count,
            D=dim,
            BLOCK_D=power_of_two(dim),
            SHARED=scored.rows == 1 < batch,
            RESUME=first > 0,
            num_warps=4,
        )
    if to_source:
        grad_source = source.new_empty(source.shape)
        ordered = sort_picks(picked, scored.rows, scored.chunks)
        wide = min(power_of_two(dim), 256)
        mask = scored.step_mask
        source_backward_kernel[(scored.rows * scored.chunks, triton.cdiv(dim, wide))](
            grad_scores,
            route,
            mask,
            ordered.pairs,
            ordered.starts,
            grad_source,
            route.stride(0),
            route.stride(1),
            0 if mask is None else mask.stride(0),
            queries,
            k,
            scored.chunks,
            scored.length,
            -scored.length % chunk_size,
            scored.eps,
            C=chunk_size,
            D=dim,
            BLOCK_P=16,
            BLOCK_C=min(power_of_two(chunk_size), 16),
            BLOCK_D=wide,
            HAS_MASK=mask is not None,
            num_warps=4,
        )
    return grad_route.to(route.dtype), grad_source
