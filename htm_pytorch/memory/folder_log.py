"""`FolderLog`: the log of a memory in a folder, in an SQLite file and the tail behind it."""

import bisect
import contextlib
import sqlite3
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from htm_pytorch.memory.files import MemoryFileError, sync_folder
from htm_pytorch.memory.log import (
    REPAIR,
    Contents,
    Head,
    Pin,
    Record,
    StoredRecord,
    check_records,
    second_writer,
    unknown,
    unsealed,
)
from htm_pytorch.memory.log_file import LogFile, put_changes, stored_head
from htm_pytorch.memory.pins import size
from htm_pytorch.memory.tail import Entry, Tail, TailError, make, remove_others

MOST_BYTES = 2**20
"""How many bytes of steps and keys an append may have that goes to the tail."""
FULL = 2**23
"""How many bytes of a tail are enough, so that another one is begun."""
WORN = 2**20
"""How many are, where the file of SQLite's is changed anyway."""


class _Now(NamedTuple):
    """What counts in a file and its tail."""

    head: Head
    """The newest of both."""
    tail: Tail | None
    entries: Sequence[Entry]
    """Those of the tail."""


class FolderLog:
    """The log of the memory of a name, in a `LogFile` and, with a folder `tails`, behind it.

    The head in the file names the tail that goes on where it ends. Of the entries in there those
    count that have higher numbers. Whoever changes the file takes them into it. So a tail that the
    file has named is left as it is while anybody is in a transaction.
    """

    def __init__(self, file: LogFile, name: str = "", tails: Path | None = None):
        self.file = file
        self.name = name
        self.where = file.where if not name else f"{file.where}, memory {name!r}"
        self._tails = tails
        # As it was read last; none, while something is done with it.
        self._tail: Tail | None = None
        # What the file was seen to say of the head and the tail, and what that means.
        self._seen: tuple[bytes, Head, str] | None = None
        # The newest head in it, as it is stored and as it is.
        self._newest: tuple[bytes, Head] | None = None
        # The tail that an error came to, by name. The disk may not have all that it says it has.
        self._doubtful = ""

    def read(self, known: Head | None = None) -> Contents | None:
        """Return the head and the records that are not known; see `Log.read`."""
        for _ in range(2):
            # Where nothing can be locked, it may just have been replaced.
            with contextlib.suppress(TailError):
                return self._read(known)
        return self._read(known)

    def _read(self, known: Head | None) -> Contents | None:
        with self.file.mutex, self.file.transaction() as connection:
            now = self._now(connection)
            if now is None:
                return None
            head, entries = now.head, now.entries
            if known is not None and head.is_same(known):
                return Contents(head, [])
            start = unknown(head, known)
            # From the record on that holds this step.
            at = bisect.bisect_right(entries, start, key=lambda entry: entry.record.first_step) - 1
            newest = [entry.record for entry in entries[max(at, 0) :]]
            rows: list[tuple[int, bytes]] = []
            if at < 0:
                rows = connection.execute(
                    "SELECT first_step, body FROM records WHERE name = ? AND first_step >= ("
                    "SELECT coalesce(max(first_step), 0) FROM records "
                    "WHERE name = ? AND first_step <= ?) ORDER BY first_step",
                    (self.name, self.name, start),
                ).fetchall()
            pin: Pin | None = None
            if known is None or known.table != head.table:
                query = "SELECT body FROM pins WHERE name = ?"
                for (body,) in connection.execute(query, (self.name,)).fetchall():
                    # Damaged, it says nothing, and the next version gets another one.
                    with contextlib.suppress(ValueError):
                        unsealed(body)
                        pin = Pin(body, {})
        records = []
        for first_step, body in rows:
            try:
                stored = StoredRecord.decode(body)
                if stored.record.first_step != first_step:
                    raise ValueError(f"it is that of step {stored.record.first_step}")
                if not stored.is_of(self.name, head):
                    raise ValueError(f"it is another one, of memory {stored.name!r}")
                records.append(stored.record)
            except (ValueError, TypeError, struct.error) as error:
                raise MemoryFileError(
                    f"{self.where}: the record of step {first_step} is damaged ({error}); {REPAIR}"
                ) from error
        contents = Contents(head, records + newest, pin)
        return check_records(self.where, contents, known if start else None)

    def write(
        self, head: Head, new: Sequence[Record], replace: bool, pin: Pin | None = None
    ) -> None:
        """Change to `head`; see `Log.write`.

        A small append is an entry of the tail, where there is one that is as it should be.
        """
        is_append = not replace and pin is None and len(new) == 1 and self._tails is not None
        is_small = is_append and new[0].size <= MOST_BYTES
        with self.file.mutex:
            # Also for an entry, since no other writer can begin before its end.
            with self.file.transaction("IMMEDIATE") as connection:
                now = self._now(connection)
                if now is not None and head.sequence != now.head.sequence + 1:
                    raise second_writer(self.where)
                old, entries = (now.tail, now.entries) if now is not None else (None, ())
                is_good = old is not None and not old.is_torn and old.path.name != self._doubtful
                if old is not None and is_small and is_good and old.end < FULL:
                    self._append(old, head, new[0])
                    # Nothing in the file has changed: to say so would wait for those who read it.
                    connection.execute("ROLLBACK")
                    return
                # None that has anything of what is forgotten.
                is_good = is_good and not head.purge
                tail = self._next(old if is_good else None, is_small)
                if old is not None and old is not tail and old.is_torn:
                    old.set_aside()
                if replace:
                    connection.execute("DELETE FROM records WHERE name = ?", (self.name,))
                    entries = ()
                records = [*(entry.record for entry in entries), *new]
                name = tail.path.name if tail is not None else ""
                put_changes(connection, self.name, head, records, pin, name)
            self._tail = tail
            if self._tails is not None and tail is not old:
                # Those that are left go with the next one.
                with contextlib.suppress(OSError):
                    remove_others(self._tails, name)

    def end(self, name: str) -> bytes | None:
        """Return the end of a file of the table that a pin brought."""
        with self.file.mutex, self.file.transaction() as connection:
            query = "SELECT body FROM ends WHERE file = ?"
            row = connection.execute(query, (name,)).fetchone()
        return None if row is None else row[0]

    def remove(self) -> None:
        """Remove this memory from the file."""
        with self.file.mutex, self.file.transaction("IMMEDIATE") as connection:
            for table in ("records", "pins", "heads", "spare_heads"):
                connection.execute(f"DELETE FROM {table} WHERE name = ?", (self.name,))

    def forget_purge(self) -> None:
        """Note that no byte is left of what was forgotten."""
        with self.file.mutex, self.file.transaction("IMMEDIATE") as connection:
            found = stored_head(connection, self.where, self.name)
            if found is not None and found[1].purge:
                head = found[1]._replace(sequence=found[1].sequence + 1, purge=False)
                put_changes(connection, self.name, head, [], None)

    def reopen(self) -> None:
        """Open the file again, since a call did not end."""
        self.close()

    def purge(self) -> None:
        """Leave no byte of what is no more."""
        self.file.purge()
        if self._tails is None or not self._tails.exists():
            return
        with self.file.mutex, self.file.transaction("IMMEDIATE") as connection:
            now = self._now(connection)
            remove_others(self._tails, now.tail.path.name if now and now.tail else "")
            if self.file.sync:
                sync_folder(self._tails)

    def problems(self) -> list[str]:
        """Return what is wrong with the file, and with what is in it."""
        # What is there, not what was read before.
        self.close()
        found = self.file.problems()
        try:
            contents = self.read()
        except MemoryFileError as error:
            return [*found, str(error)]
        if contents is not None and contents.head.table is not None and not contents.pin:
            found.append(f"{self.where}: what it keeps of the table is damaged; {REPAIR}")
        tail = self._tail
        if tail is not None and tail.is_put_right:
            found.append(f"{tail.where} has a bit that has flipped; {REPAIR}")
        return found

    def inherit(self) -> None:
        """Go on in a forked child, for reading only."""
        self.file.inherit()

    def size(self) -> int:
        """Return the bytes of the file and of its tail."""
        tails = self._tails.glob("*") if self._tails is not None else ()
        return self.file.size() + sum(size(path) for path in tails)

    def close(self) -> None:
        """Let go of the files."""
        self._tail = None
        self.file.close()

    def _now(self, connection: sqlite3.Connection) -> _Now | None:
        """Return what there is; in a transaction, so that no tail is replaced meanwhile."""
        query = "SELECT body FROM heads WHERE name = ?"
        seen = self._seen
        # Mostly it is what was there before.
        if seen is None or connection.execute(query, (self.name,)).fetchone() != (seen[0],):
            found = stored_head(connection, self.where, self.name)
            if found is None:
                return None
            seen = self._seen = found
        _, head, name = seen
        tail, self._tail = self._tail, None
        if not name:
            return _Now(head, None, ())
        if tail is not None and tail.path.name == name:
            tail.follow(head.sequence)
        else:
            tail = self._open(name, head.sequence)
        self._tail = tail
        if tail.entries:
            newest = tail.entries[-1].head
            if self._newest is None or self._newest[0] is not newest:
                self._newest = newest, Head.decode(newest)
            head = self._newest[1]
        return _Now(head, tail, tail.entries)

    def _open(self, name: str, after: int) -> Tail:
        """Return the tail of a name; for a writer, everything in it is on the disk by then."""
        if self._tails is None:
            raise TailError(f"{self.where} goes on in {name!r}, which is not here; {REPAIR}")
        tail = Tail(self._tails / name)
        tail.follow(after)
        if self.file.sync and not self.file.is_read_only:
            before, self._doubtful = self._doubtful, name
            tail.settle()
            self._doubtful = before
        return tail

    def _append(self, tail: Tail, head: Head, record: Record) -> None:
        entry = Entry.of(head, record)
        self._tail, self._doubtful = None, tail.path.name
        tail.append(entry, self.file.sync)
        self._newest = entry.head, head
        self._tail, self._doubtful = tail, ""

    def _next(self, old: Tail | None, is_needed: bool) -> Tail | None:
        """Return the tail that the file names next: the old one, unless it is worn."""
        if old is not None and old.end < WORN:
            return old
        if self._tails is None or not is_needed:
            return None
        return make(self._tails, self.file.sync)


def named_tail(file: LogFile) -> str:
    """Return the name of the tail that goes on where a file of one memory ends; "" for none."""
    with file.mutex, file.transaction() as connection:
        found = stored_head(connection, file.where, "")
    return found[2] if found is not None else ""
