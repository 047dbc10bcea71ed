"""A stored memory whose chunks an index finds: what it finds, misses, and does not know yet."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMAttention, memory, recall
from htm_pytorch.memory import ExactMemory, IndexedMemory, MemoryFileError, StoredMemory, stored
from htm_pytorch.memory.versions import MOST_SMALL
from htm_pytorch.ops import recall_with_weights
from tests.memory.on_disk import look

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 2


def make(path: Path, dim: int, **options: Any) -> StoredMemory:
    sizes = {"dim": dim, "chunk_size": SIZE, "cache_bytes": 2**16, "sync": False}
    return memory.open(path, **(sizes | options))


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
    held = look(tmp_path / "m", search="index")
    exact = look(tmp_path / "m")
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
    held = look(tmp_path / "m", search="index")
    exact = look(tmp_path / "m")
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
    # The first is in the table, the second in the log, the third is new to a reader.
    held.append(special[:1].expand(1, SIZE, 128)).flush()
    held.append(special[1:2].expand(1, SIZE, 128))
    assert held.search(special[:2].transpose(0, 1), 1).tolist() == [[[500], [501]]]
    reader = look(tmp_path / "m", search="index")
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
        assert held.info()["bytes in RAM"] <= 100 * (2 * 45 + 6 * 4 + SIZE * 6 * 4)
        assert held.flush().info()["bytes in RAM"] <= 100 * 45
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
    reader = look(tmp_path / "m")
    with pytest.raises(ValueError, match="is open for reading only"):
        reader.build_index()


def test_a_damaged_index(tmp_path: Path) -> None:
    with make(tmp_path / "m", 128) as writer:
        writer.append(topics(500, 128)).build_index()
    for path in (tmp_path / "m" / "chunks.lance" / "_indices").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:20])
    for options in ({"read_only": True}, {}):
        with pytest.raises(MemoryFileError, match=r"the index is damaged .*\.build_index\(\)"):
            memory.open(tmp_path / "m", search="index", **options)
    # What is stored is unharmed, and another index can be made.
    layer = HTMAttention(128, topk_mems=2)
    exact = memory.open(tmp_path / "m")
    layer(torch.randn(1, 2, 128), exact)
    assert all("the index is damaged" in problem for problem in exact.verify())
    exact.build_index()
    assert exact.verify() == []
    exact.close()
    held = look(tmp_path / "m", search="index")
    assert isinstance(held, IndexedMemory) and held.steps == 1000
    assert look(tmp_path / "m").index_recall() > 0.5


@pytest.mark.parametrize("way", ["compact", "append"])
def test_a_damaged_index_is_dropped_before_the_engine_reads_it(tmp_path: Path, way: str) -> None:
    with make(tmp_path / "m", 128) as writer:
        writer.append(topics(500, 128)).build_index()
    for path in (tmp_path / "m" / "chunks.lance" / "_indices").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:20])
    with memory.open(tmp_path / "m") as held:
        with pytest.warns(UserWarning, match=r"the index is damaged .* dropped"):
            if way == "compact":
                held.compact()
            else:
                for _ in range(MOST_SMALL + 1):
                    held.append(torch.randn(1, SIZE, 128)).flush()
        assert held.verify() == []
    with look(tmp_path / "m", search="index") as held:
        found = held.search(torch.randn(1, 1, 128), 4)
        assert (found >= 0).all()
        assert (held.info()["chunks in the index"] > 0) == (way == "compact")


@pytest.mark.parametrize("gone", ["_indices", "_indices/*", "_indices/*/index.idx"])
def test_an_index_that_is_gone_stops_nobody(tmp_path: Path, gone: str) -> None:
    with make(tmp_path / "m", 128) as writer:
        writer.append(topics(500, 128)).build_index()
    for path in (tmp_path / "m" / "chunks.lance").glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with memory.open(tmp_path / "m") as held:
        held.append(torch.randn(1, 4 * SIZE, 128)).flush()
        assert any("the index is damaged" in problem for problem in held.verify())
        with pytest.warns(UserWarning, match="dropped"):
            held.compact()
        assert held.verify() == []
    with look(tmp_path / "m", search="index") as held:
        assert (held.search(torch.randn(1, 1, 128), 4) >= 0).all()


def recalled(held: StoredMemory, **some: Any) -> list[int]:
    """The chunks that a query keeps among some, the best first."""
    query = torch.ones(1, 1, held.dim)
    _, kept = recall_with_weights(query, query[:, :, None], held.where(**some), 100)
    return kept.chunks[0, 0].tolist()


def test_a_filter_means_the_same_by_index(tmp_path: Path) -> None:
    """Some of the chunks are in the index, some in the table, some in the log."""
    with make(tmp_path / "m", 6, search="index") as held:
        for number in range(30):
            is_first = torch.tensor([[number % 5 == 0, False]])
            held.append(torch.full((1, SIZE, 6), float(number)), is_first, times=float(number))
            if number == 9:
                held.build_index()
            if number == 19:
                held.flush()
        exact = look(tmp_path / "m")
        for some, expected in (
            ({}, range(30)),
            ({"episodes": [1, 3, 5, 77]}, [*range(5, 10), *range(15, 20), *range(25, 30)]),
            ({"episodes": []}, []),
            ({"since": 8}, range(8, 30)),
            ({"since": torch.tensor(18.0), "until": 23.5}, range(18, 24)),
            ({"episodes": [0, 4], "until": 21}, [*range(5), 20, 21]),
            ({"since": -torch.inf, "until": torch.inf}, range(30)),
            ({"since": torch.inf}, []),
            ({"until": -torch.inf}, []),
            ({"since": 1e300}, []),
        ):
            for home in (held, exact):
                assert recalled(home, **some) == sorted(expected, reverse=True), some


def test_chunks_of_no_known_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in no range of time, by index either."""
    with make(tmp_path / "m", 6, search="index") as held:
        with monkeypatch.context() as patch:
            # As a memory of format 1 has them, which kept no times.
            patch.setattr(
                "htm_pytorch.memory.entries.time_of_each",
                lambda times, length, last: torch.full((length,), torch.nan, dtype=torch.float64),
            )
            held.append(torch.ones(1, 4 * SIZE, 6))
        held.close()
    # What comes later has times.
    with make(tmp_path / "m", 6, search="index") as held:
        held._state = held._state._replace(head=held._state.head._replace(time=None))
        held.append(torch.ones(1, SIZE, 6), times=5.0).flush()
        for home in (held, look(tmp_path / "m")):
            assert [span.first_time for span in home.spans(torch.arange(5))] == [None] * 4 + [5]
            assert recalled(home, since=3.0) == recalled(home, until=7.0) == [4]
            assert recalled(home, since=-torch.inf) == [4]
            with pytest.raises(ValueError, match="before: expected times of all steps"):
                held.forget(before=4.0)


def test_what_was_forgotten_is_not_found(tmp_path: Path) -> None:
    """An index and summaries that were made with it count no more, at once."""
    with make(tmp_path / "m", 6, search="index", chunk_size=4) as held:
        # A chunk is best by its two oldest steps, which are to be forgotten.
        steps = torch.ones(1, 12, 6)
        steps[0, 4:6] = 100
        steps[0, 6:8] = 0
        held.append(steps, times=torch.arange(12).double()).build_index()
        query = torch.ones(1, 6)
        assert held.find(query, 1).chunks.tolist() == [[1]]
        held.forget(before_step=6)
        exact = look(tmp_path / "m")
        for home in (held, exact):
            found = home.find(query, 2)
            assert (found.chunks.tolist(), found.scores.tolist()) == ([[1, 0]], [[6, 0]])
            assert home.find(query, 1).chunks.tolist() == [[1]]
            assert recalled(home, since=6.0) == recalled(home) == [1, 0]
            assert recalled(home, since=6.5) == [1]
        held.compact()
        assert held.find(query, 2).chunks.tolist() == [[1, 0]]


def test_the_share_that_is_found_after_forgetting(tmp_path: Path) -> None:
    with make(tmp_path / "m", 6, search="index", chunk_size=4) as held:
        for number in range(20):
            # Short chunks, every second of which is to be forgotten, and is better than all others.
            value = 100.0 - number if number % 2 == 0 else 1.0 + number
            held.append(torch.full((1, 2, 6), value), torch.tensor([[True, False]]))
        held.append(torch.ones(1, 1, 6), torch.tensor([[True]])).build_index()
        route = torch.ones(1, 1, 6)
        assert held.index_recall(route, 1) == 1.0
        held.forget(episodes=range(0, 20, 2))
        assert held.index_recall(route, 1) == 1.0
        assert held.search(route, 1).tolist() == [[[9]]]
        held.compact()
        assert held.index_recall(route, 1) == 1.0


def test_no_index_of_what_was_forgotten_is_left(tmp_path: Path) -> None:
    with make(tmp_path / "m", 6) as held:
        held.append(topics(300, 6)).build_index()
        indices = tmp_path / "m" / "chunks.lance" / "_indices"
        before = {path.name for path in indices.iterdir()}
        held.forget(before_step=2).compact()
        after = {path.name for path in indices.iterdir()}
        assert after and not after & before
        held.forget(before_step=held.next_step).compact()
        assert not indices.exists() or not list(indices.iterdir())
        assert held.append(topics(3, 6)).flush().find(torch.ones(1, 6), 1).chunks.shape == (1, 1)


def test_with_ages_a_view_shows_what_was_chosen(tmp_path: Path) -> None:
    """The newest are looked at as well; those of others' episodes are none of them."""
    layer = HTMAttention(6, heads=2, topk_mems=2, dim_head=4, recency=True)
    torch.nn.init.normal_(layer.to_recency.weight, std=0.3)
    queries = torch.randn(1, 5, 6)
    with make(tmp_path / "m", 6) as writer:
        is_first = torch.zeros(1, 800, dtype=torch.bool)
        is_first[0, [0, 400]] = True
        writer.append(topics(400, 6), is_first).build_index()
        old = writer.where(episodes=[0])
        _, recalled = layer.recall(queries, old)
        spans = [old.spans(chunks) for chunks in recalled.chunks[0]]
        assert {span.episode for found in spans for span in found} == {0}
        assert not layer(queries, writer.where(episodes=[])).any()


def test_ages_that_are_given_say_which_are_the_newest(tmp_path: Path) -> None:
    with make(tmp_path / "m", 6) as writer:
        writer.append(topics(400, 6)).build_index()
        layer = HTMAttention(6, heads=2, topk_mems=1, dim_head=4, recency=True)
        torch.nn.init.zeros_(layer.to_recency.weight)
        layer.to_recency.bias.data[1] = 1e3
        ages = torch.arange(1, 401)
        ages[123] = 0
        _, recalled = layer.recall(torch.randn(1, 4, 6), writer, ages=ages[None, None])
        assert (recalled.chunks == 123).all()
