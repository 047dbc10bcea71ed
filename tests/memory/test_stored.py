"""A memory on disk: what is stored stays, whole, whatever happens to the process or the disk."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMAttention, memory
from htm_pytorch.memory import ChunkedMemory, MemoryFileError, StoredMemory, stored

lance = pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, DIM = 4, 6


def make(path: Path, **options: Any) -> StoredMemory:
    sizes = {"dim": DIM, "chunk_size": SIZE, "cache_bytes": 2**12, "sync": False}
    return memory.open(path, **(sizes | options))


def steps_from(first: int, count: int) -> Tensor:
    """Steps that say which they are."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return (numbers[:, None] + torch.arange(DIM) / 8)[None]


def assert_holds(held: StoredMemory, least: int) -> None:
    """All steps from 0 on, at least so many, none damaged."""
    assert held.steps >= least
    assert held.chunks == held.steps // SIZE
    assert held.verify() == []
    contents = held.fetch(torch.arange(held.chunks)).contents
    assert torch.equal(contents.flatten(1, 2), steps_from(0, held.chunks * SIZE))
    torch.testing.assert_close(held.summaries, contents.mean(2))


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
def test_storage_precision(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    given = torch.float32 if dtype == torch.int8 else dtype
    steps = torch.randn(1, 4 * SIZE, DIM).to(given)
    steps[0, 5] = 0
    held = make(tmp_path / "m", dtype=dtype).append(steps)
    assert (held.dtype, held.stored_dtype) == (given, dtype)
    contents = held.fetch(torch.arange(4)).contents
    error = (contents.flatten(1, 2) - steps).abs().amax(2)
    assert (error <= tolerance / 2 * steps.abs().amax(2) * 1.001).all()
    torch.testing.assert_close(held.summaries, contents.float().mean(2))
    held.flush().close()
    again = memory.open(tmp_path / "m", read_only=True)
    assert torch.equal(again.fetch(torch.arange(4)).contents, contents)
    assert again.verify() == []


def test_the_table_and_the_journal_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "GROUP_BYTES", 3 * SIZE * DIM * 4)
    held, first = make(tmp_path / "m"), 0
    for count in (1, 2, 3, 5, 8, 1, 40, 3, 0, 2):
        held.append(steps_from(first, count))
        first += count
        assert_holds(held, first)
        reader = memory.open(tmp_path / "m", read_only=True)
        assert_holds(reader, first)
        assert reader.steps == held.steps == first
    assert held.info()["fragments"] > 1
    held.compact()
    assert_holds(held, first)
    assert held.info()["fragments"] == 1
    held.close()


def test_episodes_are_kept(tmp_path: Path) -> None:
    held = make(tmp_path / "m")
    for length in (6, 1, 4, 9):
        is_first = torch.zeros(1, length, dtype=torch.bool)
        is_first[0, 0] = True
        held.append(torch.randn(1, length, DIM), is_first)
        held.close()
        held = make(tmp_path / "m")
    assert held.episodes.tolist() == [0, 0, 1, 2, 3, 3]
    held.append(torch.randn(1, 3, DIM))
    assert held.episodes.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert held.info()["episodes"] == 4
    held.close()


def test_one_writer_and_readers(tmp_path: Path) -> None:
    writer = make(tmp_path / "m").append(steps_from(0, 5))
    with pytest.raises(BlockingIOError, match="another process writes"):
        make(tmp_path / "m")
    reader = memory.open(tmp_path / "m", read_only=True)
    with pytest.raises(ValueError, match="open for reading only"):
        reader.append(steps_from(5, 1))
    writer.append(steps_from(5, 20)).flush().append(steps_from(25, 6))
    assert reader.steps == 5
    assert_holds(reader.refresh(), 31)
    writer.reset(torch.tensor([True])).append(steps_from(0, 9))
    assert_holds(reader.refresh(), 9)
    assert reader.steps == 9
    writer.close()
    with pytest.raises(ValueError, match="open for reading only"):
        writer.append(steps_from(9, 1))
    make(tmp_path / "m").close()


def test_readers_beside_a_busy_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "m").close()
    with child(write_until_killed, tmp_path / "m") as (process, acknowledged):
        reader, seen = memory.open(tmp_path / "m", read_only=True), -1
        deadline = time.monotonic() + 20
        while seen < 100 and time.monotonic() < deadline:
            assert_holds(reader.refresh(), seen)
            seen = reader.steps
        assert seen >= 100
        process.kill()


def test_the_cache_is_bounded_and_right(tmp_path: Path) -> None:
    held = make(tmp_path / "m", cache_bytes=3 * SIZE * DIM * 4).append(steps_from(0, 40)).flush()
    everything = steps_from(0, 40).view(1, 10, SIZE, DIM)
    for _ in range(30):
        chunks = torch.randperm(10)[: random.Random(0).randint(1, 6)]
        assert torch.equal(held.fetch(chunks).contents, everything[:, chunks])
        assert len(held._cache._slot_of) <= 3
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


def test_ingest_shows_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = make(tmp_path / "m")
    held.ingest((steps_from(first, 10) for first in range(0, 50, 10)), total=50)
    assert_holds(held, 50)
    assert "50.0/50.0" in capsys.readouterr().err
    held.close()


# Opening what is not, or no longer, a memory.


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
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(MemoryFileError, match="is a file"):
        make(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    with pytest.raises(MemoryFileError, match="holds other files"):
        make(tmp_path / "folder")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["thesis.tex"]


def test_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    (tmp_path / "m").mkdir()
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "m" / "chunks.lance"))
    with pytest.raises(MemoryFileError, match="expected .* a memory of format 1, got None"):
        make(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr("htm_pytorch.memory.table.FORMAT", "2")
        make(tmp_path / "next").close()
    with pytest.raises(MemoryFileError, match="format 1, got '2'"):
        make(tmp_path / "next")


def damage(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    data[place : place + 16] = bytes(byte ^ 0xFF for byte in data[place : place + 16])
    path.write_bytes(data)


def test_a_damaged_fragment(tmp_path: Path) -> None:
    make(tmp_path / "m", dim=64).append(torch.randn(1, 40, 64)).flush().close()
    (data,) = (tmp_path / "m" / "chunks.lance" / "data").iterdir()
    damage(data, 0.3)
    held = memory.open(tmp_path / "m", read_only=True)
    assert len(held.verify()) == 1
    assert "checksum" in held.verify()[0]
    damaged = int(held.verify()[0].split()[1].rstrip(":"))
    with pytest.raises(MemoryFileError, match=f"chunk {damaged}: damaged"):
        held.fetch(torch.arange(10))
    others = [number for number in range(10) if number != damaged]
    assert held.fetch(torch.tensor(others)).contents.isfinite().all()
    with pytest.raises(MemoryFileError, match="damaged"):
        HTMAttention(64, topk_mems=10)(torch.randn(1, 1, 64), held)


@pytest.mark.parametrize("part", ["data", "_versions"])
def test_a_file_cut_short(tmp_path: Path, part: str) -> None:
    make(tmp_path / "m").append(steps_from(0, 40)).flush().close()
    folder = tmp_path / "m" / "chunks.lance" / part
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(MemoryFileError):
        memory.open(tmp_path / "m")


def test_a_damaged_journal(tmp_path: Path) -> None:
    make(tmp_path / "m").append(steps_from(0, 2)).append(steps_from(2, 9)).close()
    journal = tmp_path / "m" / "journal"
    whole = journal.read_bytes()
    # The last record, cut short: it was never acknowledged.
    journal.write_bytes(whole[:-1])
    held = make(tmp_path / "m")
    assert held.steps == 2
    assert_holds(held.append(steps_from(2, 7)), 9)
    held.close()
    # One that others follow.
    damaged = bytearray(whole)
    damaged[60] ^= 1
    journal.write_bytes(damaged)
    with pytest.raises(MemoryFileError, match="journal: the record at byte 24 is damaged"):
        make(tmp_path / "m")
    journal.write_bytes(b"something else entirely")
    with pytest.raises(MemoryFileError, match="journal: not of this format"):
        make(tmp_path / "m")


# Failures while writing, in a process of their own.


def limited(path: Path, pipe: Connection) -> None:
    """Append under a limit of the size of files, as on a full disk, then without."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    held = make(path).append(steps_from(0, 10))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, count in ((600, 30), (600, 30), (40_000, 10_000), (20_000, 10_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            stored.GROUP_BYTES = 2**12
            held.append(steps_from(10, count))
            pipe.send(f"{count} steps fitted into {limit} bytes")
        except OSError as error:
            pipe.send(type(error).__name__)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert_holds(held, 10)
        assert held.steps == 10
        assert_holds(memory.open(path, read_only=True), 10)
    assert_holds(held.append(steps_from(10, 3000)), 3010)
    pipe.send("done")


def test_a_full_disk(tmp_path: Path) -> None:
    with child(limited, tmp_path / "m") as (process, pipe):
        said = [pipe.recv() for _ in range(5)]
        assert said == ["OSError"] * 4 + ["done"]
    assert_holds(make(tmp_path / "m"), 3010)


def unprivileged(path: Path, pipe: Connection) -> None:
    # What is imported on the way may lie where only root may read.
    assert_holds(memory.open(path, read_only=True), 10)
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        make(path)
    except PermissionError as error:
        pipe.send(str(error))
    assert_holds(memory.open(path, read_only=True), 10)
    pipe.send("read")


def test_a_folder_that_cannot_be_written() -> None:
    # Not in tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        make(path).append(steps_from(0, 10)).flush().close()
        for entry in (Path(folder), path, *path.rglob("*")):
            entry.chmod(0o555 if entry.is_dir() else 0o444)
        with child(unprivileged, path) as (_, pipe):
            assert "read_only=True" in pipe.recv()
            assert pipe.recv() == "read"
        for entry in (Path(folder), path, *path.rglob("*")):
            entry.chmod(0o755)


def write_until_killed(path: Path, pipe: Connection, seed: int = 0, at: str = "") -> None:
    """Append pieces of any length and say how many steps are stored; die at a place or any time."""
    stored.GROUP_BYTES = 20 * SIZE * DIM * 4
    draw = random.Random(seed)
    if at:
        die_at(at, after=draw.randint(0, 2))
    held = make(path)
    pipe.send(held.steps)
    while True:
        count = draw.choice([1, 1, 2, 3, 7, 50, 200])
        held.append(steps_from(held.steps, count))
        pipe.send(held.steps)


def die_at(place: str, after: int) -> None:
    """Kill this process when it comes to a place for the time after `after` others."""
    times = 0

    def replaced(owner: Any, name: str, before: bool) -> None:
        original = getattr(owner, name)

        def dying(*args: Any) -> Any:
            nonlocal times
            times += 1
            if times > after and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args)
            if times > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, dying)

    if place == "half a record":

        def half(file: Any, data: bytes, sync: bool) -> None:
            file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        def counted(file: Any, data: bytes, sync: bool) -> None:
            nonlocal times
            times += 1
            (half if times > 3 + after else whole)(file, data, sync)

        from htm_pytorch.memory import journal

        whole = journal._write
        journal._write = counted
    elif place == "before the table":
        replaced(stored.Table, "append", True)
    elif place == "after the table":
        replaced(stored.Table, "append", False)
    elif place == "after the journal":
        replaced(stored.LocalJournal, "replace", False)


PLACES = ("half a record", "before the table", "after the table", "after the journal")


@contextlib.contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
    """Run a function in another process, with a pipe as its second argument."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lance", "pyarrow", "htm_pytorch.memory", __name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(args[0], theirs, *args[1:]), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def last_word(pipe: Connection) -> int:
    said = 0
    with contextlib.suppress(EOFError):
        while True:
            said = pipe.recv()
    return said


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_a_place(tmp_path: Path, place: str, seed: int) -> None:
    acknowledged = 0
    for turn in range(2):
        with child(write_until_killed, tmp_path / "m", 10 * seed + turn, place) as (process, pipe):
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            acknowledged = max(acknowledged, last_word(pipe))
        assert_holds(memory.open(tmp_path / "m", read_only=True), acknowledged)
        with make(tmp_path / "m") as held:
            assert_holds(held, acknowledged)
            assert_holds(held.append(steps_from(held.steps, 11)), acknowledged + 11)
            acknowledged = held.steps


def kill_at_random(path: Path, moments: int, seed: int = 0) -> None:
    make(path).close()
    acknowledged, draw = 0, random.Random(seed)
    for moment in range(1000 * seed, 1000 * seed + moments):
        with child(write_until_killed, path, moment) as (process, pipe):
            assert pipe.recv() >= acknowledged
            time.sleep(0.1 * draw.random())
            process.kill()
            acknowledged = max(acknowledged, last_word(pipe))
        assert_holds(memory.open(path, read_only=True), acknowledged)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "m", 5)


@pytest.mark.slow
def test_killed_at_200_random_moments(tmp_path: Path) -> None:
    for seed in range(10):
        kill_at_random(tmp_path / str(seed), 20, seed)


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
