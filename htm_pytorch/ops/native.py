"""`recall` by a compiled kernel on the CPU: nothing is gathered, the backward recomputes.

Two operators of torch call the compiled kernel: `pick` keeps the best chunks, `attend` reads the
steps inside them. Both take steps as they lie, whole or in chunks.
"""

from typing import Any

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory, Steps
from htm_pytorch.ops import kernels

BLOCK_BYTES = 16 * 2**20
"""Of the weights held at a time on the way back to the memory."""


def pick(
    route: Tensor, memory: ChunkedMemory | Steps, k: int, chunk_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the k best chunks of each query and their weights, both [B, Q, K].

    Best first; -1, of weight 0, where a query sees fewer.
    """
    if isinstance(memory, Steps):
        source, valid, mask, size = memory.steps, None, memory.mask, memory.chunk_size
        eps = memory.eps
    else:
        source, valid, mask, size = memory.summaries, memory.valid, None, 1
        eps = 0.0
    k = min(k, memory.chunks)
    return torch.ops.htm_pytorch.pick(route, source, valid, mask, chunk_mask, k, size, eps)


def attend(
    probe: Tensor,
    memory: ChunkedMemory | Steps,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return the context [B, Q, H, D] of the probes [B, Q, H, D] inside the picked chunks."""
    if isinstance(memory, Steps):
        steps, mask = memory.steps, memory.mask
    else:
        steps, mask = memory.contents.flatten(1, 2), memory.step_mask
    mask = None if mask is None else mask.flatten(1)
    rows = steps[:, :, None, None]
    return attend_rows(probe, rows, mask, positions, picked, weights, memory.chunk_size)


def attend_rows(
    probe: Tensor,
    rows: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
) -> Tensor:
    """Return the context [B, Q, R, W] of the probes [B, Q, R, W] inside the picked chunks.

    Args:
        probe: R = G * H rows a query, H for each of G groups.
        rows: [B, N, P, G, W], the steps; P is 2 for keys and values, 1 where they are the same.
        step_mask: [B, N] bool.
        positions: [chunk_size, W], added to the steps of every chunk; for P = G = 1.
        picked: [B, Q, K], as `pick` returns them.
        weights: [B, Q, K].
        chunk_size: C; the oldest chunk is short where N is no multiple of it.
    """
    return torch.ops.htm_pytorch.attend(
        probe, rows, step_mask, positions, picked, weights, chunk_size
    )


def _sizes(picked: Tensor, memory_batch: int, length: int, chunk_size: int) -> dict[str, Any]:
    return {
        "batch": picked.shape[0],
        "queries": picked.shape[1],
        "k": picked.shape[2],
        "memory_batch": memory_batch,
        "chunks": -(-length // chunk_size),
        "chunk_size": chunk_size,
        "missing": -length % chunk_size,
        "picked": picked,
    }


def _by_last(tensor: Tensor) -> Tensor:
    """Return the tensor with its last axis unbroken."""
    return tensor if tensor.stride(-1) == 1 or not tensor.numel() else tensor.contiguous()


def _by_head(like: Tensor) -> Tensor:
    """Return an unwritten [B, Q, R, W] whose heads lie apart, as batched matrix products want it."""
    batch, queries, heads, width = like.shape
    return like.new_empty(heads, batch, queries, width).permute(1, 2, 0, 3)


def _evenly(rows: Tensor) -> Tensor:
    """Return `rows` [B, Q, R, W] with all queries as far apart, whatever their row of the batch."""
    even = len(rows) == 1 or rows.stride(0) == rows.shape[1] * rows.stride(1)
    return rows if even and rows.stride(-1) == 1 else rows.contiguous()


def _heads(rows: Tensor) -> kernels.Heads:
    return kernels.Heads(rows.data_ptr(), rows.stride(1), rows.stride(2))


def _step_mask(mask: Tensor | None, missing: int) -> dict[str, Any]:
    if mask is None:
        return {}
    return {"step_mask": mask.data_ptr() - missing, "step_mask_by_batch": mask.stride(0)}


def _source(source: Tensor, mask: Tensor | None, size: int, eps: float) -> dict[str, Any]:
    """What is scored: summaries, as steps in chunks of one, or the means of chunks of steps."""
    if size == 1 and mask is None:
        return {
            "summaries": source,
            "summaries_by_batch": source.stride(0),
            "summaries_by_chunk": source.stride(1),
            "dim": source.shape[2],
        }
    missing = -source.shape[1] % size
    step = source.stride(1)
    return {
        "keys": source.data_ptr() - missing * step * source.itemsize,
        "rows_by_batch": source.stride(0),
        "rows_by_step": step,
        "dim": source.shape[2],
        "eps": 0.0 if mask is None else eps,
        **_step_mask(mask, missing),
    }


def _pick(
    route: Tensor,
    source: Tensor,
    valid: Tensor | None,
    step_mask: Tensor | None,
    chunk_mask: Tensor | None,
    k: int,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    picked = torch.empty(*route.shape[:2], k, dtype=torch.int64)
    weights = route.new_empty(picked.shape)
    if not picked.numel():
        return picked, weights
    route, source = route.contiguous(), _by_last(source)
    step_mask = None if step_mask is None else _by_last(step_mask)
    masks: dict[str, Any] = {}
    if valid is not None:
        valid = _by_last(valid)
        masks |= {"valid": valid, "valid_by_batch": valid.stride(0)}
    if chunk_mask is not None:
        chunk_mask = _by_last(chunk_mask)
        masks |= {
            "chunk_mask": chunk_mask,
            "chunk_mask_by_batch": chunk_mask.stride(0),
            "chunk_mask_by_query": chunk_mask.stride(1),
        }
    arguments = {
        **_sizes(picked, source.shape[0], source.shape[1], chunk_size),
        **_source(source, step_mask, chunk_size, eps),
        **masks,
        "route": route,
        "weights": weights,
    }
    kernels.run("pick", route, source, arguments)
    return picked, weights


def _pick_shapes(
    route: Tensor, source: Tensor, valid: Any, step_mask: Any, chunk_mask: Any, k: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    weights = route.new_empty(*route.shape[:2], k)
    return weights.new_empty(weights.shape, dtype=torch.int64), weights


def _pick_backward(
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
    """Gradients of route and source; the latter empty where it is not asked for."""
    grad_route = torch.zeros(route.shape, dtype=route.dtype)
    grad_source = torch.zeros(source.shape if to_source else (0, 0, 0), dtype=route.dtype)
    if not picked.numel():
        return grad_route, grad_source.to(source.dtype)
    route, source, grad = route.contiguous(), _by_last(source), grad.contiguous()
    step_mask = None if step_mask is None else _by_last(step_mask)
    arguments = {
        **_sizes(picked, source.shape[0], source.shape[1], chunk_size),
        **_source(source, step_mask, chunk_size, eps),
        "weights": weights,
        "grad_picks": grad,
        "grad_scores": torch.empty_like(weights),
        "grad_route": grad_route,
    }
    kernels.run("pick_backward", route, source, arguments)
    if to_source:
        pairs = picked.shape[0] * picked.shape[1]
        arguments |= {"route": route, "first": 0, "last": pairs, **_sorting(arguments, pairs)}
        if "summaries" in arguments:
            arguments["grad_summaries"] = grad_source
        else:
            arguments |= _grad_rows(grad_source, -source.shape[1] % chunk_size)
        kernels.run("pick_backward_summaries", route, None, arguments)
    return grad_route, grad_source.to(source.dtype)


def _pick_backward_shapes(
    grad: Tensor, route: Tensor, source: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    shape = source.shape if rest[-1] else (0, 0, 0)
    return route.new_empty(route.shape), source.new_empty(shape)


def _sorting(arguments: dict[str, Any], queries: int) -> dict[str, Any]:
    """Room to sort the picks of `queries` by their chunk."""
    slots = arguments["memory_batch"] * arguments["chunks"]
    return {
        "starts": torch.empty(slots + 1, dtype=torch.int64),
        "pairs": torch.empty(queries * arguments["k"], dtype=torch.int64),
    }


def _grad_rows(grad: Tensor, missing: int) -> dict[str, Any]:
    step = grad.stride(1)
    return {
        "grad_keys": grad.data_ptr() - missing * step * grad.itemsize,
        "grad_by_batch": grad.stride(0),
        "grad_by_step": step,
    }


def _rows(rows: Tensor, step_mask: Tensor | None, heads: int, missing: int) -> dict[str, Any]:
    first = rows.data_ptr() - missing * rows.stride(1) * rows.itemsize
    values = rows.stride(2) * rows.itemsize if rows.shape[2] == 2 else 0
    groups = rows.shape[3]
    return {
        "keys": first,
        "values": first + values,
        "rows_by_batch": rows.stride(0),
        "rows_by_step": rows.stride(1),
        "rows_by_group": rows.stride(3),
        "groups": groups,
        "heads": heads // groups,
        "width": rows.shape[4],
        **_step_mask(step_mask, missing),
    }


def _attend(
    probe: Tensor,
    rows: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
) -> Tensor:
    context = _by_head(probe)
    if not context.numel():
        return context
    probe, rows, weights = _evenly(probe), _by_last(rows), weights.contiguous()
    step_mask = None if step_mask is None else _by_last(step_mask)
    positions = None if positions is None else positions.contiguous()
    missing = -rows.shape[1] % chunk_size
    arguments = {
        **_sizes(picked, rows.shape[0], rows.shape[1], chunk_size),
        **_rows(rows, step_mask, probe.shape[2], missing),
        "weights": weights,
        "probe": _heads(probe),
        "positions": positions,
        "context": _heads(context),
    }
    kernels.run("attend", probe, rows, arguments)
    return context


def _attend_backward(
    grad: Tensor,
    probe: Tensor,
    rows: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    to_rows: bool,
    to_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of probe, weights, rows and positions; empty where they are not asked for."""
    exact = probe.dtype
    grad_probe = _by_head(probe)
    grad_weights = torch.zeros(weights.shape, dtype=exact)
    grad_rows = torch.zeros(rows.shape if to_rows else (0,) * 5, dtype=exact)
    grad_positions = torch.zeros(_shape(positions, to_positions), dtype=exact)
    if not (probe.numel() and picked.numel()):
        return grad_probe.zero_(), grad_weights, grad_rows.to(rows.dtype), grad_positions
    grad, probe, rows = _evenly(grad), _evenly(probe), _by_last(rows)
    step_mask = None if step_mask is None else _by_last(step_mask)
    positions = None if positions is None else positions.contiguous()
    batch, queries, heads, _ = probe.shape
    missing = -rows.shape[1] % chunk_size
    arguments = {
        **_sizes(picked, rows.shape[0], rows.shape[1], chunk_size),
        **_rows(rows, step_mask, heads, missing),
        "weights": weights,
        "probe": _heads(probe),
        "positions": positions,
        "grad": _heads(grad),
        "grad_probe": _heads(grad_probe),
        "grad_weights": grad_weights,
    }
    total = batch * queries
    block = total
    by_position = torch.empty(total, 2, heads, chunk_size if to_positions else 0, dtype=exact)
    if to_positions:
        arguments["position_weights"] = by_position
    if to_rows:
        held = 2 * picked.shape[2] * heads * chunk_size
        block = min(total, max(1, BLOCK_BYTES // (held * probe.itemsize)))
        arguments["block_weights"] = torch.empty(block * held, dtype=exact)
        arguments |= _sorting(arguments, block)
        arguments |= _grad_rows(grad_rows, missing) | {"grad_by_group": grad_rows.stride(3)}
        apart = grad_rows.stride(2) * grad_rows.itemsize if rows.shape[2] == 2 else 0
        arguments["grad_values"] = arguments["grad_keys"] + apart
    for first in range(0, total, block):
        arguments |= {"first": first, "last": min(first + block, total)}
        kernels.run("attend_backward", probe, rows, arguments)
        if to_rows:
            kernels.run("attend_backward_steps", probe, None, arguments)
    if to_positions:
        for side, of_side in zip((probe, grad), by_position.unbind(1), strict=True):
            grad_positions += torch.einsum("xhc,xhd->cd", of_side, side.flatten(0, 1))
    return grad_probe, grad_weights, grad_rows.to(rows.dtype), grad_positions


def _shape(positions: Tensor | None, wanted: bool) -> tuple[int, ...]:
    return tuple(positions.shape) if wanted and positions is not None else (0, 0)


def _attend_backward_shapes(
    grad: Tensor,
    probe: Tensor,
    rows: Tensor,
    step_mask: Any,
    positions: Tensor | None,
    picked: Any,
    weights: Tensor,
    chunk_size: int,
    to_rows: bool,
    to_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _by_head(probe),
        weights.new_empty(weights.shape),
        rows.new_empty(rows.shape if to_rows else (0,) * 5),
        probe.new_empty(_shape(positions, to_positions)),
    )


_library = torch.library.Library("htm_pytorch", "FRAGMENT")


def _register(schema: str, run: Any, shapes: Any) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"htm_pytorch::{name}", shapes, lib=_library)


_register(
    "pick(Tensor route, Tensor source, Tensor? valid, Tensor? step_mask, Tensor? chunk_mask, "
    "SymInt k, SymInt chunk_size, float eps) -> (Tensor picked, Tensor weights)",
    _pick,
    _pick_shapes,
)
_register(
    "pick_backward(Tensor grad, Tensor route, Tensor source, Tensor? step_mask, Tensor picked, "
    "Tensor weights, SymInt chunk_size, float eps, bool to_source) -> (Tensor, Tensor)",
    _pick_backward,
    _pick_backward_shapes,
)
_register(
    "attend(Tensor probe, Tensor rows, Tensor? step_mask, Tensor? positions, Tensor picked, "
    "Tensor weights, SymInt chunk_size) -> Tensor",
    _attend,
    lambda probe, *rest: _by_head(probe),
)
_register(
    "attend_backward(Tensor grad, Tensor probe, Tensor rows, Tensor? step_mask, "
    "Tensor? positions, Tensor picked, Tensor weights, SymInt chunk_size, bool to_rows, "
    "bool to_positions) -> (Tensor, Tensor, Tensor, Tensor)",
    _attend_backward,
    _attend_backward_shapes,
)


def _pick_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    route, source, _, step_mask, _, _, ctx.chunk_size, ctx.eps = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(route, source, step_mask, *output)


def _pick_differentiate(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_source = ctx.needs_input_grad[1]
    route, source = torch.ops.htm_pytorch.pick_backward(
        grad, *ctx.saved_tensors, ctx.chunk_size, ctx.eps, to_source
    )
    return route, source if to_source else None, *(None,) * 6


def _attend_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _attend_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    probe, weights, rows, positions = torch.ops.htm_pytorch.attend_backward(
        grad, *ctx.saved_tensors, ctx.chunk_size, needs[1], needs[3]
    )
    return (
        probe,
        rows if needs[1] else None,
        None,
        positions if needs[3] else None,
        None,
        weights,
        None,
    )


torch.library.register_autograd(
    "htm_pytorch::pick", _pick_differentiate, setup_context=_pick_context, lib=_library
)
torch.library.register_autograd(
    "htm_pytorch::attend", _attend_differentiate, setup_context=_attend_context, lib=_library
)
