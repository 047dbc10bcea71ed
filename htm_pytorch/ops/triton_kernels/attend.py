"""Attention inside the picked chunks: one program a query reads each picked step once.

All heads of a query share the rows, so a tile of rows serves two matrix products of all heads.
"""

import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.ops.kernels import by_head
from htm_pytorch.ops.triton_kernels.products import add_dot
from htm_pytorch.ops.triton_kernels.tiles import (
    Call,
    load_heads,
    load_rows,
    multiply,
    score,
    store_heads,
    there_in_chunk,
)


@triton.jit
def attend_kernel(
    probe,
    steps,
    step_mask,
    positions,
    picked,
    weights,
    context,
    probe_by_batch,
    probe_by_query,
    probe_by_head,
    steps_by_batch,
    steps_by_step,
    mask_by_batch,
    context_by_batch,
    context_by_query,
    context_by_head,
    queries,
    heads,
    k,
    missing,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
    POSITION_TYPE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """Attend from the heads of one query to the chunks that it picked.

    A chunk of one tile takes a plain softmax, and positions count once, summed over all chunks.
    Longer ones take an online softmax, with a second sum that is scaled as the largest logit grows.
    """
    WHOLE: tl.constexpr = DEPTH == WIDTH and WIDTH >= D
    # Slices of one query side by side: the second finds its rows in the cache.
    SLICES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    x = tl.program_id(0).to(tl.int64) // SLICES
    slice = tl.program_id(0) % SLICES * WIDTH
    row, q = x // queries, x % queries
    owner = row * (1 - SHARED)
    steps += owner * steps_by_batch
    probe += row * probe_by_batch + q * probe_by_query
    if HAS_MASK:
        step_mask += owner * mask_by_batch
    within = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_H, WIDTH], tl.float32)
    u = 0
    if WHOLE:
        u = load_heads(probe, probe_by_head, heads, 0, D, BLOCK_H, WIDTH)
    if C <= BLOCK_C:
        by_position = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        attended = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        if HAS_POSITIONS:
            by_position = multiply(
                probe, probe_by_head, heads, positions, within, D, within < C,
                D, BLOCK_H, DEPTH, POSITION_TYPE,
            )  # fmt: skip
        for rank in range(k):
            chunk = tl.load(picked + x * k + rank)
            there = there_in_chunk(step_mask, chunk, 0, missing, C, BLOCK_C, HAS_MASK)
            n = chunk * C + within - missing
            m = load_rows(steps, n, steps_by_step, there, slice, D, WIDTH)
            logits = by_position + score(
                u, probe, probe_by_head, heads, m, steps, n, steps_by_step, there,
                D, BLOCK_H, DEPTH, TYPE, WHOLE,
            )  # fmt: skip
            logits = tl.where(there[None, :], logits, float("-inf"))
            top = tl.max(logits, 1)
            inside = tl.where(there[None, :], tl.exp(logits - top[:, None]), 0.0)
            norm = tl.sum(inside, 1)
            weight = tl.load(weights + x * k + rank)
            inside *= (weight / tl.where(norm == 0.0, 1.0, norm))[:, None]
            attended += inside
            total = add_dot(total, inside, m, TYPE)
        if HAS_POSITIONS:
            p = load_rows(positions, within, D, within < C, slice, D, WIDTH)
            total = add_dot(total, attended, p, POSITION_TYPE)
    else:
        for rank in range(k):
            chunk = tl.load(picked + x * k + rank)
            part = tl.zeros([BLOCK_H, WIDTH], tl.float32)
            top = tl.zeros([BLOCK_H], tl.float32) + float("-inf")
            norm = tl.zeros([BLOCK_H], tl.float32)
            for start in range(0, C, BLOCK_C):
                there = there_in_chunk(step_mask, chunk, start, missing, C, BLOCK_C, HAS_MASK)
                c = start + within
                n = chunk * C + c - missing
                m = load_rows(steps, n, steps_by_step, there, slice, D, WIDTH)
                logits = score(
                    u, probe, probe_by_head, heads, m, steps, n, steps_by_step, there,
                    D, BLOCK_H, DEPTH, TYPE, WHOLE,
                )  # fmt: skip
                if HAS_POSITIONS:
                    p = load_rows(positions, c, D, there, slice, D, WIDTH)
                    logits += score(
                        u, probe, probe_by_head, heads, p, positions, c, D, there,
                        D, BLOCK_H, DEPTH, POSITION_TYPE, WHOLE,
                    )  # fmt: skip
                logits = tl.where(there[None, :], logits, float("-inf"))
                higher = tl.maximum(top, tl.max(logits, 1))
                # Both are minus infinity before the first step that is there.
                scale = tl.where(top == higher, 1.0, tl.exp(top - higher))
                inside = tl.where(there[None, :], tl.exp(logits - higher[:, None]), 0.0)
                norm = norm * scale + tl.sum(inside, 1)
                part = add_dot(part * scale[:, None], inside, m, TYPE)
                if HAS_POSITIONS:
                    part = add_dot(part, inside, p, POSITION_TYPE)
                top = higher
            weight = tl.load(weights + x * k + rank)
            total += part * (weight / tl.where(norm == 0.0, 1.0, norm))[:, None]
    context += row * context_by_batch + q * context_by_query
    store_heads(context, context_by_head, heads, slice, total, D, BLOCK_H, WIDTH)


def attend(
    probe: Tensor,
    steps: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
) -> Tensor:
    """Return the context [B, Q, H, D] of the probes inside the picked chunks."""
    context = by_head(probe)
    if not context.numel():
        return context
    call = Call(probe, steps, step_mask, positions, picked, weights, chunk_size)
    launch = call.launch()
    attend_kernel[call.grid(launch)](
        call.probe,
        call.steps,
        call.step_mask,
        call.positions,
        call.picked,
        call.weights,
        context,
        *call.probe.stride()[:3],
        *call.memory_strides(),
        *context.stride()[:3],
        call.queries,
        call.heads,
        call.k,
        call.missing,
        **call.flags,
        **launch.options(),
    )
    return context
