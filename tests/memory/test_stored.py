"""A memory on disk: what was stored is there, for its writer, for readers, in copies, and later."""

import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch import HTMAttention, memory, recall
from htm_pytorch.memory import ChunkedMemory, MemoryFileError, stored
from tests.helpers import assert_near
from tests.memory.on_disk import (
    DIM,
    SIZE,
    assert_holds,
    beginning,
    child,
    look,
    make,
    steps_from,
    write_until_killed,
)

lance = pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_outlives_the_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from htm_pytorch import memory\n"
        "m = memory.open(sys.argv[1], dim=6, chunk_size=4)\n"
        "m.append(torch.arange(60.).view(1, 10, 6))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "m")], check=True)
    held = memory.open(tmp_path / "m")
    assert (held.steps, held.chunks) == (10, 2)
    held.append(torch.arange(60.0, 72.0).view(1, 2, 6))
    contents = held.fetch(torch.arange(3)).contents
    assert torch.equal(contents.flatten(), torch.arange(72.0))
    held.close()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 0.0), (torch.float16, 0.0), (torch.bfloat16, 0.0), (torch.int8, 1 / 127)],
)
@pytest.mark.parametrize("piece", [4 * SIZE, 1], ids=["all at once", "step by step"])
def test_storage_precision(
    tmp_path: Path, dtype: torch.dtype, tolerance: float, piece: int
) -> None:
    given = torch.float32 if dtype == torch.int8 else dtype
    steps = torch.randn(1, 4 * SIZE, DIM).to(given)
    steps[0, 5] = 0
    held = make(tmp_path / "m", dtype=dtype)
    for some in steps.split(piece, 1):
        held.append(some)
    assert (held.dtype, held.stored_dtype) == (given, dtype)
    contents = held.fetch(torch.arange(4)).contents
    error = (contents.flatten(1, 2) - steps).abs().amax(2)
    assert (error <= tolerance / 2 * steps.abs().amax(2) * 1.001).all()
    torch.testing.assert_close(held.summaries, contents.float().mean(2))
    held.flush().close()
    again = look(tmp_path / "m")
    assert torch.equal(again.fetch(torch.arange(4)).contents, contents)
    assert again.verify() == []


def test_the_table_and_the_log_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "GROUP_BYTES", 3 * SIZE * DIM * 4)
    held, first = make(tmp_path / "m"), 0
    for count in (1, 2, 3, 5, 8, 1, 40, 3, 0, 2):
        held.append(steps_from(first, count))
        first += count
        assert_holds(held, first)
        reader = look(tmp_path / "m")
        assert_holds(reader, first)
        assert reader.steps == held.steps == first
    assert held.info()["fragments"] > 1
    held.compact()
    assert_holds(held, first)
    assert held.info()["fragments"] == 1
    held.close()


def test_what_was_given_may_be_used_again(tmp_path: Path) -> None:
    held = make(tmp_path / "m")
    buffer, times = torch.empty(1, 2 * SIZE, DIM), torch.zeros(2 * SIZE, dtype=torch.float64)
    for first in (0, 8, 16):
        buffer.copy_(steps_from(first, 2 * SIZE))
        held.append(buffer, times=times)
        buffer.fill_(-1)
        times += 1
    assert_holds(held, 24)
    assert [span.first_time for span in held.spans(torch.arange(6))] == [0, 0, 1, 1, 2, 2]
    assert_holds(held.flush(), 24)
    held.close()


def test_episodes_are_kept(tmp_path: Path) -> None:
    held = make(tmp_path / "m")
    for length in (6, 1, 4, 9):
        held.append(torch.randn(1, length, DIM), beginning(length))
        held.close()
        held = make(tmp_path / "m")
    assert held.episodes.tolist() == [0, 0, 1, 2, 3, 3]
    held.append(torch.randn(1, 3, DIM))
    assert held.episodes.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert held.info()["episodes"] == 4
    held.close()


def test_one_writer_and_readers(tmp_path: Path) -> None:
    writer = make(tmp_path / "m").append(steps_from(0, 5))
    with pytest.raises(BlockingIOError, match=r"this process has .* open for writing already"):
        make(tmp_path / "m")
    reader = look(tmp_path / "m")
    with pytest.raises(ValueError, match="open for reading only"):
        reader.append(steps_from(5, 1))
    writer.append(steps_from(5, 20)).flush().append(steps_from(25, 6))
    assert reader.steps == 5
    assert_holds(reader.refresh(), 31)
    writer.reset(torch.tensor([True])).append(steps_from(0, 9))
    assert_holds(reader.refresh(), 9)
    assert reader.steps == 9
    writer.close()
    with pytest.raises(ValueError, match=r"open for reading only \(it was closed\)"):
        writer.append(steps_from(9, 1))
    assert_holds(writer, 9)
    make(tmp_path / "m").close()


def test_two_processes_do_not_write(tmp_path: Path) -> None:
    with child(write_until_killed, tmp_path / "m") as (_, pipe):
        pipe.recv()
        with pytest.raises(BlockingIOError, match=r"another process writes .* read_only=True"):
            make(tmp_path / "m")
    make(tmp_path / "m").close()


def test_readers_beside_a_busy_writer(tmp_path: Path) -> None:
    make(tmp_path / "m").close()
    with child(write_until_killed, tmp_path / "m") as (process, _):
        reader, seen = look(tmp_path / "m"), -1
        deadline = time.monotonic() + 20
        while seen < 100 and time.monotonic() < deadline:
            assert_holds(reader.refresh(), seen)
            seen = reader.steps
        assert seen >= 100
        process.kill()


def test_the_cache_is_bounded_and_right(tmp_path: Path) -> None:
    held = make(tmp_path / "m", cache_bytes=3 * SIZE * DIM * 4).append(steps_from(0, 40)).flush()
    everything = steps_from(0, 40).view(1, 10, SIZE, DIM)
    draw, known = random.Random(0), held.info()["bytes in RAM"]
    for _ in range(30):
        chunks = torch.randperm(10)[: draw.randint(1, 6)]
        assert torch.equal(held.fetch(chunks).contents, everything[:, chunks])
        assert held.info()["bytes in RAM"] - known <= 3 * SIZE * DIM * 4
    assert held.info()["bytes in RAM"] - known == 3 * SIZE * DIM * 4
    uncached = make(tmp_path / "n", cache_bytes=0).append(steps_from(0, 40)).flush()
    assert torch.equal(uncached.fetch(torch.tensor([3, 1])).contents, everything[:, [3, 1]])
    for home in (held, uncached):
        home.close()


@pytest.mark.parametrize("slots", [2, 3, 50])
def test_a_chunk_asked_for_twice_is_cached_once(tmp_path: Path, slots: int) -> None:
    with make(tmp_path / "m", cache_bytes=slots * SIZE * DIM * 4) as held:
        steps = steps_from(0, 40)
        held.append(steps).flush()
        for numbers in ([3, 3, 7, 5], [3, 7, 5], [7, 1, 7], [5, 3, 1]):
            expected = steps.view(1, 10, SIZE, DIM)[:, numbers]
            assert torch.equal(held.fetch(torch.tensor(numbers)).contents, expected)


def test_nothing_is_fetched_from_before_a_reset(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        held.append(torch.full((1, 8, DIM), 9.0)).flush().fetch(torch.arange(2))
        held.reset(torch.tensor([True])).append(steps_from(0, 8)).flush()
        assert_holds(held, 8)


def test_the_open_chunk_stays_when_all_others_are_forgotten(tmp_path: Path) -> None:
    held = make(tmp_path / "m").append(steps_from(0, 6)).flush()
    held.forget(before_step=SIZE).compact()
    assert torch.equal(held.read(4, 6), steps_from(4, 2))
    held.append(steps_from(6, 5)).flush().close()
    with look(tmp_path / "m") as again:
        assert torch.equal(again.read(4, 11), steps_from(4, 7))
        assert again.verify() == []


def test_what_is_no_time_forgets_nothing(tmp_path: Path) -> None:
    with make(tmp_path / "m").append(steps_from(0, 9), times=1.0) as held:
        with pytest.raises(ValueError, match="before: expected a time in seconds, got nan"):
            held.forget(before=torch.nan)
        assert_holds(held, 9)


def test_save_makes_a_copy(tmp_path: Path) -> None:
    held = make(tmp_path / "m").append(steps_from(0, 21)).flush().append(steps_from(21, 6))
    held.save(tmp_path / "copy")
    with pytest.raises(FileExistsError, match="exists"):
        held.save(tmp_path / "copy")
    held.append(steps_from(27, 3)).close()
    copy = memory.open(tmp_path / "copy")
    assert copy.steps == 27
    assert_holds(copy.append(steps_from(27, 9)), 36)
    copy.close()


def test_a_copy_goes_on_in_the_same_episode(tmp_path: Path) -> None:
    held = make(tmp_path / "m").append(steps_from(0, SIZE))
    held.append(steps_from(SIZE, 2), beginning(2))
    held.save(tmp_path / "copy")
    with memory.open(tmp_path / "copy") as copy:
        copy.append(steps_from(SIZE + 2, 2))
        assert copy.episodes.tolist() == [0, 1]
        assert_holds(copy, 2 * SIZE)
    held.close()


def test_ingest_shows_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = make(tmp_path / "m")
    held.ingest((steps_from(first, 10) for first in range(0, 50, 10)), total=50)
    assert_holds(held, 50)
    assert "50.0/50.0" in capsys.readouterr().err
    held.close()


@pytest.mark.parametrize("place", ["in the chunk that closes", "in the open chunk"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_steps_that_are_no_numbers(
    tmp_path: Path, place: str, wrong: float, dtype: torch.dtype
) -> None:
    with make(tmp_path / "m", dtype=dtype) as held:
        steps = torch.ones(1, 6, DIM, dtype=held.dtype)
        held.append(steps)
        steps[0, 1 if place == "in the chunk that closes" else 5, 2] = wrong
        with pytest.raises(ValueError, match="steps: expected finite numbers"):
            held.append(steps)
        assert (held.steps, held.chunks, held.verify()) == (6, 1, [])
        assert held.append(torch.ones(1, 2, DIM, dtype=held.dtype)).chunks == 2


# Opening what is not a memory, or another one.


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no memory at"):
        memory.open(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no memory at"):
        memory.open(tmp_path / "m", dim=3, read_only=True)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("wrong", [{"dim": 7}, {"chunk_size": 5}, {"dtype": torch.bfloat16}])
def test_other_sizes(tmp_path: Path, wrong: dict[str, Any]) -> None:
    make(tmp_path / "m").close()
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
        make(tmp_path / "m", **wrong)
    make(tmp_path / "m").close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim: expected an integer >= 1"),
        ({"chunk_size": 0}, "chunk_size: expected an integer >= 1"),
        ({"dtype": torch.int64}, "dtype: expected one of"),
        ({"cache_bytes": -1}, "cache_bytes: expected an integer >= 0"),
        ({"search": "fast"}, "search: expected 'exact' or 'index'"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="folder of a memory, got the file"):
        make(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="folder of a memory, got .* with other files alone"):
        make(tmp_path / "folder")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["thesis.tex"]


def test_a_table_of_something_else(tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "m").mkdir()
    table = tmp_path / "m" / "chunks.lance"
    lance.write_dataset(pa.table({"a": [1]}), str(table))
    with pytest.raises(MemoryFileError, match=r"journal' is gone, .* `htm memory repair`"):
        make(tmp_path / "m")
    assert lance.dataset(str(table)).to_table().to_pydict() == {"a": [1]}


def test_a_later_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("htm_pytorch.memory.log._WITHOUT_TAIL", 9)
        make(tmp_path / "next").close()
    stored = (tmp_path / "next" / "journal").read_bytes()
    with pytest.raises(MemoryFileError, match="of another format; a newer release reads it$"):
        memory.repair(tmp_path / "next")
    assert (tmp_path / "next" / "journal").read_bytes() == stored
    for options in ({}, {"read_only": True}):
        with pytest.raises(MemoryFileError, match="of another format") as raised:
            memory.open(tmp_path / "next", **options)
        # Nothing there is damaged.
        assert "repair" not in str(raised.value)


def test_no_pickle_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    make(tmp_path / "m").append(steps_from(0, 10)).flush().append(steps_from(10, 1)).close()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with memory.open(tmp_path / "m") as held:
        assert_holds(held, 11)


def test_a_past_in_ram_can_be_told_from_one_on_disk(tmp_path: Path) -> None:
    """The same program, the memory once in RAM and once on disk in bfloat16."""
    steps = torch.randn(1, 4000, 32)
    ram = ChunkedMemory.from_steps(steps.bfloat16().float(), 16)
    held = make(tmp_path / "m", dim=32, chunk_size=16, dtype=torch.bfloat16)
    held.append(steps.bfloat16())
    layer, queries = HTMAttention(32, topk_mems=4), torch.randn(2, 7, 32)
    torch.testing.assert_close(layer(queries, held), layer(queries, ram), rtol=1e-4, atol=1e-5)
    held.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("length", [1, 9])
def test_one_number_a_step_of_any_stride(tmp_path: Path, length: int, dtype: torch.dtype) -> None:
    given = torch.float32 if dtype == torch.int8 else dtype
    values = torch.arange(7.0 * length, dtype=given)
    for number, steps in enumerate((values[None, None].mT[:, :length], values[None, ::7, None])):
        path = tmp_path / f"{number}"
        with memory.open(path, dim=1, chunk_size=4, dtype=dtype, sync=False) as held:
            held.append(steps)
            assert_near(held.read(0, length), steps.contiguous(), 0.01 * length)


def test_episodes_that_none_can_be(tmp_path: Path) -> None:
    with make(tmp_path / "m").append(steps_from(0, 10)) as held:
        for number in (2**63, 2**70, -1, -(2**70)):
            none = held.where(episodes=[number])
            assert not recall(torch.ones(1, 2, DIM), torch.ones(1, 2, 1, DIM), none, 1).any()
            assert held.forget(episodes=[number]).steps == 10


def test_a_query_that_is_no_number(tmp_path: Path) -> None:
    with make(tmp_path / "m").append(steps_from(0, 10)) as held:
        for wrong in (math.nan, math.inf):
            with pytest.raises(ValueError, match="query: expected finite numbers"):
                held.find(torch.full((1, held.dim), wrong))
