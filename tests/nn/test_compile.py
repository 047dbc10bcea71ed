"""Compiled and exported layers: whole graphs, equal to the plain ones, gradients included."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, HTMTransformer
from htm_pytorch.ops import Impl
from tests.helpers import assert_near, normal, on_cpu

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def layer_of(kind: Any = HTMAttention, **changes: Any) -> Any:
    sizes = {"dim": 6, "heads": 2, "topk_mems": 2, "mem_chunk_size": 4, "dim_head": 3}
    return kind(**(sizes | changes)).double()


def assert_compiles(
    module: nn.Module, calls: list[tuple[Any, ...]], backend: str = "aot_eager", **options: Any
) -> None:
    """Outputs and all gradients of `module(*call)`, compiled without a break, are the plain ones.

    The first argument of a call gets a gradient as well.
    """
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend=backend, **options)
    for call in calls:
        results = []
        for function in (plain, compiled):
            function.zero_grad()
            first = call[0].detach().clone().requires_grad_()
            value = function(first, *call[1:])
            leaves = [
                part for part in torch.utils._pytree.tree_leaves(value) if isinstance(part, Tensor)
            ]
            # Not the plain squares: their sum is the same whatever a layer norm is given.
            loss = sum(part.cumsum(-1).square().sum() for part in leaves if part.requires_grad)
            loss.backward()
            results.append((leaves, [first.grad, *(p.grad for p in function.parameters())]))
        (leaves, gradients), (leaves_compiled, gradients_compiled) = results
        for got, wanted in zip(
            leaves_compiled + gradients_compiled, leaves + gradients, strict=True
        ):
            assert got is not None
            if wanted.is_floating_point():
                assert_near(got, wanted, 1e-12)
            else:
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("impl", on_cpu(Impl))
def test_attention_over_a_tensor(impl: Any) -> None:
    layer = layer_of(impl=impl, inner_bias=True)
    mask, chunk_mask = torch.rand(2, 18) < 0.7, torch.rand(2, 5, 5) < 0.7
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    assert_compiles(layer, [(queries, memories), (queries, memories, mask, chunk_mask)])


def test_attention_over_a_memory() -> None:
    memory = ChunkedMemory.empty(2, 5, 4, 6, dtype=torch.float64).append(normal(2, 14, 6))
    empty = ChunkedMemory.empty(2, 5, 4, 6, dtype=torch.float64)
    queries = normal(2, 5, 6)
    shared = ChunkedMemory.from_chunks(normal(1, 5, 4, 6))
    layer = layer_of()
    assert_compiles(layer, [(queries, memory), (queries, empty), (queries, shared)])


def test_attention_with_inductor() -> None:
    mask = torch.rand(2, 18) < 0.7
    call = normal(2, 5, 6), normal(2, 18, 6), mask
    # From its cache it would take what was compiled for vectors of another length.
    assert_compiles(layer_of(), [call], "inductor", options={"fx_graph_cache": False})


def test_lengths_that_change_need_no_new_graph() -> None:
    layer = layer_of(impl="reference")
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    for queries, steps in [(5, 16), (7, 24), (3, 48), (9, 40)]:
        inputs = normal(2, queries, 6), normal(2, steps, 6)
        assert_near(compiled(*inputs), layer(*inputs), 1e-13)
    assert len(graphs) == 1


def test_recall_is_returned() -> None:
    layer = layer_of()
    compiled = torch.compile(layer.recall, fullgraph=True, backend="aot_eager")
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    out, recalled = compiled(queries, memories)
    expected, expected_recalled = layer.recall(queries, memories)
    assert_near(out, expected, 1e-13)
    assert torch.equal(recalled.chunks, expected_recalled.chunks)
    assert_near(recalled.step_weights, expected_recalled.step_weights, 1e-13)


def test_autocast_inside_a_compiled_function() -> None:
    layer = layer_of().float()

    def run(queries: Tensor, memories: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(queries, memories)

    inputs = torch.randn(2, 5, 6), torch.randn(2, 8, 6)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert compiled.dtype == torch.bfloat16
    assert torch.equal(compiled, run(*inputs))


@pytest.mark.parametrize("steps", [1, 7], ids=["acting", "learning"])
def test_transformer_over_episodes(steps: int) -> None:
    model = HTMTransformer(
        6, 1, 2, 3, topk_mems=2, mem_chunk_size=3, mem_chunks=4, window=3
    ).double()
    state = model.initial_state(2)
    with torch.no_grad():
        _, later = model(normal(2, 10, 6), state)
    is_first = torch.zeros(2, steps, dtype=torch.bool)
    is_first[0, steps // 2] = True
    x = normal(2, steps, 6)
    assert_compiles(model, [(x, later, is_first)])


@pytest.mark.parametrize(("kind", "impl"), [(HTMAttention, "reference"), (HTMBlock, "native")])
def test_export_of_a_tensor_memory_with_any_number_of_queries(kind: Any, impl: Any) -> None:
    # "auto" chooses by the number of queries, which must be known then.
    layer = layer_of(kind, impl=impl)
    mask = torch.rand(2, 18) < 0.7
    queries = torch.export.Dim("queries", min=2, max=64)
    example = normal(2, 5, 6), normal(2, 18, 6), mask
    exported = torch.export.export(
        layer, example, dynamic_shapes={"queries": {1: queries}, "memories": None, "mask": None}
    ).module()
    for count in (5, 3, 40):
        call = normal(2, count, 6), normal(2, 18, 6), torch.rand(2, 18) < 0.7
        assert_near(exported(*call), layer(*call), 1e-13)


def test_export_of_a_memory() -> None:
    layer = layer_of()
    memory = ChunkedMemory.empty(2, 5, 4, 6, dtype=torch.float64)
    exported = torch.export.export(layer, (normal(2, 5, 6), memory)).module()
    for steps in (0, 10, 50):
        call = normal(2, 5, 6), memory.append(normal(2, steps, 6))
        assert_near(exported(*call), layer(*call), 1e-13)
