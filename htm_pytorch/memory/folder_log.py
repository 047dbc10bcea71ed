"""`FolderLog`: the log of a memory in a folder, in an SQLite file."""

import contextlib
import os
import shutil
import sqlite3
import struct
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
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

WAIT_SECONDS = 60.0
"""For other processes that read at the moment of a change."""
_inherited: list[object] = []
"""What a forked child must not close."""


_LEFT_BYTES = 2**18
"""Of what a transaction leaves beside the file, for the next one; to make it anew takes time."""
_UNFINISHED = bytes.fromhex("d9d505f920a163d7")
"""What SQLite begins the file beside it with, while a transaction has not come to its end."""
_KINDS = {False: 0x48544D31, True: 0x48544D6E}
"""Numbers that tell the file of one memory from that of many."""


class LogFile:
    """A SQLite file with the logs of one memory or of many, each under a name.

    With `sync` a change survives a loss of power. There is a rollback journal and no write-ahead
    log, so that this one file holds all that was acknowledged at any moment, and a reader needs no
    right to write. The rollback journal stays between transactions, with nothing of use in it.
    """

    def __init__(self, path: Path, *, sync: bool = True, read_only: bool = False):
        self.path = path
        self.where = f"the log {str(path)!r}"
        self._sync = sync
        self._read_only = read_only
        self._connection: sqlite3.Connection | None = None
        self._copied: tempfile.TemporaryDirectory[str] | None = None
        self.mutex = threading.RLock()
        # Whether nothing can be written beside it.
        self._is_fixed = False
        self._opened: tuple[int, int] | None = None

    @classmethod
    def create(
        cls, path: Path, logs: dict[str, Contents], *, sync: bool = True, is_of_many: bool = False
    ) -> Self:
        """Make a file with these logs, in the stead of what there is at `path`; whole or not."""
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        made = cls(temporary, sync=sync)
        try:
            with made._errors(), contextlib.closing(_connect(temporary, "rwc", sync)) as connection:
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

    def transaction(self, kind: str = "DEFERRED") -> "_Transaction":
        """Change everything that is changed inside, or nothing; for those who hold the mutex.

        Raises:
            MemoryFileError: the file is damaged.
            OSError: it cannot be read or written.
        """
        return _Transaction(self, kind)

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

    def purge(self) -> None:
        """Write the file anew, without the pages that are no longer used.

        Nor is anything left of them beside it.
        """
        with self.mutex, self._errors():
            self.opened().execute("VACUUM")
            self.close()
        if self._beside.exists():
            raise OSError(f"{str(self._beside)!r} cannot be removed; nothing is lost, try again")
        if self._sync:
            sync_folder(self.path.parent)

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

    def save(self, path: Path) -> None:
        """Write a copy of the whole file to `path`, as of one moment."""
        with self.mutex, self._errors(), contextlib.closing(_connect(path, "rwc", True)) as copy:
            self.opened().backup(copy)

    def size(self) -> int:
        """Return its bytes."""
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file; it is opened again when it is asked for."""
        with self.mutex:
            connection, self._connection = self._connection, None
            if connection is not None:
                if not self._read_only:
                    # Removes what is beside the file, where nobody needs it.
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("PRAGMA journal_mode = DELETE")
                connection.close()
            if self._copied is not None:
                self._copied.cleanup()
                self._copied = None

    def inherit(self) -> None:
        """Go on in a forked child, for reading only, without what the parent has open."""
        _inherited.append((self._connection, self._copied))
        self._connection = self._copied = None
        self.mutex = threading.RLock()
        self._read_only = True

    def look_again(self) -> None:
        """Let go of the file, where another one is in its place by now.

        Or where nothing can be written, and a writer has left it half done.
        """
        if self._connection is not None and self._opened != _identity(self.path):
            self.close()
        if self._copied is not None or (self._is_fixed and self._is_unfinished()):
            self.close()

    def _is_unfinished(self) -> bool:
        try:
            with open(self._beside, "rb") as file:
                return file.read(len(_UNFINISHED)) == _UNFINISHED
        except FileNotFoundError:
            return False

    @property
    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}-journal")

    def opened(self) -> sqlite3.Connection:
        """Return the connection, which is made where there is none."""
        if self._connection is None:
            self._opened = _identity(self.path)
            if self._opened is None:
                raise MemoryFileError(f"{self.where} is gone; {REPAIR}")
            if not self._read_only:
                self._connection = _connect(self.path, "rw", self._sync)
            elif os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK):
                # To take back what a process that was killed has left half done.
                self._connection = _connect(self.path, "rw", self._sync)
                self._connection.execute("PRAGMA query_only = ON")
            else:
                self._connection = self._open_elsewhere()
        return self._connection

    def _open_elsewhere(self) -> sqlite3.Connection:
        """Open the file where nothing can be written beside it."""
        self._is_fixed = True
        if not self._is_unfinished():
            return _connect(self.path, "ro", self._sync)
        self._copied = tempfile.TemporaryDirectory(prefix="htm_pytorch-")
        for path in (self._beside, self.path):
            shutil.copy(path, self._copied.name)
        return _connect(Path(self._copied.name, self.path.name), "rw", False)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self.told(error) from error

    def told(self, error: sqlite3.Error) -> Exception:
        """Return what an error of SQLite's means here."""
        code = getattr(error, "sqlite_errorname", "")
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return TimeoutError(
                f"{self.where}: another process has held it for {WAIT_SECONDS:.0f} s; "
                "end that process, or try again"
            )
        if code.startswith("SQLITE_READONLY"):
            return PermissionError(
                f"{self.where}: no right to write ({error}); read_only=True only reads"
            )
        is_damaged = code in ("SQLITE_ERROR", "SQLITE_CORRUPT", "SQLITE_NOTADB")
        if is_damaged or not isinstance(error, sqlite3.OperationalError):
            return MemoryFileError(f"{self.where} is damaged ({error}); {REPAIR}")
        return OSError(f"{self.where} cannot be read or written ({error})")


class _Transaction:
    """A transaction of a file.

    Not a generator: what an interrupt has left of one would end later, in the middle of another.
    Nor does it take the mutex: only `with` itself gives back a lock whenever an interrupt comes.
    For the same reason no cursor has a name here: the traceback of an interrupt would keep it, and
    with it the file locked.
    """

    def __init__(self, file: LogFile, kind: str):
        self._file = file
        self._kind = kind

    def __enter__(self) -> sqlite3.Connection:
        file = self._file
        file.look_again()
        try:
            connection = file.opened()
            if connection.in_transaction:
                # Of a call that was interrupted: whatever followed would be part of it.
                connection.execute("ROLLBACK")
            connection.execute(f"BEGIN {self._kind}")
        except sqlite3.Error as error:
            raise file.told(error) from error
        return connection

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._file.opened().execute("COMMIT")
        except BaseException as failed:
            self._undo()
            if isinstance(failed, sqlite3.Error):
                raise self._file.told(failed) from failed
            raise
        if error is not None:
            self._undo()
        if isinstance(error, sqlite3.Error):
            raise self._file.told(error) from error

    def _undo(self) -> None:
        with contextlib.suppress(sqlite3.Error, MemoryFileError):
            connection = self._file.opened()
            if connection.in_transaction:
                connection.execute("ROLLBACK")


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
                    f"{self.where}: the record of step {first_step} is damaged ({error}); {REPAIR}"
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
        raise MemoryFileError(f"{where}: its heads are damaged ({wrong}); {REPAIR}")
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


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from others that have or had its name; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _connect(path: Path, mode: str, sync: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=WAIT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        if mode != "ro":
            connection.execute("PRAGMA journal_mode = PERSIST")
            connection.execute(f"PRAGMA journal_size_limit = {_LEFT_BYTES}")
        connection.execute(f"PRAGMA synchronous = {'FULL' if sync else 'OFF'}")
        connection.execute("PRAGMA temp_store = MEMORY")
        # What is no more must not be found by a repair; Debian's SQLite does so anyway.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA page_size = 4096")
    except BaseException:
        connection.close()
        raise
    return connection
