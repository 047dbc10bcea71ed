"""The operators `pick` and `attend`: what keeps the best chunks, and what reads inside them.

`register` makes them, and their ways back, of functions of this meaning; those of the compiled
kernel on the CPU are registered here. All take steps as they lie, whole or in chunks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.memory import ChunkedMemory, ScoredHome, Steps
from htm_pytorch.memory.codes import Codes
from htm_pytorch.memory.fading import Fading
from htm_pytorch.ops import compiled, operators


def pick(
    route: Tensor,
    memory: ChunkedMemory | Steps | ScoredHome,
    k: int,
    chunk_mask: Tensor | None,
    fading: Fading | None = None,
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the k best chunks of each query and their weights, both [B, Q, K].

    Best first; -1, of weight 0, where a query sees fewer. `prefix` says which operators,
    of those that were registered.
    """
    if isinstance(memory, Steps):
        source, valid, mask, size = memory.steps, None, memory.mask, memory.chunk_size
        eps = memory.eps
    else:
        source, valid, mask, size = memory.summaries, memory.valid, None, 1
        eps = 0.0
    batch, queries, dim = route.shape
    if memory.batch == 1 < batch:
        # As one row of queries, so that the memory is read once for all.
        route = route.reshape(1, batch * queries, dim)
        chunk_mask = None if chunk_mask is None else chunk_mask.flatten(0, 1)[None]
        fading = None if fading is None else _as_one_row(fading)
    fades = fading or (None,) * 3
    kept = min(k, memory.chunks)
    if not prefix and (codes := _codes_of(memory, route, kept)) is not None:
        parts = codes.coarse, codes.centres, codes.radii, codes.terms
        picked, weights = torch.ops.htm_pytorch.pick_coded(
            route, source, valid, chunk_mask, *fades, kept, *parts
        )
        return picked.view(batch, queries, kept), weights.view(batch, queries, kept)
    picked, weights = getattr(torch.ops.htm_pytorch, f"{prefix}pick")(
        route,
        source,
        valid,
        mask,
        chunk_mask,
        *fades,
        kept,
        size,
        eps,
    )
    return picked.view(batch, queries, kept), weights.view(batch, queries, kept)


def _codes_of(memory: object, route: Tensor, k: int) -> Codes | None:
    """Return codes of what is scored, where they serve and pay."""
    if not isinstance(memory, ChunkedMemory) or route.dtype != torch.float32:
        return None
    return memory._ring.codes(k, route.shape[1])


def _as_one_row(fading: Fading) -> Fading:
    """Return what a row of all queries fades by."""
    ceiling, decay, ages = fading
    batch, queries = ceiling.shape
    if ages.shape[:2] != (1, 1):
        chunks = ages.shape[2]
        ages = ages.expand(batch, queries, chunks).reshape(1, batch * queries, chunks)
    return Fading(ceiling.reshape(1, -1), decay.reshape(1, -1), ages)


def attend(
    probe: Tensor,
    memory: ChunkedMemory | Steps,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    prefix: str = "",
) -> Tensor:
    """Return the context [B, Q, H, D] of the probes [B, Q, H, D] inside the picked chunks."""
    if isinstance(memory, Steps):
        steps, mask = memory.steps, memory.mask
    else:
        steps, mask = memory.contents.flatten(1, 2), memory.step_mask
    mask = None if mask is None else mask.flatten(1)
    return getattr(torch.ops.htm_pytorch, f"{prefix}attend")(
        probe, steps, mask, positions, picked, weights, memory.chunk_size
    )


def register(
    prefix: str,
    pick: Callable[..., Any],
    pick_backward: Callable[..., Any],
    attend: Callable[..., Any],
    attend_backward: Callable[..., Any],
    *,
    device: str,
) -> None:
    """Make operators of four functions, with `prefix` before their names, and derive the two.

    They get tensors of any strides. Sums are in float32 at least, and so are the weights.
    """
    operators.register(
        f"{prefix}pick(Tensor route, Tensor source, Tensor? valid, Tensor? step_mask, "
        "Tensor? chunk_mask, Tensor? ceiling, Tensor? decay, Tensor? ages, SymInt k, "
        "SymInt chunk_size, float eps) "
        "-> (Tensor picked, Tensor weights)",
        pick,
        _pick_shapes,
        device=device,
    )
    operators.register(
        f"{prefix}pick_backward(Tensor grad, Tensor route, Tensor source, Tensor? step_mask, "
        "Tensor? ceiling, Tensor? decay, Tensor? ages, Tensor picked, Tensor weights, "
        "SymInt chunk_size, float eps, bool to_source) -> (Tensor, Tensor, Tensor, Tensor)",
        pick_backward,
        _pick_backward_shapes,
        device=device,
    )
    operators.register(
        f"{prefix}attend(Tensor probe, Tensor steps, Tensor? step_mask, Tensor? positions, "
        "Tensor picked, Tensor weights, SymInt chunk_size) -> Tensor",
        attend,
        lambda probe, *rest: kernels.by_head(probe),
        device=device,
    )
    operators.register(
        f"{prefix}attend_backward(Tensor grad, Tensor probe, Tensor steps, Tensor? step_mask, "
        "Tensor? positions, Tensor picked, Tensor weights, SymInt chunk_size, bool to_steps, "
        "bool to_positions) -> (Tensor, Tensor, Tensor, Tensor)",
        attend_backward,
        _attend_backward_shapes,
        device=device,
    )

    def pick_differentiate(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        to_source = needs[1]
        route, source, ceiling, decay = getattr(torch.ops.htm_pytorch, f"{prefix}pick_backward")(
            grad, *operators.saved(ctx), ctx.chunk_size, ctx.eps, to_source
        )
        return (
            route,
            source if to_source else None,
            *(None,) * 3,
            ceiling if needs[5] else None,
            decay if needs[6] else None,
            *(None,) * 4,
        )

    def attend_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        backward = getattr(torch.ops.htm_pytorch, f"{prefix}attend_backward")
        probe, weights, steps, positions = backward(
            grad, *operators.saved(ctx), ctx.chunk_size, needs[1], needs[3]
        )
        return (
            probe,
            steps if needs[1] else None,
            None,
            positions if needs[3] else None,
            None,
            weights,
            None,
        )

    operators.differentiate(f"{prefix}pick", pick_differentiate, _pick_context)
    operators.differentiate(f"{prefix}attend", attend_differentiate, _attend_context)


def _pick_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    route, source, _, step_mask, _, *fading, _, ctx.chunk_size, ctx.eps = inputs
    ctx.mark_non_differentiable(output[0])
    operators.save(ctx, route, source, step_mask, *fading, *output)


def _attend_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk_size = inputs
    operators.save(ctx, *tensors)


def _pick_shapes(route: Tensor, source: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k = rest[-3]
    sums = torch.promote_types(route.dtype, torch.float32)
    weights = route.new_empty(*route.shape[:2], k, dtype=sums)
    return weights.new_empty(weights.shape, dtype=torch.int64), weights


def _pick_backward_shapes(
    grad: Tensor,
    route: Tensor,
    source: Tensor,
    step_mask: Any,
    ceiling: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = source.shape if rest[-1] else (0, 0, 0)
    queries = 0 if ceiling is None else ceiling.shape
    fades = route.new_empty(queries), route.new_empty(queries)
    return route.new_empty(route.shape), source.new_empty(shape), *fades


def _attend_backward_shapes(
    grad: Tensor,
    probe: Tensor,
    steps: Tensor,
    step_mask: Any,
    positions: Tensor | None,
    picked: Any,
    weights: Tensor,
    chunk_size: int,
    to_steps: bool,
    to_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        kernels.by_head(probe),
        weights.new_empty(weights.shape),
        steps.new_empty(steps.shape if to_steps else (0,) * 3),
        (probe if positions is None else positions).new_empty(
            compiled.gradient_shape(positions, to_positions)
        ),
    )


def _pick_coded_shapes(route: Tensor, source: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _pick_shapes(route, source, rest[5], 0, 0)


def _pick_coded_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    route, source, _, _, *fading, _ = inputs[:8]
    ctx.mark_non_differentiable(output[0])
    ctx.chunk_size, ctx.eps = 1, 0.0
    operators.save(ctx, route, source, None, *fading, *output)


def _pick_coded_differentiate(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    route, source, ceiling, decay = torch.ops.htm_pytorch.pick_backward(
        grad, *operators.saved(ctx), 1, 0.0, needs[1]
    )
    return (
        route,
        source if needs[1] else None,
        None,
        None,
        ceiling if needs[4] else None,
        decay if needs[5] else None,
        *(None,) * 6,
    )


operators.register(
    "pick_coded(Tensor route, Tensor source, Tensor? valid, Tensor? chunk_mask, Tensor? ceiling, "
    "Tensor? decay, Tensor? ages, SymInt k, Tensor coarse, Tensor centres, Tensor radii, "
    "Tensor terms) -> (Tensor picked, Tensor weights)",
    compiled.pick_coded,
    _pick_coded_shapes,
    device="CPU",
)
operators.differentiate("pick_coded", _pick_coded_differentiate, _pick_coded_context)
register(
    "",
    compiled.pick,
    compiled.pick_backward,
    compiled.attend,
    compiled.attend_backward,
    device="CPU",
)
