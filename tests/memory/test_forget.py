"""What a stored memory was told to forget is recalled no more, and then in no file any more."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMAttention, memory
from htm_pytorch.memory import ExactMemory, IndexedMemory, StoredMemory, stored

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, DIM, STEPS = 4, 16, 60
BEGINS = [0, 11, 30, 45]
"""Of episodes, none of which ends with a chunk."""
WAYS: dict[str, tuple[dict[str, Any], Iterable[int]]] = {
    "an episode": ({"episodes": [1]}, range(11, 30)),
    "the first and the last, which is open": ({"episodes": [3, 0]}, [*range(11), *range(45, 60)]),
    "before a time, inside of a chunk": ({"before": 17.0}, range(17)),
    "before a step, inside of the open chunk": ({"before_step": 58}, range(58)),
    "before a step, at a border": ({"before_step": 11}, range(11)),
    "everything": ({"before_step": 60}, range(60)),
}


def key(step: int) -> str:
    return f"secret of step {step:03}"


def past() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    is_first = torch.zeros(1, STEPS, dtype=torch.bool)
    is_first[0, BEGINS] = True
    return torch.randn(1, STEPS, DIM, generator=generator), is_first


def fill(held: StoredMemory) -> StoredMemory:
    steps, is_first = past()
    at = 0
    for count in (7, 13, 10, 20, 10):
        part = slice(at, at + count)
        keys = [key(step) for step in range(at, at + count)]
        times = torch.arange(at, at + count).double()
        held.append(steps[:, part], is_first[:, part], keys=keys, times=times)
        at += count
    return held


def held_steps(held: StoredMemory) -> list[int]:
    """Return the numbers of all steps in closed chunks, each of which is what was stored."""
    steps, _ = past()
    found: list[int] = []
    for span in held.spans(torch.arange(held.chunks)):
        numbers = range(span.first_step, span.first_step + span.count)
        assert span.keys == tuple(key(number) for number in numbers)
        assert (span.first_time, span.last_time) == (numbers[0], numbers[-1])
        part = held.fetch(torch.tensor([span.chunk]))
        expected = steps[0, numbers[0] : numbers[-1] + 1]
        assert torch.equal(part.contents[0, 0, -span.count :], expected)
        assert (part.contents[0, 0, : SIZE - span.count] == 0).all()
        torch.testing.assert_close(part.summaries[0, 0], expected.mean(0))
        found += numbers
    return found


def found_in_files(folder: Path, steps: Iterable[int]) -> set[str]:
    values, _ = past()
    wanted = [values[0, step].numpy().tobytes()[:16] for step in steps]
    wanted += [key(step).encode() for step in steps]
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path.name for path, data in files.items() for part in wanted if part in data}


@pytest.mark.parametrize(
    ("group", "has_index"),
    [(2**30, False), (2000, False), (2000, True)],
    ids=["in the log", "in the table", "with an index"],
)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_recalled_no_more_and_then_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, group: int, has_index: bool
) -> None:
    monkeypatch.setattr(stored, "GROUP_BYTES", group)
    arguments, steps = WAYS[way]
    gone = set(steps)
    left = [step for step in range(STEPS) if step not in gone]
    place = tmp_path / "m"
    held = fill(memory.open(place, dim=DIM, chunk_size=SIZE, sync=False))
    if has_index:
        held.build_index()
    reader = memory.open(place, read_only=True)
    closed = [step for step in held_steps(held) if step not in gone]
    assert held.forget(**arguments).steps == len(left)
    assert held.next_step == STEPS
    by_index = memory.open(place, read_only=True, search="index")
    for home in (held, reader.refresh(), by_index):
        assert held_steps(home) == closed
        assert home.verify() == []
        route = past()[0][:, :5]
        if home.chunks:
            chunks = home.find(route[0], 3).chunks
            assert 0 <= int(chunks.min()) <= int(chunks.max()) < home.chunks
        assert HTMAttention(DIM, topk_mems=2)(route, home).isfinite().all()
    with pytest.raises(ValueError, match="some forgotten"):
        held.read(min(gone), min(gone) + 1)
    assert found_in_files(place, gone)
    held.compact()
    assert not found_in_files(place, gone)
    assert not left or found_in_files(place, left)
    assert held_steps(held) == closed
    assert held_steps(reader.refresh()) == closed
    with pytest.raises(ValueError, match="times: expected times that never fall"):
        held.append(torch.ones(1, 3, DIM), times=1.0)
    held.append(torch.ones(1, 3, DIM), times=100.0).close()
    again = memory.open(place)
    assert (again.steps, again.next_step) == (len(left) + 3, STEPS + 3)
    assert again.verify() == []
    again.close()


def test_after_reset_nothing_is_left(tmp_path: Path) -> None:
    held = fill(memory.open(tmp_path / "m", dim=DIM, chunk_size=SIZE, sync=False))
    held.flush().build_index().fetch(torch.arange(held.chunks))
    held.reset(torch.tensor([True])).append(torch.full((1, 8, DIM), 2.0))
    assert (held.fetch(torch.arange(2)).contents == 2).all()
    held.compact()
    assert not found_in_files(tmp_path / "m", range(STEPS))
    assert held.verify() == []
    held.close()


def test_times_must_be_known_to_forget_by_them(tmp_path: Path) -> None:
    held = memory.open(tmp_path / "m", dim=DIM, sync=False)
    with pytest.raises(ValueError, match="before_step: expected an integer >= 0, got -1"):
        held.forget(before_step=-1)
    assert held.forget(before=5.0, before_step=3, episodes=[7]).steps == 0
    held.close()


def test_later_steps_of_a_forgotten_episode_are_kept(tmp_path: Path) -> None:
    held = memory.open(tmp_path / "m", dim=DIM, chunk_size=SIZE, sync=False)
    held.append(torch.ones(1, 6, DIM)).forget(episodes=[0]).append(torch.ones(1, 5, DIM))
    assert (held.steps, held.next_step) == (5, 11)
    assert [span.first_step for span in held.spans(torch.arange(held.chunks))] == [6]
    held.close()
    again = memory.open(tmp_path / "m", read_only=True)
    assert [span.first_step for span in again.spans(torch.arange(again.chunks))] == [6]


def test_views_by_episode_and_time(tmp_path: Path) -> None:
    held = fill(memory.open(tmp_path / "m", dim=DIM, chunk_size=SIZE, sync=False))
    held.flush().build_index()
    indexed = memory.open(tmp_path / "m", read_only=True, search="index", probes=100)
    assert isinstance(held, ExactMemory)
    assert isinstance(indexed, IndexedMemory)
    spans = held.spans(torch.arange(held.chunks))
    choices: list[tuple[dict[str, Any], Any]] = [
        ({"episodes": [1, 3]}, lambda s: s.episode in (1, 3)),
        ({"since": 20.0}, lambda s: s.first_time >= 20),
        ({"since": 12.0, "until": 40.0}, lambda s: s.first_time >= 12 and s.last_time <= 40),
        ({"episodes": [2], "until": 37.0}, lambda s: s.episode == 2 and s.last_time <= 37),
        ({"episodes": []}, lambda s: False),
    ]
    layer, queries = HTMAttention(DIM, topk_mems=3), torch.randn(2, 5, DIM)
    for arguments, is_chosen in choices:
        mask = torch.tensor([is_chosen(span) for span in spans])
        chosen = mask.nonzero()[:, 0]
        expected = layer(queries, held.fetch(chosen))
        for home in (held, indexed):
            out, recalled = layer.recall(queries, home.where(**arguments))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
            assert set(recalled.chunks.unique().tolist()) <= {-1, *chosen.tolist()}
    view = held.where(since=1000.0)
    assert (layer(queries, view) == 0).all()
    held.append(torch.randn(1, 4, DIM), torch.tensor([[True, False, False, False]]), times=1000.0)
    assert (layer(queries, view) != 0).any()
    with pytest.raises(ValueError, match="a view is only read"):
        view.append(torch.randn(1, 4, DIM))
    with pytest.raises(ValueError, match="since: expected a time in seconds, got nan"):
        held.where(since=float("nan"))
    held.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": ["a"]}, "keys: expected 3, one for each step, got 1"),
        ({"keys": [1, 2, 3]}, "keys: expected a str, or one or None for each step, got 1"),
        ({"times": torch.tensor([1.0, 2.0])}, r"times: expected shape \[T = 3\]"),
        ({"times": torch.tensor([1.0, 3.0, 2.0])}, "times: expected times that never fall"),
        ({"times": float("nan")}, "times: expected a time in seconds, got nan"),
    ],
)
def test_keys_and_times_are_checked(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    held = memory.open(tmp_path / "m", dim=DIM, sync=False)
    with pytest.raises(ValueError, match=message):
        held.append(torch.ones(1, 3, DIM), **arguments)
    assert held.steps == 0
    held.close()
