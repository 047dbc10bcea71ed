"""What is correct: against loops written from the formulas, and the identity of the layer."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import RecallImpl, recall, reference
from tests.helpers import assert_near, leaf, memory_of, on_cpu, value_and_gradients


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    return [e / sum(exponentials) for e in exponentials]


def position(back: int, dim: int) -> Tensor:
    """The sinusoid of a step that lies `back` steps before the newest of its chunk."""
    angles = [back / 10000 ** (2 * i / dim) for i in range(math.ceil(dim / 2))]
    table = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(table[:dim], dtype=torch.float64)


def attend(
    query: Tensor, chunks: list[Tensor], weights: dict[str, Tensor], heads: int, k: int
) -> Tensor:
    """One query over chunks [steps, D] that may differ in length: the paper's four formulas.

    A chunk's newest step is its last one.
    """

    def linear(name: str, value: Tensor) -> Tensor:
        out = weights[f"{name}.weight"] @ value
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    width = weights["attn.to_out.weight"].shape[0]
    if not chunks:
        return torch.zeros(width, dtype=torch.float64)
    relevance = []
    for chunk in chunks:
        summary = sum(chunk[1:], chunk[0]) / len(chunk)
        score = linear("to_summary_queries", query) @ linear("to_summary_keys", summary)
        relevance.append(float(score) / math.sqrt(weights["to_summary_keys.weight"].shape[0]))
    best = sorted(range(len(chunks)), key=lambda j: -relevance[j])[:k]
    w = softmax([relevance[j] for j in best])

    inner = weights["attn.to_q.weight"].shape[0]
    size = inner // heads
    q = linear("attn.to_q", query)
    mixed = torch.zeros(inner, dtype=torch.float64)
    for w_j, j in zip(w, best, strict=True):
        steps = [
            step + position(len(chunks[j]) - 1 - c, len(step)) for c, step in enumerate(chunks[j])
        ]
        projected = [linear("attn.to_kv", step) for step in steps]
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            keys = [kv[:inner][part] for kv in projected]
            values = [kv[inner:][part] for kv in projected]
            a = softmax([float(q[part] @ key) / math.sqrt(size) for key in keys])
            for a_c, value in zip(a, values, strict=True):
                mixed[part] += w_j * a_c * value
    return linear("attn.to_out", mixed)


def layer_of(**changes: Any) -> HTMAttention:
    arguments: dict[str, Any] = {
        "dim": 6,
        "heads": 3,
        "topk_mems": 2,
        "mem_chunk_size": 4,
        "dim_head": 2,
        "dim_memory": 7,
        "dim_features": 5,
        "inner_bias": True,
        "detach_memories": False,
    }
    return HTMAttention(**(arguments | changes)).double()


def test_formulas_with_chunks_of_different_lengths() -> None:
    layer = layer_of()
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    lengths = [[4, 1, 3, 4, 2], [2, 4, 4, 1, 3]]
    chunks = [[torch.randn(n, 7, dtype=torch.float64) for n in row] for row in lengths]
    queries = torch.randn(2, 4, 6, dtype=torch.float64)
    chunk_mask = torch.rand(2, 4, 5) < 0.6
    chunk_mask[0, 0], chunk_mask[1, 2] = True, False

    contents = torch.full((2, 5, 4, 7), 100.0, dtype=torch.float64)
    step_mask = torch.zeros(2, 5, 4, dtype=torch.bool)
    for b, row in enumerate(chunks):
        for j, chunk in enumerate(row):
            contents[b, j, 4 - len(chunk) :] = chunk
            step_mask[b, j, 4 - len(chunk) :] = True
    memory = ChunkedMemory.from_chunks(contents, step_mask)
    got = reference.htm_attention(
        queries,
        memory,
        weights,
        heads=3,
        k=2,
        positions=sinusoid(4, 7, torch.float64, queries.device),
        chunk_mask=chunk_mask,
    )
    expected = torch.stack(
        [
            torch.stack(
                [
                    attend(
                        queries[b, i],
                        [chunks[b][j] for j in range(5) if chunk_mask[b, i, j]],
                        weights,
                        heads=3,
                        k=2,
                    )
                    for i in range(4)
                ]
            )
            for b in range(2)
        ]
    )
    assert_near(got, expected, 1e-10, "reference")
    assert_near(layer(queries, memory, None, chunk_mask), expected, 1e-10, "layer")


@pytest.mark.parametrize("chunk_size", [1, 5])
@pytest.mark.parametrize("dim", [1, 2, 7, 8])
def test_positions_count_back_from_the_newest_step(chunk_size: int, dim: int) -> None:
    table = sinusoid(chunk_size, dim, torch.float64, torch.device("cpu"))
    expected = torch.stack([position(chunk_size - 1 - c, dim) for c in range(chunk_size)])
    assert_near(table, expected, 1e-14)


@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no-positions"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("router_bias", [True, False], ids=["router-bias", "no-router-bias"])
@pytest.mark.parametrize("inner_bias", [True, False], ids=["inner-bias", "no-inner-bias"])
def test_projections_moved_to_the_query_are_the_projected_memory(
    positions: bool, masked: bool, router_bias: bool, inner_bias: bool
) -> None:
    layer = layer_of(router_bias=router_bias, inner_bias=inner_bias, add_pos_enc=positions)
    queries, memories = leaf(2, 5, 6), leaf(2, 19, 7)
    mask = torch.rand(2, 19) < 0.6 if masked else None
    chunk_mask = torch.rand(2, 5, 5) < 0.7 if masked else None
    parameters = dict(layer.named_parameters())
    table = sinusoid(4, 7, torch.float64, queries.device) if positions else None

    def ours(queries: Tensor, memories: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True))
        arguments = (queries, memories, mask, chunk_mask)
        return torch.func.functional_call(layer, state, arguments)

    def plain(queries: Tensor, memories: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True))
        memory = ChunkedMemory.from_steps(memories, 4, mask, borders="newest", eps=layer.eps)
        return reference.htm_attention(
            queries, memory, state, heads=3, k=2, positions=table, chunk_mask=chunk_mask
        )

    inputs = [queries, memories, *parameters.values()]
    out, gradients = value_and_gradients(ours, inputs)
    expected, expected_gradients = value_and_gradients(plain, inputs)
    assert_near(out, expected, 1e-10)
    # Key biases cancel: the plain order leaves rounding errors of a zero there.
    names = ["queries", "memories", *parameters]
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for name, got, wanted in zip(names, gradients, expected_gradients, strict=True):
        assert (got - wanted).abs().max() <= 1e-10 * scale, name
        assert "key" in name or got.any(), name


@pytest.mark.parametrize("impl", on_cpu(RecallImpl))
@pytest.mark.parametrize("shared", [False, True], ids=["own-memory", "shared-memory"])
def test_gradcheck(impl: Any, shared: bool) -> None:
    batch, queries, heads, chunks, chunk_size, dim = 2, 3, 2, 4, 3, 3
    rows = 1 if shared else batch
    step_mask = torch.rand(rows, chunks, chunk_size) < 0.7
    step_mask[:, :, 0] = True
    valid = torch.ones(rows, chunks, dtype=torch.bool)
    valid[0, 1] = False
    chunk_mask = torch.rand(batch, queries, chunks) < 0.8
    chunk_mask[0, 0] = False

    def run(
        route: Tensor, probe: Tensor, positions: Tensor, contents: Tensor, summaries: Tensor
    ) -> Tensor:
        memory = memory_of(contents, summaries, valid, step_mask)
        return recall(
            route, probe, memory, 2, positions=positions, chunk_mask=chunk_mask, impl=impl
        )

    inputs = (
        leaf(batch, queries, dim),
        leaf(batch, queries, heads, dim),
        leaf(chunk_size, dim),
        leaf(rows, chunks, chunk_size, dim),
        leaf(rows, chunks, dim),
    )
    assert torch.autograd.gradcheck(run, inputs)
