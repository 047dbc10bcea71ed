"""Memories of format 1: how they are read, and how they become memories of today's format.

Their table had no checksums of its numbers, and their journal was a file of records of our own, in
an object store a table of one row. They are read from there as they are; opened for writing, they
get a log. Until that has the place of the journal, nothing that they hold is changed.
"""

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.folder_log import FolderLog
from htm_pytorch.memory.formats import Format
from htm_pytorch.memory.lance_access import is_damage
from htm_pytorch.memory.log import REPAIR, Contents, Head, Log, Pin, Record, check_records
from htm_pytorch.memory.log_file import LogFile
from htm_pytorch.memory.object_log import EARLIER, ObjectLog, decoded, is_object
from htm_pytorch.memory.place import Place
from htm_pytorch.memory.table import Table, holes
from htm_pytorch.memory.versions import Versions

MAGIC = b"HTMJRNL1"
_HEADER = struct.Struct("<8s16s")
_RECORD = struct.Struct("<IQqII")


class Journal(NamedTuple):
    """What a journal of format 1 holds."""

    generation: str
    records: list[Record]


def decode(journal: bytes, where: str) -> Journal:
    """Return what a journal holds; a record that breaks off at the end was never acknowledged.

    Raises:
        MemoryFileError: it is no journal, or a record that others follow is damaged.
    """
    if len(journal) < _HEADER.size or journal[: len(MAGIC)] != MAGIC:
        raise MemoryFileError(f"{where} is damaged, or not of this format; {REPAIR}")
    records, at = [], _HEADER.size
    while (found := _record(journal, at)) is not None:
        record, at = found
        records.append(record)
    if any(_record(journal, later) for later in range(at + 1, len(journal) - _RECORD.size)):
        raise MemoryFileError(f"{where}: the record at byte {at} is damaged; {REPAIR}")
    return Journal(_HEADER.unpack_from(journal)[1].hex(), records)


def salvaged(journal: bytes) -> list[Record]:
    """Return all records that are whole, also behind damage."""
    records, at = [], _HEADER.size
    while at < len(journal):
        found = _record(journal, at)
        if found is not None:
            record, at = found
            records.append(record)
        else:
            at += 1
    return records


def _record(journal: bytes, at: int) -> tuple[Record, int] | None:
    if at + _RECORD.size > len(journal):
        return None
    crc, first_step, episode, borders, size = _RECORD.unpack_from(journal, at)
    body = at + _RECORD.size
    end = body + borders + size
    if end > len(journal) or not size or zlib.crc32(journal[at + 4 : end]) != crc:
        return None
    numbers = struct.unpack_from(f"<{borders // 4}I", journal, body)
    return Record(first_step, episode, numbers, (), (), False, journal[body + borders : end]), end


def contents(versions: Versions, journal: bytes, where: str) -> tuple[Contents, Table]:
    """Return what a memory of format 1 holds.

    Raises:
        MemoryFileError: it is damaged, or it has steps twice, as compaction once left them.
    """
    table, facts = versions.newest()
    try:
        form = table.form
        generation = facts["generation"]
    except KeyError as error:
        raise MemoryFileError(f"{versions.uri!r}: no table of this format ({error})") from error
    found = decode(journal, where)
    end, episode = table.pinned.end, -1
    ends: list[tuple[int, int]] = []
    for row in table.rows(0, with_summaries=False):
        first, chunks = row.chunks.first_steps, row.chunks
        ends += zip(first.tolist(), (first + chunks.counts).tolist(), strict=True)
        episode = max(episode, int(chunks.episodes.max()))
    wrong = holes(ends, (), end)
    if wrong:
        raise MemoryFileError(f"{versions.uri!r}: {wrong[0]}; {REPAIR}")
    records: list[Record] = []
    at = end
    # Records of another generation are of a table that is no more.
    for record in found.records if found.generation == generation else ():
        after = record.first_step + len(record.steps) // form.step_bytes
        # One that begins further on is the rest of chunks that never reached the table.
        if record.first_step > at or after <= at:
            continue
        records.append(record)
        at = after
        episode = max(episode, record.episode + sum(border > 0 for border in record.borders))
    first = Head.first(form)
    head = first._replace(
        generation=generation,
        sequence=1,
        steps=at,
        episode=episode,
        table=table.pinned if table.pinned.rows else None,
    )
    return Contents(head, _cut(records, end, form)), table


def _cut(records: Sequence[Record], start: int, form: Format) -> list[Record]:
    """Return the records without steps that come before `start`, or twice."""
    found: list[Record] = []
    at = start
    for record in records:
        known = at - record.first_step
        begun = sum(0 < border <= known for border in record.borders)
        borders = tuple(border - known for border in record.borders if border >= known)
        steps = record.steps[known * form.step_bytes :]
        found.append(Record(at, record.episode + begun, borders, (), (), False, steps))
        at += len(steps) // form.step_bytes
    return found


class EarlierLog:
    """The log of a memory that is not in today's format here, and only read."""

    def __init__(self, where: str, read: Callable[[], Contents], size: Callable[[], int]):
        self.where = where
        self._read = read
        self.size = size

    @classmethod
    def of_format_1(cls, versions: Versions, journal: Callable[[], bytes], where: str) -> Self:
        """Return that of a memory with such a journal."""

        def read() -> Contents:
            found, _ = contents(versions, journal(), where)
            # What its writer adds shows as another number.
            version = versions.newest()[0].pinned.version
            head = found.head._replace(sequence=1 + found.head.steps + version)
            return check_records(where, found._replace(head=head))

        return cls(where, read, lambda: len(journal()))

    def read(self, known: Head | None = None) -> Contents | None:
        """Return the head and all records; see `Log.read`."""
        return self._read()

    def write(
        self, head: Head, new: Sequence[Record], replace: bool, pin: Pin | None = None
    ) -> None:
        """Raise: it is only read."""
        raise OSError(f"{self.where} is of another format, which is only read")

    def end(self, name: str) -> bytes | None:
        """Return nothing: none is kept."""
        return None

    def reopen(self) -> None:
        """Do nothing."""

    def purge(self) -> None:
        """Do nothing."""

    def problems(self) -> list[str]:
        """Return nothing: what is damaged cannot be read in the first place."""
        return []

    def inherit(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def in_folder(place: Place, sync: bool, read_only: bool) -> Log | None:
    """Return the log of a memory in a folder that is of format 1, or came from an object store.

    None where there is none. Unless it is only read, it becomes one of today's format.
    """
    path = place.log
    if LogFile(path, read_only=True).is_log():
        return None
    versions = Versions(place, sync)
    if is_object(path.read_bytes()):
        where = f"the log {str(path)!r}"

        def read() -> Contents:
            return check_records(where, decoded(path.read_bytes(), where))

        if read_only:
            return EarlierLog(where, read, lambda: path.stat().st_size)
        found = read()
    else:
        where = f"the journal {str(path)!r}"
        if read_only:
            return EarlierLog.of_format_1(versions, path.read_bytes, where)
        found = _widened(versions, path.read_bytes(), where)
    return FolderLog(LogFile.create(path, {"": found}, sync=sync), tails=place.tails)


def in_object_store(place: Place, log: ObjectLog, read_only: bool) -> Log:
    """Return the log of the memory at a place: `log`, unless what is there is of format 1.

    Raises:
        MemoryFileError: there is a table, and no log.
    """
    versions = Versions(place, sync=False)
    where = f"the journal {place.uri}/{EARLIER}"
    read = _remote_journal(place, where)
    if read is None:
        if versions.exists:
            raise MemoryFileError(
                f"{log.where} is gone, and with it the newest steps of this memory; put it back, "
                f"or {REPAIR}"
            )
        return log
    if read_only:
        return EarlierLog.of_format_1(versions, read, where)
    log.create(_widened(versions, read(), where))
    log.purge()
    return log


def _widened(versions: Versions, journal: bytes, where: str) -> Contents:
    found, table = contents(versions, journal, where)
    if found.head.table is None:
        return found
    table = versions.widen(table)
    return Contents(found.head._replace(table=table.pinned), found.records, table.pin)


def _remote_journal(place: Place, where: str) -> Callable[[], bytes] | None:
    import lance

    def read() -> bytes:
        with _reading(where):
            dataset = lance.dataset(f"{place.uri}/{EARLIER}", storage_options=place.storage_options)
            return dataset.to_table()["journal"][0].as_py()

    try:
        read()
    except MemoryFileError as error:
        if "was not found" in str(error):
            return None
        raise
    return read


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not is_damage(error):
            raise
        raise MemoryFileError(
            f"{where} cannot be read ({error}); where a writer has moved the memory to today's "
            f"format meanwhile, open it again; where it is damaged, {REPAIR}"
        ) from error
