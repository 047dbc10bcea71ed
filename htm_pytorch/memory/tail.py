"""The tail of a log: its newest appends, one behind the other in a file that only grows.

An append is one write and one wait for the disk. Which tail counts, and from which transaction on,
is said elsewhere: see `folder_log`. An entry is what one append has changed: the head after it, and
a record. A header with a checksum of its own says how long it is. Bytes that are no entry are at
the end of the file alone, where a write was cut short, which nobody was told has happened.

One flipped bit is put right. Whether it was one is decided by a digest, since a checksum that is
wrong for another reason may well be that of a single bit.
"""

import errno
import hashlib
import io
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple, Self

from htm_pytorch.memory.files import MemoryFileError, sync_data, sync_file, sync_folder
from htm_pytorch.memory.log import REPAIR, TAIL_NAME, Head, Record
from htm_pytorch.memory.one_bit import put_right
from htm_pytorch.memory.place import SET_ASIDE

_FILE = b"HTMTAIL1"
_ENTRY = b"\x89htmEnt1"
_FIELDS = struct.Struct("<8sQIII16s")
"""What it begins with, its number, the bytes of head and record, and sum and digest of both."""
_SUM = struct.Struct("<I")
_HEADER = _FIELDS.size + _SUM.size


class TailError(MemoryFileError):
    """A tail is not what its log says that it is."""


class Entry(NamedTuple):
    """One append."""

    sequence: int
    """The number of the change."""
    head: bytes
    """The head of the log after it, encoded."""
    record: Record

    @classmethod
    def of(cls, head: Head, record: Record) -> Self:
        """Return the entry that changes the log to `head`."""
        return cls(head.sequence, head.encode(), record)


class _Found(NamedTuple):
    """An entry in a file."""

    sequence: int
    end: int
    """Where the next one begins."""
    entry: Entry | None
    """None where it was not asked for."""
    is_put_right: bool


def encoded(name: str, entry: Entry) -> bytes:
    """Return an entry as bytes, for the file of this name."""
    record = entry.record.encode()
    body = entry.head + record
    sizes = len(entry.head), len(record)
    sums = zlib.crc32(body), _digest(name, body)
    fields = _FIELDS.pack(_ENTRY, entry.sequence, *sizes, *sums)
    return fields + _SUM.pack(zlib.crc32(fields)) + body


class Tail:
    """A file of entries, as far as it was read.

    What an error has ended in the middle of a call is not used again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.where = f"the tail {str(path)!r} of the log"
        self.entries: list[Entry] = []
        """Those that count."""
        self.end = 0
        """Where the next one would begin."""
        self.is_put_right = False
        """Whether a bit of it had flipped."""
        self._size = 0
        self._after = 0

    @property
    def is_torn(self) -> bool:
        """Whether there are bytes behind the last entry."""
        return self._size > self.end

    def follow(self, after: int) -> None:
        """Read what was added; entries count that have higher numbers than `after`.

        Raises:
            TailError: the file is gone or damaged.
        """
        try:
            size = self.path.stat().st_size
            if size < self._size or after < self._after:
                self.entries, self.end, self._size, self.is_put_right = [], 0, 0, False
            if self.entries and self.entries[0].sequence <= after:
                self.entries = [entry for entry in self.entries if entry.sequence > after]
            self._after = after
            if size > self._size:
                with open(self.path, "rb") as file:
                    file.seek(self.end)
                    self._take(file.read())
        except FileNotFoundError as error:
            raise TailError(f"{self.where} is gone; {REPAIR}") from error

    def append(self, entry: Entry, sync: bool) -> None:
        """Put an entry behind the others; with `sync`, wait until the disk has it.

        Raises:
            OSError: it cannot be written; some of its bytes may be there.
        """
        data = encoded(self.path.name, entry)
        with open(self.path, "rb+", buffering=0) as file:
            file.seek(self.end)
            _write(file, data, sync)
        self.entries.append(entry)
        self.end = self._size = self.end + len(data)

    def set_aside(self) -> None:
        """Keep a copy of what is behind the last entry, where nothing in it is read."""
        aside = self.path.parents[1] / SET_ASIDE
        aside.mkdir(exist_ok=True)
        kept = aside / f"{self.path.name}.tail"
        with open(self.path, "rb") as file:
            file.seek(self.end)
            kept.write_bytes(file.read())
        sync_file(kept)
        for folder in kept.parents[:2]:
            sync_folder(folder)

    def settle(self) -> None:
        """Wait until the disk has it, whoever has written it."""
        sync_file(self.path)
        for folder in self.path.parents[:2]:
            sync_folder(folder)

    def _take(self, data: bytes) -> None:
        at, size, name = 0, self.end + len(data), self.path.name
        is_put_right = self.is_put_right
        if not self.end:
            begin = _beginning(name)
            wrong = [a ^ b for a, b in zip(data, begin, strict=False) if a != b]
            if len(data) < len(begin) or len(wrong) > 1 or any(b & (b - 1) for b in wrong):
                raise self._damaged(0)
            at, is_put_right = len(begin), bool(wrong)
        while at < len(data):
            found = _found(data, at, name, self._after)
            if found is None:
                if _is_followed(data, at + 1):
                    raise self._damaged(self.end + at)
                break
            if found.entry is not None:
                before = self.entries[-1].sequence if self.entries else self._after
                if found.sequence != before + 1:
                    step = f"goes on at change {found.sequence}, not {before + 1}"
                    raise TailError(f"{self.where} {step}; {REPAIR}")
                self.entries.append(found.entry)
            is_put_right |= found.is_put_right
            at = found.end
        self.end, self._size, self.is_put_right = self.end + at, size, is_put_right

    def _damaged(self, at: int) -> TailError:
        return TailError(f"{self.where} is damaged at byte {at}; {REPAIR}")


def make(folder: Path, sync: bool) -> Tail:
    """Make an empty one under a new name, in a folder that is made where there is none."""
    folder.mkdir(exist_ok=True)
    tail = Tail(folder / os.urandom(16).hex())
    with open(tail.path, "xb", buffering=0) as file:
        _write(file, _beginning(tail.path.name), sync)
    if sync:
        sync_folder(folder)
        sync_folder(folder.parent)
    return tail


def remove_others(folder: Path, name: str) -> None:
    """Delete all tails in the folder but for the one of this name."""
    for other in _tails(folder):
        if other.name != name:
            other.unlink(missing_ok=True)


def salvaged(folder: Path, name: str) -> list[Entry]:
    """Return the entries that can be read of the file of a name, in the order of their numbers.

    Of all files, where that is "".
    """
    found: list[Entry] = []
    for path in _tails(folder):
        if name not in ("", path.name):
            continue
        data, at = path.read_bytes(), len(_beginning(path.name))
        while 0 <= at < len(data):
            one = _found(data, at, path.name, -1)
            if one is not None and one.entry is not None:
                found.append(one.entry)
                at = one.end
            else:
                at = data.find(_ENTRY, at + 1)
    return sorted(found, key=lambda entry: entry.sequence)


def _tails(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if TAIL_NAME.fullmatch(path.name)]


def _write(file: io.FileIO, data: bytes, sync: bool) -> None:
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    if sync:
        sync_data(file.fileno())


def _beginning(name: str) -> bytes:
    return _FILE + name.encode()


def _digest(name: str, body: bytes) -> bytes:
    return hashlib.sha256(name.encode() + body).digest()[:16]


def _found(data: bytes, at: int, name: str, after: int) -> _Found | None:
    """Return the entry at a place, if it is whole; it is not read unless its number is higher."""
    start = at + _HEADER
    if start > len(data):
        return None
    (checksum,) = _SUM.unpack_from(data, start - _SUM.size)
    stored = data[at : start - _SUM.size]
    fields = put_right(stored, checksum)
    if fields is None or not fields.startswith(_ENTRY):
        return None
    is_put_right = zlib.crc32(stored) != checksum
    _, sequence, middle, rest, checksum, digest = _FIELDS.unpack(fields)
    end = start + middle + rest
    if end > len(data):
        return None
    if sequence <= after:
        return _Found(sequence, end, None, is_put_right)
    body = data[start:end]
    if zlib.crc32(body) != checksum:
        is_put_right, body = True, put_right(body, checksum)
        if body is None or _digest(name, body) != digest:
            return None
    entry = Entry(sequence, body[:middle], Record.decode(body[middle:]))
    return _Found(sequence, end, entry, is_put_right)


def _is_followed(data: bytes, at: int) -> bool:
    """Whether an entry begins at a place or behind it."""
    while (at := data.find(_ENTRY, at)) >= 0:
        fields, checksum = data[at : at + _FIELDS.size], data[at + _FIELDS.size : at + _HEADER]
        if checksum == _SUM.pack(zlib.crc32(fields)):
            return True
        at += 1
    return False
