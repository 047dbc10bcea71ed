"""A memory on disk when something fails: damage, a full disk, no rights, a process that ends."""

import os
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch import HTMAttention
from htm_pytorch.memory import MemoryFileError, StoredMemory, folder_log, stored, table
from tests.memory.faults import Fault, die_at, everywhere, failing
from tests.memory.on_disk import (
    SIZE,
    assert_holds,
    child,
    flip,
    last_word,
    look,
    make,
    steps_from,
    write_until_killed,
)

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def files(path: Path) -> dict[str, bytes]:
    """What is in the files of a memory, but for the lock and what SQLite puts beside its file."""
    left_out = {"lock", "journal-journal"}
    found = [entry for entry in path.rglob("*") if entry.is_file() and entry.name not in left_out]
    return {str(entry.relative_to(path)): entry.read_bytes() for entry in found}


def assert_refused(path: Path, message: str) -> None:
    """Whoever opens it gets an error that names a way out, and changes nothing."""
    before = files(path)
    for options in ({"read_only": False}, {}):
        with pytest.raises(MemoryFileError, match=f"(?s){message}.*`htm memory repair`"):
            look(path, **options)
    assert files(path) == before


# Damaged files.


def damage(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    data[place : place + 16] = bytes(byte ^ 0xFF for byte in data[place : place + 16])
    path.write_bytes(data)


def test_a_damaged_fragment(tmp_path: Path) -> None:
    make(tmp_path / "m", dim=64).append(torch.randn(1, 40, 64)).flush().close()
    (data,) = (tmp_path / "m" / "chunks.lance" / "data").iterdir()
    damage(data, 0.3)
    held = look(tmp_path / "m")
    assert len(held.verify()) == 1
    assert "checksum" in held.verify()[0]
    damaged = int(held.verify()[0].split()[1].rstrip(":"))
    with pytest.raises(MemoryFileError, match=f"chunk {damaged}: damaged"):
        held.fetch(torch.arange(10))
    others = [number for number in range(10) if number != damaged]
    assert held.fetch(torch.tensor(others)).contents.isfinite().all()
    with pytest.raises(MemoryFileError, match="damaged"):
        HTMAttention(64, topk_mems=10)(torch.randn(1, 1, 64), held)


def test_verify_names_a_chunk_by_its_number(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        held.append(steps_from(0, 10 * SIZE)).flush().forget(before_step=3 * SIZE)
    (data,) = (tmp_path / "m" / "chunks.lance" / "data").iterdir()
    flip(data, steps_from(5 * SIZE, SIZE).numpy().tobytes())
    held = look(tmp_path / "m")
    with pytest.raises(MemoryFileError, match="chunk 2: damaged"):
        held.fetch(torch.arange(7))
    (problem,) = held.verify()
    assert problem.startswith("chunk 2: ")


@pytest.mark.parametrize("left", [20, 0])
def test_a_data_file_cut_short(tmp_path: Path, left: int) -> None:
    make(tmp_path / "m").append(steps_from(0, 40)).flush().close()
    (data,) = (tmp_path / "m" / "chunks.lance" / "data").iterdir()
    data.write_bytes(data.read_bytes()[:left])
    assert_refused(tmp_path / "m", f"{data.name}' is damaged or gone")


def test_the_table_is_gone(tmp_path: Path) -> None:
    make(tmp_path / "m").append(steps_from(0, 40)).flush().append(steps_from(40, 9)).close()
    os.rename(tmp_path / "m" / "chunks.lance", tmp_path / "elsewhere")
    assert_refused(tmp_path / "m", r"chunks\.lance' is gone")
    os.rename(tmp_path / "elsewhere", tmp_path / "m" / "chunks.lance")
    assert_holds(look(tmp_path / "m"), 49)


def newest_manifest(path: Path) -> Path:
    return min((path / "chunks.lance" / "_versions").glob("*.manifest"))


def spoil(file: Path, how: str) -> None:
    whole = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        cut = {"cut": whole[:20], "empty": b"", "zeros": bytes(len(whole))}
        flipped = whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]
        file.write_bytes(cut.get(how, flipped))


@pytest.mark.parametrize("how", ["gone", "cut", "empty", "zeros", "flipped"])
def test_a_manifest_is_put_right_from_a_copy(tmp_path: Path, how: str) -> None:
    path = tmp_path / "m"
    make(path).append(steps_from(0, 20)).flush().append(steps_from(20, 20)).flush().close()
    spoil(newest_manifest(path), how)
    spoiled, before = newest_manifest(path), files(path)
    with pytest.raises(MemoryFileError, match=r"\.manifest' is damaged or gone; open .* for writ"):
        look(path)
    assert files(path) == before
    with make(path) as held:
        assert_holds(held.append(steps_from(40, 5)), 45)
    assert_holds(look(path), 45)
    aside = [f.read_bytes() for f in (path / "set-aside").rglob("*.manifest*") if f.is_file()]
    assert aside == ([] if how == "gone" else [before[str(spoiled.relative_to(path))]])


@pytest.mark.parametrize("how", ["cut", "empty", "zeros"])
@pytest.mark.parametrize("begins", ["the first version", "after a reset", "another version"])
def test_a_version_that_never_counted_is_torn(tmp_path: Path, how: str, begins: str) -> None:
    """What is left of a change that a loss of power has ended does not hinder later ones."""
    path = tmp_path / "m"
    held = make(path)
    if begins != "the first version":
        held.append(steps_from(0, 20)).flush()
    if begins == "after a reset":
        held.reset(torch.tensor([True]))
    with failing(Fault("write", False, 0, True, OSError)), pytest.raises(OSError):
        held.append(steps_from(held.steps, 20)).flush()
    with failing(Fault("write", False, 1, True, OSError)), pytest.raises(OSError):
        held.append(steps_from(held.steps, 20)).flush()
    steps = held.steps
    held.close()
    spoil(newest_manifest(path), how)
    for change in ("append", "flush", "build_index", "compact"):
        with make(path) as held:
            if change == "append":
                held.append(steps_from(steps, 8))
            else:
                getattr(held, change)()
            assert_holds(held, steps + 8)
    with make(path) as held:
        held.reset(torch.tensor([True])).compact()
        assert_holds(held.append(steps_from(0, 9)).flush(), 9)


def test_a_missing_journal(tmp_path: Path) -> None:
    make(tmp_path / "m").append(steps_from(0, 9)).close()
    (tmp_path / "m" / "journal").unlink()
    assert_refused(tmp_path / "m", "journal' is gone")
    with pytest.raises(MemoryFileError, match="journal' is gone"):
        make(tmp_path / "m")
    with make(tmp_path / "n").append(steps_from(0, 9)) as held:
        held.save(tmp_path / "copy")
    (tmp_path / "copy" / "journal").unlink()
    with pytest.raises(MemoryFileError, match="journal' is gone"):
        make(tmp_path / "copy")


@pytest.mark.parametrize("content", [b"something else entirely", b"", bytes(4096)])
def test_a_journal_of_something_else(tmp_path: Path, content: bytes) -> None:
    make(tmp_path / "m").append(steps_from(0, 40)).flush().append(steps_from(40, 9)).close()
    (tmp_path / "m" / "journal").write_bytes(content)
    assert_refused(tmp_path / "m", "journal")


def test_a_damaged_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_log, "MOST_BYTES", 0)
    held = make(tmp_path / "m").append(steps_from(0, 2)).append(steps_from(2, 9))
    held.append(steps_from(11, 1))
    flip(tmp_path / "m" / "journal", steps_from(2, 9).numpy().tobytes())
    # Who has it in RAM can still say what is wrong.
    (problem,) = held.verify()
    assert "record of step 2 is damaged" in problem
    held.close()
    assert_refused(tmp_path / "m", r"journal'?: the record of step 2 is damaged")


def test_one_of_two_heads_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "m"
    make(path).append(steps_from(0, 40)).flush().append(steps_from(40, 9)).close()
    whole = (path / "journal").read_bytes()
    places = [at for at in range(len(whole)) if whole[at:].startswith(b'{"dim":')]
    # The newest of each; what SQLite no longer uses may hold older ones.
    for at in places:
        (path / "journal").write_bytes(whole[:at] + b"[" + whole[at + 1 :])
        with look(path) as held:
            assert held.steps == 49
            assert all("one of two heads is damaged" in problem for problem in held.verify())
    (path / "journal").write_bytes(whole.replace(b'{"dim":', b'["dim":'))
    assert_refused(path, "its heads are damaged")


def test_any_damaged_byte_of_the_journal(tmp_path: Path) -> None:
    """The steps that were stored, or an error: never others, never fewer."""
    path = tmp_path / "m"
    make(path).append(steps_from(0, 40)).flush().append(steps_from(40, 9)).close()
    whole = (path / "journal").read_bytes()
    used = [at for at in range(len(whole)) if whole[at]]
    draw, refused = random.Random(0), 0
    for _ in range(60):
        at, bit = draw.choice(used), 1 << draw.randrange(8)
        (path / "journal").write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            with look(path) as held:
                assert held.steps == 49
                assert torch.equal(held.read(0, 49), steps_from(0, 49))
        except MemoryFileError as error:
            assert "journal" in str(error) and "htm memory repair" in str(error)
            refused += 1
    assert refused > 5
    (path / "journal").write_bytes(whole)
    assert_holds(look(path), 49)


def test_a_journal_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "m"
    make(path).append(steps_from(0, 400)).close()
    whole = (path / "journal").read_bytes()
    for length in (10, 3000, len(whole) // 2, len(whole) - 1000):
        (path / "journal").write_bytes(whole[:length])
        assert_refused(path, "journal")


def test_a_reader_that_finds_damage_keeps_what_it_knew(tmp_path: Path) -> None:
    path = tmp_path / "m"
    writer = make(path).append(steps_from(0, SIZE)).flush()
    reader, before = look(path), files(path)
    for number in range(1, 8):
        writer.append(steps_from(number * SIZE, SIZE))
        reader.refresh()
    writer.append(steps_from(8 * SIZE, SIZE)).flush()
    (data,) = [path / name for name in files(path) if "/data/" in name and name not in before]
    flip(data, steps_from(2 * SIZE, SIZE).mean(1).numpy().tobytes(), 64)
    with pytest.raises(MemoryFileError, match="damaged; `htm memory repair`"):
        look(path)
    # It knew them before they were in the table.
    reader.refresh()
    torch.testing.assert_close(reader.summaries[0, 2], steps_from(2 * SIZE, SIZE)[0].mean(0))
    writer.close()


# Failures while writing.


def test_what_could_not_be_purged_is_purged_later(tmp_path: Path) -> None:
    """Where SQLite leaves deleted bytes in its file, as it does by default."""
    path = tmp_path / "m"
    with make(path) as held:
        held._log.file.connected().execute("PRAGMA secure_delete = OFF")
        held.append(steps_from(0, 400), keys=[f"secret {n}" for n in range(400)])
        held.append(steps_from(400, 8)).forget(before_step=400)
        with failing(Fault("purge", False, 0, False, OSError)), pytest.raises(OSError):
            held.compact()
        assert b"secret" in (path / "journal").read_bytes()
        assert held.info()["forgotten and still in files"]
        held.compact()
        assert not held.info()["forgotten and still in files"]
        assert not any(b"secret" in content for content in files(path).values())


def test_new_folders_are_synced_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    everywhere(monkeypatch, "sync_folder", synced.append)
    make(tmp_path / "a" / "b" / "m", sync=True).close()
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)


def limited(path: Path, pipe: Connection) -> None:
    """Append under a limit of the size of files, as on a full disk, then without."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    held = make(path).append(steps_from(0, 10))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    stored.GROUP_BYTES = 2**12
    size = held.info()["bytes of the log"]
    for limit, count in ((600, 30), (600, 30), (size, 2000), (size // 2, 10_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            held.append(steps_from(10, count))
            pipe.send(f"{count} steps fitted into {limit} bytes")
        except OSError as error:
            pipe.send(type(error).__name__)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert_holds(held, 10)
        assert held.steps == 10
        assert_holds(look(path), 10)
    assert_holds(held.append(steps_from(10, 3000)), 3010)
    pipe.send("done")


def test_a_full_disk(tmp_path: Path) -> None:
    with child(limited, tmp_path / "m") as (_, pipe):
        said = [pipe.recv() for _ in range(5)]
        assert said == ["OSError"] * 4 + ["done"]
    assert_holds(make(tmp_path / "m"), 3010)


def unprivileged(path: Path, pipe: Connection) -> None:
    # What is imported on the way may lie where only root may read.
    import filelock  # noqa: F401

    assert_holds(look(path), 10)
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        make(path)
    except PermissionError as error:
        pipe.send(str(error))
    assert_holds(look(path), 10)
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


def test_another_process_holds_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, "WAIT_SECONDS", 0.05)
    held = make(tmp_path / "m").append(steps_from(0, 5))
    held._log.reopen()
    other = sqlite3.connect(tmp_path / "m" / "journal", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TimeoutError, match="another process has held it"):
        held.append(steps_from(5, 1))
    other.execute("ROLLBACK")
    other.close()
    assert_holds(held.append(steps_from(5, 4)), 9)
    held.close()


# The end of the process.


def die_while_the_journal_is_written(after: int) -> None:
    """Let the system end this process at a write that makes the journal longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    calls, original = 0, StoredMemory.append

    def limiting(held: StoredMemory, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            size = held.info()["bytes of the log"] + 1000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return original(held, *args, **kwargs)

    StoredMemory.append = limiting  # type: ignore[method-assign]


PLACES = [
    ("in a transaction", partial(die_at, "put", True)),
    ("in the middle of a write", die_while_the_journal_is_written),
    ("after a transaction", partial(die_at, "write", True)),
    ("before the table", partial(die_at, "append", False)),
    ("after the table", partial(die_at, "append", True)),
    ("between its files", partial(die_at, "sync_file", False)),
    ("behind its files", partial(die_at, "sync_folder", True)),
    ("before a join", partial(die_at, "join", False)),
    ("after a join", partial(die_at, "join", True)),
    ("after cleaning", partial(die_at, "clean", True)),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0])
def test_killed_at_a_place(tmp_path: Path, place: tuple[str, Any]) -> None:
    acknowledged = 0
    for turn in range(3):
        before = partial(place[1], turn)
        with child(write_until_killed, tmp_path / "m", turn, before) as (process, pipe):
            acknowledged = max(acknowledged, last_word(pipe))
            process.join(60)
            assert process.exitcode in (-signal.SIGKILL, -signal.SIGXFSZ)
        assert_holds(look(tmp_path / "m"), acknowledged)
        with make(tmp_path / "m") as held:
            assert_holds(held, acknowledged)
            assert_holds(held.append(steps_from(held.steps, 11)), acknowledged + 11)
            acknowledged = held.steps


@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_reader_without_rights_beside_what_was_left_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: str
) -> None:
    """It cannot take the change back, and sees the memory without it; and what comes later."""
    path = tmp_path / "m"
    make(path).append(steps_from(0, 9)).close()
    rights = os.access
    monkeypatch.setattr(os, "access", lambda where, mode: mode != os.W_OK and rights(where, mode))
    reader = look(path)
    before = partial(die_while_the_journal_is_written, 3)
    with child(write_until_killed, path, 0, before) as (process, pipe):
        acknowledged = last_word(pipe)
        process.join(60)
    assert (path / "journal-journal").stat().st_size
    if opened == "after":
        reader = look(path)
    for _ in range(2):
        assert_holds(reader.refresh(), acknowledged)
    monkeypatch.undo()
    with make(path) as held:
        held.append(steps_from(held.steps, 50))
        monkeypatch.setattr(os, "access", lambda where, mode: mode != os.W_OK)
        assert_holds(reader.refresh(), held.steps)


def kill_at_random(path: Path, moments: int, seed: int = 0) -> None:
    make(path).close()
    acknowledged, draw = 0, random.Random(seed)
    for moment in range(1000 * seed, 1000 * seed + moments):
        with child(write_until_killed, path, moment) as (process, pipe):
            assert pipe.recv() >= acknowledged
            time.sleep(0.1 * draw.random())
            process.kill()
            acknowledged = max(acknowledged, last_word(pipe))
        assert_holds(look(path), acknowledged)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "m", 5)


@pytest.mark.slow
def test_killed_at_200_random_moments(tmp_path: Path) -> None:
    for seed in range(10):
        kill_at_random(tmp_path / str(seed), 20, seed)


def test_a_memory_without_its_mark_is_marked_by_its_next_writer(tmp_path: Path) -> None:
    """It was killed before it came to that; afterwards a missing log is noticed as ever."""
    make(tmp_path / "m").append(steps_from(0, 5)).close()
    (tmp_path / "m" / "README.txt").unlink()
    make(tmp_path / "m").close()
    (tmp_path / "m" / "journal").unlink()
    with pytest.raises(MemoryFileError, match="is gone"):
        make(tmp_path / "m")


def test_files_of_a_careless_writer_are_synced_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(tmp_path / "m", sync=False) as careless:
        careless.append(steps_from(0, 9)).flush()
    data = {path.name for path in (tmp_path / "m/chunks.lance/data").iterdir()}
    synced: list[str] = []
    real = table.sync_file
    monkeypatch.setattr(table, "sync_file", lambda path: (synced.append(path.name), real(path)))
    with make(tmp_path / "m", sync=True) as careful:
        careful.append(steps_from(9, 9)).flush()
    assert data and data <= set(synced)


def test_another_memory_in_the_same_place_is_seen(tmp_path: Path) -> None:
    """Though it was changed as often."""
    make(tmp_path / "m").append(steps_from(0, 5)).close()
    make(tmp_path / "other").append(steps_from(5, 5)).close()
    reader = look(tmp_path / "m")
    shutil.rmtree(tmp_path / "m/tails")
    for name in ("journal", "tails"):
        (tmp_path / "other" / name).replace(tmp_path / "m" / name)
    assert torch.equal(reader.refresh().read(0, 5), steps_from(5, 5))
    reader.close()


def test_a_forgotten_chunk_is_named_by_its_row(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        held.append(steps_from(0, 9)).flush().forget(before_step=4)
        held.append(steps_from(9, 9)).flush()
    stored_as = steps_from(0, 4).numpy().tobytes()
    (data,) = (
        path
        for path in (tmp_path / "m/chunks.lance/data").iterdir()
        if stored_as in path.read_bytes()
    )
    flip(data, stored_as)
    with look(tmp_path / "m") as reader:
        (problem,) = reader.verify()
        assert problem.startswith("a forgotten chunk in row 0: its checksum is wrong")


def test_a_writer_whose_lock_was_removed_is_told_of_the_next_one(tmp_path: Path) -> None:
    first = make(tmp_path / "m").append(steps_from(0, 5))
    (tmp_path / "m/lock").unlink()
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        other.submit(_append_five, tmp_path / "m").result()
    with pytest.raises(BlockingIOError, match="changed by another writer since"):
        first.append(steps_from(5, 5))
    first.close()
    with make(tmp_path / "m") as held:
        assert_holds(held, 10)


def _append_five(path: Path) -> None:
    make(path).append(steps_from(5, 5)).close()
