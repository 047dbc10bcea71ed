"""A damaged file of many memories: none is read wrong without a word, and repair keeps the rest."""

import contextlib
import random
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError, log
from htm_pytorch.memory.log import Head, Record

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, DIM = 4, 8
PAGE = 4096
WAY_OUT = re.compile("htm memory repair")


class Truth(NamedTuple):
    """What a memory was given."""

    steps: Tensor  # [T, D]
    episodes: list[int]
    keys: list[str | None]
    kept: list[int]
    """The numbers of those that were not forgotten."""


def make(path: Path) -> dict[str, Truth]:
    """Make a folder of memories whose names differ in a bit; some have forgotten something."""
    draw = random.Random(0)
    given: dict[str, Truth] = {}
    with memory.open_many(path, dim=DIM, chunk_size=SIZE, sync=False) as users:
        for name in (f"user {n}" for n in range(12)):
            given[name] = Truth(torch.zeros(0, DIM), [], [], [])
        for number in range(60):
            name = f"user {number % 12}"
            count = draw.choice([1, 3, 8, 150 if number in (10, 37) else 2])
            steps, first = torch.randn(1, count, DIM), len(given[name].steps)
            is_first = torch.tensor([[draw.random() < 0.2 for _ in range(count)]])
            key = f"key {number}" if draw.random() < 0.5 else None
            at = torch.arange(first, first + count, dtype=torch.float64)
            users.append([name], steps, is_first, keys=key, times=at)
            before = given[name]
            episode = before.episodes[-1] if before.episodes else 0
            episodes = []
            for place, begins in enumerate(is_first[0].tolist()):
                episode += begins and first + place > 0
                episodes.append(episode)
            given[name] = Truth(
                torch.cat([before.steps, steps[0]]),
                before.episodes + episodes,
                before.keys + [key] * count,
                before.kept + list(range(first, first + count)),
            )
        users["user 3"].forget(before_step=2)
        given["user 3"].kept[:2] = []
        users.open("gone").append(torch.randn(1, 9, DIM))
        users.remove("gone")
        users.open("empty")
    given["empty"] = Truth(torch.zeros(0, DIM), [], [], [])
    return given


def said_by(users: memory.Memories, name: str, truth: Truth) -> list[int]:
    """Return the numbers of the steps that a memory has, once all that it says of them is true."""
    held = users[name]
    numbers: list[int] = []
    for span in held.spans(torch.arange(held.chunks)):
        own = range(span.first_step, span.first_step + span.count)
        assert {truth.episodes[n] for n in own} == {span.episode}, (name, span)
        keys = list(span.keys or (None,) * span.count)
        assert keys == [truth.keys[n] for n in own], (name, span)
        assert (span.first_time, span.last_time) == (own[0], own[-1]), (name, span)
        numbers += own
    opened = held._state.open_chunk
    numbers += range(opened.first_step, opened.next_step)
    at = 0
    while at < len(numbers):
        # Those that follow each other, at once.
        end = next(
            (n for n in range(at + 1, len(numbers)) if numbers[n] != numbers[n - 1] + 1),
            len(numbers),
        )
        first, last = numbers[at], numbers[end - 1] + 1
        assert torch.equal(held.read(first, last)[0], truth.steps[first:last]), (name, first)
        at = end
    return numbers


def complain(folder: Path, given: dict[str, Truth], most_lost: int) -> None:
    """Raise unless everything that is said of a damaged folder is true, before and after repair."""
    was_said: list[str] = []
    try:
        with memory.open_many(folder, read_only=True) as users:
            was_said += users.verify()
            for name, truth in given.items():
                try:
                    assert said_by(users, name, truth) == truth.kept
                except (MemoryFileError, OSError) as error:
                    was_said.append(str(error))
    except (MemoryFileError, OSError) as error:
        was_said.append(str(error))
    assert all(WAY_OUT.search(said) for said in was_said), was_said
    report = memory.repair(folder)
    assert bool(report.problems) == bool(was_said), (report, was_said)
    with memory.open_many(folder) as users:
        assert users.verify() == []
        assert set(users) <= set(given), users.names()
        total = 0
        for name, truth in given.items():
            lost = {n for first, last in report.lost_of.get(name, ()) for n in range(first, last)}
            kept = [n for n in truth.kept if n not in lost]
            if name in report.headless:
                # Nobody knows how many there were.
                kept = [n for n in kept if n < users[name].next_step]
            assert said_by(users, name, truth) == kept, name
            assert len(truth.kept) - len(kept) <= most_lost, (name, report)
            assert users[name].steps == len(kept)
            total += len(kept)
        assert report.steps == total
        names = users.names()
        more = torch.randn(len(names), 3, DIM)
        when = torch.arange(1000, 1003, dtype=torch.float64)
        users.append(names, more, times=when)
    with memory.open_many(folder, read_only=True) as users:
        for row, name in enumerate(names):
            last = users[name].next_step
            assert torch.equal(users[name].read(last - 3, last)[0], more[row])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Truth]]:
    folder = tmp_path_factory.mktemp("many") / "m"
    return folder, make(folder)


def damaged_at(folder: Path, seed: int, count: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield files of which a bit is flipped, and of which a page is empty or a sector is random."""
    whole = (folder / "journal").read_bytes()
    draw = random.Random(seed)
    for number in range(count):
        content = bytearray(whole)
        if number % 4:
            # Half of them where names and heads are, or what says what is where.
            texts = [
                found.start() for found in re.finditer(rb"user |forgotten|SQLite|CREATE", whole)
            ]
            near = draw.choice([*range(0, 100, 4), *texts]) + draw.randrange(12)
            at = near if draw.random() < 0.5 else draw.randrange(len(content))
            content[at] ^= 1 << draw.randrange(8)
            yield f"bit at {at}", bytes(content), 150
        else:
            size = draw.choice([512, PAGE])
            at = draw.randrange(len(content) // size) * size
            content[at : at + size] = bytes(size) if number % 8 else draw.randbytes(size)
            yield f"{size} at {at}", bytes(content), 600


def search(made: tuple[Path, dict[str, Truth]], tmp_path: Path, seed: int, count: int) -> None:
    folder, given = made
    for what, content, most_lost in damaged_at(folder, seed, count):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / "journal").write_bytes(content)
        try:
            complain(copy, given, most_lost)
        except BaseException as error:
            raise AssertionError(what) from error


def test_any_damage_is_told_and_repaired(
    made: tuple[Path, dict[str, Truth]], tmp_path: Path
) -> None:
    search(made, tmp_path, 0, 32)


def test_nothing_but_its_names_is_left(made: tuple[Path, dict[str, Truth]], tmp_path: Path) -> None:
    """No head and no way to any row, and yet all steps: each says whose it is."""
    folder, given = made
    shutil.copytree(folder, tmp_path / "copy")
    journal = tmp_path / "copy" / "journal"
    content = bytearray(journal.read_bytes())
    content[:PAGE] = bytes(PAGE)
    journal.write_bytes(content)
    complain(tmp_path / "copy", given, 0)


def test_without_any_head_nothing_is_done(tmp_path: Path) -> None:
    make(tmp_path / "m")
    journal = tmp_path / "m" / "journal"
    content = bytearray(journal.read_bytes())
    content[200:] = bytes(len(content) - 200)
    journal.write_bytes(content)
    with pytest.raises(MemoryFileError, match="nothing in it says what its memories hold"):
        memory.repair(tmp_path / "m")
    assert journal.read_bytes() == content


def with_pages_of(journal: Path, older: bytes, is_whole: bool) -> None:
    """Damage a head of "b", and let the file hold pages to which nothing leads.

    As SQLite leaves copies of rows. If it is not whole, what leads to rows is damaged, too.
    """
    connection = sqlite3.connect(journal)
    with contextlib.closing(connection), connection:
        query = "UPDATE spare_heads SET body = zeroblob(length(body)) WHERE name = 'b'"
        assert connection.execute(query).rowcount == 1
        if not is_whole:
            connection.execute("PRAGMA writable_schema = ON")
            wrong = "UPDATE sqlite_schema SET sql = replace(sql, 'first_step', 'x') WHERE name = "
            connection.execute(wrong + "'records'")
    journal.write_bytes(journal.read_bytes() + older)


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("count", [0, 2, 30])
def test_what_was_before_a_reset_does_not_come_back(
    tmp_path: Path, count: int, is_whole: bool
) -> None:
    with memory.open_many(tmp_path / "m", dim=DIM, chunk_size=SIZE) as users:
        for _ in range(4):
            users.append(["a", "b"], torch.randn(2, 5, DIM))
        users["a"].forget(before_step=3)
    older = (tmp_path / "m" / "journal").read_bytes()
    steps = torch.randn(1, count, DIM)
    with memory.open_many(tmp_path / "m") as users:
        users["a"].reset(torch.tensor([True])).append(steps)
    with_pages_of(tmp_path / "m" / "journal", older, is_whole)
    report = memory.repair(tmp_path / "m")
    assert report.problems and not report.lost_of and not report.headless
    with memory.open_many(tmp_path / "m") as users:
        assert users.verify() == []
        assert users["a"].steps == users["a"].next_step == count
        assert torch.equal(users["a"].read(0, count), steps)


@pytest.mark.parametrize("is_whole", [False, True])
def test_contents_are_not_taken_for_heads(tmp_path: Path, is_whole: bool) -> None:
    """Whatever somebody stores, heads to which the file leads count before it."""
    with memory.open_many(tmp_path / "m", dim=DIM, chunk_size=SIZE) as users:
        users.append(["victim", "b"], torch.ones(2, 5, DIM))
        head = users["victim"]._state.head
    forged = head._replace(sequence=10**6, forgotten=((0, 3),))
    with memory.open_many(tmp_path / "other", dim=DIM, chunk_size=SIZE) as others:
        others._file.write([("victim", forged, [])])
    more = (tmp_path / "other" / "journal").read_bytes()
    with_pages_of(tmp_path / "m" / "journal", more, is_whole)
    assert memory.repair(tmp_path / "m").problems
    with memory.open_many(tmp_path / "m") as users:
        assert torch.equal(users["victim"].read(0, 5), torch.ones(1, 5, DIM))


@pytest.mark.parametrize("has_records", [False, True])
def test_a_memory_without_a_head_is_named(tmp_path: Path, has_records: bool) -> None:
    steps = torch.randn(2, 5, DIM)
    with memory.open_many(tmp_path / "m", dim=DIM, chunk_size=SIZE) as users:
        users.append(["a", "b"], steps)
    journal = sqlite3.connect(tmp_path / "m" / "journal")
    with contextlib.closing(journal), journal:
        for table in ("heads", "spare_heads", "records")[: 2 if has_records else 3]:
            query = f"UPDATE {table} SET body = zeroblob(length(body)) WHERE name = 'b'"
            journal.execute(query)
    report = memory.repair(tmp_path / "m")
    assert report.headless == ("b",) and report.lost_of == {}
    with memory.open_many(tmp_path / "m") as users:
        assert users.verify() == []
        assert torch.equal(users["a"].read(0, 5), steps[:1])
        assert users["b"].steps == (5 if has_records else 0)
        if has_records:
            assert torch.equal(users["b"].read(0, 5), steps[1:])


def test_files_of_before_have_no_names_in_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        head, record = Head.encode, Record.encode
        patch.setattr(Head, "encode", lambda self, tail="", name="": head(self, tail))
        patch.setattr(Record, "encode", lambda self, name="", generation="": record(self))
        given = make(tmp_path / "m")
    body = (tmp_path / "m" / "journal").read_bytes()
    assert b'"name":"user' not in body
    with memory.open_many(tmp_path / "m") as users:
        for name, truth in given.items():
            assert said_by(users, name, truth) == truth.kept
        users.append(["user 1"], torch.ones(1, 3, DIM))
    with memory.open_many(tmp_path / "m") as users:
        assert users["user 1"].steps == len(given["user 1"].kept) + 3
        assert users.verify() == []
    # One head of two is damaged.
    body = bytearray((tmp_path / "m" / "journal").read_bytes())
    (*_, at) = (found.end() for found in re.finditer(rb'(?s)user 5....{"dim"', body))
    body[at] ^= 1
    (tmp_path / "m" / "journal").write_bytes(body)
    assert memory.repair(tmp_path / "m").lost_of == {}
    with memory.open_many(tmp_path / "m") as users:
        assert users["user 1"].steps == len(given["user 1"].kept) + 3
        del given["user 1"]
        for name, truth in given.items():
            assert said_by(users, name, truth) == truth.kept


def test_what_a_newer_release_wrote_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(log, "_OF_MANY", 9)
        make(tmp_path / "m")
    stored = (tmp_path / "m" / "journal").read_bytes()
    told = pytest.raises(MemoryFileError, match="of another format; a newer release reads it$")
    with memory.open_many(tmp_path / "m", read_only=True) as users, told:
        users["user 1"]
    with told:
        memory.repair(tmp_path / "m")
    assert (tmp_path / "m" / "journal").read_bytes() == stored


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_much_damage_is_told_and_repaired(
    made: tuple[Path, dict[str, Truth]], tmp_path: Path, seed: int
) -> None:
    search(made, tmp_path, seed, 400)
