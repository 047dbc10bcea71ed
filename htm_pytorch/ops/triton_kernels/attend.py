"""Attention inside the picked chunks: one program a query reads each picked step once.

All heads of a query share the rows, so a tile of rows serves two matrix products of all heads.
Where queries are too few for all processors, several programs share the chunks of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.kernels import by_head
from htm_pytorch.ops.triton_kernels.parts import add_parts
from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    add_dot,
    divide_up,
    processors,
)
from htm_pytorch.ops.triton_kernels.tiles import (
    Call,
    blocks,
    find_tile,
    in_groups,
    in_rows,
    load_heads,
    load_rows,
    score,
    store_sums,
)

PROGRAMS = 4
"""For each processor, where there are picks enough for so many."""


@triton.jit
def attend_kernel(
    probe,
    steps,
    words,
    positions,
    picked,
    weights,
    context,
    probe_by_batch,
    probe_by_query,
    probe_by_head,
    steps_by_batch,
    steps_by_step,
    context_by_batch,
    context_by_query,
    context_by_head,
    context_by_split,
    queries,
    heads,
    k,
    splits,
    each,
    missing,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
    POSITION_TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """Attend from the heads of one query to the chunks that it picked, or to `each` of them.

    Chunks of one tile, a group of them at a time, take a plain softmax each, and positions count
    once, summed over all chunks. Longer ones take an online softmax, with a second sum that is
    scaled as the largest logit grows.
    """
    # Slices of one query side by side: the second finds its rows in the cache.
    SLICES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    part = tl.program_id(0).to(tl.int64) // SLICES
    slice = tl.program_id(0) % SLICES * WIDTH
    x, split = part // splits, part % splits
    row, q = x // queries, x % queries
    steps += row * (1 - SHARED) * steps_by_batch
    probe += row * probe_by_batch + q * probe_by_query
    within = tl.arange(0, BLOCK_C)
    begin = x * k + split * each
    last = tl.minimum(begin + each, (x + 1) * k)
    total = tl.zeros([WIDTH, BLOCK_H], tl.float32)
    u = 0
    if WHOLE:
        u = load_heads(probe, probe_by_head, heads, 0, D, BLOCK_H, WIDTH)
    if C <= BLOCK_C:
        by_position = tl.zeros([GROUPS * BLOCK_C, BLOCK_H], tl.float32)
        attended = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
        if HAS_POSITIONS:
            c = tl.arange(0, GROUPS * BLOCK_C) % BLOCK_C
            by_position = score(
                0, 0, positions, c, D, c < C, probe, probe_by_head, heads,
                D, BLOCK_H, DEPTH, POSITION_TYPE, False,
            )  # fmt: skip
        for first in range(begin, last, GROUPS):
            n, there, weight = find_tile(
                picked, weights, words, first, last, 0, missing, C, GROUPS, BLOCK_C, HAS_MASK
            )
            m = load_rows(steps, n, steps_by_step, there, slice, D, WIDTH)
            logits = by_position + score(
                m, u, steps, n, steps_by_step, there, probe, probe_by_head, heads,
                D, BLOCK_H, DEPTH, TYPE, WHOLE,
            )  # fmt: skip
            logits = in_groups(tl.where(there[:, None], logits, float("-inf")), GROUPS, BLOCK_C)
            top = tl.max(logits, 1)
            is_there = tl.reshape(there, [GROUPS, BLOCK_C])[:, :, None]
            inside = tl.where(is_there, tl.exp(logits - top[:, None, :]), 0.0)
            norm = tl.sum(inside, 1)
            inside *= (weight[:, None] / tl.where(norm == 0.0, 1.0, norm))[:, None, :]
            attended += tl.sum(inside, 0)
            total = add_dot(total, tl.trans(m), in_rows(inside), TYPE)
        if HAS_POSITIONS:
            p = load_rows(positions, within, D, within < C, slice, D, WIDTH)
            total = add_dot(total, tl.trans(p), attended, POSITION_TYPE)
    else:
        for first in range(begin, last):
            weight = tl.load(weights + first)
            inner = tl.zeros([WIDTH, BLOCK_H], tl.float32)
            top = tl.zeros([BLOCK_H], tl.float32) + float("-inf")
            norm = tl.zeros([BLOCK_H], tl.float32)
            for start in range(0, C, BLOCK_C):
                n, there, _ = find_tile(
                    picked, weights, words, first, last, start, missing, C, 1, BLOCK_C, HAS_MASK
                )
                m = load_rows(steps, n, steps_by_step, there, slice, D, WIDTH)
                logits = score(
                    m, u, steps, n, steps_by_step, there, probe, probe_by_head, heads,
                    D, BLOCK_H, DEPTH, TYPE, WHOLE,
                )  # fmt: skip
                if HAS_POSITIONS:
                    p = load_rows(positions, start + within, D, there, slice, D, WIDTH)
                    logits += score(
                        p, u, positions, start + within, D, there, probe, probe_by_head, heads,
                        D, BLOCK_H, DEPTH, POSITION_TYPE, WHOLE,
                    )  # fmt: skip
                logits = tl.where(there[:, None], logits, float("-inf"))
                higher = tl.maximum(top, tl.max(logits, 0))
                # Both are minus infinity before the first step that is there.
                scale = tl.where(top == higher, 1.0, tl.exp(top - higher))
                inside = tl.where(there[:, None], tl.exp(logits - higher[None, :]), 0.0)
                norm = norm * scale + tl.sum(inside, 0)
                inner = add_dot(inner * scale[None, :], tl.trans(m), inside, TYPE)
                if HAS_POSITIONS:
                    inner = add_dot(inner, tl.trans(p), inside, POSITION_TYPE)
                top = higher
            total += inner * (weight / tl.where(norm == 0.0, 1.0, norm))[None, :]
    context += row * context_by_batch + q * context_by_query + split * context_by_split
    store_sums(context, context_by_head, heads, slice, total, D, BLOCK_H, WIDTH)


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
    if not (context.numel() and picked.numel()):
        return context.zero_()
    call = Call(probe, steps, step_mask, positions, picked, weights, chunk_size)
    launch = blocks(call, both=False)
    programs, head_blocks = call.grid(launch)
    each = share(programs * head_blocks, call.k, launch, processors(probe))
    splits = divide_up(call.k, each)
    out, by_split = context, 0
    if splits > 1:
        sizes = call.batch, call.queries, splits, call.heads, call.dim
        parts = torch.empty(sizes, dtype=torch.float32, device=probe.device)
        out, by_split = parts[:, :, 0], parts.stride(2)
    attend_kernel[programs * splits, head_blocks](
        call.probe,
        call.steps,
        call.words(launch),
        call.positions,
        call.picked,
        call.weights,
        out,
        *call.probe.stride()[:3],
        *call.steps.stride()[:2],
        *out.stride()[:3],
        by_split,
        call.queries,
        call.heads,
        call.k,
        splits,
        each,
        call.missing,
        **call.flags,
        **launch.options(),
    )
    if splits > 1:
        add_parts(parts.flatten(0, 1), context)
    return context


def share(programs: int, k: int, launch: Launch, processors: int) -> int:
    """Return of how many of the k picks of a query a program takes care."""
    wanted = max(1, PROGRAMS * processors // max(programs, 1))
    groups = launch.constants["GROUPS"]
    return max(1, divide_up(divide_up(k, groups), wanted)) * groups
