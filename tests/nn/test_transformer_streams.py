"""What a stream costs: a step does not copy the ring, and a long call has no mask of its square."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from htm_pytorch import HTMTransformer, kernels
from htm_pytorch.nn import layer as layers

pytestmark = pytest.mark.usefixtures("one_thread")


def build(**changes: Any) -> HTMTransformer:
    sizes = {"dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "topk_mems": 2}
    sizes |= {"mem_chunk_size": 4, "mem_chunks": 512, "window": 4}
    return HTMTransformer(**(sizes | changes))


class Made(TorchDispatchMode):
    """Notes the largest tensor that any operator makes anew, in bytes, and counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operators += 1
        given = pytree.tree_leaves((args, kwargs))
        places = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in places:
                self.largest = max(self.largest, tensor.nbytes)
        return made


@pytest.mark.parametrize("bordered", [False, True], ids=["on", "over-episodes"])
@pytest.mark.parametrize("keep", [False, True], ids=["own", "keep"])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_step_copies_the_ring(bordered: bool, keep: bool, rows: int) -> None:
    model = build(keep_across_episodes=keep)
    ring = rows * 512 * 4 * 8 * 4
    with torch.no_grad():
        _, state = model(torch.randn(rows, 9, 8))
        for time in range(12):
            is_first = torch.arange(rows) == time % 5 if bordered else torch.zeros(rows).bool()
            with Made() as made:
                _, state = model(torch.randn(rows, 1, 8), state, is_first[:, None])
            assert made.largest < ring / 8


@pytest.mark.parametrize("keep", [False, True], ids=["own", "keep"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("asked", [[], [8], [7, 8]], ids=["nothing", "last", "last-two"])
def test_steps_before_the_first_that_is_asked_are_written_without_a_copy_of_the_ring(
    asked: list[int], keep: bool, padded: bool
) -> None:
    model = build(keep_across_episodes=keep, mem_chunks=512)
    ring = 2 * 512 * 4 * 8 * 4
    at = torch.tensor(asked, dtype=torch.int64).expand(2, -1)
    with torch.no_grad():
        states = [model(torch.randn(2, 1500, 8))[1]] * 2
        for _ in range(3):
            x, is_first = torch.randn(2, 9, 8), torch.rand(2, 9) < 0.1
            mask = torch.rand(2, 9) < 0.8 if padded else None
            y, states[0] = model(x, states[0], is_first, mask)
            some, states[1] = model(x, states[1], is_first, mask, at=at)
            torch.testing.assert_close(some, y[:, asked])
            found, wanted = map(pytree.tree_leaves, reversed(states))
            torch.testing.assert_close(found, wanted)
        # What was looked at is copied once.
        after = model(x, states[1], is_first, at=at)[1]
        with Made() as made:
            model(x, after, at=at)
        # A chunk may close between two that are asked.
        assert made.largest < ring / 2 or len(asked) > 1


def test_a_step_costs_as_many_operators_whatever_the_memory_holds() -> None:
    counts = []
    for chunks in (4, 512):
        model = build(mem_chunks=chunks)
        with torch.no_grad():
            _, state = model(torch.randn(2, 65, 8))
            for _ in range(4):
                with Made() as made:
                    _, state = model(torch.randn(2, 1, 8), state)
                counts.append(made.operators)
    # The fourth of four steps closes a chunk; leaving out empty slots takes a few views.
    assert max(counts[4:]) <= max(counts[:4]) + 8
    if kernels.IS_AVAILABLE:
        assert min(counts) <= 150


@pytest.mark.parametrize("mask_bytes", [1, 60, 500])
@pytest.mark.parametrize("keep", [False, True], ids=["own", "keep"])
@pytest.mark.parametrize("detach", [False, True], ids=["flows", "detached"])
def test_a_long_call_in_pieces_is_the_same_call(
    mask_bytes: int, keep: bool, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(mem_chunks=3, keep_across_episodes=keep, detach_memories=detach, depth=2).double()
    x = torch.randn(2, 60, 8, dtype=torch.float64, requires_grad=True)
    is_first = torch.rand(2, 60) < 0.1
    at = torch.randint(60, (2, 5))
    state = model(torch.randn(2, 10, 8, dtype=torch.float64))[1]

    def results() -> list[Tensor]:
        y, after = model(x, state, is_first)
        some = model(x, state, is_first, at=at)[0]
        inputs = [x, *model.parameters()]
        gradients = torch.autograd.grad(y.sin().sum() + some.cos().sum(), inputs)
        return [y, some, *gradients, *pytree.tree_leaves(after)]

    expected = results()
    monkeypatch.setattr(layers, "MASK_BYTES", mask_bytes)
    for got, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_no_tensor_of_a_long_call_grows_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that short calls show what a budget of 32 MiB does to long ones.
    monkeypatch.setattr(layers, "MASK_BYTES", 2**12)
    model = build(mem_chunks=8)
    largest = []
    for length in (1_000, 4_000):
        x = torch.randn(1, length, 8)
        with torch.no_grad(), Made() as made:
            model(x)
        largest.append(made.largest)
    assert largest[1] <= 4.1 * largest[0]
