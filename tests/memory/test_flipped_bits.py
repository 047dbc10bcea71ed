"""One bit of a file is not what was written: nothing that is read is wrong without a word."""

import contextlib
import os
import random
import re
import shutil
import signal
import traceback
import zlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError, StoredMemory, folder_log, stored
from htm_pytorch.memory.carved import sealed_lists, windows
from htm_pytorch.memory.formats import Chunks, Format, Marks
from htm_pytorch.memory.log import sealed
from htm_pytorch.memory.rows import NUMBERS, encoded
from htm_pytorch.memory.salvage_rows import determined
from tests.memory.on_disk import DIM, SIZE, child, steps_from

lance = pytest.importorskip("lance", reason="the extra `store` is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = 30.0
"""For all that is done with one damaged memory."""
WAY_OUT = re.compile(r"htm memory repair|for writing, which puts it right|put it back|build_index")


class Step(NamedTuple):
    """What a memory says of a step, but for its numbers."""

    episode: int
    key: str | None


Truth = dict[int, Step]
"""Of each step by its number."""


class Flip(NamedTuple):
    """A bit of a file."""

    file: str
    byte: int
    bit: int


def open_(path: Path, **options: Any) -> StoredMemory:
    return memory.open(path, cache_bytes=2**12, sync=False, **options)


# A memory with a table of several files, an index, keys, a log, and steps that were forgotten.


def write(path: Path, pipe: Connection, is_killed: bool) -> None:
    stored.GROUP_BYTES = 12 * SIZE * DIM * 4
    held = memory.open(path, dim=DIM, chunk_size=SIZE, cache_bytes=0, sync=False)
    truth: Truth = {}
    for number, count in enumerate([3, 7, 10, 6, 4, 50, 1, 2, 30, 50, 1, 1, 3, 5, 2]):
        first, episode = held.next_step, number // 3
        is_first = torch.zeros(1, count, dtype=torch.bool)
        is_first[0, 0] = number % 3 == 0
        keys = [f"key {first + i}" if number % 2 else None for i in range(count)]
        times = torch.arange(first, first + count, dtype=torch.float64)
        held.append(steps_from(first, count), is_first, keys=keys, times=times)
        truth |= {first + i: Step(episode, key) for i, key in enumerate(keys)}
        if number == 8:
            held.build_index()
        if number == 9:
            # All of episode 1, and half a chunk.
            held.forget(episodes=[1], before_step=2)
    truth = {n: step for n, step in truth.items() if step.episode != 1 and n >= 2}
    assert said_by(held) == truth
    pipe.send(truth)
    if is_killed:
        put = folder_log.put_changes

        def dying(*args: Any) -> None:
            put(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        folder_log.put_changes = dying
        held.forget(before_step=3)
    held.close()


def said_by(held: StoredMemory, has_times: bool = True) -> Truth:
    """What a memory says of its steps; and that what it says in other ways is the same."""
    said: Truth = {}
    every = torch.arange(held.chunks)
    contents, episodes = held.fetch(every), held.episodes.tolist()
    for span in held.spans(every):
        steps = contents.contents[0, span.chunk, SIZE - span.count :]
        assert torch.equal(steps, steps_from(span.first_step, span.count)[0]), span
        assert episodes[span.chunk] == span.episode
        last = span.first_step + span.count - 1
        if has_times or span.first_time is not None:
            assert (span.first_time, span.last_time) == (span.first_step, last), span
        keys = span.keys or (None,) * span.count
        said |= {span.first_step + i: Step(span.episode, key) for i, key in enumerate(keys)}
    summaries = torch.stack(
        [contents.contents[0, s.chunk, SIZE - s.count :].mean(0) for s in held.spans(every)]
    )
    if held.holds_summaries:
        torch.testing.assert_close(held.summaries[0], summaries)
    else:
        query = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
        found = held.find(query, 5)
        scores = (query @ summaries.T).gather(1, found.chunks.clamp(min=0))
        torch.testing.assert_close(found.scores[found.chunks >= 0], scores[found.chunks >= 0])
    opened = held._state.open_chunk
    if len(opened.stored):
        read = held.read(opened.first_step, held.next_step)
        assert torch.equal(read, steps_from(opened.first_step, len(opened.stored)))
        keys = opened.keys or (None,) * len(opened.stored)
        steps = enumerate(keys, opened.first_step)
        said |= {number: Step(opened.episode, key) for number, key in steps}
    assert len(said) == held.steps
    return said


# What is asked of a damaged memory, in a process that may hang or break.


def judge(whole: Path, pipe: Connection, truth: Truth) -> None:
    """Answer for each flipped bit what is wrong with what became of it, or nothing."""
    while True:
        flip = pipe.recv()
        try:
            pipe.send(complaint(whole, flip, truth))
        except BaseException:
            pipe.send(traceback.format_exc())


def flip_in(folder: Path, flip: Flip) -> None:
    file = folder / flip.file
    content = bytearray(file.read_bytes())
    content[flip.byte] ^= 1 << flip.bit
    file.write_bytes(content)


def complaint(whole: Path, flip: Flip, truth: Truth) -> str:
    damaged = whole.with_name("damaged")

    def anew() -> None:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole, damaged)
        flip_in(damaged, flip)

    was_said = False
    for search in ("exact", "index"):
        anew()
        with warned(damaged) as said, open_(damaged, read_only=True, search=search) as held:
            assert said_by(held) == truth
            assert all(WAY_OUT.search(problem) for problem in held.verify())
            said += held.verify()
        was_said |= bool(said)
    anew()
    with warned(damaged) as said:
        with open_(damaged) as held:
            assert said_by(held) == truth
            said += held.verify()
            more = held.next_step
            held.append(steps_from(more, 3), times=torch.arange(more, more + 3.0)).flush()
        with open_(damaged, read_only=True) as held:
            assert {n: step for n, step in said_by(held).items() if n < more} == truth
    if said or was_said:
        anew()
        is_repaired(damaged, truth)
    return ""


@contextlib.contextmanager
def warned(path: Path) -> Iterator[list[str]]:
    """Collect the error, if there is one, that says what is damaged and what to do."""
    said: list[str] = []
    try:
        yield said
    except (MemoryFileError, OSError) as error:
        said.append(str(error))
        assert WAY_OUT.search(str(error)), error
        assert path.name in str(error) or "chunk" in str(error), error


def is_repaired(damaged: Path, truth: Truth) -> None:
    parts = {file.name for file in damaged.iterdir()} & {"journal", "chunks.lance"}
    report = memory.repair(damaged)
    if report.problems:
        assert parts <= {file.name for file in Path(report.set_aside).iterdir()}
    lost = {number for first, last in report.lost for number in range(first, last)}
    with open_(damaged) as held:
        assert held.verify() == []
        said = said_by(held, has_times=False)
        # At most one chunk, or what was appended together.
        assert len(lost & set(truth)) <= 5, report
        kept = {number: step for number, step in truth.items() if number not in lost}
        assert said.keys() == kept.keys(), report
        # Keys of one chunk may be lost where its steps are not, but none is another one.
        other = [said[number] for number, step in kept.items() if said[number] != step]
        assert len(other) <= SIZE and all(step.key is None for step in other), report
        assert all(said[number].episode == step.episode for number, step in kept.items()), report
        more = held.next_step
        held.append(steps_from(more, 3), times=torch.arange(more, more + 3.0)).flush()
    with open_(damaged, read_only=True) as held:
        assert held.steps == len(kept) + 3


def flips(whole: Path, count: int, draw: random.Random) -> list[Flip]:
    """Of every file as many; half of them near its ends, where it says what is where."""
    files = sorted(p for p in whole.rglob("*") if p.is_file() and p.stat().st_size)
    chosen = []
    for number in range(count):
        file = files[number % len(files)]
        size = file.stat().st_size
        ends = [*range(min(size, 256)), *range(max(0, size - 512), size)]
        byte = draw.choice(ends) if draw.random() < 0.5 else draw.randrange(size)
        chosen.append(Flip(str(file.relative_to(whole)), byte, draw.randrange(8)))
    return chosen


def flip_bits(folder: Path, is_killed: bool, count: int, seed: int) -> None:
    whole = folder / "whole"
    with child(write, whole, is_killed) as (process, pipe):
        truth = pipe.recv()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if is_killed else 0)
    left, wrong = flips(whole, count, random.Random(seed)), []
    while left:
        with child(judge, whole, truth) as (process, pipe):
            while left:
                flip = left.pop()
                pipe.send(flip)
                if not pipe.poll(SECONDS):
                    wrong.append((flip, f"nothing after {SECONDS} s"))
                    break
                try:
                    said = pipe.recv()
                except EOFError:
                    process.join(5)
                    wrong.append((flip, f"the process broke: {process.exitcode}"))
                    break
                if said:
                    wrong.append((flip, said))
    assert not wrong, "\n".join(f"{flip}: {said}" for flip, said in wrong)


@pytest.mark.parametrize("is_killed", [False, True])
def test_flipped_bits(tmp_path: Path, is_killed: bool) -> None:
    flip_bits(tmp_path, is_killed, 16, seed=1)


def test_a_damaged_index_is_not_asked_and_keeps_nobody_from_reading(tmp_path: Path) -> None:
    whole, draw = tmp_path / "whole", random.Random(0)
    with child(write, whole, False) as (process, pipe):
        truth = pipe.recv()
        process.join(60)
    for file in sorted(whole.rglob("*.idx")):
        flip = Flip(str(file.relative_to(whole)), draw.randrange(file.stat().st_size), 7)
        assert complaint(whole, flip, truth) == ""
        damaged = tmp_path / "damaged"
        with open_(damaged) as held:
            first = held.next_step
            held.append(steps_from(first, 50), times=torch.arange(first, first + 50.0))
            held.build_index()
        with open_(damaged, search="index", read_only=True) as held:
            assert held.verify() == []
        other = next((damaged / "chunks.lance").rglob(file.name))
        flip_in(damaged, Flip(str(other.relative_to(damaged)), 0, 0))
        with open_(damaged, read_only=True) as held:
            assert held.steps == len(said_by(held))
            (problem,) = held.verify()
        assert "the index is damaged" in problem and WAY_OUT.search(problem)
        for options in ({"read_only": True}, {}):
            with pytest.raises(MemoryFileError, match="the index is damaged"):
                open_(damaged, search="index", **options)


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_1000_flipped_bits(tmp_path: Path, is_killed: bool, seed: int) -> None:
    flip_bits(tmp_path, is_killed, 100, seed=100 + seed)


def test_lists_behind_their_checksums_are_found() -> None:
    lists = [b'[[1.0,2.0],["a]]b",null]]', b"[[],[]]", b"[[3.0],[]]"]
    data = b"[[ ]] no" + b"".join(b"x" + sealed(body) + b"[[" for body in lists)
    assert list(sealed_lists(data)) == [sealed(body) for body in lists]
    assert list(sealed_lists(data.replace(b"2.0", b"2.5"))) == [sealed(body) for body in lists[1:]]


def test_windows_by_their_checksums() -> None:
    data = random.Random(0).randbytes(300)
    wanted = {zlib.crc32(data[at : at + 16]): data[at : at + 16] for at in (0, 111, 284)}
    assert windows(data, 16, {*wanted, 7}) == wanted
    assert windows(b"", 16, {7}) == {}


def three_chunks(form: Format) -> Chunks:
    counts = torch.tensor([SIZE, 2, 1], dtype=torch.int32)
    steps = torch.randn(3, SIZE, DIM)
    steps[torch.arange(SIZE) < SIZE - counts[:, None]] = 0
    stored = form.encode(steps)
    marks = Marks((5.0, 6.5), ("a", None))
    return Chunks(
        stored,
        form.summarise(stored, counts),
        counts,
        torch.tensor([0, 7, 2**40]),
        torch.tensor([0, SIZE, 2**62]),
        torch.tensor([[torch.nan, torch.nan], [5.0, 6.5], [-1e300, torch.inf]]).double(),
        torch.tensor([False, True, False]),
        (None, marks, None),
    )


@pytest.mark.parametrize("missing", [*NUMBERS, "checksum"])
def test_a_column_of_numbers_follows_from_the_others(missing: str) -> None:
    form = Format(DIM, SIZE, torch.float32)
    (batch,) = encoded(three_chunks(form), form, "")
    found = determined(missing, batch.drop_columns([missing]), form)
    assert found.type == batch[missing].type
    assert found.to_numpy(zero_copy_only=False).tobytes() == (
        batch[missing].to_numpy(zero_copy_only=False).tobytes()
    )


def test_what_the_others_rule_out_is_not_made_up() -> None:
    form = Format(DIM, SIZE, torch.float32)
    (batch,) = encoded(three_chunks(form), form, "")
    with pytest.raises(ValueError, match="several numbers"):
        determined("steps", batch.drop_columns(["steps", "episode"]), form)
    other = batch.set_column(2, "steps", pa.array([SIZE, 3, 1], pa.int32()))
    with pytest.raises(ValueError, match="expected a flag"):
        determined("marked", other.drop_columns(["marked"]), form)
