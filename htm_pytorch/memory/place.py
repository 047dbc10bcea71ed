"""Where a stored memory is: a folder, under one name however it was spelled, or an object store."""

import os
import re
import urllib.parse
import weakref
from pathlib import Path
from typing import NamedTuple

from htm_pytorch.memory.files import MemoryFileError, sync_file, sync_folder

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_LOST_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
_held: "weakref.WeakValueDictionary[Path, Lock]" = weakref.WeakValueDictionary()


NO_MEMORY = "uri: no memory at {!r}; memory.open(uri, dim=...) makes one, open_many many"
MARKER = "README.txt"
"""What says that there is a memory, should its log ever be missing."""
_TEXT = """\
This folder is a memory of htm_pytorch. Please leave all of its files together.

journal         the newest steps, and what counts of the rest (an SQLite file)
tails           the very newest steps, which the journal does not hold yet
journal-journal, while it is open for writing: part of the journal
chunks.lance    the other steps (a Lance table)
lock            held by the one process that writes
set-aside       what was found damaged; nothing in it is read

`htm memory info`, `verify`, `save`, `compact` and `repair` look after it.
"""


class Place(NamedTuple):
    """A folder, or a place in an object store."""

    uri: str
    """As the engine takes it: an absolute path, or with a scheme."""
    folder: Path | None
    storage_options: dict[str, str] | None

    @property
    def log(self) -> Path:
        """The file of the log."""
        assert self.folder is not None
        return self.folder / "journal"

    @property
    def tails(self) -> Path:
        """The folder of what the log goes on with."""
        assert self.folder is not None
        return self.folder / "tails"


def find(uri: str | os.PathLike[str], storage_options: dict[str, str] | None) -> Place:
    """Return the place that is meant: `~`, `file://`, links and relative paths are resolved.

    Raises:
        ValueError: it names nothing in which a memory could be.
    """
    spelled = os.fspath(uri)
    if not isinstance(spelled, str):
        raise ValueError(f"uri: expected a str or a path, got {spelled!r}")
    if isinstance(uri, os.PathLike) and _LOST_SLASH.match(spelled):
        raise ValueError(
            f"uri: expected the place in an object store as a str, got {uri!r}, of which a path "
            "has dropped a slash"
        )
    scheme = _SCHEME.match(spelled)
    name = scheme[1].lower() if scheme else ""
    if name == "file" or spelled.lower().startswith("file:/"):
        parsed = urllib.parse.urlsplit(spelled)
        if parsed.netloc not in ("", "localhost"):
            raise ValueError(f"uri: expected a file of this machine, got {spelled!r}")
        # Not `parsed.path`, which ends at a "?" or "#" that a folder may be called.
        spelled = urllib.parse.unquote(re.sub(r"^file:(//(localhost)?)?", "", spelled, flags=re.I))
        scheme = None
    if scheme is not None:
        rest = spelled[scheme.end() :].strip("/")
        if not rest:
            raise ValueError(f"uri: expected a place such as {name}://bucket/name, got {spelled!r}")
        return Place(f"{name}://{rest}", None, storage_options)
    if not spelled.strip():
        raise ValueError(f"uri: expected the folder of a memory, got {spelled!r}")
    folder = Path(spelled).expanduser().resolve()
    if folder == Path(folder.anchor):
        raise ValueError(f"uri: expected a folder in {folder.anchor!r}, got {spelled!r}")
    return Place(str(folder), folder, storage_options)


class Lock:
    """The right to write to a folder, which ends with the process at the latest."""

    def __init__(self, folder: Path):
        from filelock import FileLock, Timeout

        other = _held.get(folder)
        if other is not None and other.is_held:
            raise BlockingIOError(
                f"uri: this process has {str(folder)!r} open for writing already; close() that "
                "memory first, or use it; read_only=True reads beside it"
            )
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for path in made:
                sync_folder(path.parent)
            # Not of one thread: whoever closes the memory gives it back.
            self._lock = FileLock(folder / "lock", thread_local=False)
            self._lock.acquire(timeout=0)
        except PermissionError as error:
            raise PermissionError(
                f"uri: no right to write to {str(folder)!r} ({error}); read_only=True only reads"
            ) from error
        except Timeout:
            raise BlockingIOError(
                f"uri: another process writes to {str(folder)!r}; read_only=True reads beside it, "
                "and it can be opened for writing when that process has closed it or ended"
            ) from None
        _held[folder] = self

    @property
    def is_held(self) -> bool:
        """Whether it was not released yet, in this process."""
        return self._lock.is_locked

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def check_folder(folder: Path, may_make: bool) -> None:
    """Raise unless the folder is that of a memory, or may become one.

    Raises:
        FileNotFoundError: there is no memory, and none `may_make`.
        MemoryFileError: there is something else.
    """
    if folder.exists() and not folder.is_dir():
        raise MemoryFileError(f"uri: {str(folder)!r} is a file; expected the folder of a memory")
    if any((folder / name).exists() for name in ("journal", "chunks.lance", MARKER)):
        return
    # What making one leaves behind, if it does not come to an end.
    left = {"lock", ".journal.new", ".journal.new-journal", f".{MARKER}.new"}
    if folder.exists() and not {entry.name for entry in folder.iterdir()} <= left:
        raise MemoryFileError(f"uri: {str(folder)!r} holds other files, and no memory")
    if not may_make:
        raise FileNotFoundError(NO_MEMORY.format(str(folder)))


def mark(folder: Path, sync: bool) -> None:
    """Say in the folder what it is."""
    path = folder / MARKER
    if not path.exists():
        temporary = folder / f".{MARKER}.new"
        temporary.write_text(_TEXT)
        if sync:
            sync_file(temporary)
        os.replace(temporary, path)
        if sync:
            sync_folder(folder)
