"""Layers, the transformer and memories on a GPU: the same function, and no wait for the device."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, HTMTransformer, recall
from tests.helpers import in_a_cuda_graph, relative_error
from tests.memory.home_laws import Elsewhere

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]

IMPLS = ["triton", "blocked"]
ROUNDINGS = 2**10
"""Of float32, by which results may differ that were computed in another order."""


def transformer(**changes: Any) -> HTMTransformer:
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "topk_mems": 2}
    sizes |= {"mem_chunk_size": 4, "mem_chunks": 6, "window": 5}
    return HTMTransformer(**(sizes | changes))


def assert_close(got: Tensor, expected: Tensor, name: str = "value") -> None:
    error = relative_error(got.cpu(), expected.cpu())
    assert error <= ROUNDINGS * torch.finfo(torch.float32).eps, f"{name}: off by {error:.1e}"


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TestTransformer:
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("recency", [False, True], ids=["ageless", "ages"])
    def test_streamed_equals_whole_equals_the_cpu(self, impl: Any, recency: bool) -> None:
        model = transformer(recency=recency, impl="auto", detach_memories=False)
        on_gpu = copy.deepcopy(model).cuda()
        for module in on_gpu.modules():
            if isinstance(module, HTMAttention):
                module.impl = impl
        x = torch.randn(3, 45, 32)
        is_first = torch.rand(3, 45) < 0.05
        expected, after = model(x, is_first=is_first)
        moved, first = x.cuda(), is_first.cuda()
        whole, state = on_gpu(moved, is_first=first)
        assert_close(whole, expected, "whole")
        parts, streamed = [], None
        for cut in (slice(0, 1), slice(1, 2), slice(2, 19), slice(19, 20), slice(20, 45)):
            y, streamed = on_gpu(moved[:, cut], streamed, first[:, cut])
            parts.append(y)
        assert_close(torch.cat(parts, 1), expected, "streamed")
        for got, other, wanted in zip(
            *map(pytree.tree_leaves, (streamed, state, after)), strict=True
        ):
            if wanted.is_floating_point():
                assert_close(got, wanted, "state")
                assert_close(other, wanted, "state")
            else:
                assert torch.equal(got.cpu(), wanted)
                assert torch.equal(other.cpu(), wanted)
        cotangent = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, list(model.parameters()), cotangent)
        found = torch.autograd.grad(whole, list(on_gpu.parameters()), cotangent.cuda())
        for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
            if other.abs().max() > 1e-6:
                assert_close(one, other, name)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_nothing_waits_for_the_device(self, impl: Any) -> None:
        model = transformer(impl=impl).cuda()
        is_first = torch.zeros(3, 1, dtype=torch.bool, device="cuda")
        with no_waiting():
            y, state = model(torch.randn(3, 21, 32, device="cuda"))
            y.sum().backward()
            with torch.no_grad():
                for _ in range(9):
                    y, state = model(torch.randn(3, 1, 32, device="cuda"), state, is_first)

    @pytest.mark.parametrize("donated", [False, True])
    @pytest.mark.parametrize("impl", IMPLS)
    @torch.no_grad()
    def test_a_step_as_a_cuda_graph(self, impl: Any, donated: bool) -> None:
        model = transformer(impl=impl).cuda()
        steps = torch.randn(30, 3, 1, 32, device="cuda")
        first = torch.rand(30, 3, 1, device="cuda") < 0.1
        expected, state = [], None
        for x, is_first in zip(steps, first, strict=True):
            y, state = model(x, state, is_first)
            expected.append(y)
        x, is_first = steps[0].clone(), first[0].clone()
        held = model.initial_state(3)
        held = held.donate() if donated else held
        leaves, spec = pytree.tree_flatten(held)
        leaves = [leaf.clone() for leaf in leaves]

        def step() -> Tensor:
            y, after = model(x, pytree.tree_unflatten(leaves, spec), is_first)
            rest = []
            for old, new in zip(leaves, pytree.tree_leaves(after), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                    rest.append(old)
            # Of a donated state the chunks are where they were.
            assert donated == all(old.ndim < 4 or old.shape[1] < 6 for old in rest)
            return y

        before = [leaf.clone() for leaf in leaves]
        graph, _, y = in_a_cuda_graph(step)
        for leaf, start in zip(leaves, before, strict=True):
            leaf.copy_(start)
        for at, wanted in enumerate(expected):
            x.copy_(steps[at])
            is_first.copy_(first[at])
            graph.replay()
            assert_close(y, wanted, f"step {at}")

    @pytest.mark.compile
    @pytest.mark.filterwarnings("ignore")
    @torch.no_grad()
    def test_a_compiled_step(self) -> None:
        model = transformer(depth=1, impl="triton").cuda()
        compiled = torch.compile(model, fullgraph=True)
        state, other = model.initial_state(2), model.initial_state(2)
        for _ in range(9):
            x = torch.randn(2, 1, 32, device="cuda")
            expected, state = model(x, state)
            got, other = compiled(x, other)
            assert_close(got, expected)

    @torch.no_grad()
    def test_the_ring_is_written_where_it_lies(self) -> None:
        model = transformer(mem_chunks=4096, depth=1).cuda()
        x = torch.randn(4, 1, 32, device="cuda")
        _, state = model(torch.randn(4, 9, 32, device="cuda"))
        ring = 4 * 4096 * 4 * 32 * 4
        for _ in range(9):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _, state = model(x, state)
            assert torch.cuda.max_memory_allocated() - before < ring / 2


def output_and_gradients(layer: Any, queries: Tensor, memories: Tensor) -> list[Tensor]:
    out = layer(queries, memories)
    wanted = [queries, memories, *layer.parameters()]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), wanted)]


@pytest.mark.parametrize("layer_class", [HTMAttention, HTMBlock])
@pytest.mark.parametrize("impl", [*IMPLS, "projected"])
class TestLayers:
    def test_autocast(self, layer_class: Any, impl: Any) -> None:
        # All chunks are kept: another choice would be another function.
        layer = layer_class(64, 2, 8, 8, 32, impl=impl, detach_memories=False).cuda()
        queries = torch.randn(2, 7, 64, device="cuda", requires_grad=True)
        memories = torch.randn(2, 60, 64, device="cuda", requires_grad=True)

        expected = output_and_gradients(layer, queries, memories)
        with torch.autocast("cuda", torch.bfloat16):
            got = output_and_gradients(layer, queries, memories)
        for one, other in zip(got, expected, strict=True):
            assert one.isfinite().all()
            scale = float(other.abs().max())
            assert float((one.float() - other).abs().max()) <= 0.1 * scale + 1e-3

    def test_nothing_waits_for_the_device(self, layer_class: Any, impl: Any) -> None:
        layer = layer_class(64, 2, 3, 8, 32, impl=impl, detach_memories=False).cuda()
        queries = torch.randn(2, 7, 64, device="cuda", requires_grad=True)
        memories = torch.randn(2, 61, 64, device="cuda", requires_grad=True)
        mask = torch.arange(61, device="cuda").expand(2, -1) % 5 > 0
        with no_waiting():
            layer(queries, memories, mask).sum().backward()

    def test_a_cuda_graph(self, layer_class: Any, impl: Any) -> None:
        layer = layer_class(64, 2, 3, 8, 32, impl=impl, detach_memories=False).cuda()
        queries = torch.randn(2, 7, 64, device="cuda", requires_grad=True)
        memories = torch.randn(2, 61, 64, device="cuda", requires_grad=True)

        graph, expected, got = in_a_cuda_graph(
            lambda: output_and_gradients(layer, queries, memories)
        )
        graph.replay()
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.compile
def test_the_default_device() -> None:
    """What is made without a device is where the arguments are, not where the default is."""
    # It may hold functions that other tests had replaced.
    torch.utils._device._device_constructors.cache_clear()
    x, memories = torch.randn(2, 5, 32), torch.randn(2, 22, 32)
    layer, model = HTMAttention(32, 2, 2, 4, 16), transformer()
    expected = layer(x, memories), model(x)[0]
    with torch.device("cuda"):
        here = HTMAttention(32, 2, 2, 4, 16), transformer()
        assert all(p.is_cuda for module in here for p in module.parameters())
        on_gpu = here[0](x.cuda(), memories.cuda()), here[1](x.cuda())[0]
        assert all(part.is_cuda for part in on_gpu)
        memory = ChunkedMemory.from_steps(memories.cuda(), 4)
        assert here[0](x.cuda(), memory).is_cuda
        for got, wanted in zip((layer(x, memories), model(x)[0]), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_memory_elsewhere() -> None:
    """It is asked by queries on a GPU, and its chunks come to them."""
    memory = ChunkedMemory.from_steps(torch.randn(1, 90, 16), 8)
    route, probe = torch.randn(1, 5, 16), torch.randn(1, 5, 2, 16)
    expected = recall(route, probe, memory, 3)
    home: Any = Elsewhere(memory)
    got = recall(route.cuda(), probe.cuda(), home, 3)
    assert got.is_cuda
    assert_close(got, expected)
