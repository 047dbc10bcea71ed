"""`ObjectLog`: the log of a memory in an object store, one object that is replaced as a whole.

It is replaced on the condition that it is still the one that was read. So it leaves no versions
behind, and of two writers the one who comes second learns of it.
"""

import contextlib
import struct
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.folder_log import FolderLog, named_tail
from htm_pytorch.memory.log import (
    REPAIR,
    Contents,
    Head,
    OtherFormatError,
    Pin,
    Record,
    check_records,
    sealed,
    second_writer,
    unknown,
    unsealed,
)
from htm_pytorch.memory.log_file import LogFile
from htm_pytorch.memory.object_store import Objects, Replaced
from htm_pytorch.memory.place import Place

MAGIC = b"HTMLOG02"
NAME = "journal"
EARLIER = "journal.lance"
"""The name that the log of format 1 had, which was a table."""
TAILS = "tails"
"""Where the log of a memory goes on that was copied from a folder."""
_FOLDERS = b"SQLite format 3\0"
"""What a log begins with that was copied from a folder."""
_NUMBER_BYTES = 16
_SIZE = struct.Struct("<Q")


class _Object(NamedTuple):
    """The object, as it was at one moment."""

    number: bytes
    """Another one for each that was ever written: so a writer knows its own again."""
    tag: dict[str, str]
    head: Head
    records: list[bytes]


class ObjectLog:
    """The log of the memory at a place."""

    def __init__(self, place: Place):
        self.where = f"the log {place.uri}/{NAME}"
        self._objects = Objects(place.uri, place.storage_options)
        # As it was read or written last.
        self._seen: _Object | None = None
        # Numbers of those that were sent, and of which no answer came.
        self._sent: set[bytes] = set()
        self._is_writer = False
        # Whether what was seen is what this has written, and no call since then broke off.
        self._is_own = False
        self._is_fenced = False

    def read(self, known: Head | None = None) -> Contents | None:
        """Return the head and the records that are not known; see `Log.read`."""
        found = self._seen if self._is_own else self._follow()
        if found is None:
            return None
        head = found.head
        if known is not None and head.is_same(known):
            return Contents(head, [])
        start = unknown(head, known)
        with _damage(self.where):
            records = [Record.decode(record) for record in found.records]
        first = max((r.first_step for r in records if r.first_step <= start), default=0)
        records = [record for record in records if record.first_step >= first]
        return check_records(self.where, Contents(head, records), known if start else None)

    def create(self, contents: Contents) -> None:
        """Make the object, unless there is one already.

        Raises:
            ValueError: the store replaces objects whatever the condition.
        """
        self._objects.check_conditions()
        self._put(contents.head, [record.encode() for record in contents.records], None)

    def write(
        self, head: Head, new: Sequence[Record], replace: bool, pin: Pin | None = None
    ) -> None:
        """Change to `head`; see `Log.write`.

        Raises:
            BlockingIOError: another writer has changed it.
        """
        seen = self._seen
        if seen is None:
            raise self._gone()
        # What is there may be newer than what the caller has read.
        self._is_fenced |= head.sequence != seen.head.sequence + 1
        if self._is_fenced:
            raise second_writer(self.where)
        records = [record.encode() for record in new]
        self._put(head, records if replace else [*seen.records, *records], seen)

    def end(self, name: str) -> bytes | None:
        """Return nothing: none is kept."""
        return None

    def reopen(self) -> None:
        """Look again at what is there, since a call did not end."""
        self._is_own = False
        self._objects.reopen()

    def purge(self) -> None:
        """Leave no byte of records that are no more: an earlier format left some, or a folder."""
        for folder in (EARLIER, TAILS):
            self._objects.delete(self._objects.sizes(folder))

    def problems(self) -> list[str]:
        """Return what is wrong with the object."""
        try:
            found = self._get()
        except MemoryFileError as error:
            return [str(error)]
        return [] if found is not None else [str(self._gone())]

    def inherit(self) -> None:
        """Go on in a forked child, which knows what was read so far."""
        self._objects.inherit()

    def size(self) -> int:
        """Return the bytes of the object."""
        return self._objects.size(NAME)

    def close(self) -> None:
        """Let go of the connection."""
        self.reopen()

    def _follow(self) -> _Object | None:
        """Look at what is there, and remember it."""
        seen, found = self._seen, self._get(self._seen)
        if self._is_writer and seen is not None and found is not None:
            self._is_fenced |= found.number not in {seen.number, *self._sent}
        self._seen = found
        return found

    def _get(self, seen: _Object | None = None) -> _Object | None:
        """Return what is there; None: nothing; `seen`, if it still is that."""
        try:
            found = self._objects.get(NAME, seen.tag if seen is not None else None)
        except FileNotFoundError:
            return None
        return seen if found is None else self._taken_apart(found.body, found.tag)

    def _put(self, head: Head, records: list[bytes], seen: _Object | None) -> None:
        """Replace what was seen, if it is still there; None: if there is nothing."""
        self._is_writer, self._is_own = True, False
        number = uuid.uuid4().bytes
        body = _put_together(number, head, records)
        self._sent.add(number)
        try:
            tag = self._objects.put(NAME, body, None if seen is None else seen.tag)
        except Replaced as error:
            found = self._get()
            if found is None and seen is not None:
                raise self._gone() from error
            if found is None or (found.number in self._sent and found.number != number):
                raise OSError(f"{self.where} could not be written; try again") from error
            if found.number != number:
                self._is_fenced = seen is not None
                if self._is_fenced:
                    raise second_writer(self.where) from error
                return
            # It is this one, and the answer to it was lost.
            tag = found.tag
        self._seen, self._is_own = _Object(number, tag, head, records), True
        # None of those before can come true any more.
        self._sent = {number}

    def _gone(self) -> MemoryFileError:
        return MemoryFileError(f"{self.where} is gone; put it back, or {REPAIR}")

    def _taken_apart(self, body: bytes, tag: dict[str, str]) -> _Object:
        if body.startswith(_FOLDERS):
            found = self._of_folder(body)
            return _Object(b"", tag, found.head, [record.encode() for record in found.records])
        with _damage(self.where):
            number, head, records = _parts(body)
            return _Object(number, tag, Head.decode(head), records)

    def _tail_of_folder(self, tail: str) -> bytes:
        try:
            found = self._objects.get(f"{TAILS}/{tail}")
        except FileNotFoundError as error:
            raise MemoryFileError(
                f"{self.where} goes on in {TAILS}/{tail}, which is not there; copy that, too, or "
                f"{REPAIR}"
            ) from error
        assert found is not None
        return found.body

    def _of_folder(self, body: bytes) -> Contents:
        """Return what is in the log of a memory that was copied from a folder."""
        with tempfile.TemporaryDirectory(prefix="htm_pytorch-") as folder:
            path, tails = Path(folder, NAME), Path(folder, TAILS)
            path.write_bytes(body)
            file = LogFile(path)
            file.where = self.where
            with contextlib.closing(file):
                tail = named_tail(file)
                if tail:
                    tails.mkdir()
                    (tails / tail).write_bytes(self._tail_of_folder(tail))
                contents = FolderLog(file, tails=tails).read()
        if contents is None:
            raise MemoryFileError(
                f"{self.where} is that of many memories, which only a folder can hold"
            )
        return contents


def is_object(body: bytes) -> bool:
    """Whether it is the log of a memory in an object store."""
    return body.startswith(MAGIC)


def decoded(body: bytes, where: str) -> Contents:
    """Return what is in the log of a memory in an object store.

    Raises:
        MemoryFileError: it is damaged.
    """
    with _damage(where):
        _, head, records = _parts(body)
        return Contents(Head.decode(head), [Record.decode(record) for record in records])


def salvaged(body: bytes) -> tuple[list[Head], list[Record]]:
    """Return those heads and records of a damaged log whose checksums are right."""
    heads: list[Head] = []
    records: list[Record] = []
    at = 0
    while at + _SIZE.size < len(body):
        start = at + _SIZE.size
        (size,) = _SIZE.unpack_from(body, at)
        part = body[start : start + size]
        at += 1
        if len(part) < size or size < _SIZE.size:
            continue
        with contextlib.suppress(ValueError):
            unsealed(part)
            at = start + size
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, struct.error):
                records.append(Record.decode(part))
                continue
            try:
                heads.append(Head.decode(part))
            except OtherFormatError:
                raise
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    return heads, records


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except OtherFormatError as error:
        raise OtherFormatError(f"{where}: {error}") from error
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise MemoryFileError(f"{where} is damaged ({error}); {REPAIR}") from error


def _parts(body: bytes) -> tuple[bytes, bytes, list[bytes]]:
    """Return the number, the head and the records that `_put_together` put together."""
    if not is_object(body):
        raise ValueError("it is of another format")
    parts, at = [], len(MAGIC)
    while at < len(body):
        (size,) = _SIZE.unpack_from(body, at)
        at += _SIZE.size + size
        parts.append(body[at - size : at])
    seal, head, *records = parts
    if at != len(body):
        raise ValueError("its end is missing")
    number, sums = unsealed(seal)[:_NUMBER_BYTES], unsealed(seal)[_NUMBER_BYTES:]
    if sums != b"".join(part[:4] for part in (head, *records)):
        raise ValueError("some of it is missing")
    for record in records:
        unsealed(record)
    return number, head, records


def _put_together(number: bytes, head: Head, records: Sequence[bytes]) -> bytes:
    parts = [head.encode(), *records]
    # The checksums of all parts behind one of their own, so that none can be missing.
    seal = sealed(number + b"".join(part[:4] for part in parts))
    body = [MAGIC]
    for part in (seal, *parts):
        body += [_SIZE.pack(len(part)), part]
    return b"".join(body)
