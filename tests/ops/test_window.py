"""Attention over the newest steps: kernel and plain version, on sizes drawn at random."""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from htm_pytorch import kernels
from htm_pytorch.ops.window import attend_window
from tests.helpers import relative_error, rounding

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="no kernel for this machine"),
]


class Inputs(NamedTuple):
    projected: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    oldest: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x if x is self.oldest else x.to(dtype) for x in self))


def drawn(seed: int, size: float = 1.0, **sizes: int) -> Inputs:
    """Inputs of sizes at random, some of them at their smallest; `size` is that of the numbers."""
    draw = random.Random(seed)
    B, T, H, E, W = (
        sizes.get(name, draw.choice((1, 2, draw.randint(1, most))))
        for name, most in {"B": 3, "T": 70, "H": 4, "E": 40, "W": 45}.items()
    )
    torch.manual_seed(seed)
    projected = size * torch.randn(B, T, 3, H, E, dtype=torch.float64)
    keys, values = (size * torch.randn(B, W - 1, H, E, dtype=torch.float64) for _ in range(2))
    filled = torch.randint(W, (B, 1))
    begins = torch.where(torch.rand(B, T) < 0.1, torch.arange(T), -filled)
    bias = torch.randn(H, W, dtype=torch.float64)
    return Inputs(projected, keys, values, bias, begins.cummax(1).values)


def each_alone(inputs: Inputs) -> Tensor:
    """What is computed, by the book: a softmax for every query, over what it sees."""
    projected, keys, values, bias, oldest = inputs
    batch, length, _, heads, width = projected.shape
    window, out = bias.shape[1], projected.new_empty(batch, length, heads, width)
    keys = torch.cat([keys, projected[:, :, 1]], 1)
    values = torch.cat([values, projected[:, :, 2]], 1)
    for b in range(batch):
        for t in range(length):
            first = max(t - window + 1, int(oldest[b, t]))
            seen = slice(first + window - 1, t + window)
            back = torch.arange(t - first, -1, -1)
            scores = torch.einsum("he,the->ht", projected[b, t, 0], keys[b, seen])
            weights = (scores / math.sqrt(width) + bias[:, back]).softmax(-1)
            out[b, t] = torch.einsum("ht,the->he", weights, values[b, seen])
    return out


def results(inputs: Inputs, function: Callable[[Inputs], Tensor]) -> list[Tensor]:
    """The output and the gradients of steps and biases."""
    projected, bias = (x.clone().requires_grad_() for x in (inputs.projected, inputs.bias))
    out = function(inputs._replace(projected=projected, bias=bias))
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (projected, bias), cotangent)]


def by_kernel(inputs: Inputs) -> Tensor:
    return attend_window(*inputs, plainly=False)


def plainly(inputs: Inputs) -> Tensor:
    return attend_window(*inputs, plainly=True)


@pytest.mark.parametrize("function", [by_kernel, plainly])
@pytest.mark.parametrize("seed", range(40))
def test_each_step_attends_to_what_it_sees(seed: int, function: Callable[[Inputs], Tensor]) -> None:
    inputs = drawn(seed)
    for found, expected in zip(results(inputs, function), results(inputs, each_alone), strict=True):
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(30))
def test_in_float32_it_is_as_exact_as_the_plain_version(seed: int, size: float) -> None:
    inputs = drawn(100 + seed, size)
    exact = results(inputs, plainly)
    single = inputs.to(torch.float32)
    allowed = [
        4 * relative_error(x, y) for x, y in zip(results(single, plainly), exact, strict=True)
    ]
    for found, expected, most in zip(results(single, by_kernel), exact, allowed, strict=True):
        assert relative_error(found, expected) <= most + rounding(torch.float32)


@pytest.mark.parametrize("function", [by_kernel, plainly])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("seed", range(6))
def test_a_step_that_is_no_number_is_told_to_those_that_see_it_alone(
    seed: int, broken: float, function: Callable[[Inputs], Tensor]
) -> None:
    inputs = drawn(seed, B=2, T=30, E=5, W=6)
    expected = function(inputs)
    values = inputs.projected.clone()
    values[0, 11, 2, -1, 3] = broken
    found = function(inputs._replace(projected=values))
    sees = (torch.arange(30) >= 11) & (torch.arange(30) < 17) & (inputs.oldest[0] <= 11)
    assert found[0, sees, -1].isnan().all()
    found[0, sees, -1] = expected[0, sees, -1]
    assert torch.equal(found, expected)


def test_sums_have_one_order_whatever_the_number_of_threads() -> None:
    inputs = drawn(3, B=3, T=61, H=3, E=16, W=16).to(torch.float32)
    one = results(inputs, by_kernel)
    torch.set_num_threads(3)
    for found, expected in zip(results(inputs, by_kernel), one, strict=True):
        assert torch.equal(found, expected)


def test_layouts_do_not_matter() -> None:
    inputs = drawn(5, B=2, T=20, H=2, E=6, W=5)
    expected = results(inputs, by_kernel)
    apart = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in inputs]
    every_other = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for other in (apart, every_other):
        for found, wanted in zip(results(Inputs(*other), by_kernel), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.compile
def test_as_operators_of_torch() -> None:
    inputs = drawn(7, B=2, T=9, H=2, E=4, W=4)
    leaves: Any = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    names = torch.ops.htm_pytorch
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    forward = leaves[0], *inputs[1:3], *leaves[3:]
    torch.library.opcheck(names.attend_window.default, forward, test_utils=checks)
    backward = torch.randn(2, 9, 2, 4, dtype=torch.float64), *inputs
    torch.library.opcheck(names.attend_window_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("name", Inputs._fields)
def test_what_does_not_fit_is_named_before_it_is_read(name: str) -> None:
    inputs = drawn(9, B=2, T=9, H=2, E=4, W=4)
    few = getattr(inputs, name)
    with pytest.raises((ValueError, RuntimeError), match=name if name != "projected" else "keys"):
        torch.ops.htm_pytorch.attend_window(*inputs._replace(**{name: few[:1]}))
    with pytest.raises(ValueError, match="keys" if name == "projected" else name):
        torch.ops.htm_pytorch.attend_window(*inputs._replace(**{name: few.to(torch.int32).float()}))


# torch itself still scripts some of its forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_and_second_derivatives_take_the_plain_version() -> None:
    inputs = drawn(11, B=2, T=9, H=2, E=4, W=4)

    def total(projected: Tensor) -> Tensor:
        return by_kernel(inputs._replace(projected=projected)).sin().sum()

    (expected,) = torch.autograd.grad(total(x := inputs.projected.clone().requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(total)(inputs.projected), expected)
    with forward_ad.dual_level():
        tangent = torch.randn_like(expected)
        moved = total(forward_ad.make_dual(inputs.projected, tangent))
        slope = forward_ad.unpack_dual(moved).tangent
    torch.testing.assert_close(slope, (expected * tangent).sum())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first,) = torch.autograd.grad(total(x), x, create_graph=True)
        first.sum().backward()


def test_keys_with_a_gradient_get_it() -> None:
    inputs = drawn(13, B=2, T=9, H=2, E=4, W=4)
    keys = inputs.keys.clone().requires_grad_()
    found, expected = (
        torch.autograd.grad(f(inputs._replace(keys=keys)).sin().sum(), keys)[0]
        for f in (by_kernel, plainly)
    )
    torch.testing.assert_close(found, expected)
    assert found.any()
