"""`LogFile`: the logs of one memory or of many, as tables of an SQLite file."""

import contextlib
import os
import sqlite3
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
    StoredHead,
    second_writer,
)
from htm_pytorch.memory.pins import files_of
from htm_pytorch.memory.sqlite_file import SqliteFile, connect

_KINDS = {False: 0x48544D31, True: 0x48544D6E}
"""Numbers that tell the file of one memory from that of many."""
_FLIPPED = 2
"""How many of their bits may be wrong, of five in which they differ."""


def says_many(path: Path) -> bool | None:
    """Whether the first bytes of a file say that it is of many memories; None where nothing."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        said = int.from_bytes(file.read(72)[68:], "big")
        for is_of_many, kind in _KINDS.items():
            if (said ^ kind).bit_count() <= _FLIPPED:
                return is_of_many
    return None


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
                    put_changes(connection, name, head, records, pin)
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
                put_changes(connection, name, head, records, None)

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
        """Whether it was made for many memories.

        Raises:
            MemoryFileError: it does not say, or not how names are written.
        """
        with self.mutex, self.transaction() as connection:
            pragmas = ("application_id", "encoding")
            kind, text = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas)
        if kind not in _KINDS.values() or text != "UTF-8":
            raise MemoryFileError(f"{self.where} is damaged at its beginning; {REPAIR}")
        return kind == _KINDS[True]

    def has(self, name: str) -> bool:
        """Whether there is a memory of this name."""
        with self.mutex, self.transaction() as connection:
            query = (
                "SELECT 1 FROM heads WHERE name = ?1 UNION ALL "
                "SELECT 1 FROM spare_heads WHERE name = ?1"
            )
            return connection.execute(query, (name,)).fetchone() is not None

    def changes(self) -> tuple[object, int]:
        """Return something else than before, if another process has written meanwhile."""
        with self.mutex, self.transaction() as connection:
            return self.identity, connection.execute("PRAGMA data_version").fetchone()[0]

    def names(self) -> list[str]:
        """Return the names of all memories in the file, in order."""
        with self.mutex, self.transaction() as connection:
            # A damaged name may be where none leads to it.
            query = (
                "SELECT name FROM (SELECT name FROM heads UNION SELECT name FROM spare_heads) AS a "
                "WHERE EXISTS (SELECT 1 FROM heads AS b WHERE b.name = a.name) "
                "OR EXISTS (SELECT 1 FROM spare_heads AS c WHERE c.name = a.name) ORDER BY name"
            )
            return [name for (name,) in connection.execute(query).fetchall()]

    def damage(self) -> list[str]:
        """Return what keeps the file from leading to all of its rows, whatever is in them."""
        try:
            with self.mutex, self.transaction() as connection:
                found = connection.execute("PRAGMA integrity_check").fetchall()
        except MemoryFileError as error:
            return [str(error)]
        return [f"{self.where}: {text}; {REPAIR}" for (text,) in found if text != "ok"]

    def problems(self) -> list[str]:
        """Return what is wrong with the file itself."""
        damaged = self.damage()
        both = ("SELECT name, body FROM heads", "SELECT name, body FROM spare_heads")
        try:
            with self.mutex, self.transaction() as connection:
                heads = connection.execute(
                    f"SELECT DISTINCT name FROM ({both[0]} EXCEPT {both[1]} "
                    f"UNION ALL SELECT * FROM ({both[1]} EXCEPT {both[0]}))"
                ).fetchall()
                orphans = connection.execute(
                    "SELECT DISTINCT name FROM records WHERE name NOT IN (SELECT name FROM heads)"
                ).fetchall()
        except MemoryFileError as error:
            return damaged or [str(error)]
        damaged += [f"{self.where}: one of two heads is damaged; {REPAIR}" for _ in heads]
        return damaged + [f"{self.where}: steps have no head; {REPAIR}" for _ in orphans]


def stored_head(
    connection: sqlite3.Connection, where: str, name: str
) -> tuple[bytes, Head, str] | None:
    """Return the head of a memory, of which there are two copies, and the name of its tail.

    The first is the one that was found, as it is stored.
    """
    found, wrong = [], None
    for table in ("heads", "spare_heads"):
        query = f"SELECT body FROM {table} WHERE name = ?"
        for (body,) in connection.execute(query, (name,)).fetchall():
            try:
                head, tail, of = StoredHead.decode(body)
                if of not in ("", name):
                    raise ValueError(f"one is that of memory {of!r}")
                found.append((body, head, tail))
            except OtherFormatError as error:
                raise OtherFormatError(f"{where}: {error}") from error
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                wrong = error
    if not found and wrong is not None:
        raise MemoryFileError(f"{where}: its heads are damaged ({wrong}); {REPAIR}")
    return max(found, key=lambda one: one[1].sequence, default=None)


def _check_next(connection: sqlite3.Connection, where: str, name: str, head: Head) -> None:
    """Raise where the log is not what the writer of `head` has read.

    The lock keeps others away, unless somebody removes its file.
    """
    now = stored_head(connection, where, name)
    if now is not None and head.sequence != now[1].sequence + 1:
        raise second_writer(where)


def put_changes(
    connection: sqlite3.Connection,
    name: str,
    head: Head,
    records: Sequence[Record],
    pin: Pin | None,
    tail: str = "",
) -> None:
    """Write a head, which names a tail or none, and more records."""
    for record in records:
        row = name, record.first_step, record.encode(name, head.generation)
        connection.execute("INSERT INTO records VALUES (?, ?, ?)", row)
    body = head.encode(tail, name)
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
