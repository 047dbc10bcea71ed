"""Operators of torch: what compilers, exporters and autograd see of code they cannot look into."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
