"""What several test files need: inputs from a seed, gradients, and errors by the largest entry."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory

Made = TypeVar("Made")


def on_cpu(impls: Any) -> tuple[Any, ...]:
    """Those of the implementations that run on the CPU."""
    return tuple(impl for impl in get_args(impls) if impl != "triton")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected entry; where that is 0, over nothing."""
    assert got.shape == expected.shape
    if not got.numel():
        return 0.0
    assert got.isfinite().all() and expected.isfinite().all()
    got, expected = got.detach().double(), expected.detach().double()
    largest = float(expected.abs().max())
    return float((got - expected).abs().max()) / (largest or 1.0)


def assert_near(got: Tensor, expected: Tensor, tolerance: float, name: str = "value") -> None:
    error = relative_error(got, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def rounding(dtype: torch.dtype) -> float:
    """What sums in `dtype`, in float32 at least, may err beyond a multiple of the plain error.

    That is one draw of roundings, which may cancel by luck: over thousands of draws, errors were
    up to 6 units above the multiples that tests allow.
    """
    return 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The function's value and, for each input, the gradient of its inner product with cotangent.

    Without a cotangent, a fixed one of the value's shape is drawn.
    """
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    value = function(*inputs)
    if cotangent is None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(value)
    gradients = torch.autograd.grad(value, inputs, cotangent, allow_unused=True)
    filled = [
        torch.zeros_like(part) if gradient is None else gradient
        for part, gradient in zip(inputs, gradients, strict=True)
    ]
    return value.detach(), filled


def memory_of(
    contents: Tensor,
    summaries: Tensor | None = None,
    valid: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> ChunkedMemory:
    """`ChunkedMemory.from_chunks` with invalid chunks and masked steps at the same time."""
    made: Any = ChunkedMemory.from_chunks(contents, valid, summaries=summaries)
    return made if step_mask is None else made._replace(step_mask=step_mask)


def in_a_cuda_graph(call: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made, Made]:
    """A graph of a call, what the call gave before, and what the graph writes when replayed."""
    # As torch asks: warmed on another stream.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        before = call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = call()
    return graph, before, written
