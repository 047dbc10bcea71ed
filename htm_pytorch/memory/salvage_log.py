"""What can still be read of a damaged log, and the version of the table that it names."""

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from htm_pytorch.memory import carved, earlier, object_log, pins, tail
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.log import Head, Pin, Record, unsealed
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
    heads: list[tuple[Head, str]] = []
    records: list[Record] = []
    pin: Pin | None = None
    with contextlib.closing(LogFile(path)) as file:
        for table in ("heads", "spare_heads"):
            for (body,) in _rows(file, f"SELECT body FROM {table}"):
                with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                    heads.append(Head.with_tail(body))
        for (body,) in _rows(file, "SELECT body FROM pins"):
            with contextlib.suppress(ValueError):
                unsealed(body)
                pin = Pin(body, {})
        for (body,) in _rows(file, "SELECT body FROM records NOT INDEXED"):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                records.append(Record.decode(body))
        is_whole = not file.problems()
    if not is_whole:
        found = [body for _, body in carved.blobs(path.read_bytes())]
        if not heads:
            heads = list(_decoded(found, Head.with_tail))
        known = {record.first_step for record in records}
        records += [
            record for record in _decoded(found, Record.decode) if record.first_step not in known
        ]
    head, name = max(heads, key=lambda found: found[0].sequence, default=(None, ""))
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


def _decoded(found: Sequence[bytes], decode: Callable[[bytes], Decoded]) -> Iterator[Decoded]:
    """Yield what can be made of those that are whole, and of this kind."""
    for body in found:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, struct.error):
            yield decode(body)


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
