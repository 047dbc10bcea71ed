"""`repair`: what can still be read of a damaged memory becomes a memory again.

A new memory is made of every chunk and record whose checksum is right, and takes the place of what
is there. That is moved aside as it is: nothing is deleted. Steps that are missing in the new one
are known to be lost.
"""

import contextlib
import datetime
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory import place
from htm_pytorch.memory.files import MemoryFileError, sync_folder
from htm_pytorch.memory.formats import CPU, Chunks, Format
from htm_pytorch.memory.log import (
    Contents,
    Head,
    Range,
    Record,
    merged,
    missing,
    new_generation,
)
from htm_pytorch.memory.log_file import LogFile
from htm_pytorch.memory.many import Memories, open_many
from htm_pytorch.memory.open_chunk import Batch, OpenChunk
from htm_pytorch.memory.opening import open_memory
from htm_pytorch.memory.place import Lock, Misplaced, Place
from htm_pytorch.memory.repair_many import is_of_many, rebuilt
from htm_pytorch.memory.rows import BATCH_BYTES, form_of
from htm_pytorch.memory.salvage_log import salvaged_log, salvaged_table
from htm_pytorch.memory.salvage_rows import DamagedRows, SalvagedRow
from htm_pytorch.memory.stored import StoredMemory
from htm_pytorch.memory.versions import Versions

_NEW = ".repaired"
_PARTS = ("journal", "journal-journal", "tails", "chunks.lance")


class Report(NamedTuple):
    """What `repair` found."""

    problems: tuple[str, ...]
    """What was wrong; nothing where nothing was done."""
    steps: int
    """How many there are now."""
    lost: tuple[Range, ...]
    """Steps that are lost of one memory, from a first one up to, without, a last one."""
    moved: int
    """Steps that had the numbers of others and got new ones, behind all others."""
    set_aside: str
    """Where what was there before is now."""
    lost_of: dict[str, tuple[Range, ...]]
    """Steps that are lost of many memories, by the names of those that lost some."""
    headless: tuple[str, ...]
    """Names of those of many whose newest steps may be lost, too: how many there were is lost."""


class _Piece(NamedTuple):
    """A chunk that can be read, and where it gets to."""

    row: int
    first_step: int
    length: int
    episode: int


def repair(uri: str | os.PathLike[str]) -> Report:
    """Make what can be read of the memory in a folder a memory again, if it is damaged.

    Of a folder of many memories each keeps what can be read of it, under its name.

    Raises:
        ValueError: it is in an object store.
        FileNotFoundError: there is nothing of a memory.
        BlockingIOError: it is open for writing.
        MemoryFileError: nothing of it can be read, a newer release has written it, or something is
            where `repair` needs a place.
    """
    where = place.find(uri, None)
    if where.folder is None:
        raise ValueError(
            f"uri: expected a folder, got {where.uri!r}; copy it to one with the tools of your "
            "object store, repair it there, and copy it back"
        )
    place.check_folder(where.folder, may_make=(where.folder / _NEW).exists())
    place.check_own(where.folder / _NEW, "a folder")
    lock = Lock(where.folder)
    try:
        aside = _finish(where.folder)
        # Of which nobody makes more now.
        wrong = place.misplaced(where.folder)
        aside = _move_aside(where.folder, wrong) if wrong else aside
        told = [str(one) for one in wrong]
        is_many = is_of_many(where.log)
        look = open_many if is_many else open_memory
        problems = told + _problems(where, look)
        if len(problems) == len(told):
            return Report(tuple(told), _steps(where, look), (), 0, aside, {}, ())
        return (_rebuild_many if is_many else _rebuild)(where, where.folder, problems)
    finally:
        lock.release()


def _problems(where: Place, look: Callable[..., StoredMemory | Memories]) -> list[str]:
    try:
        with look(where.uri, read_only=True) as found:
            return found.verify()
    except (MemoryFileError, OSError) as error:
        return [str(error)]


def _steps(where: Place, look: Callable[..., StoredMemory | Memories]) -> int:
    with look(where.uri, read_only=True) as found:
        one = isinstance(found, StoredMemory)
        return found.steps if one else sum(found[name].steps for name in found)


def _rebuild_many(where: Place, folder: Path, problems: list[str]) -> Report:
    logs, lost, headless = rebuilt(where.log)
    aside = _put(folder, _empty(folder), logs, is_of_many=True)
    return Report(tuple(problems), _steps(where, open_many), (), 0, aside, lost, headless)


def _empty(folder: Path) -> Path:
    """Return a place in the folder for what is made anew."""
    new = folder / _NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    return new


def _put(folder: Path, new: Path, logs: dict[str, Contents], *, is_of_many: bool = False) -> str:
    """Put what was made, with these logs, in the place of the old; return where that is."""
    LogFile.create(new / "journal", logs, is_of_many=is_of_many).close()
    (new / "complete").touch()
    sync_folder(new)
    return _finish(folder)


def _rebuild(where: Place, folder: Path, problems: list[str]) -> Report:
    head, records, pin = salvaged_log(where)
    new = _empty(folder)
    dataset, facts = salvaged_table(where, head, pin)
    form = head.form if head is not None else _form(facts)
    if form is None:
        raise MemoryFileError(
            f"{str(folder)!r}: neither its log nor its table says what it holds; nothing of it can "
            "be read, and nothing was deleted"
        )
    if head is None:
        head = Head.first(form)
    # So that readers of before take nothing of it for what they know.
    head = head._replace(generation=new_generation())
    damaged = DamagedRows(dataset, form) if dataset is not None else None
    rows = damaged.rows() if damaged is not None else []
    least = max((row.first_step + row.length for row in rows if row.is_certain), default=0)
    found = [row for row in rows if row.is_whole]
    pieces, moved = _in_order(found, head)
    held = _Held(pieces, found, damaged, form)
    chunks, open_chunk, more = _closed(records, form, held)
    versions = Versions(Place(str(new), new, None), sync=True)
    first = head._replace(table=None)
    table = None
    for part in held.parts():
        table = versions.append(table, first, part)
    if chunks.length:
        table = versions.append(table, first, chunks)
    ends = [(piece.first_step, piece.first_step + piece.length) for piece in pieces]
    firsts = chunks.first_steps.tolist()
    ends += zip(firsts, (chunks.first_steps + chunks.counts).tolist(), strict=True)
    steps = max(head.steps, open_chunk.next_step, least)
    ends.append((open_chunk.first_step, open_chunk.next_step))
    lost = missing([*ends, *head.gaps], steps)
    episode = max(head.episode, open_chunk.episode, max((p.episode for p in pieces), default=-1))
    after = head._replace(
        sequence=head.sequence + 1,
        steps=steps,
        episode=episode,
        lost=merged((*head.lost, *lost)),
        table=table and table.pinned,
    )
    kept = open_chunk.records()
    if open_chunk.next_step != steps and kept:
        kept = [kept[0]._replace(closes=True)]
    logs = {"": Contents(after, kept, table.pin if table else None)}
    aside = _put(folder, new, logs)
    left = _steps(where, open_memory)
    return Report(tuple(problems), left, tuple(lost), moved + more, aside, {}, ())


def _move(path: Path, to: Path) -> None:
    try:
        os.rename(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise MemoryFileError(
            f"uri: {str(path)!r} cannot be set aside in {str(to.parent)!r}, which is on another "
            f"disk; {place.MOVE}"
        ) from error


def _new_aside(folder: Path) -> Path:
    """Make a folder in which nothing is read."""
    aside = folder / place.SET_ASIDE / datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-more")
    aside.mkdir(parents=True)
    return aside


def _move_aside(folder: Path, wrong: Sequence[Misplaced]) -> str:
    """Move what is of a wrong kind to a new folder; return where that is."""
    aside = _new_aside(folder)
    for one in wrong:
        to = aside / one.path.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        _move(one.path, to)
        for changed in (to.parent, one.path.parent):
            sync_folder(changed)
    for changed in (aside.parent, folder):
        sync_folder(changed)
    return str(aside)


def _finish(folder: Path) -> str:
    """Put a memory that was made in the place of the old one; return where that is."""
    new = folder / _NEW
    if not (new / "complete").exists():
        shutil.rmtree(new, ignore_errors=True)
        return ""
    aside = _new_aside(folder)
    moved = new / "moved"
    if not moved.exists():
        for name in _PARTS:
            if (folder / name).exists():
                _move(folder / name, aside / name)
        for changed in (aside, aside.parent, folder):
            sync_folder(changed)
        moved.touch()
        sync_folder(new)
    for name in _PARTS:
        if (new / name).exists():
            os.rename(new / name, folder / name)
    place.mark(folder, sync=True)
    sync_folder(folder)
    shutil.rmtree(new)
    return str(aside)


def _form(facts: dict[str, str]) -> Format | None:
    with contextlib.suppress(KeyError, ValueError, AttributeError):
        return form_of(facts)
    return None


def _in_order(found: Sequence[SalvagedRow], head: Head) -> tuple[list[_Piece], int]:
    """Return the chunks in the order of their steps, each step once.

    Where compaction once put rows out of order, later steps got numbers that others had: those
    are moved behind all others. Where a call was repeated, chunks are there twice.
    """
    taken: dict[int, tuple[int, int]] = {}
    pieces: list[_Piece] = []
    later: list[SalvagedRow] = []
    spans: list[Range] = []
    for row in found:
        if row.is_certain:
            same = taken.get(row.first_step)
            if same == (row.length, row.checksum):
                continue
            part = (row.first_step, row.first_step + row.length)
            if any(start < part[1] and part[0] < end for start, end in spans):
                later.append(row)
                continue
            taken[row.first_step] = (row.length, row.checksum)
            spans = list(merged((*spans, part)))
            pieces.append(_Piece(row.row, row.first_step, row.length, row.episode))
    pieces.sort(key=lambda piece: piece.first_step)
    for row in found:
        if not row.is_certain:
            pieces = _fitted(pieces, row, head)
    end = max((piece.first_step + piece.length for piece in pieces), default=0)
    moved = 0
    episode = max((piece.episode for piece in pieces), default=-1)
    before = None
    for row in later:
        episode += before is None or row.episode != before
        before = row.episode
        pieces.append(_Piece(row.row, end, row.length, episode))
        end += row.length
        moved += row.length
    return pieces, moved


def _fitted(pieces: list[_Piece], row: SalvagedRow, head: Head) -> list[_Piece]:
    """Put a chunk whose numbers are in doubt where a chunk of its size is missing."""
    at, episode = 0, 0
    limit = head.table.end if head.table is not None else 0
    for place_, piece in enumerate([*pieces, _Piece(-1, limit, 0, head.episode)]):
        hole = piece.first_step - at
        if 0 < hole <= row.most and (row.first_step == at or hole == row.length):
            between = episode <= row.episode <= max(piece.episode, episode)
            new = _Piece(row.row, at, hole, row.episode if between else episode)
            return [*pieces[:place_], new, *pieces[place_:]]
        at, episode = piece.first_step + piece.length, piece.episode
    return pieces


class _Held:
    """The chunks of the old table, in their new order."""

    def __init__(
        self,
        pieces: Sequence[_Piece],
        found: Sequence[SalvagedRow],
        damaged: DamagedRows | None,
        form: Format,
    ):
        self.end = max((piece.first_step + piece.length for piece in pieces), default=0)
        self.episode = max((piece.episode for piece in pieces), default=-1)
        self._pieces = pieces
        self._of_row = {row.row: row for row in found}
        self._damaged = damaged
        self._form = form

    def parts(self) -> Iterator[Chunks]:
        """Yield them, a few at a time."""
        size = max(1, 4 * BATCH_BYTES // self._form.chunk_bytes)
        for start in range(0, len(self._pieces), size):
            yield self._chunks(self._pieces[start : start + size])

    def steps(self, first: int, last: int) -> Tensor:
        """Return what is stored of those of these steps that there are [T, step_bytes]."""
        some = [p for p in self._pieces if p.first_step < last and first < p.first_step + p.length]
        none = Chunks.none(self._form).stored.flatten(0, 1)
        parts = [none]
        for piece in some:
            stored = self._chunks([piece]).stored[0, self._form.chunk_size - piece.length :]
            parts.append(stored[max(first - piece.first_step, 0) : last - piece.first_step])
        return torch.cat(parts)

    def _chunks(self, some: Sequence[_Piece]) -> Chunks:
        form, rows = self._form, [self._of_row[piece.row] for piece in some]
        assert self._damaged is not None
        stored = torch.stack([self._damaged.stored(row) for row in rows])
        counts = torch.tensor([piece.length for piece in some], dtype=torch.int32, device=CPU)
        marks = tuple(row.marks for row in rows)
        return Chunks(
            stored,
            form.summarise(stored, counts),
            counts,
            torch.tensor([piece.episode for piece in some], device=CPU),
            torch.tensor([piece.first_step for piece in some], device=CPU),
            torch.tensor([row.times for row in rows], dtype=torch.float64, device=CPU),
            torch.tensor([mark is not None for mark in marks], dtype=torch.bool, device=CPU),
            marks,
        )


def _closed(records: Sequence[Record], form: Format, held: _Held) -> tuple[Chunks, OpenChunk, int]:
    """Return the chunks that records close behind the table, the open one, and how many moved."""
    open_chunk = OpenChunk.nothing(form, held.end, held.episode)
    chunks = Chunks.none(form)
    moved = 0
    for record in records:
        batch = Batch.of([record], form)
        length = len(batch.stored)
        old = min(length, held.end - batch.first_step)
        if old > 0 and not torch.equal(
            held.steps(batch.first_step, batch.first_step + old), batch.stored[:old]
        ):
            # Others have the numbers of these steps: see `_in_order`.
            batch = batch._replace(
                first_step=open_chunk.next_step, episode=open_chunk.episode + 1, borders=(0,)
            )
            moved += length
        batch = batch.since(open_chunk.next_step)
        if not len(batch.stored):
            continue
        closed, open_chunk = open_chunk.follow(batch, form, record.closes)
        chunks = chunks + closed
    return chunks, open_chunk, moved
