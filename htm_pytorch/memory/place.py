"""Where a stored memory is: a folder, under one name however it was spelled, or an object store."""

import contextlib
import errno
import os
import re
import stat
import urllib.parse
import weakref
from pathlib import Path
from typing import Literal, NamedTuple

from htm_pytorch.memory.files import MemoryFileError, sync_file, sync_folder
from htm_pytorch.memory.log import REPAIR, TAIL_NAME

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

_FILES = ("journal", "journal-journal")
_OF_TABLE = ("_versions", "data", "_transactions", "_deletions")
_FOLDERS = ("tails", "chunks.lance", *(f"chunks.lance/{name}" for name in _OF_TABLE))
MOVE = "move it away"
SET_ASIDE = "set-aside"
"""The folder in which nothing is read."""


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
    spelled = os.fspath(uri) if isinstance(uri, os.PathLike) else uri
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

        check_own(folder / "lock", "a file")
        check_own(folder / SET_ASIDE, "a folder", may_link=True)
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
        except Timeout:
            raise BlockingIOError(
                f"uri: another process writes to {str(folder)!r}; read_only=True reads beside it, "
                "and it can be opened for writing when that process has closed it or ended"
            ) from None
        except OSError as error:
            if not (isinstance(error, PermissionError) or error.errno == errno.EROFS):
                raise
            raise PermissionError(
                f"uri: no right to write to {str(folder)!r} ({error}); read_only=True only reads"
            ) from error
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
        ValueError: there is something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"uri: expected the folder of a memory, got the file {str(folder)!r}")
    if any((folder / name).exists() for name in ("journal", "chunks.lance", MARKER)):
        return
    # What making one leaves behind, if it does not come to an end.
    left = {"lock", ".journal.new", ".journal.new-journal", f".{MARKER}.new"}
    if folder.exists() and not {entry.name for entry in folder.iterdir()} <= left:
        raise ValueError(
            f"uri: expected the folder of a memory, got {str(folder)!r} with other files alone"
        )
    if not may_make:
        raise FileNotFoundError(NO_MEMORY.format(str(folder)))


class Misplaced(NamedTuple):
    """Something in the folder of a memory that is not of the kind that its name says.

    That is a folder in the place of a file, or a file in that of a folder, a link that leads
    nowhere, or anything else whose reading might not end.
    """

    path: Path
    what: str
    """What it is, and what was expected."""

    def __str__(self) -> str:
        """Say it in a line, without a way out."""
        return f"{str(self.path)!r} is {self.what}"


def misplaced(folder: Path) -> list[Misplaced]:
    """Return everything of a wrong kind among what is read of a memory in a folder.

    What is missing is not: another process may just be making it.
    """
    found = [_looked_at(folder / name, "a file") for name in _FILES]
    for path in (folder / name for name in _FOLDERS):
        found.append(_looked_at(path, "a folder"))
        if path.is_dir():
            with contextlib.suppress(FileNotFoundError):
                entries = [one for one in os.scandir(path) if _is_file_of_ours(path.name, one.name)]
                # Mostly they are, which says itself without a look at each.
                others = [one for one in entries if not one.is_file(follow_symlinks=False)]
                found += [_looked_at(Path(other), "a file") for other in others]
    return [one for one in found if one is not None]


def _looked_at(path: Path, expected: Literal["a file", "a folder"]) -> Misplaced | None:
    """Return what is wrong with a path, if there is anything at it."""
    try:
        own = path.lstat()
    except OSError:
        # Not there, or not to be reached, which whoever reads it says better.
        return None
    try:
        mode = path.stat().st_mode if stat.S_ISLNK(own.st_mode) else own.st_mode
    except OSError:
        return Misplaced(path, f"a link that leads nowhere; expected {expected}")
    kinds = {"a file": stat.S_ISREG(mode), "a folder": stat.S_ISDIR(mode)}
    if kinds[expected]:
        return None
    found = next((kind for kind, is_it in kinds.items() if is_it), "neither file nor folder")
    return Misplaced(path, f"{found}; expected {expected}")


def _is_file_of_ours(folder: str, name: str) -> bool:
    if folder == "tails":
        return TAIL_NAME.fullmatch(name) is not None
    # Of the engine's all have a suffix; other folders may be the file system's.
    return folder in _OF_TABLE and Path(name).suffix != ""


def check_kinds(folder: Path) -> None:
    """Raise a MemoryFileError where something in the folder of a memory is of a wrong kind."""
    for one in misplaced(folder):
        raise MemoryFileError(f"uri: {one}; {REPAIR}")


def check_own(
    path: Path, expected: Literal["a file", "a folder"], *, may_link: bool = False
) -> None:
    """Raise a MemoryFileError where a writer cannot have a file or folder of its own at a path."""
    wrong = _looked_at(path, expected)
    if wrong is None and path.is_symlink() and not may_link:
        wrong = Misplaced(path, f"a link; expected {expected}")
    if wrong is not None:
        raise MemoryFileError(f"uri: {wrong}; {MOVE}")


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
