"""Memories of format 1: read as they are, moved by a writer, put right by `repair`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMAttention, memory
from htm_pytorch.memory import MemoryFileError, StoredMemory
from tests.memory import format_one
from tests.memory.format_one import cut, folder, record

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 8


def numbered(count: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count).float()[:, None] + torch.arange(DIM) / 16


def values(held: StoredMemory) -> list[int]:
    """Return the numbers that all closed chunks hold, in order."""
    found: list[int] = []
    for span in held.spans(torch.arange(held.chunks)):
        part = held.read(span.first_step, span.first_step + span.count)
        found += part[0, :, 0].int().tolist()
    return found


def assert_holds(path: Path, steps: int, closed: list[int], episodes: list[int]) -> None:
    """As it is for readers, after a writer has moved it, and when that has gone on."""
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with memory.open(path, read_only=True) as held:
        assert (held.steps, values(held), held.episodes.tolist()) == (steps, closed, episodes)
        assert held.verify() == []
        assert HTMAttention(DIM)(torch.randn(1, 2, DIM), held).isfinite().all()
        assert held.refresh().steps == steps
        held.save(path.with_name("copy"))
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for place in (path, path.with_name("copy")):
        with memory.open(place) as held:
            assert (held.steps, values(held), held.episodes.tolist()) == (steps, closed, episodes)
            assert held.verify() == []
            held.append(numbered(9, 500)[None])
        with memory.open(place) as held:
            assert held.read(held.next_step - 9, held.next_step)[0, 0, 0] == 500
            held.compact().build_index()
            assert held.verify() == []
            assert values(held)[: len(closed)] == closed


def test_a_table_and_a_journal(tmp_path: Path) -> None:
    steps = numbered(31)
    records = [record(24, 0, [], steps[24:27]), record(27, 1, [0], steps[27:31])]
    path = folder(tmp_path / "m", cut(steps, 0, 24), records)
    assert_holds(path, 31, list(range(31)), [0] * 7 + [1])


def test_a_journal_alone(tmp_path: Path) -> None:
    steps = numbered(10)
    records = [record(n, 0, [], steps[n : n + 1]) for n in range(10)]
    assert_holds(folder(tmp_path / "m", [], records), 10, list(range(8)), [0, 0])


def test_records_that_the_table_has_too(tmp_path: Path) -> None:
    # The process ended between the version of the table and the new journal; and a record that
    # begins further on is the rest of chunks that never reached the table.
    steps = numbered(40)
    records = [
        record(4, 0, [], steps[4:9]),
        record(9, 1, [0], steps[9:15]),
        record(30, 2, [], steps[30:33]),
        record(15, 1, [], steps[15:18]),
    ]
    chunks = [*cut(steps, 0, 8), (8, 0, steps[8:9]), *cut(steps, 9, 13, episode=1)]
    path = folder(tmp_path / "m", chunks, records)
    assert_holds(path, 18, list(range(17)), [0, 0, 0, 1, 1])


def test_a_record_cut_short_was_never_acknowledged(tmp_path: Path) -> None:
    steps = numbered(20)
    records = [record(0, 0, [], steps[:6]), record(6, 0, [], steps[6:12])[:-3]]
    assert_holds(folder(tmp_path / "m", [], records), 6, list(range(4)), [0])


def test_a_journal_of_an_earlier_generation_counts_for_nothing(tmp_path: Path) -> None:
    steps = numbered(8)
    path = folder(tmp_path / "m", cut(steps, 0, 8), [])
    old = format_one.journal(record(8, 0, [], steps[:3]), generation=bytes(16))
    (path / "journal").write_bytes(old)
    assert_holds(path, 8, list(range(8)), [0, 0])


@pytest.mark.parametrize("byte", [27, 30, 34, 38, 41, 44, 48, 52, 60, 200])
def test_one_flipped_bit_in_a_journal_is_damage(tmp_path: Path, byte: int) -> None:
    steps = numbered(20)
    records = [record(n, 0, [], steps[n : n + 1]) for n in range(20)]
    path = folder(tmp_path / "m", [], records)
    data = bytearray((path / "journal").read_bytes())
    data[byte] ^= 64
    (path / "journal").write_bytes(data)
    for read_only in (True, False):
        with pytest.raises(MemoryFileError, match="journal.* is damaged; `htm memory repair`"):
            memory.open(path, read_only=read_only)
    assert (path / "journal").read_bytes() == data
    report = memory.repair(path)
    (lost,) = report.lost
    assert lost[1] - lost[0] == 1
    with memory.open(path) as held:
        assert held.steps == 19
        assert held.verify() == []


def test_rows_that_compaction_put_out_of_order(tmp_path: Path) -> None:
    steps = numbered(58)
    chunks = cut(steps, 0, 56)
    chunks = chunks[10:] + chunks[:10]
    path = folder(tmp_path / "m", chunks, [record(56, 0, [], steps[56:58])])
    assert_holds(path, 58, list(range(56)), [0] * 14)


def test_steps_that_got_the_numbers_of_others_are_kept_behind_them(tmp_path: Path) -> None:
    # The last row was taken for the newest, so appending went on at step 40.
    steps, later = numbered(56), numbered(19, 1000)
    chunks = cut(steps, 0, 56)
    chunks = chunks[10:] + chunks[:10]
    chunks += [(40 + 4 * n, 0, later[4 * n : 4 * n + 4]) for n in range(3)]
    path = folder(tmp_path / "m", chunks, [record(52, 0, [], later[12:19])])
    for read_only in (True, False):
        with pytest.raises(MemoryFileError, match="steps 40 to 43 are there twice; `htm memory r"):
            memory.open(path, read_only=read_only)
    report = memory.repair(path)
    assert (report.steps, report.lost, report.moved) == (75, (), 19)
    with memory.open(path) as held:
        assert values(held) == [*range(56), *range(1000, 1016)]
        assert held.read(72, 75)[0, :, 0].tolist() == [1016, 1017, 1018]
        assert held.verify() == []
    assert len(list((path / "set-aside").rglob("journal"))) == 1
    assert memory.repair(path).problems == ()


def test_chunks_that_were_stored_twice_are_there_once(tmp_path: Path) -> None:
    steps = numbered(24)
    chunks = [*cut(steps, 0, 16), *cut(steps, 8, 24)]
    path = folder(tmp_path / "m", chunks, [])
    with pytest.raises(MemoryFileError, match="are there twice"):
        memory.open(path)
    assert memory.repair(path).moved == 0
    with memory.open(path) as held:
        assert values(held) == list(range(24))


def test_times_are_not_known(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", cut(numbered(8), 0, 8), [])
    with memory.open(path) as held:
        (span,) = held.spans(torch.tensor([1]))
        assert (span.first_step, span.first_time, span.keys) == (4, None, ())
        with pytest.raises(ValueError, match="before: expected times of all steps"):
            held.forget(before=5.0)
        assert held.forget(before_step=5).steps == 3
        assert held.compact().verify() == []
        assert values(held) == [5, 6, 7]


def test_steps_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    steps = numbered(8)
    steps[5] = torch.nan
    path = folder(tmp_path / "m", cut(steps, 0, 8), [])
    with memory.open(path, read_only=True) as held:
        (problem,) = held.verify()
        assert problem.startswith("chunk 1: its steps are not finite; `htm memory repair`")
    assert memory.repair(path).lost == ((4, 8),)
    with memory.open(path, read_only=True) as held:
        assert held.verify() == []
        assert values(held) == [0, 1, 2, 3]
