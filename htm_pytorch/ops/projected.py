"""`attend` with the kept chunks projected once: for queries so many that they share chunks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from htm_pytorch import kernels
from htm_pytorch.memory import ChunkedMemory, Steps
from htm_pytorch.ops import fitting, operators
from htm_pytorch.shapes import is_seen, may_look_at

# What a floating point operation costs inside chunks, where one in a large matrix product costs 1:
# absorbed into the queries, and projected; see docs/math.md.
ABSORBED, PROJECTED = 1.6, 3.0
# On a GPU: how many such operations take as long as a byte from or to its memory; see docs/math.md.
BYTE = 160.0


def absorb(queries: Tensor, projections: Tensor) -> Tensor:
    """Return the probes u_h = W_k^h^T queries_h: [B, Q, H, D]."""
    return torch.einsum("bqhe,hed->bqhd", queries, projections[0])


def read(context: Tensor, projections: Tensor) -> Tensor:
    """Return W_v^h context_h: [B, Q, H, E]."""
    return torch.einsum("bqhd,hed->bqhe", context, projections[1])


def is_cheaper(queries: Tensor, memory: ChunkedMemory | Steps, picked: Tensor) -> bool:
    """Whether projecting the picked chunks costs less than moving the projections to the queries.

    It costs more the more chunks there are. They are counted, unless even the fewest would be too
    many; a compiler, which cannot count, reckons with all.
    """
    if queries.device.type == "cuda":
        return _is_cheaper_on_gpu(queries, memory, picked.shape[2])
    batch, length, heads, width = queries.shape
    k = picked.shape[2]
    project = 4 * memory.dim * heads * width
    inside = 4 * heads * k * memory.chunk_size
    absorbed = batch * length * (project + ABSORBED * inside * memory.dim)

    def pays(chunks: int) -> bool:
        once = chunks * memory.chunk_size * project
        return once + batch * length * PROJECTED * inside * width < absorbed

    if not is_seen():
        return pays(memory.batch * memory.chunks)
    return pays(memory.batch * k) and pays(int(_find(memory, picked)[1].sum()))


def _is_cheaper_on_gpu(queries: Tensor, memory: ChunkedMemory | Steps, k: int) -> bool:
    batch, length, heads, width = queries.shape
    inner, each = heads * width, queries.element_size()
    project = 4 * memory.dim * inner
    chunk = memory.chunk_size * memory.dim * memory.dtype.itemsize
    # Probes and contexts, written and read; a picked chunk is read once for all heads.
    moved = 4 * heads * memory.dim * each + k * chunk
    absorbed = batch * length * (project + BYTE * moved)
    # Keys and values, written and read; for each pick a query, and its part, written and read.
    step = project + BYTE * 4 * inner * each
    pick = 4 * inner * memory.chunk_size + BYTE * 3 * inner * each
    once = memory.batch * memory.chunks * memory.chunk_size * step
    return once + batch * length * k * pick < absorbed


def attend(
    queries: Tensor,
    projections: Tensor,
    memory: ChunkedMemory | Steps,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    scale: float,
    prefix: str = "",
) -> Tensor:
    """Return the attended values [B, Q, H, E] of the picked chunks [B, Q, K].

    `prefix` says which operator, of those that were registered.
    """
    kept = _kept(memory, picked)
    rows = kept.rows.to(projections.dtype)
    if positions is not None:
        rows = rows + positions.to(rows.dtype)
    # [U * C, 2 * H * E], as one matrix product.
    projected = linear(rows.flatten(0, 1), projections.flatten(0, 2))
    exact = torch.promote_types(queries.dtype, torch.float32)
    return getattr(torch.ops.htm_pytorch, f"{prefix}attend_projected")(
        queries if prefix else queries.to(exact),
        projected.unflatten(-1, projections.shape[:3]),
        None if kept.step_mask is None else kept.step_mask.flatten(),
        kept.picked,
        weights.to(exact),
        memory.chunk_size,
        memory.batch,
        scale,
    )


class _Kept(NamedTuple):
    rows: Tensor  # [U, C, D], of all rows of the batch; zeros where masked
    step_mask: Tensor | None  # [U, C]
    picked: Tensor  # [B, Q, K], counted among the U


def _kept(memory: ChunkedMemory | Steps, picked: Tensor) -> _Kept:
    """Collect the chunks that any query picked. What others hold, NaN perhaps, is not touched."""
    slots, is_kept = _find(memory, picked)
    if may_look_at(picked):
        chunks = is_kept.nonzero()[:, 0]
        number, is_kept = (is_kept.cumsum(0) - 1)[slots], None
    else:
        # How many there are is not known, or not without waiting: all stay, blank where not kept.
        chunks, number = None, slots
    rows, mask = _rows(memory, chunks)
    if is_kept is not None:
        mask = is_kept[:, None].expand(rows.shape[:2]) if mask is None else mask & is_kept[:, None]
    if mask is not None:
        rows = rows.masked_fill(~mask[..., None], 0.0)
    return _Kept(rows, mask, number.masked_fill(picked < 0, -1))


def _rows(memory: ChunkedMemory | Steps, chunks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the steps [U, C, D] of chunks [U], or of all, and which of them there are."""
    if isinstance(memory, ChunkedMemory):
        rows, mask = memory.contents.flatten(0, 1), memory.step_mask
        mask = None if mask is None else mask.flatten(0, 1)
        if chunks is None:
            return rows, mask
        return rows[chunks], None if mask is None else mask[chunks]
    length, size = memory.steps.shape[1], memory.chunk_size
    rows, mask = memory.steps, memory.mask
    if chunks is None and length % size == 0:
        mask = None if mask is None else mask.unflatten(1, (-1, size)).flatten(0, 1)
        return rows.unflatten(1, (-1, size)).flatten(0, 1), mask
    if chunks is None:
        chunks = torch.arange(memory.batch * memory.chunks, device=rows.device)
    step = torch.arange(size, device=rows.device) - -length % size
    step = (chunks % memory.chunks)[:, None] * size + step
    at = (chunks // memory.chunks)[:, None] * length + step.clamp(min=0)
    mask = None if mask is None else mask.flatten()[at]
    if length % size:
        mask = step >= 0 if mask is None else mask & (step >= 0)
    return rows.flatten(0, 1)[at], mask


def _find(memory: ChunkedMemory | Steps, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the picks [B, Q, K] are among all chunks, and which of all are picked [M']."""
    total = memory.batch * memory.chunks
    row = torch.arange(memory.batch, device=picked.device)[:, None, None]
    slots = torch.where(picked < 0, total, row * memory.chunks + picked)
    is_picked = picked.new_zeros(total + 1, dtype=torch.bool)
    # Not by an index, which copies a number from the host: a CUDA graph could not be made of it.
    is_picked.scatter_(0, slots.flatten(), True)
    return slots.clamp(max=max(total - 1, 0)), is_picked[:-1]


def _call(
    queries: Tensor,
    projected: Tensor,
    step_mask: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    owners: int,
    scale: float,
) -> dict[str, Any]:
    fitting.check_projected(queries, projected, step_mask, picked, weights, chunk_size, owners)
    sizes = kernels.sizes(picked, 1, len(projected), chunk_size)
    total = picked.shape[0] * picked.shape[1]
    return {
        **sizes,
        "rows": projected,
        "rows_by_step": projected.stride(0),
        "values_by": projected.stride(1),
        "heads": queries.shape[2],
        "width": queries.shape[3],
        "probe": kernels.heads(queries),
        "weights": weights,
        "owners": owners,
        "scale": scale,
        "first": 0,
        "last": total,
        **kernels.sorting(sizes, total),
        **kernels.step_mask(None if step_mask is None else step_mask[None], 0),
    }


def _attend(
    queries: Tensor,
    projected: Tensor,
    step_mask: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    *others: Any,
) -> Tensor:
    context = queries.new_zeros(queries.shape)
    if context.numel() and picked.numel():
        queries, projected = kernels.evenly(queries), projected.contiguous()
        picked, weights = picked.contiguous(), weights.contiguous()
        step_mask = None if step_mask is None else step_mask.contiguous()
        arguments = _call(queries, projected, step_mask, picked, weights, *others)
        arguments["context"] = kernels.heads(context)
        kernels.run("attend_projected", queries, projected, arguments)
    return context


def _attend_backward(
    grad: Tensor,
    queries: Tensor,
    projected: Tensor,
    step_mask: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, projected and weights."""
    grad_queries = queries.new_zeros(queries.shape)
    grad_projected = queries.new_zeros(projected.shape)
    by_head = queries.new_zeros(queries.shape[2], *weights.shape)
    operators.check("grad", grad, queries.shape, queries.dtype)
    if grad_queries.numel() and picked.numel():
        queries, grad = kernels.evenly(queries), kernels.evenly(grad)
        projected = projected.contiguous()
        picked, weights = picked.contiguous(), weights.contiguous()
        step_mask = None if step_mask is None else step_mask.contiguous()
        arguments = _call(queries, projected, step_mask, picked, weights, *others) | {
            "grad": kernels.heads(grad),
            "grad_probe": kernels.heads(grad_queries),
            "grad_weights": by_head,
            "grad_rows": grad_projected,
            "grad_by_step": grad_projected.stride(0),
        }
        kernels.run("attend_projected_backward", queries, projected, arguments)
    return grad_queries, grad_projected.to(projected.dtype), by_head.sum(0)


def register(
    prefix: str, attend: Callable[..., Any], attend_backward: Callable[..., Any], *, device: str
) -> None:
    """Make an operator of two functions, with `prefix` before its name, and derive it."""
    operators.register(
        f"{prefix}attend_projected(Tensor queries, Tensor projected, Tensor? step_mask, "
        "Tensor picked, Tensor weights, SymInt chunk_size, SymInt owners, float scale) -> Tensor",
        attend,
        lambda queries, *others: queries.new_empty(queries.shape),
        device=device,
    )
    operators.register(
        f"{prefix}attend_projected_backward(Tensor grad, Tensor queries, Tensor projected, "
        "Tensor? step_mask, Tensor picked, Tensor weights, SymInt chunk_size, SymInt owners, "
        "float scale) -> (Tensor, Tensor, Tensor)",
        attend_backward,
        lambda grad, queries, projected, step_mask, picked, weights, *others: (
            queries.new_empty(queries.shape),
            projected.new_empty(projected.shape),
            weights.new_empty(weights.shape),
        ),
        device=device,
    )

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = getattr(torch.ops.htm_pytorch, f"{prefix}attend_projected_backward")
        queries, projected, weights = backward(
            grad, *operators.saved(ctx), ctx.chunk_size, ctx.owners, ctx.scale
        )
        return queries, projected, None, None, weights, None, None, None

    operators.differentiate(f"{prefix}attend_projected", differentiate, _setup_context)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk_size, ctx.owners, ctx.scale = inputs
    operators.save(ctx, *tensors)


register("", _attend, _attend_backward, device="CPU")
