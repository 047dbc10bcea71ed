"""Where operators are seen but no data, by fake tensors and traces; and inference mode."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from htm_pytorch import ChunkedMemory, HTMAttention, HTMTransformer
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")


def model(**options: Any) -> HTMTransformer:
    return HTMTransformer(
        8, 2, 2, 4, topk_mems=2, mem_chunk_size=3, mem_chunks=4, window=3, **options
    )


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("length", [1, 2, 12])
def test_sizes_are_known_without_data(length: int, keep: bool) -> None:
    made = model(keep_across_episodes=keep)
    x, is_first, mask = (
        torch.randn(2, length, 8),
        torch.rand(2, length) < 0.3,
        torch.rand(2, length) < 0.8,
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(part) for part in (x, is_first, mask)]
        for given in (fakes[:1], fakes[:2], fakes):
            y, state = made(given[0], None, *given[1:])
            y, _ = made(given[0], state, *given[1:])
            assert y.shape == (2, length, 8)


def test_a_graph_of_operators_does_what_the_model_does() -> None:
    made, x = model(), torch.randn(2, 12, 8)

    def whole(x: Tensor, is_first: Tensor) -> Tensor:
        return made(x, None, is_first)[0]

    graph = make_fx(whole)(x, torch.zeros(2, 12, dtype=torch.bool))
    other, is_first = torch.randn(2, 12, 8), torch.rand(2, 12) < 0.3
    assert_near(graph(other, is_first), whole(other, is_first), 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_a_trace_keeps_no_mask(impl: Any) -> None:
    layer = HTMAttention(8, 2, 2, 4, 4, impl=impl)
    queries, past = torch.randn(2, 3, 8), torch.randn(2, 10, 8)
    every, some = torch.ones(2, 10, dtype=torch.bool), torch.rand(2, 10) > 0.4
    traced: Any = torch.jit.trace(layer, (queries, past, every), check_trace=False)
    with torch.no_grad():
        assert_near(traced(queries, past, some), layer(queries, past, some), 1e-5)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_training_goes_on_from_what_inference_mode_made(length: int, detach: bool) -> None:
    made, x = model(detach_memories=detach).double(), torch.randn(2, 10, 8).double()
    with torch.inference_mode():
        _, before = made(x[:, :5])
    with torch.no_grad():
        _, plain = made(x[:, :5])
    gradients: list[Tensor] = []
    for state in (before, plain):
        given = x[:, 5 : 5 + length].clone().requires_grad_()
        y, _ = made(given, state)
        y.square().sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert_near(*gradients, 1e-12)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_steps_with_gradients_into_a_memory_of_inference_mode(length: int) -> None:
    steps = torch.randn(2, 5, 8)
    with torch.inference_mode():
        memory = ChunkedMemory.empty(2, 3, 3, 8).append(steps[:, :1])
    given = steps[:, :length].clone().requires_grad_()
    after = memory.append(given)
    (after.open_steps.sum() + after.contents.sum()).backward()
    assert given.grad is not None and given.grad.eq(1).all()
