"""What `native.pick` and `native.attend` do, and their ways back, by the compiled kernel.

Nothing is gathered, and the way back computes again what it needs. Steps are read as they lie.
"""

from typing import Any

import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.memory.codes import Codes
from htm_pytorch.ops import fitting, operators

BLOCK_BYTES = 16 * 2**20
"""How many bytes of weights are held at a time on the way back to the memory."""


def _source(source: Tensor, mask: Tensor | None, size: int, eps: float) -> dict[str, Any]:
    """What is scored: summaries, as steps in chunks of one, or the means of chunks of steps."""
    if size == 1 and mask is None:
        return {
            "summaries": source,
            "summaries_by_batch": source.stride(0),
            "summaries_by_chunk": source.stride(1),
            "dim": source.shape[2],
        }
    return {
        **_rows(source, mask, size),
        "dim": source.shape[2],
        "eps": 0.0 if mask is None else eps,
    }


def _rows(steps: Tensor, mask: Tensor | None, chunk_size: int) -> dict[str, Any]:
    missing = -steps.shape[1] % chunk_size
    return {
        "rows": steps.data_ptr() - missing * steps.stride(1) * steps.itemsize,
        "rows_by_batch": steps.stride(0),
        "rows_by_step": steps.stride(1),
        **kernels.step_mask(mask, missing),
    }


def _fading(
    route: Tensor, chunks: int, ceiling: Tensor | None, decay: Tensor | None, ages: Tensor | None
) -> dict[str, Any]:
    """What scores fade by, if they do."""
    if ceiling is None or decay is None or ages is None:
        return {}
    batch, queries = route.shape[:2]
    for name, part in {"ceiling": ceiling, "decay": decay}.items():
        operators.check(name, part, (batch, queries), route.dtype)
    operators.check_axes("ages", ages, 3)
    rows = 1 if ages.shape[0] == 1 else batch, 1 if ages.shape[1] == 1 else queries
    operators.check("ages", ages, (*rows, chunks), route.dtype)
    ages = kernels.by_last(ages).expand(batch, queries, chunks)
    return {
        "ceiling": ceiling.contiguous(),
        "decay": decay.contiguous(),
        "fading": ages,
        "fading_by_batch": ages.stride(0),
        "fading_by_query": ages.stride(1),
    }


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
    codes: Codes | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k best chunks of each query and their weights, both [B, Q, K].

    By codes, if there are any: the same, to the last bit.
    """
    chunks = fitting.check_source(route, source, step_mask, chunk_size)
    operators.check("valid", valid, (len(source), chunks), torch.bool)
    operators.check("chunk_mask", chunk_mask, (*route.shape[:2], chunks), torch.bool)
    picked = torch.empty(*route.shape[:2], k, dtype=torch.int64, device=route.device)
    weights = route.new_empty(picked.shape)
    if not picked.numel():
        return picked, weights
    route, source = route.contiguous(), kernels.by_last(source)
    step_mask = None if step_mask is None else kernels.by_last(step_mask)
    masks: dict[str, Any] = {}
    if valid is not None:
        valid = kernels.by_last(valid)
        masks |= {"valid": valid, "valid_by_batch": valid.stride(0)}
    if chunk_mask is not None:
        chunk_mask = kernels.by_last(chunk_mask)
        masks |= {
            "chunk_mask": chunk_mask,
            "chunk_mask_by_batch": chunk_mask.stride(0),
            "chunk_mask_by_query": chunk_mask.stride(1),
        }
    fading = _fading(route, chunks, ceiling, decay, ages)
    arguments = {
        **kernels.sizes(picked, source.shape[0], source.shape[1], chunk_size),
        **_source(source, step_mask, chunk_size, eps),
        **masks,
        **fading,
        "route": route,
        "weights": weights,
    }
    if codes is not None:
        arguments["codes"] = codes.struct()
    kernels.run("pick", route, source, arguments)
    return picked, weights


def pick_coded(
    route: Tensor,
    source: Tensor,
    valid: Tensor | None,
    chunk_mask: Tensor | None,
    ceiling: Tensor | None,
    decay: Tensor | None,
    ages: Tensor | None,
    k: int,
    coarse: Tensor,
    centres: Tensor,
    radii: Tensor,
    terms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do what `pick` does with summaries, of which most are spared a look by their codes."""
    codes = Codes(coarse, None, centres, radii, terms)
    codes.check(source)
    fading = ceiling, decay, ages
    return pick(route, source, valid, None, chunk_mask, *fading, k, 1, 0.0, codes)


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
    """Gradients of route, source, ceiling and decay; empty where they are not asked for."""
    chunks = fitting.check_source(route, source, step_mask, chunk_size)
    fitting.check_picks(route, picked, weights)
    operators.check("grad", grad, picked.shape, route.dtype)
    grad_route = torch.zeros(route.shape, dtype=route.dtype, device=route.device)
    grad_source = route.new_zeros(source.shape if to_source else (0, 0, 0))
    grad_ceiling = route.new_zeros(0 if ceiling is None else ceiling.shape)
    grad_decay = torch.zeros_like(grad_ceiling)
    if not picked.numel():
        return grad_route, grad_source.to(source.dtype), grad_ceiling, grad_decay
    route, source, grad = route.contiguous(), kernels.by_last(source), grad.contiguous()
    picked, weights = picked.contiguous(), weights.contiguous()
    step_mask = None if step_mask is None else kernels.by_last(step_mask)
    fading = _fading(route, chunks, ceiling, decay, ages)
    arguments = {
        **kernels.sizes(picked, source.shape[0], source.shape[1], chunk_size),
        **_source(source, step_mask, chunk_size, eps),
        "weights": weights,
        "grad_picks": grad,
        "grad_scores": torch.empty_like(weights),
        "grad_route": grad_route,
        **fading,
    }
    if fading:
        arguments |= {"grad_ceiling": grad_ceiling, "grad_decay": grad_decay, "route": route}
    kernels.run("pick_backward", route, source, arguments)
    if to_source:
        pairs = picked.shape[0] * picked.shape[1]
        arguments |= {
            "route": route,
            "first": 0,
            "last": pairs,
            **kernels.sorting(arguments, pairs),
        }
        if "summaries" in arguments:
            arguments["grad_summaries"] = grad_source
        else:
            arguments |= _grad_steps(grad_source, -source.shape[1] % chunk_size)
        kernels.run("pick_backward_summaries", route, None, arguments)
    return grad_route, grad_source.to(source.dtype), grad_ceiling, grad_decay


def _steps(
    probe: Tensor, steps: Tensor, step_mask: Tensor | None, picked: Tensor, chunk_size: int
) -> dict[str, Any]:
    return {
        **kernels.sizes(picked, steps.shape[0], steps.shape[1], chunk_size),
        **_rows(steps, step_mask, chunk_size),
        "heads": probe.shape[2],
        "width": probe.shape[3],
        "probe": kernels.heads(probe),
    }


def attend(
    probe: Tensor,
    steps: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
) -> Tensor:
    """Return the context [B, Q, H, D] of the probes [B, Q, H, D] inside the picked chunks."""
    fitting.check_inside(probe, steps, step_mask, positions, picked, weights, chunk_size)
    context = kernels.by_head(probe)
    if not context.numel():
        return context
    probe, steps = kernels.evenly(probe), kernels.by_last(steps)
    picked, weights = picked.contiguous(), weights.contiguous()
    step_mask = None if step_mask is None else kernels.by_last(step_mask)
    positions = None if positions is None else positions.contiguous()
    arguments = {
        **_steps(probe, steps, step_mask, picked, chunk_size),
        "weights": weights,
        "positions": positions,
        "context": kernels.heads(context),
    }
    kernels.run("attend", probe, steps, arguments)
    return context


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
    """Gradients of probe, weights, steps and positions; empty where they are not asked for."""
    fitting.check_inside(probe, steps, step_mask, positions, picked, weights, chunk_size)
    operators.check("grad", grad, probe.shape, probe.dtype)
    dtype = probe.dtype
    grad_probe = kernels.by_head(probe)
    grad_weights = torch.zeros(weights.shape, dtype=dtype, device=weights.device)
    grad_steps = steps.new_zeros(steps.shape if to_steps else (0,) * 3, dtype=dtype)
    grad_positions = steps.new_zeros(gradient_shape(positions, to_positions), dtype=dtype)
    if not (probe.numel() and picked.numel()):
        return grad_probe.zero_(), grad_weights, grad_steps.to(steps.dtype), grad_positions
    grad, probe, steps = kernels.evenly(grad), kernels.evenly(probe), kernels.by_last(steps)
    picked, weights = picked.contiguous(), weights.contiguous()
    step_mask = None if step_mask is None else kernels.by_last(step_mask)
    positions = None if positions is None else positions.contiguous()
    batch, queries, heads, _ = probe.shape
    arguments = {
        **_steps(probe, steps, step_mask, picked, chunk_size),
        "weights": weights,
        "positions": positions,
        "grad": kernels.heads(grad),
        "grad_probe": kernels.heads(grad_probe),
        "grad_weights": grad_weights,
    }
    block = total = batch * queries
    by_position = probe.new_empty(total, 2, heads, chunk_size if to_positions else 0, dtype=dtype)
    if to_positions:
        arguments["position_weights"] = by_position
    if to_steps:
        held = 2 * picked.shape[2] * heads * chunk_size
        block = min(total, max(1, BLOCK_BYTES // (held * probe.itemsize)))
        arguments["block_weights"] = probe.new_empty(block * held, dtype=dtype)
        arguments |= kernels.sorting(arguments, block)
        arguments |= _grad_steps(grad_steps, -steps.shape[1] % chunk_size)
    for first in range(0, total, block):
        arguments |= {"first": first, "last": min(first + block, total)}
        kernels.run("attend_backward", probe, steps, arguments)
        if to_steps:
            kernels.run("attend_backward_steps", probe, None, arguments)
    if to_positions:
        for side, of_side in zip((probe, grad), by_position.unbind(1), strict=True):
            grad_positions += torch.einsum("xhc,xhd->cd", of_side, side.flatten(0, 1))
    return grad_probe, grad_weights, grad_steps.to(steps.dtype), grad_positions


def _grad_steps(grad: Tensor, missing: int) -> dict[str, Any]:
    return {
        "grad_rows": grad.data_ptr() - missing * grad.stride(1) * grad.itemsize,
        "grad_by_batch": grad.stride(0),
        "grad_by_step": grad.stride(1),
    }


def gradient_shape(positions: Tensor | None, wanted: bool) -> tuple[int, ...]:
    """Return the shape of the gradient of positions; it is empty where it is not asked for."""
    return tuple(positions.shape) if wanted and positions is not None else (0, 0)
