"""Inputs of any size for the compiled kernel, and how its results are compared."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory import Steps
from htm_pytorch.ops import Recency, recall
from tests.helpers import assert_near, memory_of, normal, relative_error, rounding

OPERATORS = torch.ops.htm_pytorch


class Sizes(NamedTuple):
    """The letters of `htm_pytorch.shapes`."""

    B: int = 2
    Q: int = 5
    H: int = 3
    M: int = 7
    C: int = 4
    D: int = 6


def inputs_of(sizes: Sizes, shared: bool = False) -> dict[str, Tensor]:
    """Inputs of order one, whose softmaxes are not saturated: no gradient is a rounding error."""
    b, q, h, m, c, d = sizes
    rows = 1 if shared else b
    return {
        "route": d**-0.5 * normal(b, q, d),
        "probe": d**-0.5 * normal(b, q, h, d),
        "positions": normal(c, d),
        "contents": normal(rows, m, c, d),
        "summaries": normal(rows, m, d),
    }


def masks_of(sizes: Sizes) -> dict[str, Tensor]:
    b, q, _, m, c, _ = sizes
    return {
        "valid": torch.rand(b, m) < 0.8,
        "step_mask": torch.rand(b, m, c) < 0.7,
        "chunk_mask": torch.rand(b, q, m) < 0.8,
    }


def cast(parts: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with all but the masks in `dtype`."""
    return {name: p.to(dtype) if p.is_floating_point() else p for name, p in parts.items()}


def run(impl: Any, k: int, parts: dict[str, Tensor]) -> Tensor:
    """Recall from a memory of these `contents` (and `summaries`), or of these `steps`."""
    if "steps" in parts:
        memory: Any = Steps(parts["steps"], 4, parts.get("mask"), 0.1)
    else:
        masks = parts.get("valid"), parts.get("step_mask")
        memory = memory_of(parts["contents"], parts.get("summaries"), *masks)
    recency = None
    if "ceiling" in parts:
        recency = Recency(parts["ceiling"], parts["decay"], parts.get("ages"))
    return recall(
        parts["route"],
        parts["probe"],
        memory,
        k,
        positions=parts.get("positions"),
        chunk_mask=parts.get("chunk_mask"),
        recency=recency,
        impl=impl,
    )


def with_gradients(
    impl: Any,
    k: int,
    parts: dict[str, Tensor],
    cotangent: Tensor | None = None,
    seen_as: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """The context and the gradients by name; the kernel gets what `seen_as` makes of a part."""
    leaves = {
        name: part.detach().clone().requires_grad_(part.is_floating_point())
        for name, part in parts.items()
    }
    context = run(impl, k, {name: seen_as(name, part) for name, part in leaves.items()})
    if cotangent is None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(context.shape, generator=generator, dtype=torch.float64)
    named = {name: part for name, part in leaves.items() if part.requires_grad}
    cotangent = seen_as("cotangent", cotangent.to(context))
    gradients = torch.autograd.grad(context, list(named.values()), cotangent, allow_unused=True)
    filled = [
        torch.zeros_like(part) if gradient is None else gradient
        for part, gradient in zip(named.values(), gradients, strict=True)
    ]
    return {"context": context.detach(), **dict(zip(named, filled, strict=True))}


def assert_all_near(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, note: str = ""
) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(got[name], value, tolerance, f"{name} {note}")


def assert_as_accurate(
    got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], note: str = ""
) -> None:
    """Errors of at most a few of the plain ones, or of a few roundings of the result."""
    for name, true in truth.items():
        unit = torch.finfo(got[name].dtype).eps
        # The truth itself has the roundings of float64.
        unit = 8 * unit if got[name].dtype == torch.float64 else unit
        allowed = 8 * max(relative_error(plain[name], true), unit) + rounding(got[name].dtype)
        error = relative_error(got[name], true)
        assert error <= allowed, f"{name} {note}: {error:.2e} > {allowed:.2e}"


def clear_cut(sizes: Sizes, stored: torch.dtype, route: torch.dtype) -> dict[str, Tensor]:
    """Inputs that the dtypes hold exactly, whose kept chunks no rounding changes."""
    parts = inputs_of(sizes)
    # Scores two apart, in a random order.
    b, q, _, m, _, d = sizes
    order = torch.stack([torch.randperm(m) for _ in range(b)]).double()
    parts["route"] = 0.05 * d**-0.5 * parts["route"]
    parts["route"][..., 0] = 1.0 + 0.1 * torch.rand(b, q)
    parts["summaries"][..., 0] = 0.5 * (order - m / 2)
    kept = {"contents": stored, "summaries": stored}
    return {name: part.to(kept.get(name, route)) for name, part in parts.items()}


def garbage(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan") if like.is_floating_point() else True)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors of the same entries, each otherwise laid out."""
    made = {}
    other = garbage(tensor)
    for axis in range(tensor.ndim):
        size = tensor.shape[axis]
        both = torch.stack([tensor, other], axis + 1).flatten(axis, axis + 1)
        made[f"gaps-{axis}"] = both.unflatten(axis, (size, 2)).select(axis + 1, 0)
        made[f"more-behind-{axis}"] = torch.cat([tensor, other], axis).narrow(axis, 0, size)
        made[f"more-before-{axis}"] = torch.cat([other, tensor], axis).narrow(axis, size, size)
        for to in range(axis + 1, tensor.ndim):
            # A clone: to be contiguous, an axis of size 1 may have any stride.
            moved = tensor.movedim(axis, to).clone(memory_format=torch.contiguous_format)
            made[f"moved-{axis}-{to}"] = moved.movedim(to, axis)
    return made
