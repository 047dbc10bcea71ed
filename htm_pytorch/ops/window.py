"""Attention over the newest steps: of each query to its own step and those just before.

The recent past of an `HTMTransformer`, with a learned bias for each distance.
"""

from typing import Any

import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.ops import operators
from htm_pytorch.ops.reference import masked_softmax
from htm_pytorch.shapes import is_transformed, may_look_at

_DTYPES = (torch.float32, torch.float64)


def attend_window(
    projected: Tensor, keys: Tensor, values: Tensor, bias: Tensor, oldest: Tensor, *, plainly: bool
) -> Tensor:
    """Return what each of T steps attends to among the newest W, [B, T, H, E].

    Step t gets the softmax of q . k / sqrt(E) + bias over the steps from max(t - W + 1, oldest) to
    t. A value that is not finite makes those that see it NaN in its head, and nothing else.

    Args:
        projected: [B, T, 3, H, E], query, key and value of each step.
        keys: [B, W - 1, H, E], those of the steps before, newest last.
        values: likewise.
        bias: [H, W], of each distance, the step's own first.
        oldest: [B, T] int64, the oldest step that each may see; -1 is the newest of those before.
        plainly: by operators of torch alone, as a `torch.func` transform and second derivatives
            need it.
    """
    if not plainly and _fits(projected, keys, values):
        exact = torch.promote_types(projected.dtype, torch.float32)
        parts = (part.to(exact) for part in (projected, keys, values, bias))
        return torch.ops.htm_pytorch.attend_window(*parts, oldest).to(projected.dtype)
    return _attend_plainly(projected, keys, values, bias, oldest)


def _fits(projected: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the compiled kernel can do it."""
    is_for_it = kernels.IS_AVAILABLE and projected.device.type == "cpu" and not is_transformed()
    return is_for_it and not (keys.requires_grad or values.requires_grad)


def _attend_plainly(
    projected: Tensor, keys: Tensor, values: Tensor, bias: Tensor, oldest: Tensor
) -> Tensor:
    """Blocks of queries against the keys in their reach: linear in T."""
    length, window = projected.shape[1], bias.shape[1]
    past = window - 1
    queries, new_keys, new_values = projected.unbind(2)
    if not length:
        return queries
    keys, values = torch.cat([keys, new_keys], 1), torch.cat([values, new_values], 1)
    keys, values = _told(keys, values)
    block = min(window, length)
    missing = -length % block
    blocks = (length + missing) // block
    pad = torch.nn.functional.pad
    queries = pad(queries, (0, 0, 0, 0, 0, missing)).unflatten(1, (blocks, block))
    keys, values = (
        pad(part, (0, 0, 0, 0, 0, missing)).unfold(1, block + past, block)
        for part in (keys, values)
    )
    oldest = pad(oldest, (0, missing)).unflatten(1, (blocks, block))
    query = torch.arange(block, device=queries.device)
    key = torch.arange(block + past, device=queries.device)
    distance = query[:, None] + past - key
    near = (distance >= 0) & (distance <= past)
    start = torch.arange(blocks, device=queries.device)[:, None, None] * block
    mask = near & (start + key - past >= oldest[..., None])
    scores = torch.einsum("bnqhe,bnhek->bnhqk", queries * queries.shape[-1] ** -0.5, keys)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores + bias[:, distance.clamp(0, past)]
    weights = masked_softmax(scores, mask[:, :, None]).to(values.dtype)
    attended = torch.einsum("bnhqk,bnhek->bnqhe", weights, values)
    return attended.flatten(1, 2)[:, :length]


def _told(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, T, H, E] of steps of which one that is not finite spoils no other.

    A weight of 0 times what is not finite is no 0: where a value is not, it becomes 0, and its key
    NaN for those who see it.
    """
    if may_look_at(values) and values.detach().sum().isfinite():
        return keys, values
    is_broken = ~values.isfinite().all(3, keepdim=True)
    return keys.masked_fill(is_broken, torch.nan), values.masked_fill(is_broken, 0)


def _call(
    projected: Tensor, keys: Tensor, values: Tensor, bias: Tensor, oldest: Tensor
) -> dict[str, Any]:
    """Name the sizes and inputs of a call of the kernel."""
    operators.check_axes("projected", projected, 5)
    operators.check_axes("bias", bias, 2)
    batch, length, _, heads, width = projected.shape
    window, dtype = bias.shape[1], projected.dtype
    operators.check("projected", projected, (batch, length, 3, heads, width), *_DTYPES)
    for name, part in {"keys": keys, "values": values}.items():
        operators.check(name, part, (batch, window - 1, heads, width), dtype)
    operators.check("bias", bias, (heads, window), dtype)
    operators.check("oldest", oldest, (batch, length), torch.int64)
    return {
        **kernels.threads(),
        "batch": batch,
        "length": length,
        "heads": heads,
        "width": width,
        "window": window,
        "projected": projected.contiguous(),
        "keys": keys.contiguous(),
        "values": values.contiguous(),
        "bias": bias.contiguous(),
        "oldest": oldest,
        "oldest_by_batch": oldest.stride(0),
        "oldest_by_step": oldest.stride(1),
    }


def _run(name: str, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    made = kernels.struct("Window", **arguments)
    kernels.call(f"{name}_{kernels.NAMES[dtype]}", made, made)


def _attend(*inputs: Tensor) -> Tensor:
    arguments = _call(*inputs)
    attended = _shape(*inputs)
    _run("attend_window", attended.dtype, {**arguments, "attended": attended})
    return attended


def _attend_backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    arguments = _call(*inputs)
    operators.check("grad", grad, tuple(_shape(*inputs).shape), inputs[0].dtype)
    to_projected, to_bias = _backward_shapes(grad, *inputs)
    by_row = to_bias.new_empty(grad.shape[0], *to_bias.shape)
    made = {"grad": grad.contiguous(), "grad_projected": to_projected, "grad_bias": by_row}
    _run("attend_window_backward", grad.dtype, {**arguments, **made})
    return to_projected, by_row.sum(0)


def _shape(projected: Tensor, *rest: Tensor) -> Tensor:
    batch, length, _, heads, width = projected.shape
    return projected.new_empty(batch, length, heads, width)


def _backward_shapes(grad: Tensor, projected: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return projected.new_empty(projected.shape), rest[2].new_empty(rest[2].shape)


def _context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    operators.save(ctx, *inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made = torch.ops.htm_pytorch.attend_window_backward(grad, *operators.saved(ctx))
    return made[0], None, None, made[1], None


operators.register(
    "attend_window(Tensor projected, Tensor keys, Tensor values, Tensor bias, Tensor oldest) "
    "-> Tensor",
    _attend,
    _shape,
    device="CPU",
)
operators.register(
    "attend_window_backward(Tensor grad, Tensor projected, Tensor keys, Tensor values, "
    "Tensor bias, Tensor oldest) -> (Tensor, Tensor)",
    _attend_backward,
    _backward_shapes,
    device="CPU",
)
operators.differentiate("attend_window", _differentiate, _context)
