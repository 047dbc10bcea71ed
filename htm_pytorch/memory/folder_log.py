"""`FolderLog`: the log of a memory in a folder, in an SQLite file."""

import contextlib
import os
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from htm_pytorch.memory.files import MemoryFileError, sync_folder
from htm_pytorch.memory.log import (
    FORMAT,
    REPAIR,
    Contents,
    Head,
    OtherFormatError,
    Pin,
    Record,
    check_records,
    second_writer,
    unknown,
    unsealed,
)
from htm_pytorch.memory.pins import files_of
from htm_pytorch.memory.sqlite_file import SqliteFile, connect

_KINDS = {False: 0x48544D31, True: 0x48544D6E}
"""Numbers that tell the file of one memory from that of many."""
_REMOVE = "the others are unharmed, and `memory.open_many(uri).remove(name)` lets go of this one"


def says_many(path: Path) -> bool:
    """Whether the first bytes of a file say that it is of many memories, damaged or not."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return file.read(72)[68:] == _KINDS[True].to_bytes(4, "big")
    return False


class LogFile(SqliteFile):
    """The logs of one memory or of many, each under a name."""

    @classmethod
    def create(
        cls, path: Path, logs: dict[str, Contents], *, sync: bool = True, is_of_many: bool = False
    ) -> Self:
        """Make a file with these logs, in the stead of what there is at `path`; whole or not."""
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        made = cls(temporary, sync=sync)
        try:
            with made._errors(), contextlib.closing(connect(temporary, "rwc", sync)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                connection.execute(f"PRAGMA application_id = {_KINDS[is_of_many]}")
                for table in ("heads", "spare_heads"):
                    connection.execute(
                        f"CREATE TABLE {table} (name TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID"
                    )
                connection.execute(
                    "CREATE TABLE records "
                    "(name TEXT, first_step INTEGER, body BLOB, PRIMARY KEY (name, first_step))"
                )
                connection.execute("CREATE TABLE pins (name TEXT PRIMARY KEY, body BLOB)")
                connection.execute("CREATE TABLE ends (file TEXT PRIMARY KEY, body BLOB)")
                for name, (head, records, pin) in logs.items():
                    _put(connection, name, head, records, pin)
                connection.execute("COMMIT")
            # What its transactions leave beside it is of no use by now.
            temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if sync:
            sync_folder(path.parent)
        return cls(path, sync=sync)

    def write(self, changes: Iterable[tuple[str, Head, Sequence[Record]]]) -> None:
        """Change memories by name, all or none, to their heads, with more records."""
        with self.mutex, self.transaction("IMMEDIATE") as connection:
            for name, head, records in changes:
                _check_next(connection, f"{self.where}, memory {name!r}", name, head)
                _put(connection, name, head, records, None)

    def is_log(self) -> bool:
        """Whether it is a file of SQLite's at all, damaged or not."""
        try:
            with self.mutex, self.transaction() as connection:
                connection.execute("PRAGMA user_version").fetchone()
        except MemoryFileError as error:
            code = getattr(error.__cause__, "sqlite_errorname", "")
            return code != "SQLITE_NOTADB"
        finally:
            self.close()
        return True

    def is_of_many(self) -> bool:
        """Whether it was made for many memories."""
        with self.mutex, self.transaction() as connection:
            (kind,) = connection.execute("PRAGMA application_id").fetchone()
        return kind == _KINDS[True]

    def has(self, name: str) -> bool:
        """Whether there is a memory of this name."""
        with self.mutex, self.transaction() as connection:
            query = "SELECT 1 FROM heads WHERE name = ?"
            return connection.execute(query, (name,)).fetchone() is not None

    def changes(self) -> int:
        """Return another number than before, if another process has written meanwhile."""
        with self.mutex, self.transaction() as connection:
            return connection.execute("PRAGMA data_version").fetchone()[0]

    def names(self) -> list[str]:
        """Return the names of all memories in the file, in order."""
        with self.mutex, self.transaction() as connection:
            rows = connection.execute("SELECT name FROM heads ORDER BY name").fetchall()
        return [name for (name,) in rows]

    def problems(self) -> list[str]:
        """Return what is wrong with the file itself."""
        try:
            with self.mutex, self.transaction() as connection:
                found = connection.execute("PRAGMA integrity_check").fetchall()
                heads = connection.execute(
                    "SELECT heads.name FROM heads LEFT JOIN spare_heads USING (name) "
                    "WHERE heads.body IS NOT spare_heads.body"
                ).fetchall()
        except MemoryFileError as error:
            return [str(error)]
        damaged = [f"{self.where}: {text}; {REPAIR}" for (text,) in found if text != "ok"]
        return damaged + [f"{self.where}: one of two heads is damaged; {REPAIR}" for _ in heads]


class FolderLog:
    """The log of the memory of a name, in a `LogFile`."""

    def __init__(self, file: LogFile, name: str = ""):
        self.file = file
        self.name = name
        self.where = file.where if not name else f"{file.where}, memory {name!r}"
        self._written = b""

    def read(self, known: Head | None = None) -> Contents | None:
        """Return the head and the records that are not known; see `Log.read`."""
        with self.file.mutex, self.file.transaction() as connection:
            head = _head(connection, self.where, self.name)
            if head is None:
                return None
            if known is not None and head.is_same(known):
                return Contents(head, [])
            start = unknown(head, known)
            # From the record on that holds this step.
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
                record = Record.decode(body)
                if record.first_step != first_step:
                    raise ValueError(f"it is that of step {record.first_step}")
                records.append(record)
            except (ValueError, TypeError, struct.error) as error:
                raise MemoryFileError(
                    f"{self.where}: the record of step {first_step} is damaged ({error}); "
                    f"{_REMOVE if self.name else REPAIR}"
                ) from error
        return check_records(self.where, Contents(head, records, pin), known if start else None)

    def write(
        self, head: Head, new: Sequence[Record], replace: bool, pin: Pin | None = None
    ) -> None:
        """Change to `head`; see `Log.write`."""
        with self.file.mutex, self.file.transaction("IMMEDIATE") as connection:
            self._check_next(connection, head)
            if replace:
                connection.execute("DELETE FROM records WHERE name = ?", (self.name,))
            self._written = _put(connection, self.name, head, new, pin)

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
            head = _head(connection, self.where, self.name)
            if head is not None and head.purge:
                head = head._replace(sequence=head.sequence + 1, purge=False)
                _put(connection, self.name, head, [], None)

    def reopen(self) -> None:
        """Open the file again, since a call did not end."""
        self.file.close()

    def purge(self) -> None:
        """Leave no byte of what is no more."""
        self.file.purge()

    def problems(self) -> list[str]:
        """Return what is wrong with the file, and with what is in it."""
        # What is there, not what was read before.
        self.file.close()
        found = self.file.problems()
        try:
            contents = self.read()
        except MemoryFileError as error:
            return [*found, str(error)]
        if contents is not None and contents.head.table is not None and not contents.pin:
            found.append(f"{self.where}: what it keeps of the table is damaged; {REPAIR}")
        return found

    def inherit(self) -> None:
        """Go on in a forked child, for reading only."""
        self.file.inherit()

    def size(self) -> int:
        """Return the bytes of the file."""
        return self.file.size()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _check_next(self, connection: sqlite3.Connection, head: Head) -> None:
        query = "SELECT body FROM heads WHERE name = ?"
        # Mostly it is what this has written last.
        if connection.execute(query, (self.name,)).fetchone() != (self._written,):
            _check_next(connection, self.where, self.name, head)


def _head(connection: sqlite3.Connection, where: str, name: str) -> Head | None:
    """Return the head of a memory, of which there are two copies."""
    found, wrong = [], None
    for table in ("heads", "spare_heads"):
        query = f"SELECT body FROM {table} WHERE name = ?"
        for (body,) in connection.execute(query, (name,)).fetchall():
            try:
                found.append(Head.decode(body))
            except OtherFormatError as error:
                raise MemoryFileError(f"{where}: {error}") from error
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                wrong = error
    if not found and wrong is not None:
        way_out = _REMOVE if name else REPAIR
        raise MemoryFileError(f"{where}: its heads are damaged ({wrong}); {way_out}")
    return max(found, key=lambda head: head.sequence, default=None)


def _check_next(connection: sqlite3.Connection, where: str, name: str, head: Head) -> None:
    """Raise where the log is not what the writer of `head` has read.

    The lock keeps others away, unless somebody removes its file.
    """
    now = _head(connection, where, name)
    if now is not None and head.sequence != now.sequence + 1:
        raise second_writer(where)


def _put(
    connection: sqlite3.Connection,
    name: str,
    head: Head,
    records: Sequence[Record],
    pin: Pin | None,
) -> bytes:
    """Write a head and more records; return the head's bytes."""
    for record in records:
        row = name, record.first_step, record.encode()
        connection.execute("INSERT INTO records VALUES (?, ?, ?)", row)
    body = head.encode()
    # Twice, in pages of their own: one damaged byte leaves the other.
    for table in ("heads", "spare_heads"):
        connection.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (name, body))
    if pin is not None:
        connection.execute("INSERT OR REPLACE INTO pins VALUES (?, ?)", (name, pin.body))
        needed = files_of(pin)
        there = {file for (file,) in connection.execute("SELECT file FROM ends").fetchall()}
        gone = [(file,) for file in there - needed]
        connection.executemany("DELETE FROM ends WHERE file = ?", gone)
        connection.executemany("INSERT OR REPLACE INTO ends VALUES (?, ?)", pin.ends.items())
    return body
