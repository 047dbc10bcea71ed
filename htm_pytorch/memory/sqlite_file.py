"""`SqliteFile`: a file of SQLite's that changes in transactions, and its errors in our words."""

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from htm_pytorch.memory.files import MemoryFileError, sync_folder
from htm_pytorch.memory.log import REPAIR

WAIT_SECONDS = 60.0
"""How long a change waits for other processes that read at that moment."""
_inherited: list[object] = []
"""What a forked child must not close."""
_LEFT_BYTES = 2**18
"""How many bytes a transaction leaves beside the file for the next one; new ones take time."""
_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What a damaged file leads to; the latter where what SQLite would say of it is no text."""
_UNFINISHED = bytes.fromhex("d9d505f920a163d7")
"""What SQLite begins the file beside it with, while a transaction has not come to its end."""


class SqliteFile:
    """A file with tables, of which a transaction changes all or nothing.

    With `sync` a change survives a loss of power. There is a rollback journal and no write-ahead
    log: a flipped bit in one would drop without a word what was acknowledged, and readers would
    need the right to write. The rollback journal stays between transactions, with nothing of use in
    it.
    """

    def __init__(self, path: Path, *, sync: bool = True, read_only: bool = False):
        self.path = path
        self.where = f"the log {str(path)!r}"
        self.sync = sync
        self.is_read_only = read_only
        self._connection: sqlite3.Connection | None = None
        self._copied: tempfile.TemporaryDirectory[str] | None = None
        self.mutex = threading.RLock()
        # Whether nothing can be written beside it.
        self._is_fixed = False
        self._opened: tuple[int, int] | None = None

    def transaction(self, kind: str = "DEFERRED") -> "_Transaction":
        """Change everything that is changed inside, or nothing; for those who hold the mutex.

        Raises:
            MemoryFileError: the file is damaged.
            OSError: it cannot be read or written.
        """
        return _Transaction(self, kind)

    def purge(self) -> None:
        """Write the file anew, without the pages that are no longer used.

        Nor is anything left of them beside it.
        """
        with self.mutex, self._errors():
            self.connected().execute("VACUUM")
            self.close()
        if self._beside.exists():
            raise OSError(f"{str(self._beside)!r} cannot be removed; nothing is lost, try again")
        if self.sync:
            sync_folder(self.path.parent)

    def save(self, path: Path) -> None:
        """Write a copy of the whole file to `path`, as of one moment."""
        with self.mutex, self._errors(), contextlib.closing(connect(path, "rwc", True)) as copy:
            self.connected().backup(copy)

    def size(self) -> int:
        """Return its bytes."""
        return self.path.stat().st_size

    def free(self) -> int:
        """Return how many of its bytes hold nothing any more."""
        with self.mutex, self.transaction() as connection:
            sizes = ("freelist_count", "page_size")
            pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in sizes)
        return pages * size

    def close(self) -> None:
        """Close the file; it is opened again when it is asked for."""
        with self.mutex:
            connection, self._connection = self._connection, None
            if connection is not None:
                if not self.is_read_only:
                    # Removes what is beside the file, where nobody needs it.
                    with contextlib.suppress(*_ERRORS):
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
        self.is_read_only = True

    @property
    def identity(self) -> object:
        """What tells the file that is open from others that have or had its name."""
        return self._opened

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

    def connected(self) -> sqlite3.Connection:
        """Return the connection, which is made where there is none."""
        if self._connection is None:
            self._opened = _identity(self.path)
            if self._opened is None:
                raise MemoryFileError(f"{self.where} is gone; {REPAIR}")
            if not self.is_read_only:
                self._connection = connect(self.path, "rw", self.sync)
            elif os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK):
                # To take back what a process that was killed has left half done.
                self._connection = connect(self.path, "rw", self.sync)
                self._connection.execute("PRAGMA query_only = ON")
            else:
                self._connection = self._open_elsewhere()
        return self._connection

    def _open_elsewhere(self) -> sqlite3.Connection:
        """Open the file where nothing can be written beside it."""
        self._is_fixed = True
        if not self._is_unfinished():
            return connect(self.path, "ro", self.sync)
        self._copied = tempfile.TemporaryDirectory(prefix="htm_pytorch-")
        for path in (self._beside, self.path):
            shutil.copy(path, self._copied.name)
        return connect(Path(self._copied.name, self.path.name), "rw", False)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            raise self.told(error) from error

    def told(self, error: sqlite3.Error | UnicodeDecodeError) -> Exception:
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
        # Without a code it is of Python's own module: a text that is none.
        is_damaged = code in ("", "SQLITE_ERROR", "SQLITE_CORRUPT", "SQLITE_NOTADB")
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

    def __init__(self, file: SqliteFile, kind: str):
        self._file = file
        self._kind = kind

    def __enter__(self) -> sqlite3.Connection:
        file = self._file
        file.look_again()
        try:
            connection = file.connected()
            if connection.in_transaction:
                # Of a call that was interrupted: whatever followed would be part of it.
                connection.execute("ROLLBACK")
            connection.execute(f"BEGIN {self._kind}")
        except _ERRORS as error:
            raise file.told(error) from error
        return connection

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            connection = self._file.connected()
            if error is None and connection.in_transaction:
                connection.execute("COMMIT")
        except BaseException as failed:
            self._undo()
            if isinstance(failed, _ERRORS):
                raise self._file.told(failed) from failed
            raise
        if error is not None:
            self._undo()
        if isinstance(error, _ERRORS):
            raise self._file.told(error) from error

    def _undo(self) -> None:
        with contextlib.suppress(*_ERRORS, MemoryFileError):
            connection = self._file.connected()
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from others that have or had its name; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def connect(path: Path, mode: str, sync: bool) -> sqlite3.Connection:
    """Return a new connection to a file, set up as all of them are; `mode` is ro, rw or rwc."""
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
        # A file may come from anybody: its schema may call harmless functions alone.
        connection.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        connection.close()
        raise
    return connection
