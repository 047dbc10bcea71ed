"""Operators of torch: what compilers, exporters and autograd see of code they cannot look into."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of queries and memories."""
_library = torch.library.Library("htm_pytorch", "FRAGMENT")


def register(
    schema: str,
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    device: str = "CompositeExplicitAutograd",
) -> None:
    """Make `run` the operator `schema` names; `shapes` returns unwritten tensors like its results.

    Not by `torch.library.custom_op`, whose first call loads torch's compiler: seconds that nobody
    who does not compile should wait for.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, device)
    torch.library.register_fake(f"htm_pytorch::{name}", shapes, lib=_library)


def differentiate(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[..., None],
) -> None:
    """Give an operator its way back, which has no way back of its own and says so.

    It computes in the dtypes it is given, also inside `torch.autocast`.
    """

    def plainly(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[-1].device.type, enabled=False):
            return backward(ctx, *grads)

    torch.library.register_autograd(
        f"htm_pytorch::{name}",
        once_differentiable(plainly),
        setup_context=setup_context,
        lib=_library,
    )


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for the way back, those too that autograd refuses: made in inference mode."""
    ctx.kept_apart = tuple(x if x is not None and x.is_inference() else None for x in tensors)
    pairs = zip(tensors, ctx.kept_apart, strict=True)
    ctx.save_for_backward(*(x if apart is None else None for x, apart in pairs))


def saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return what `save` has kept."""
    pairs = zip(ctx.saved_tensors, ctx.kept_apart, strict=True)
    return tuple(x if apart is None else apart for x, apart in pairs)


def check(name: str, tensor: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raise a ValueError unless a tensor, if there is one, has this shape and one of the dtypes.

    What reads its memory by addresses must be sure. Fast, since operators are called step by step.
    """
    if tensor is None or (tensor.shape == shape and tensor.dtype in dtypes):
        return
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(f"{name}: expected dtype {wanted}, got {tensor.dtype}")


def check_axes(name: str, tensor: Tensor, count: int) -> None:
    """Raise a ValueError unless the tensor has so many axes."""
    if tensor.ndim != count:
        raise ValueError(f"{name}: expected {count} axes, got {list(tensor.shape)}")
