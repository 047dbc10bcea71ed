"""What a stored memory wrote last: its head, and the steps that its table does not hold yet.

A `Log` changes in transactions: a new `Head`, and records that come or go with it, all or none.
What it answers is what the last transaction left, so the head says which version of the table
counts. `folder_log.FolderLog` is in an SQLite file and the tail behind it, `object_log.ObjectLog`
is one object in an object store.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch

from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.formats import Format

FORMAT = 3
"""The newest format of one memory; heads of those before are read."""
_WITHOUT_TAIL = 2
"""The format of a head that names no tail: earlier releases read it."""
_OF_MANY = 4
"""The format of a head that says of which of many memories it is."""
TAIL_NAME = re.compile("[0-9a-f]{32}")
"""What a tail may be called."""
_JSON = json.JSONEncoder(separators=(",", ":"))
Range = tuple[int, int]
"""Steps from a first one up to, and without, a last one."""
REPAIR = "`htm memory repair` sets aside what is damaged and keeps the rest"


class OtherFormatError(MemoryFileError):
    """Nothing is damaged, but this release does not know what it is."""


class Pinned(NamedTuple):
    """The version of the table that counts."""

    version: int
    end: int
    """The number of the step after those that it holds."""
    rows: int
    layout: int
    """A number that changes when rows come to lie otherwise than they did."""
    unchecked: int
    """Rows of an earlier format, which have no checksum over their numbers."""


class Head(NamedTuple):
    """All that a memory is, but for its steps."""

    dim: int
    chunk_size: int
    dtype: str
    generation: str
    """What tells it from itself before a `reset`, after which steps are counted from 0 again."""
    sequence: int
    """How many transactions there were."""
    steps: int
    """The number of the step to come."""
    episode: int
    """Which episode the last step is of; -1 before the first step of all."""
    time: float | None
    """When the last step was; None before the first of all."""
    forgotten: tuple[Range, ...]
    """Steps that are to be recalled no more."""
    purge: bool
    """Whether some of them are still in files, until `compact`."""
    lost: tuple[Range, ...]
    """Steps that were damaged, and that `repair` could not save."""
    table: Pinned | None

    @classmethod
    def first(cls, form: Format) -> Self:
        """Return the head of a memory that nothing was written to."""
        name = str(form.dtype).removeprefix("torch.")
        at = new_generation(), 0, 0, -1, None
        return cls(form.dim, form.chunk_size, name, *at, (), False, (), None)

    @property
    def form(self) -> Format:
        """Its sizes, and how its steps become bytes."""
        return Format(self.dim, self.chunk_size, getattr(torch, self.dtype))

    @property
    def gaps(self) -> tuple[Range, ...]:
        """Steps that are not there and need not be."""
        return merged((*self.forgotten, *self.lost))

    def is_same(self, known: Self) -> bool:
        """Whether nothing has changed since a head that was written."""
        at = self.generation, self.sequence
        return self.sequence > 0 and at == (known.generation, known.sequence)

    def encode(self, tail: str = "", name: str = "") -> bytes:
        """Return it as bytes, behind a checksum.

        `tail` names the file that goes on where this head ends; see `tail`. `name` is that of the
        memory, of many in one file: what leads to a row has no checksum of its own.
        """
        body = {**self._asdict(), "format": _OF_MANY if name else FORMAT if tail else _WITHOUT_TAIL}
        body |= {"tail": tail} if tail else {}
        body |= {"name": name} if name else {}
        if self.table is not None:
            body["table"] = self.table._asdict()
        return sealed(_JSON.encode(body).encode())

    @staticmethod
    def decode(stored: bytes) -> "Head":
        """Return the head that `encode` made these bytes of.

        Raises:
            ValueError: they are damaged, or of another format.
        """
        return StoredHead.decode(stored).head


class StoredHead(NamedTuple):
    """A head, and what is stored with it."""

    head: Head
    tail: str
    """The name of its tail; empty for none."""
    name: str
    """Of the memory; empty for one alone, and in files of many from before they said it."""

    @classmethod
    def decode(cls, stored: bytes) -> Self:
        """Return what `Head.encode` made these bytes of.

        Raises:
            ValueError: they are damaged, or of another format.
        """
        body = json.loads(unsealed(stored))
        if body.pop("format") not in (_WITHOUT_TAIL, FORMAT, _OF_MANY):
            raise OtherFormatError("it is of another format; a newer release reads it")
        if body["table"] is not None:
            body["table"] = Pinned(**body["table"])
        for ranges in ("forgotten", "lost"):
            body[ranges] = tuple((start, end) for start, end in body[ranges])
        tail, name = body.pop("tail", ""), body.pop("name", "")
        if tail and not TAIL_NAME.fullmatch(tail):
            # It is to name a file of the memory, whoever has written this.
            raise ValueError(f"{tail!r} is no name of a tail")
        return cls(Head(**body), tail, name)


class Record(NamedTuple):
    """Steps that were appended together."""

    first_step: int
    """The number that the first of them has."""
    episode: int
    """Which episode the first of them is of."""
    borders: tuple[int, ...]
    """Which of them begin an episode."""
    times: tuple[float, ...]
    """One for all of them or one for each; nothing where none is known."""
    keys: tuple[str | None, ...]
    """One for all of them or one for each; nothing where there is none."""
    closes: bool
    """Whether the chunk that they end in is closed, however short it is."""
    steps: bytes

    @property
    def size(self) -> int:
        """How many bytes its steps have, and characters its keys."""
        return len(self.steps) + sum(len(key) for key in self.keys if key is not None)

    def encode(self, name: str = "", generation: str = "") -> bytes:
        """Return it as bytes, behind a checksum.

        Of many memories it says whose it is: the memory of a name, in what its head says.
        """
        text = _JSON.encode(self[:-1] + ((name, generation) if name else ())).encode()
        return sealed(b"".join((struct.pack("<I", len(text)), text, self.steps)))

    @staticmethod
    def decode(stored: bytes) -> "Record":
        """Return the record that `encode` made these bytes of.

        Raises:
            ValueError: they are damaged.
        """
        return StoredRecord.decode(stored).record


class StoredRecord(NamedTuple):
    """A record, and what is stored with it; nothing but the record of one memory alone."""

    record: Record
    name: str
    """Of the memory."""
    generation: str
    """Of the head that it came with."""

    @classmethod
    def decode(cls, stored: bytes) -> Self:
        """Return what `Record.encode` made these bytes of.

        Raises:
            ValueError: they are damaged.
        """
        body = unsealed(stored)
        (length,) = struct.unpack_from("<I", body)
        said: list[Any] = [*json.loads(body[4 : 4 + length]), "", ""]
        first_step, episode, *lists, closes, name, generation = said[:8]
        borders, times, keys = (tuple(part) for part in lists)
        record = Record(first_step, episode, borders, times, keys, closes, body[4 + length :])
        return cls(record, name, generation)

    def is_of(self, name: str, head: Head) -> bool:
        """Whether it may be of the memory of this name and head."""
        return self.name in ("", name) and self.generation in ("", head.generation)


class Pin(NamedTuple):
    """What a table wants kept in the log, against damage; see `pins`."""

    body: bytes
    """What is kept of the version that counts, as `pins` encodes it."""
    ends: dict[str, bytes]
    """The ends of files, by their names: of those that are new, where it is written."""


class Contents(NamedTuple):
    """What is in a log, as of one moment."""

    head: Head
    records: list[Record]
    pin: Pin | None = None
    """What the table wants kept here; nothing where it is known already."""


class Log(Protocol):
    """Heads and records of a memory, changed all at once or not at all."""

    where: str
    """Where it is, for people."""

    def read(self, known: Head | None = None) -> Contents | None:
        """Return the head, and the records that a reader who knows `known` does not have.

        None where nothing was ever written.

        Raises:
            MemoryFileError: what is there is damaged.
        """
        ...

    def write(
        self, head: Head, new: Sequence[Record], replace: bool, pin: Pin | None = None
    ) -> None:
        """Change to `head`, with the records `new` behind the others or, `replace`, in their stead.

        `pin` is kept for the table, from the version on that the head names. When this returns, it
        is safe. When it raises, it has happened or it has not.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def end(self, name: str) -> bytes | None:
        """Return the end of a file of the table that a pin brought."""
        ...

    def reopen(self) -> None:
        """Forget everything that was left by a call that did not end."""
        ...

    def purge(self) -> None:
        """Leave no byte of records that are no more."""
        ...

    def problems(self) -> list[str]:
        """Return what is wrong with it."""
        ...

    def inherit(self) -> None:
        """Go on in a forked child, for reading only."""
        ...

    def size(self) -> int:
        """Return its bytes."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def second_writer(where: str) -> BlockingIOError:
    """Return the error of a writer that comes second."""
    return BlockingIOError(
        f"uri: {where} was changed by another writer since this one opened it; what was "
        "acknowledged to either is stored; close this memory, and open it again once the other one "
        "has ended"
    )


def sealed(body: bytes) -> bytes:
    """Return the body behind its checksum."""
    return struct.pack("<I", zlib.crc32(body)) + body


def unsealed(stored: bytes) -> bytes:
    """Return the body that `sealed` put behind a checksum.

    Raises:
        ValueError: it is another one.
    """
    body = stored[4:]
    if len(stored) < 4 or struct.unpack_from("<I", stored)[0] != zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    return body


def new_generation() -> str:
    """Return what no head has said before."""
    return os.urandom(16).hex()


def merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Return the ranges in order, those that touch each other as one."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif start < end:
            found.append((start, end))
    return tuple(found)


def missing(ranges: Sequence[Range], steps: int) -> list[Range]:
    """Return which of so many steps are in none of these ranges."""
    found: list[Range] = []
    at = 0
    for start, end in [*merged(ranges), (steps, steps)]:
        if start > at:
            found.append((at, start))
        at = max(at, end)
    return found


def check_records(where: str, contents: Contents, known: Head | None = None) -> Contents:
    """Return the contents.

    Raises:
        MemoryFileError: records do not follow each other up to where the head says.
    """
    head, records, _ = contents
    at = known.steps if known else (head.table.end if head.table else 0)
    if known and records:
        at = min(at, records[0].first_step)
    for record in records:
        at = _over(at, head.gaps, record.first_step)
        if record.first_step != at:
            raise MemoryFileError(f"{where} lacks steps from {at} on; {REPAIR}")
        at += len(record.steps) // head.form.step_bytes
    if _over(at, head.gaps, head.steps) != head.steps:
        raise MemoryFileError(f"{where} lacks steps from {at} to {head.steps - 1}; {REPAIR}")
    return contents


def _over(at: int, gaps: Sequence[Range], to: int) -> int:
    """Return where a step after `at` may be, not beyond `to`, if those before it are missing."""
    for start, end in gaps:
        if start <= at < to:
            at = max(at, min(end, to))
    return at


def unknown(head: Head, known: Head | None) -> int:
    """Return the first step, from which on records are news to whoever knows the head `known`."""
    if known is None or known.generation != head.generation or known.gaps != head.gaps:
        return 0
    if head.sequence < known.sequence:
        return 0
    # Steps that went to the table meanwhile are read from there.
    if head.table is not None and head.table.end > known.steps:
        return 0
    return known.steps
