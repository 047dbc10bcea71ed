"""What a layer recalls from a memory that lies anywhere, as a trace."""

from pathlib import Path

import pytest
import torch

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock
from htm_pytorch import memory as memories
from htm_pytorch.report import trace_memory
from htm_pytorch.report.page import as_data, render

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_memory_in_ram() -> None:
    layer = HTMAttention(dim=8, heads=2, dim_head=4, topk_mems=2)
    memory = ChunkedMemory.empty(2, 10, 4, 8).append(torch.randn(2, 40, 8))
    queries = torch.randn(2, 3, 8)
    trace = trace_memory(layer, queries, memory, "ram", row=1, labels=["a", "b", "c"])
    _, recall = layer.recall(queries, memory)
    assert [moment.label for moment in trace.moments] == ["a", "b", "c"]
    for query, moment in enumerate(trace.moments):
        assert moment.step is None
        (layer_recall,) = moment.layers
        kept = recall.chunks[1, query].tolist()
        assert [trace.chunks[one.chunk].first_step for one in layer_recall] == [4 * n for n in kept]
        assert [trace.chunks[one.chunk].chunk for one in layer_recall] == kept
        for rank, one in enumerate(layer_recall):
            inside = recall.step_weights[1, query, :, rank].mean(0)
            assert one.step_weights == pytest.approx(inside.tolist())
    data = as_data(trace)
    assert data["stops"] == [[None, 0], [None, 1], [None, 2]]
    assert [first for first, _, _ in data["axis"]] == [s.first_step for s in trace.chunks]


def test_a_memory_on_disk_with_keys_and_times(tmp_path: Path) -> None:
    pytest.importorskip("lance")
    layer = HTMBlock(8, heads=2, dim_head=4, topk_mems=2)
    stored = memories.open(tmp_path / "life", dim=8, chunk_size=4)
    keys = [f"page {n}" for n in range(10)]
    stored.append(torch.randn(1, 10, 8), keys=keys, times=1700000000.0)
    trace = trace_memory(layer, torch.randn(1, 2, 8), stored, "disk")
    assert [span.keys for span in trace.chunks] == [tuple(keys[:4]), tuple(keys[4:8])]
    text = render(trace)
    assert "2023-11-14 22:13:20 UTC" in text and "page 7" in text
    assert [moment.label for moment in trace.moments] == ["query 0", "query 1"]


def test_steps_that_are_masked_have_no_weight() -> None:
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, [1, 9]] = False
    memory = ChunkedMemory.from_steps(torch.randn(1, 12, 8), 4, mask)
    layer = HTMAttention(dim=8, heads=2, dim_head=4, topk_mems=3)
    trace = trace_memory(layer, torch.randn(1, 1, 8), memory, "masked")
    assert [len(r.step_weights) for r in sorted(trace.moments[0].layers[0])] == [3, 4, 3]
    for recalled in trace.moments[0].layers[0]:
        assert sum(recalled.step_weights) == pytest.approx(1)


def test_words_of_the_past_are_shown_where_they_are_given() -> None:
    memory = ChunkedMemory.from_steps(torch.randn(1, 8, 8), 4)
    layer = HTMAttention(dim=8, heads=2, dim_head=4, topk_mems=1)
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    data = as_data(trace_memory(layer, torch.randn(1, 1, 8), memory, "words", steps=words))
    assert data["labels"] == words
    assert sum(count for _, count, _ in data["axis"]) == 8


def test_a_memory_that_holds_nothing_is_shown_as_nothing() -> None:
    memory = ChunkedMemory.empty(1, 10, 4, 8)
    layer = HTMAttention(dim=8, heads=2, dim_head=4, topk_mems=1)
    trace = trace_memory(layer, torch.randn(1, 1, 8), memory, "nothing")
    assert trace.moments[0].layers == ((),)
    assert "<td>nothing</td>" in render(trace)


def test_wrong_arguments_are_refused() -> None:
    memory = ChunkedMemory.from_steps(torch.randn(1, 8, 8), 4)
    layer = HTMAttention(dim=8, heads=2, dim_head=4, topk_mems=1)
    with pytest.raises(ValueError, match="labels: expected 3, one a query, got 1"):
        trace_memory(layer, torch.randn(1, 3, 8), memory, "t", labels=["a"])
    with pytest.raises(ValueError, match="row: expected an integer from 0 to 0, got 1"):
        trace_memory(layer, torch.randn(1, 3, 8), memory, "t", row=1)
