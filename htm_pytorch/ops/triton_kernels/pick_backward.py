"""The way back from the weights of the picked chunks, to the route and to what was scored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.memory.fading import LEAK
from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    by_last,
    divide_up,
    power_of_two,
    sort_picks,
    there_in_chunk,
)
from htm_pytorch.ops.triton_kernels.sources import Source


@triton.jit
def _load_picked(
    summaries,
    picked,
    owner,
    summaries_by_batch,
    summaries_by_chunk,
    first,
    count,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load the summary of the pick at `picked`, and whether it is one of first to first + count."""
    d = tl.arange(0, BLOCK_D)
    m = tl.load(picked) - first
    here = (m >= 0) & (m < count)
    summary = summaries + owner * summaries_by_batch + m * summaries_by_chunk + d
    return tl.load(summary, d < tl.where(here, D, 0), other=0.0).to(tl.float32), here


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
        value, here = _load_picked(
            summaries, picked + x * k + rank, owner, summaries_by_batch, summaries_by_chunk,
            first, count, D, BLOCK_D,
        )  # fmt: skip
        total += tl.where(here, tl.load(grad_scores + x * k + rank), 0.0) * value
    tl.store(grad_route + x * D + d, total, d < D)


@triton.jit
def products_kernel(
    route,
    picked,
    summaries,
    products,
    route_by_batch,
    route_by_query,
    summaries_by_batch,
    summaries_by_chunk,
    queries,
    k,
    first,
    count,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Multiply a query with one chunk that it picked, of the chunks first to first + count."""
    x, rank = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, q = x // queries, x % queries
    d = tl.arange(0, BLOCK_D)
    value, here = _load_picked(
        summaries, picked + x * k + rank, row * (1 - SHARED), summaries_by_batch,
        summaries_by_chunk, first, count, D, BLOCK_D,
    )  # fmt: skip
    query = tl.load(route + row * route_by_batch + q * route_by_query + d, d < D, other=0.0)
    tl.store(products + x * k + rank, tl.sum(query.to(tl.float32) * value, 0), here)


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
    row, chunk = slot // chunks, slot % chunks
    begin = chunk * C - missing
    if HAS_MASK:
        step_mask += row * mask_by_batch
    number = 0
    for start in range(0, C, BLOCK_C):
        there = there_in_chunk(step_mask, chunk, start, missing, C, BLOCK_C, HAS_MASK)
        number += tl.sum(there.to(tl.int32), 0)
    total /= tl.maximum(number, 1).to(tl.float32) + eps
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        exists = (c < C) & (begin + c >= 0)
        there = there_in_chunk(step_mask, chunk, start, missing, C, BLOCK_C, HAS_MASK)
        value = tl.where(there[:, None], total[None, :], 0.0)
        index = (row * length + begin + c)[:, None] * D + d[None, :]
        tl.store(grad_source + index, value, exists[:, None] & (d < D)[None, :])


def pick_backward(
    grad: Tensor,
    route: Tensor,
    source: Tensor,
    step_mask: Tensor | None,
    ceiling: Tensor | None,
    decay: Tensor | None,
    ages: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    eps: float,
    to_source: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of route, source, ceiling and decay; empty where not asked for."""
    batch, queries, dim = route.shape
    grad_source = source.new_zeros((0, 0, 0))
    grad_ceiling = route.new_zeros(0 if ceiling is None else ceiling.shape)
    grad_decay = torch.zeros_like(grad_ceiling)
    if not (picked.numel() and dim):
        grad_source = source.new_zeros(source.shape) if to_source else grad_source
        grad_route = torch.zeros_like(route, memory_format=torch.contiguous_format)
        return grad_route, grad_source, grad_ceiling, grad_decay
    grad_scores = weights * (grad - (weights * grad).sum(-1, keepdim=True))
    grad_scores = grad_scores.masked_fill_(picked < 0, 0.0).contiguous()
    picked, route = picked.contiguous(), by_last(route)
    scored = Source(source, None, step_mask, chunk_size, eps)
    grad_route = torch.empty(route.shape, dtype=torch.float32, device=route.device)
    k = picked.shape[2]
    launch = Launch({"D": dim, "BLOCK_D": power_of_two(dim)}).options()
    launch["SHARED"] = scored.rows == 1 < batch
    products = torch.zeros_like(grad_scores)
    slope, grad_products = products, grad_scores
    for first, count in scored.pieces():
        summaries = scored.summaries(first, count)
        sizes = *summaries.stride()[:2], queries, k, first, count
        if ceiling is not None:
            places = route.stride()[:2]
            products_kernel[batch * queries, k](
                route, picked, summaries, products, *places, *sizes, **launch
            )
            # Of the picks of later pieces it is neither known yet nor needed.
            slope = (1.0 - LEAK) * torch.sigmoid(products - ceiling[..., None])
            grad_products = grad_scores * (1.0 - slope)
        route_backward_kernel[(batch * queries,)](
            grad_products, picked, summaries, grad_route, *sizes, RESUME=first > 0, **launch
        )
    if ages is not None:
        aged = ages.expand(batch, queries, -1).gather(2, picked.clamp(min=0))
        grad_ceiling = (grad_scores * slope).sum(-1).to(route.dtype)
        grad_decay = -(grad_scores * aged).sum(-1).to(route.dtype)
    if to_source:
        grad_source = source.new_empty(source.shape)
        ordered = sort_picks(picked, scored.rows, scored.chunks)
        wide = min(power_of_two(dim), 256)
        tile = {"BLOCK_P": 16, "BLOCK_C": min(power_of_two(chunk_size), 16), "BLOCK_D": wide}
        mask = scored.step_mask
        source_backward_kernel[(scored.rows * scored.chunks, divide_up(dim, wide))](
            grad_products,
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
            HAS_MASK=mask is not None,
            **Launch({"C": chunk_size, "D": dim, **tile}).options(),
        )
    return grad_route.to(route.dtype), grad_source, grad_ceiling, grad_decay
