"""What can still be read of a damaged log, and the version of the table that it names."""

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from htm_pytorch.memory import carved, earlier, object_log, pins, tail
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.log import (
    Head,
    OtherFormatError,
    Pin,
    Record,
    StoredHead,
    StoredRecord,
    unsealed,
)
from htm_pytorch.memory.log_file import LogFile
from htm_pytorch.memory.place import Place
from htm_pytorch.memory.rows import facts_of
from htm_pytorch.memory.versions import Versions

Decoded = TypeVar("Decoded")


def salvaged_log(where: Place) -> tuple[Head | None, list[Record], Pin | None]:
    """Return what can be read of the log: the newest head, records, and what the table kept."""
    path = where.log
    if not path.exists():
        return None, [], None
    body = path.read_bytes()
    if body.startswith(earlier.MAGIC):
        return None, earlier.salvaged(body), None
    if object_log.is_object(body):
        found, records = object_log.salvaged(body)
        records.sort(key=lambda record: record.first_step)
        return next(iter(found), None), records, None
    found = salvaged_rows(path, is_of_many=False)
    head, name, records = found.get("", Rows()).newest()
    pin = _salvaged_pin(path)
    entries = tail.salvaged(where.tails, name) if name or head is None else []
    of = head.table if head is not None else None
    for newest, record in _counting(entries, head):
        head = newest
        records.append(record)
    if head is not None and head.table != of:
        # What is kept is of another version: a log from before was put in the place of this one.
        pin = None
    records.sort(key=lambda record: record.first_step)
    return head, records, pin


class Rows:
    """What can be read of one memory in a file."""

    def __init__(self) -> None:
        self.heads: list[StoredHead] = []
        """To which the file leads."""
        self.carved_heads: list[StoredHead] = []
        self.records: list[StoredRecord] = []
        """First those to which the file leads."""

    def newest(self, name: str = "") -> tuple[Head | None, str, list[Record]]:
        """Return the newest head, the name of its tail, and the records, each step's once."""
        heads = self.heads or self.carved_heads
        head = max(heads, key=lambda one: one.head.sequence, default=None)
        # Copies may be left of what was before a reset, where nothing leads to.
        of = head.head.generation if head is not None else _first_generation(self.records)
        of_step: dict[int, Record] = {}
        for one in self.records:
            if one.name in ("", name) and one.generation in ("", of):
                of_step.setdefault(one.record.first_step, one.record)
        records = [of_step[step] for step in sorted(of_step)]
        return (None, "", records) if head is None else (head.head, head.tail, records)


def _first_generation(records: Sequence[StoredRecord]) -> str:
    return next((one.generation for one in records if one.generation), "")


def salvaged_rows(path: Path, *, is_of_many: bool) -> dict[str, Rows]:
    """Return, by names of memories, what can be read of an SQLite file; "" names one alone."""
    # No text: what its bytes are is not known.
    query = "SELECT CAST(name AS BLOB), body FROM"
    with contextlib.closing(LogFile(path)) as file:
        both = [_rows(file, f"{query} {table}") for table in ("heads", "spare_heads")]
        records = _rows(file, f"{query} records NOT INDEXED")
        damage = file.damage()
    # Only then: copies of rows may be left where nothing leads to, and contents look like rows.
    carved_ = list(carved.blobs(path.read_bytes())) if damage else []
    found: dict[str, Rows] = {}

    def of(row: Any, sealed: str) -> Rows:
        text = row.decode(errors="replace") if isinstance(row, bytes) else ""
        return found.setdefault((sealed or text) if is_of_many else "", Rows())

    for row in {row for row, _ in both[0]} & {row for row, _ in both[1]}:
        # Of which both heads may be damaged.
        of(row, "")
    for row, head in _decoded(both[0] + both[1], StoredHead.decode):
        of(row, head.name).heads.append(head)
    for row, head in _decoded(carved_, StoredHead.decode):
        of(row, head.name).carved_heads.append(head)
    for row, record in _decoded(records + carved_, StoredRecord.decode):
        of(row, record.name).records.append(record)
    return found


def _salvaged_pin(path: Path) -> Pin | None:
    pin: Pin | None = None
    with contextlib.closing(LogFile(path)) as file:
        for (body,) in _rows(file, "SELECT body FROM pins"):
            with contextlib.suppress(ValueError):
                unsealed(body)
                pin = Pin(body, {})
    return pin


def _counting(entries: Sequence[tail.Entry], head: Head | None) -> list[tuple[Head, Record]]:
    """Return what those of all entries, in their order, say that came after `head`.

    Where no head can be read, those after which there was no change of another kind: what is before
    one may be forgotten.
    """
    start = 0 if head is None else head.sequence + 1
    if head is None:
        for before, entry in zip(entries, entries[1:], strict=False):
            if entry.sequence > before.sequence + 1:
                start = entry.sequence
    found = [(Head.decode(entry.head), entry.record) for entry in entries]
    return [one for one in found if one[0].sequence >= start]


def _rows(file: LogFile, query: str) -> list[tuple[Any, ...]]:
    """Return what a query finds before it comes to damage."""
    found: list[tuple[Any, ...]] = []
    damage = contextlib.suppress(MemoryFileError, OSError)
    with damage, file.mutex, file.transaction() as connection:
        found.extend(connection.execute(query))
    return found


def _decoded(
    rows: Sequence[tuple[Any, ...]], decode: Callable[[bytes], Decoded]
) -> Iterator[tuple[Any, Decoded]]:
    """Yield name and body of those rows of which something can be made, of this kind.

    Raises:
        OtherFormatError: one is whole, and a newer release has written it.
    """
    for name, body in rows:
        try:
            yield name, decode(body)
        except OtherFormatError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, struct.error):
            continue


def _ends(where: Place) -> dict[str, bytes]:
    """Return what can be read of the ends of files that the log keeps."""
    with contextlib.closing(LogFile(where.log)) as file:
        return dict(_rows(file, "SELECT file, body FROM ends"))


def salvaged_table(where: Place, head: Head | None, pin: Pin | None) -> tuple[Any, dict[str, str]]:
    """Return the engine's table, and what it says of itself; None where nothing can be read.

    It is the version that counts, or else the newest that can be read.
    """
    assert where.folder is not None
    folder = where.folder / "chunks.lance"
    if not folder.exists() or (head is not None and head.table is None):
        return None, {}
    versions = Versions(where, sync=True)
    wanted = head.table.version if head is not None and head.table is not None else None
    if wanted is not None and pin is not None:
        with contextlib.suppress(MemoryFileError):
            pins.check(folder, wanted, pin, _ends(where).get)
    dataset = versions.readable(wanted)
    if dataset is None:
        return None, {}
    return dataset, facts_of(dataset)
