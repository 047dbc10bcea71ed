"""The way back through `attend`: everything is computed again, nothing is added by atomics.

One program a query gives the gradients of its probe and of its weights. One program a tile of a
chunk gives those of its steps: it takes the queries that picked the chunk in their order, so that
the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.kernels import by_head
from htm_pytorch.ops.triton_kernels.products import (
    Launch,
    add_dot,
    by_last,
    divide_up,
    power_of_two,
    sort_picks,
    there_in_chunk,
)
from htm_pytorch.ops.triton_kernels.tiles import (
    Call,
    blocks,
    find_tile,
    in_groups,
    in_rows,
    load_heads,
    load_rows,
    score_both,
    stack,
    store_sums,
)


@triton.jit
def _add_by_position(
    sums, heads, start, value, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add to what this program alone reads and writes."""
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = start + tl.arange(0, BLOCK_C)
    places = sums + h[None, :] * C + c[:, None]
    inside = (h < heads)[None, :] & (c < C)[:, None]
    tl.debug_barrier()
    tl.store(places, value + tl.load(places, inside, other=0.0), inside)


@triton.jit
def queries_backward_kernel(
    grad,
    probe,
    steps,
    words,
    positions,
    picked,
    weights,
    grad_probe,
    grad_weights,
    tops,
    scales,
    means,
    earned_sums,
    attended_sums,
    grad_by_batch,
    grad_by_query,
    grad_by_head,
    probe_by_batch,
    probe_by_query,
    probe_by_head,
    steps_by_batch,
    steps_by_step,
    out_by_batch,
    out_by_query,
    out_by_head,
    pairs,
    queries,
    heads,
    k,
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
    TO_STEPS: tl.constexpr,
    TO_POSITIONS: tl.constexpr,
):
    """Gradients of one query's probe and weights, and what the programs over chunks need of it.

    With g the gradient of the context and a the softmax inside chunk j: the logits get
    w_j a (g . (m + p) - t_j), t_j = sum of a g . (m + p), and w_j itself gets t_j.
    """
    SLICES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    x = tl.program_id(0).to(tl.int64) // SLICES
    slice = tl.program_id(0) % SLICES * WIDTH
    row, q = x // queries, x % queries
    steps += row * (1 - SHARED) * steps_by_batch
    probe += row * probe_by_batch + q * probe_by_query
    grad += row * grad_by_batch + q * grad_by_query
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    within = tl.arange(0, BLOCK_C)
    last = (x + 1) * k
    block = tl.program_id(1).to(tl.int64) * pairs
    total = tl.zeros([WIDTH, BLOCK_H], tl.float32)
    both = 0
    if WHOLE:
        u = load_heads(probe, probe_by_head, heads, 0, D, BLOCK_H, WIDTH)
        g = load_heads(grad, grad_by_head, heads, 0, D, BLOCK_H, WIDTH)
        both = stack(u, g)
    if C <= BLOCK_C:
        u_position = tl.zeros([GROUPS * BLOCK_C, BLOCK_H], tl.float32)
        g_position = tl.zeros([GROUPS * BLOCK_C, BLOCK_H], tl.float32)
        attended = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
        earned = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
        if HAS_POSITIONS:
            c = tl.arange(0, GROUPS * BLOCK_C) % BLOCK_C
            u_position, g_position = score_both(
                0, 0, positions, c, D, c < C, probe, probe_by_head, grad, grad_by_head, heads,
                D, BLOCK_H, DEPTH, POSITION_TYPE, False,
            )  # fmt: skip
        for first in range(x * k, last, GROUPS):
            n, there, weight = find_tile(
                picked, weights, words, first, last, 0, missing, C, GROUPS, BLOCK_C, HAS_MASK
            )
            m = load_rows(steps, n, steps_by_step, there, slice, D, WIDTH)
            logits, slopes = score_both(
                m, both, steps, n, steps_by_step, there,
                probe, probe_by_head, grad, grad_by_head, heads,
                D, BLOCK_H, DEPTH, TYPE, WHOLE,
            )  # fmt: skip
            logits = tl.where(there[:, None], logits + u_position, float("-inf"))
            logits = in_groups(logits, GROUPS, BLOCK_C)
            slopes = in_groups(slopes + g_position, GROUPS, BLOCK_C)
            is_there = tl.reshape(there, [GROUPS, BLOCK_C])[:, :, None]
            top = tl.max(logits, 1)
            inside = tl.where(is_there, tl.exp(logits - top[:, None, :]), 0.0)
            norm = tl.sum(inside, 1)
            inverse = 1.0 / tl.where(norm == 0.0, 1.0, norm)
            inside *= inverse[:, None, :]
            gained = tl.where(is_there, inside * slopes, 0.0)
            mean = tl.sum(gained, 1)
            grad_logits = weight[:, None, None] * (gained - inside * mean[:, None, :])
            attended += tl.sum(weight[:, None, None] * inside, 0)
            earned += tl.sum(grad_logits, 0)
            total = add_dot(total, tl.trans(m), in_rows(grad_logits), TYPE)
            if slice == 0:
                pair = first + tl.arange(0, GROUPS)
                tl.store(grad_weights + block + pair, tl.sum(mean, 1), pair < last)
                if TO_STEPS:
                    at = pair[:, None] * heads + h[None, :]
                    exists = (pair < last)[:, None] & (h < heads)[None, :]
                    tl.store(tops + at, top, exists)
                    tl.store(scales + at, weight[:, None] * inverse, exists)
                    tl.store(means + at, mean, exists)
        if HAS_POSITIONS:
            p = load_rows(positions, within, D, within < C, slice, D, WIDTH)
            total = add_dot(total, tl.trans(p), earned, POSITION_TYPE)
        if TO_POSITIONS:
            if slice == 0:
                at = x * heads * C
                _add_by_position(earned_sums + at, heads, 0, earned, C, BLOCK_H, BLOCK_C)
                _add_by_position(attended_sums + at, heads, 0, attended, C, BLOCK_H, BLOCK_C)
    else:
        for first in range(x * k, last):
            weight = tl.load(weights + first)
            top = tl.zeros([BLOCK_H], tl.float32) + float("-inf")
            norm = tl.zeros([BLOCK_H], tl.float32)
            mean = tl.zeros([BLOCK_H], tl.float32)
            for start in range(0, C, BLOCK_C):
                n, there, _ = find_tile(
                    picked, weights, words, first, last, start, missing, C, 1, BLOCK_C, HAS_MASK
                )
                m = load_rows(steps, n, steps_by_step, there, slice, D, WIDTH)
                logits, slopes = score_both(
                    m, both, steps, n, steps_by_step, there,
                    probe, probe_by_head, grad, grad_by_head, heads,
                    D, BLOCK_H, DEPTH, TYPE, WHOLE,
                )  # fmt: skip
                if HAS_POSITIONS:
                    c = start + within
                    p = load_rows(positions, c, D, there, slice, D, WIDTH)
                    by_position = score_both(
                        p, both, positions, c, D, there,
                        probe, probe_by_head, grad, grad_by_head, heads,
                        D, BLOCK_H, DEPTH, POSITION_TYPE, WHOLE,
                    )  # fmt: skip
                    logits += by_position[0]
                    slopes += by_position[1]
                logits = tl.where(there[:, None], logits, float("-inf"))
                higher = tl.maximum(top, tl.max(logits, 0))
                scale = tl.where(top == higher, 1.0, tl.exp(top - higher))
                inside = tl.where(there[:, None], tl.exp(logits - higher[None, :]), 0.0)
                norm = norm * scale + tl.sum(inside, 0)
                gained = tl.where(there[:, None], inside * slopes, 0.0)
                mean = mean * scale + tl.sum(gained, 0)
                top = higher
            inverse = 1.0 / tl.where(norm == 0.0, 1.0, norm)
            mean *= inverse
            for start in range(0, C, BLOCK_C):
                n, there, _ = find_tile(
                    picked, weights, words, first, last, start, missing, C, 1, BLOCK_C, HAS_MASK
                )
                m = load_rows(steps, n, steps_by_step, there, slice, D, WIDTH)
                logits, slopes = score_both(
                    m, both, steps, n, steps_by_step, there,
                    probe, probe_by_head, grad, grad_by_head, heads,
                    D, BLOCK_H, DEPTH, TYPE, WHOLE,
                )  # fmt: skip
                if HAS_POSITIONS:
                    c = start + within
                    p = load_rows(positions, c, D, there, slice, D, WIDTH)
                    by_position = score_both(
                        p, both, positions, c, D, there,
                        probe, probe_by_head, grad, grad_by_head, heads,
                        D, BLOCK_H, DEPTH, POSITION_TYPE, WHOLE,
                    )  # fmt: skip
                    logits += by_position[0]
                    slopes += by_position[1]
                share = weight * inverse[None, :] * tl.exp(logits - top[None, :])
                share = tl.where(there[:, None], share, 0.0)
                grad_logits = tl.where(there[:, None], share * (slopes - mean[None, :]), 0.0)
                total = add_dot(total, tl.trans(m), grad_logits, TYPE)
                if HAS_POSITIONS:
                    total = add_dot(total, tl.trans(p), grad_logits, POSITION_TYPE)
                if TO_POSITIONS:
                    if slice == 0:
                        at = x * heads * C
                        _add_by_position(
                            earned_sums + at, heads, start, grad_logits, C, BLOCK_H, BLOCK_C
                        )
                        _add_by_position(
                            attended_sums + at, heads, start, share, C, BLOCK_H, BLOCK_C
                        )
            if slice == 0:
                tl.store(grad_weights + block + first, tl.sum(mean, 0))
                if TO_STEPS:
                    at = first * heads + h
                    tl.store(tops + at, top, h < heads)
                    tl.store(scales + at, weight * inverse, h < heads)
                    tl.store(means + at, mean, h < heads)
    grad_probe += row * out_by_batch + q * out_by_query
    store_sums(grad_probe, out_by_head, heads, slice, total, D, BLOCK_H, WIDTH)


@triton.jit
def steps_backward_kernel(
    grad,
    probe,
    steps,
    step_mask,
    positions,
    tops,
    scales,
    means,
    ordered,
    starts,
    grad_steps,
    grad_by_batch,
    grad_by_query,
    grad_by_head,
    probe_by_batch,
    probe_by_query,
    probe_by_head,
    steps_by_batch,
    steps_by_step,
    mask_by_batch,
    queries,
    k,
    chunks,
    length,
    missing,
    H: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
    POSITION_TYPE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """Gradient of a tile of one chunk's steps, from all heads of all queries that picked it."""
    SLICES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    slice = program % SLICES * WIDTH
    start = program // SLICES % TILES * BLOCK_C
    slot = program // (SLICES * TILES)
    owner, chunk = slot // chunks, slot % chunks
    steps += owner * steps_by_batch
    if HAS_MASK:
        step_mask += owner * mask_by_batch
    there = there_in_chunk(step_mask, chunk, start, missing, C, BLOCK_C, HAS_MASK)
    c = start + tl.arange(0, BLOCK_C)
    n = chunk * C + c - missing
    total = tl.zeros([BLOCK_C, WIDTH], tl.float32)
    # Heads of queries one after the other, whatever their number.
    end = tl.load(starts + slot + 1).to(tl.int64) * H
    for first in range(tl.load(starts + slot).to(tl.int64) * H, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        pair = tl.load(ordered + r // H, r < end, other=0).to(tl.int64)
        head = r % H
        x = pair // k
        row, q = x // queries, x % queries
        u_at = row * probe_by_batch + q * probe_by_query + head * probe_by_head
        g_at = row * grad_by_batch + q * grad_by_query + head * grad_by_head
        logits = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        slopes = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for depth in range(0, D, DEPTH):
            u = load_rows(probe, u_at, 1, r < end, depth, D, DEPTH)
            g = load_rows(grad, g_at, 1, r < end, depth, D, DEPTH)
            m = tl.trans(load_rows(steps, n, steps_by_step, there, depth, D, DEPTH))
            logits = add_dot(logits, u, m, TYPE)
            slopes = add_dot(slopes, g, m, TYPE)
            if HAS_POSITIONS:
                p = tl.trans(load_rows(positions, c, D, there, depth, D, DEPTH))
                logits = add_dot(logits, u, p, POSITION_TYPE)
                slopes = add_dot(slopes, g, p, POSITION_TYPE)
        top = tl.load(tops + pair * H + head, r < end, other=0.0)
        scale = tl.load(scales + pair * H + head, r < end, other=0.0)
        mean = tl.load(means + pair * H + head, r < end, other=0.0)
        inside = (r < end)[:, None] & there[None, :]
        share = tl.where(inside, scale[:, None] * tl.exp(logits - top[:, None]), 0.0)
        grad_logits = tl.where(inside, share * (slopes - mean[:, None]), 0.0)
        u = load_rows(probe, u_at, 1, r < end, slice, D, WIDTH)
        total = add_dot(total, tl.trans(grad_logits), u, TYPE)
        g = load_rows(grad, g_at, 1, r < end, slice, D, WIDTH)
        total = add_dot(total, tl.trans(share), g, TYPE)
    # Also where the program has summed NaN beside: masked steps get nothing.
    total = tl.where(there[:, None], total, 0.0).to(grad_steps.dtype.element_ty)
    d = slice + tl.arange(0, WIDTH)
    exists = ((c < C) & (n >= 0))[:, None] & (d < D)[None, :]
    tl.store(grad_steps + (owner * length + n)[:, None] * D + d[None, :], total, exists)


def steps_launch(call: Call, launch: Launch) -> Launch:
    """Say how `steps_backward_kernel` is compiled, but for flags."""
    sizes = launch.constants
    exact = sizes["TYPE"] == tl.float32
    wide = power_of_two(call.dim, 16)
    constants = {
        **{name: sizes[name] for name in ("C", "D", "TYPE", "POSITION_TYPE")},
        "H": call.heads,
        "BLOCK_R": 16 if exact else 32,
        "BLOCK_C": min(power_of_two(call.chunk_size, 16), 32),
        "WIDTH": min(wide, 128),
        "DEPTH": min(wide, 32 if exact else 64),
    }
    warps = 8 if constants["WIDTH"] >= 128 else 4
    return Launch(constants, num_warps=warps, num_stages=2 if exact else 3)


def attend_backward(
    grad: Tensor,
    probe: Tensor,
    steps: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    to_steps: bool,
    to_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of probe, weights, steps and positions; empty where not asked for."""
    grad_probe = by_head(probe)
    grad_steps = steps.new_empty(steps.shape if to_steps else (0, 0, 0))
    grad_positions = probe.new_empty((0, 0))
    if positions is not None and to_positions:
        grad_positions = positions.new_zeros(positions.shape)
    if not (probe.numel() and picked.numel()):
        return grad_probe.zero_(), torch.zeros_like(weights), grad_steps.zero_(), grad_positions
    call = Call(probe, steps, step_mask, positions, picked, weights, chunk_size)
    grad = by_last(grad)
    launch = blocks(call, both=True)
    grid = call.grid(launch)
    pairs = call.picked.numel()
    exact = {"dtype": torch.float32, "device": probe.device}
    # One share for each block of heads.
    grad_weights = torch.empty(grid[1], *picked.shape, **exact)
    softmaxes = torch.empty(3, pairs if to_steps else 0, call.heads, **exact).unbind()
    to_positions = bool(grad_positions.numel())
    summed = call.batch * call.queries if to_positions else 0
    by_position = torch.zeros(2, summed, call.heads, chunk_size, **exact).unbind()
    strides = *grad.stride()[:3], *call.probe.stride()[:3], *call.steps.stride()[:2]
    queries_backward_kernel[grid](
        grad,
        call.probe,
        call.steps,
        call.words(launch),
        call.positions,
        call.picked,
        call.weights,
        grad_probe,
        grad_weights,
        *softmaxes,
        *by_position,
        *strides,
        *grad_probe.stride()[:3],
        pairs,
        call.queries,
        call.heads,
        call.k,
        call.missing,
        TO_STEPS=to_steps,
        TO_POSITIONS=to_positions,
        **call.flags,
        **launch.options(),
    )
    if to_steps:
        ordered = sort_picks(call.picked, call.rows, call.chunks)
        launch = steps_launch(call, launch)
        sizes = launch.constants
        tiles = divide_up(chunk_size, sizes["BLOCK_C"]) * divide_up(call.dim, sizes["WIDTH"])
        steps_backward_kernel[(call.rows * call.chunks * tiles,)](
            grad,
            call.probe,
            call.steps,
            call.step_mask,
            call.positions,
            *softmaxes,
            ordered.pairs,
            ordered.starts,
            grad_steps,
            *strides,
            call.mask_by_batch,
            call.queries,
            call.k,
            call.chunks,
            call.length,
            call.missing,
            HAS_MASK=call.flags["HAS_MASK"],
            HAS_POSITIONS=call.flags["HAS_POSITIONS"],
            **launch.options(),
        )
    if to_positions:
        earned, attended = by_position
        found = _over_queries(earned, probe) + _over_queries(attended, grad)
        grad_positions = found.to(grad_positions.dtype)
    return grad_probe, grad_weights.sum(0), grad_steps, grad_positions


def _over_queries(by_position: Tensor, rows: Tensor) -> Tensor:
    """Sum [X, H, C] times [B, Q, H, D] over queries and heads: [C, D]."""
    return by_position.flatten(0, 1).mT @ rows.reshape(-1, rows.shape[-1]).float()
