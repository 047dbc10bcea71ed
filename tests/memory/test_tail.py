"""The tail of a log: small appends are one write and one wait, and nothing of them is lost."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError, StoredMemory, folder_log, log, tail
from htm_pytorch.memory.log import Head, StoredHead
from htm_pytorch.memory.tail import TailError
from tests.memory import on_disk
from tests.memory.faults import Fault, everywhere, failing
from tests.memory.on_disk import assert_holds, child, look, steps_from
from tests.memory.test_tail_file import FORM, read


def make_memory(path: Path, **options: Any) -> StoredMemory:
    """Make one that has a tail, with two steps before it."""
    return on_disk.make(path, **options).append(steps_from(0, 2))


def tails(path: Path) -> list[Path]:
    return sorted((path / "tails").iterdir())


def test_a_small_append_is_one_write_and_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    with make_memory(tmp_path / "m", sync=True) as held:
        journal = (tmp_path / "m" / "journal").read_bytes()
        for name in ("sync_data", "sync_file", "sync_folder"):
            original = next(vars(tail)[n] for n in (name,))
            everywhere(monkeypatch, name, lambda at, o=original, n=name: (waits.append(n), o(at)))
        for number in range(2, 40):
            held.append(steps_from(number, 1))
        assert waits == ["sync_data"] * 38
        assert (tmp_path / "m" / "journal").read_bytes() == journal
        assert len(tails(tmp_path / "m")) == 1
        assert_holds(held, 40)
        assert (
            held.info()["bytes of the log"]
            == len(journal) + tails(tmp_path / "m")[0].stat().st_size
        )
    for options in ({"read_only": True}, {}):
        with look(tmp_path / "m", **options) as again:
            assert_holds(again, 40)


def test_who_does_not_wait_has_what_was_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Any] = []
    everywhere(monkeypatch, "sync_data", waits.append)
    with make_memory(tmp_path / "m", sync=False) as held:
        held.append(steps_from(2, 3))
        assert_holds(look(tmp_path / "m"), 5)
    assert waits == []


@pytest.mark.parametrize("change", ["flush", "append much", "compact", "build_index"])
def test_what_changes_the_file_takes_in_the_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(folder_log, "MOST_BYTES", 1000)
    held, count = make_memory(tmp_path / "m").append(steps_from(2, 5)), 7
    reader = look(tmp_path / "m")
    if change == "append much":
        held.append(steps_from(7, 100))
        count = 107
    else:
        getattr(held, change)()
    assert_holds(held, count)
    assert_holds(reader.refresh(), count)
    held.append(steps_from(count, 1)).append(steps_from(count + 1, 1))
    assert_holds(reader.refresh(), count + 2)
    assert_holds(look(tmp_path / "m"), count + 2)
    held.close()
    # Without the tail, the file has all but the newest.
    (path,) = tails(tmp_path / "m")
    assert len(read(path, held._state.head.sequence - 2).entries) == 2
    held.close()


def test_tails_are_replaced_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_log, "FULL", 2000)
    monkeypatch.setattr(folder_log, "WORN", 1000)
    held, reader, names = make_memory(tmp_path / "m"), look(tmp_path / "m"), set()
    for number in range(2, 60):
        held.append(steps_from(number, 1))
        (path,) = tails(tmp_path / "m")
        assert path.stat().st_size < 3000
        names.add(path.name)
        if number % 7 == 0:
            assert_holds(reader.refresh(), number + 1)
    assert 5 < len(names) < 25
    assert_holds(held, 60)
    (tmp_path / "m" / "tails" / "0123456789abcdef0123456789abcdef").touch()
    (tmp_path / "m" / "tails" / "of somebody else").touch()
    held.flush()
    assert_holds(held, 60)
    for number in range(60, 70):
        held.append(steps_from(number, 1))
    names = [path.name for path in tails(tmp_path / "m")]
    assert len(names) == 2 and names[1] == "of somebody else"
    held.close()
    assert_holds(look(tmp_path / "m"), 70)


def test_a_refresh_reads_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    original: Callable[..., Any] = tail._found

    def counting(data: bytes, at: int, *rest: Any) -> Any:
        parsed.append(len(data))
        return original(data, at, *rest)

    held = make_memory(tmp_path / "m")
    for number in range(2, 30):
        held.append(steps_from(number, 1))
    reader = look(tmp_path / "m")
    monkeypatch.setattr(tail, "_found", counting)
    reader.refresh()
    assert parsed == []
    held.append(steps_from(30, 1))
    assert parsed == []
    reader.refresh()
    assert len(parsed) == 1 and parsed[0] < 1000
    assert_holds(held, 31)
    held.close()


# What goes wrong.


ERRORS = [OSError, KeyboardInterrupt, MemoryError]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("seam", ["sync_data", "entry", "follow", "write"])
def test_an_error_in_an_append(
    tmp_path: Path, seam: str, after: bool, error: type[BaseException]
) -> None:
    with make_memory(tmp_path / "m", sync=True) as held:
        held.append(steps_from(2, 1))
        (before,) = tails(tmp_path / "m")
        with failing(Fault(seam, after, 0, False, error)), pytest.raises(error):
            held.append(steps_from(3, 2))
        has_happened = seam == "sync_data" or (after and seam in ("entry", "write"))
        assert held.next_step == (5 if has_happened else 3)
        assert_holds(look(tmp_path / "m"), held.next_step)
        assert held.verify() == []
        held.append(steps_from(held.next_step, 1))
        # What the disk may not have is written once more.
        (now,) = tails(tmp_path / "m")
        assert (now != before) == (seam in ("sync_data", "entry"))
        held.append(steps_from(held.next_step, 1))
        assert_holds(held, held.next_step)
    assert_holds(look(tmp_path / "m"), held.next_step)


class Short(io.FileIO):
    """A file that has no room for all that it is given."""

    def __init__(self, path: Path, mode: str, buffering: int = -1):
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        return super().write(data[:-7])


def test_a_short_write_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_memory(tmp_path / "m") as held:
        held.append(steps_from(2, 1))
        (before,) = tails(tmp_path / "m")
        with monkeypatch.context() as patch:
            patch.setattr(tail, "open", Short, raising=False)
            with pytest.raises(OSError, match="No space left"):
                held.append(steps_from(3, 2))
        reader = look(tmp_path / "m")
        for memory_ in (held, reader):
            assert_holds(memory_, 3)
            assert memory_.next_step == 3
        torn = before.read_bytes()
        held.append(steps_from(3, 4)).append(steps_from(7, 1))
        assert_holds(reader.refresh(), 8)
        (now,) = tails(tmp_path / "m")
        assert now != before
        (kept,) = (tmp_path / "m" / "set-aside").iterdir()
        assert torn.endswith(kept.read_bytes()) and len(kept.read_bytes()) > 48


def test_a_tail_that_could_not_be_begun_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_disk.make(tmp_path / "m") as held:
        with monkeypatch.context() as patch:
            patch.setattr(tail, "open", Short, raising=False)
            with pytest.raises(OSError, match="No space left"):
                held.append(steps_from(0, 2))
        assert_holds(held, 0)
        for first in range(0, 6, 2):
            held.append(steps_from(first, 2))
        assert len(tails(tmp_path / "m")) == 1
        assert_holds(held, 6)


def test_what_follows_a_torn_end_goes_elsewhere(tmp_path: Path) -> None:
    make_memory(tmp_path / "m").append(steps_from(2, 3)).close()
    (before,) = tails(tmp_path / "m")
    with before.open("ab") as file:
        file.write(bytes(100) + b"torn")
    with look(tmp_path / "m") as reader:
        assert_holds(reader, 5)
    with look(tmp_path / "m", read_only=False) as held:
        assert_holds(held, 5)
        assert tails(tmp_path / "m") == [before]
        held.append(steps_from(5, 2))
        assert_holds(held, 7)
    assert not before.exists()
    (kept,) = (tmp_path / "m" / "set-aside").iterdir()
    assert kept.read_bytes() == bytes(100) + b"torn"
    assert_holds(look(tmp_path / "m"), 7)


def test_a_tail_that_is_gone(tmp_path: Path) -> None:
    make_memory(tmp_path / "m").append(steps_from(2, 7)).close()
    (path,) = tails(tmp_path / "m")
    path.unlink()
    for options in ({}, {"read_only": False}):
        with pytest.raises(MemoryFileError, match=f"{path.name}.* is gone; `htm memory repair`"):
            look(tmp_path / "m", **options)
    assert "is gone" in memory.repair(tmp_path / "m").problems[0]
    with look(tmp_path / "m", read_only=False) as held:
        assert_holds(held, 2)
        assert_holds(held.append(steps_from(2, 5)), 7)


def bytes_of(first: int, count: int) -> bytes:
    return steps_from(first, count).numpy().tobytes()


def test_a_flipped_bit_is_told_and_repaired(tmp_path: Path) -> None:
    held = make_memory(tmp_path / "m").append(steps_from(2, 7)).append(steps_from(9, 3))
    (path,) = tails(tmp_path / "m")
    on_disk.flip(path, bytes_of(2, 7))
    for one in (held, look(tmp_path / "m")):
        (problem,) = one.verify()
        assert "has a bit that has flipped; `htm memory repair`" in problem
        assert path.name in problem
        assert torch.equal(one.read(0, 12), steps_from(0, 12))
    held.append(steps_from(12, 1)).close()
    report = memory.repair(tmp_path / "m")
    assert report.lost == () and report.steps == 13
    assert (Path(report.set_aside) / "tails" / path.name).exists()
    assert_holds(look(tmp_path / "m"), 13)


def test_a_damaged_append_is_what_is_lost(tmp_path: Path) -> None:
    held = make_memory(tmp_path / "m")
    for first in range(2, 10, 2):
        held.append(steps_from(first, 2))
    held.close()
    (path,) = tails(tmp_path / "m")
    on_disk.flip(path, bytes_of(4, 2), 3)
    for options in ({}, {"read_only": False}):
        with pytest.raises(MemoryFileError, match=f"{path.name}.* is damaged .*htm memory repair"):
            look(tmp_path / "m", **options)
    assert memory.repair(tmp_path / "m").lost == ((4, 6),)
    with look(tmp_path / "m") as held:
        assert held.verify() == []
        assert torch.equal(held.read(6, 10), steps_from(6, 4))


def test_a_tail_outlives_the_heads_of_its_file(tmp_path: Path) -> None:
    """And what was forgotten before stays forgotten."""
    held = make_memory(tmp_path / "m").append(steps_from(2, 3)).forget(before_step=4)
    held.append(steps_from(5, 2)).append(steps_from(7, 3))
    held.close()
    journal = tmp_path / "m" / "journal"
    journal.write_bytes(journal.read_bytes().replace(b'{"dim":', b'["dim":'))
    with pytest.raises(MemoryFileError, match="its heads are damaged"):
        look(tmp_path / "m")
    report = memory.repair(tmp_path / "m")
    with look(tmp_path / "m") as held:
        assert (held.next_step, held.steps) == (10, 6)
        assert torch.equal(held.read(4, 10), steps_from(4, 6))
    assert report.lost == ()


def test_what_was_forgotten_is_in_no_tail(tmp_path: Path) -> None:
    held = make_memory(tmp_path / "m")
    for first in range(2, 12):
        held.append(steps_from(first, 1))
    with failing(Fault("remove_others", False, 0, False, OSError)):
        held.forget(before_step=9)
    held.append(steps_from(12, 2)).append(steps_from(14, 1))
    held.compact()
    held.append(steps_from(15, 1)).append(steps_from(16, 1))
    for file in (file for file in (tmp_path / "m").rglob("*") if file.is_file()):
        data = file.read_bytes()
        assert not [number for number in range(9) if bytes_of(number, 1) in data], file
    assert torch.equal(held.read(9, 17), steps_from(9, 8))
    held.reset(torch.tensor([True])).append(steps_from(50, 2)).append(steps_from(52, 2))
    reader = look(tmp_path / "m")
    assert torch.equal(reader.read(0, 4), steps_from(50, 4))
    held.close()


def test_what_was_deleted_in_vain_goes_with_compact(tmp_path: Path) -> None:
    held = make_memory(tmp_path / "m").append(steps_from(2, 5))
    with failing(Fault("remove_others", False, 0, False, OSError)):
        held.forget(before_step=7)
    assert any(bytes_of(3, 1) in path.read_bytes() for path in tails(tmp_path / "m"))
    with failing(Fault("remove_others", False, 0, True, OSError)), pytest.raises(OSError):
        held.compact()
    held.compact()
    assert tails(tmp_path / "m") == []
    held.close()


def test_an_earlier_release_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would see fewer steps."""
    make_memory(tmp_path / "m").append(steps_from(2, 1)).close()
    monkeypatch.setattr(log, "FORMAT", 2)
    for options in ({}, {"read_only": False}):
        with pytest.raises(MemoryFileError, match="another format; a newer release") as raised:
            look(tmp_path / "m", **options)
        assert "repair" not in str(raised.value)


@pytest.mark.parametrize("name", ["../journal", "0" * 31, "0" * 32 + "\n", 7])
def test_a_tail_has_no_other_name(name: Any) -> None:
    """Nobody can have a file elsewhere read or written."""
    head = Head.first(FORM)
    assert StoredHead.decode(head.encode("0" * 32)) == (head, "0" * 32, "")
    with pytest.raises((ValueError, TypeError)):
        StoredHead.decode(head.encode(name))


def test_a_memory_without_a_tail_is_one_of_format_2(tmp_path: Path) -> None:
    with make_memory(tmp_path / "m").append(steps_from(2, 3)) as held:
        held.save(tmp_path / "copy")
    for name, number in (("m", b'"format":3'), ("copy", b'"format":2')):
        assert number in (tmp_path / name / "journal").read_bytes()
    assert not (tmp_path / "copy" / "tails").exists()
    with look(tmp_path / "copy", read_only=False) as held:
        assert_holds(held.append(steps_from(5, 1)).append(steps_from(6, 1)), 7)


def change_elsewhere(path: Path, pipe: Any, what: str) -> None:
    folder_log.WORN = 0
    with on_disk.make(path) as held:
        if what == "append":
            held.append(steps_from(held.next_step, 1))
        elif what == "flush":
            held.append(steps_from(held.next_step, 8)).flush().append(steps_from(held.next_step, 1))
        else:
            held.forget(before_step=1)
        pipe.send(held.next_step)


@pytest.mark.parametrize("what", ["append", "flush", "forget"])
def test_who_comes_second_is_told(tmp_path: Path, what: str) -> None:
    first = make_memory(tmp_path / "m").append(steps_from(2, 1))
    (tmp_path / "m" / "lock").unlink()
    with child(change_elsewhere, tmp_path / "m", what) as (_, pipe):
        steps = pipe.recv()
    before = {path: path.read_bytes() for path in tails(tmp_path / "m")}
    for change in (lambda: first.append(steps_from(3, 1)), lambda: first.forget(before_step=2)):
        first._is_changing = False
        with pytest.raises(BlockingIOError, match="changed by another writer since"):
            change()
    assert {path: path.read_bytes() for path in tails(tmp_path / "m")} == before
    first.close()
    with look(tmp_path / "m") as reader:
        assert reader.next_step == steps


def test_bytes_that_another_program_adds_are_not_written_behind(tmp_path: Path) -> None:
    with make_memory(tmp_path / "m").append(steps_from(2, 1)) as held:
        (path,) = tails(tmp_path / "m")
        with path.open("ab") as file:
            file.write(b"else")
        held.append(steps_from(3, 2))
        assert tails(tmp_path / "m") != [path]
        assert_holds(look(tmp_path / "m"), 5)


def test_what_a_careless_writer_left_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_memory(tmp_path / "m").append(steps_from(2, 2)).close()
    synced: list[Path] = []
    everywhere(monkeypatch, "sync_file", synced.append)
    everywhere(monkeypatch, "sync_folder", synced.append)
    (path,) = tails(tmp_path / "m")
    look(tmp_path / "m").close()
    assert synced == []
    look(tmp_path / "m", read_only=False, sync=True).close()
    assert {path, path.parent, path.parents[1]} <= set(synced)


def test_repair_keeps_what_came_after_an_old_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail names a later version of the table than the journal whose pin there is."""
    path = tmp_path / "m"
    with make_memory(path) as held:
        held.append(steps_from(2, 38)).flush()
        held.append(steps_from(40, 3))
    shutil.copy(path / "journal", tmp_path / "journal")
    with memory.open(path) as held:
        with monkeypatch.context() as patched:
            patched.setattr(folder_log, "MOST_BYTES", 0)
            # To the end of a chunk, so that the journal that is lost held none of them.
            held.append(steps_from(43, 197)).flush()
        held.append(steps_from(240, 3))
    shutil.copy(tmp_path / "journal", path / "journal")
    with pytest.raises(TailError, match="htm memory repair"):
        memory.open(path)
    assert memory.repair(path).lost == ()
    with look(path) as held:
        assert held.verify() == []
        assert torch.equal(held.read(0, 243), steps_from(0, 243))


@pytest.mark.parametrize("more", [1, 2, 3, 4])
def test_a_reader_joins_nothing_that_repair_took_back(tmp_path: Path, more: int) -> None:
    path = tmp_path / "m"
    with make_memory(path) as held:
        held.append(steps_from(2, 38)).flush()
        for first in range(40, 46, 2):
            held.append(steps_from(first, 2))
    reader = look(path)
    assert torch.equal(reader.read(40, 46), steps_from(40, 6))
    for file in tails(path):
        file.unlink()
    memory.repair(path)
    with memory.open(path) as held:
        first = held.next_step
        for number in range(more):
            held.append(-steps_from(first + number, 1))
        wanted = held.read(0, held.next_step)
    reader.refresh()
    assert reader.next_step == wanted.shape[1]
    assert torch.equal(reader.read(0, reader.next_step), wanted)
