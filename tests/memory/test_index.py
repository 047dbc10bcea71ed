"""A stored memory whose chunks an index finds: what it finds, misses, and does not know yet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMAttention, memory, recall
from htm_pytorch.memory import ExactMemory, IndexedMemory, MemoryFileError, StoredMemory, stored

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 2


def make(path: Path, dim: int, **options: Any) -> StoredMemory:
    return memory.open(path, dim=dim, chunk_size=SIZE, sync=False, **options)


def topics(chunks: int, dim: int, seed: int = 0) -> Tensor:
    """Steps [1, T, D] of chunks that are each about one of 40 topics."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, dim, generator=generator)
    generator.manual_seed(seed)
    topic = torch.randint(40, (chunks,), generator=generator).repeat_interleave(SIZE)
    return (centres[topic] + 0.5 * torch.randn(chunks * SIZE, dim, generator=generator))[None]


def near(held: StoredMemory, count: int) -> Tensor:
    """Routes [1, Q, D] like the summaries of some chunks."""
    chosen = torch.randint(held.chunks, (count,))
    return held.fetch(chosen).summaries + 0.3 * torch.randn(1, count, held.dim)


@pytest.mark.parametrize("dim", [6, 128, 132], ids=["narrow", "wide", "wide, not of bytes"])
def test_it_finds_most_of_the_best(tmp_path: Path, dim: int) -> None:
    with make(tmp_path / "m", dim) as writer:
        writer.append(topics(3000, dim)).build_index()
        assert writer.info()["chunks in the index"] == 3000
        route = near(writer, 30)
        share = writer.index_recall(route, 8)
    held = memory.open(tmp_path / "m", read_only=True, search="index")
    exact = memory.open(tmp_path / "m", read_only=True)
    assert isinstance(held, IndexedMemory)
    assert isinstance(exact, ExactMemory)
    best = (route[0] @ exact.summaries[0].T).topk(8).indices
    found = held.search(route, 8)[0]
    by_hand = (best[:, :, None] == found[:, None]).any(2).float().mean()
    assert share == pytest.approx(float(by_hand))
    assert share > 0.9
    assert 0.5 < held.index_recall() <= 1.0
    scores = (route[0].unsqueeze(1) * exact.summaries[0, found]).sum(2)
    assert (scores.diff(dim=1) < 1e-3).all(), "best first"


def test_the_layer_gives_what_it_gives_of_the_chunks_that_were_found(tmp_path: Path) -> None:
    with make(tmp_path / "m", 128) as writer:
        writer.append(topics(2000, 128)).build_index()
    held = memory.open(tmp_path / "m", read_only=True, search="index")
    exact = memory.open(tmp_path / "m", read_only=True)
    assert isinstance(held, IndexedMemory)
    route, probe = near(held, 12).view(3, 4, 128), torch.randn(3, 4, 2, 128)
    found = held.search(route, 5)
    mask = torch.zeros(3, 4, 2000, dtype=torch.bool).scatter_(2, found, True)
    assert torch.equal(
        recall(route, probe, held, 5), recall(route, probe, exact, 5, chunk_mask=mask)
    )
    with pytest.raises(ValueError, match="chunk_mask: expected None beside an index"):
        recall(route, probe, held, 5, chunk_mask=mask)
    probe[0, 0], route[0, 1] = torch.nan, torch.nan
    context = recall(route, probe, held, 5)
    assert context[0, :2].isnan().all()
    assert not context[0, 2:].isnan().any()


def test_chunks_that_the_index_does_not_know_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make(tmp_path / "m", 128, search="index")
    assert isinstance(held, IndexedMemory)
    held.append(topics(500, 128)).build_index()
    monkeypatch.setattr(stored, "GROUP_BYTES", 2**30)
    special = 9 * torch.randn(3, 1, 128)
    # The first is in the table, the second in the journal, the third is new to a reader.
    held.append(special[:1].expand(1, SIZE, 128)).flush()
    held.append(special[1:2].expand(1, SIZE, 128))
    assert held.search(special[:2].transpose(0, 1), 1).tolist() == [[[500], [501]]]
    reader = memory.open(tmp_path / "m", read_only=True, search="index")
    assert isinstance(reader, IndexedMemory)
    held.append(special[2:].expand(1, SIZE, 128))
    assert reader.refresh().chunks == 503
    every = special.transpose(0, 1)
    assert reader.search(every, 1).tolist() == [[[500], [501], [502]]]
    assert held.info()["chunks in the index"] == 500
    held.compact()
    assert held.info()["chunks in the index"] == 503
    assert held.search(every, 1).tolist() == [[[500], [501], [502]]]
    assert reader.refresh().search(every, 1).tolist() == [[[500], [501], [502]]]
    held.reset(torch.tensor([True])).append(topics(2, 128))
    assert held.search(every, 9).shape == (1, 3, 2)
    held.close()


def test_summaries_are_not_in_ram(tmp_path: Path) -> None:
    with make(tmp_path / "m", 6, search="index") as held:
        held.append(topics(100, 6))
        assert not hasattr(held, "summaries")
        assert held._known.summaries.numel() == 0
        assert held.episodes.tolist() == [0] * 100


def test_an_index_of_nothing(tmp_path: Path) -> None:
    with make(tmp_path / "m", 6, search="index") as held:
        assert isinstance(held, IndexedMemory)
        held.build_index()
        assert held.index_recall() == 1.0
        assert held.search(torch.randn(2, 3, 6), 4).shape == (2, 3, 0)
        held.append(topics(1, 6)).flush().build_index()
        assert held.search(torch.randn(2, 3, 6), 4).tolist() == [[[0]] * 3] * 2
        with pytest.raises(ValueError, match=r"route: expected shape \[B, Q, D = 6\]"):
            held.search(torch.randn(2, 3, 7), 4)
    reader = memory.open(tmp_path / "m", read_only=True)
    with pytest.raises(ValueError, match="is open for reading only"):
        reader.build_index()


def test_a_damaged_index(tmp_path: Path) -> None:
    with make(tmp_path / "m", 128) as writer:
        writer.append(topics(500, 128)).build_index()
    for path in (tmp_path / "m" / "chunks.lance" / "_indices").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:20])
    held = memory.open(tmp_path / "m", read_only=True, search="index")
    assert isinstance(held, IndexedMemory)
    with pytest.raises(MemoryFileError, match="summaries: cannot be searched"):
        held.search(torch.randn(1, 1, 128), 4)
    # What is stored is unharmed, and another index can be made.
    layer = HTMAttention(128, topk_mems=2)
    exact = memory.open(tmp_path / "m")
    layer(torch.randn(1, 2, 128), exact)
    assert exact.verify() == []
    exact.build_index().close()
    assert held.refresh().steps == 1000
    assert memory.open(tmp_path / "m", read_only=True).index_recall() > 0.5
