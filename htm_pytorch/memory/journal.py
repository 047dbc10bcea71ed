"""The journal of a stored memory: steps that were appended and are not yet in its table."""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from htm_pytorch.memory.files import MemoryFileError, sync_folder

MAGIC = b"HTMJRNL1"
_HEADER = struct.Struct("<8s16s")
_RECORD = struct.Struct("<IQqII")


class Record(NamedTuple):
    """What one call of `append` brought."""

    first_step: int
    """The number of its first step, since the memory is empty."""
    episode: int
    """Of its first step."""
    borders: tuple[int, ...]
    """Which of its steps begin an episode."""
    steps: bytes

    def encode(self) -> bytes:
        """Return the record behind its checksum."""
        borders = struct.pack(f"<{len(self.borders)}I", *self.borders)
        sizes = _RECORD.pack(0, self.first_step, self.episode, len(borders), len(self.steps))[4:]
        checked = b"".join((sizes, borders, self.steps))
        return struct.pack("<I", zlib.crc32(checked)) + checked


def encode(generation: bytes, records: bytes) -> bytes:
    """Return a whole journal; `generation` [16] ties it to a table."""
    return _HEADER.pack(MAGIC, generation) + records


def decode(journal: bytes, generation: bytes) -> tuple[list[Record], int]:
    """Return the records and how many bytes they fill.

    A journal of another generation belongs to a table that is no more: it holds nothing. A record
    that breaks off at the end was never acknowledged and is left out.

    Raises:
        MemoryFileError: not a journal, or a record that is followed by others is damaged.
    """
    if not journal:
        return [], 0
    if len(journal) < _HEADER.size or journal[: len(MAGIC)] != MAGIC:
        raise MemoryFileError("journal: not of this format")
    if _HEADER.unpack_from(journal)[1] != generation:
        return [], 0
    records, end = [], _HEADER.size
    for record, after in _records(journal, end):
        records.append(record)
        end = after
    return records, end


def _records(journal: bytes, start: int) -> Iterator[tuple[Record, int]]:
    while start + _RECORD.size <= len(journal):
        crc, first_step, episode, borders, size = _RECORD.unpack_from(journal, start)
        body = start + _RECORD.size
        end = body + borders + size
        if end > len(journal):
            return
        if zlib.crc32(journal[start + 4 : end]) != crc:
            if end == len(journal):
                return
            raise MemoryFileError(f"journal: the record at byte {start} is damaged")
        numbers = struct.unpack_from(f"<{borders // 4}I", journal, body)
        yield Record(first_step, episode, numbers, journal[body + borders : end]), end
        start = end


class LocalJournal:
    """A journal in a file; with `sync`, what is written survives a loss of power."""

    def __init__(self, path: Path, sync: bool):
        self.path = path
        self.sync = sync

    def read(self) -> bytes:
        """Return all of it; nothing where there is none."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def add(self, record: bytes, end: int) -> int:
        """Write a record at byte `end`, whole or not at all; return where it ends."""
        with open(self.path, "r+b", buffering=0) as file:
            try:
                file.truncate(end)
                file.seek(end)
                _write(file, record, self.sync)
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        return end + len(record)

    def replace(self, journal: bytes) -> int:
        """Write a whole journal and return its length; a crash leaves the old one or the new."""
        temporary = self.path.with_suffix(".new")
        with open(temporary, "wb", buffering=0) as file:
            _write(file, journal, self.sync)
        os.replace(temporary, self.path)
        if self.sync:
            sync_folder(self.path.parent)
        return len(journal)


def _write(file: FileIO, data: bytes, sync: bool) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    if sync:
        os.fsync(file.fileno())


class RemoteJournal:
    """A journal in an object store, where nothing can be added to: it is written anew each time."""

    def __init__(self, uri: str, storage_options: dict[str, str] | None):
        self.uri = uri
        self.storage_options = storage_options
        self.written = b""

    def read(self) -> bytes:
        """Return all of it; nothing where there is none."""
        import lance

        try:
            table = lance.dataset(self.uri, storage_options=self.storage_options).to_table()
        except (ValueError, FileNotFoundError):
            return b""
        self.written = table["journal"][0].as_py()
        return self.written

    def add(self, record: bytes, end: int) -> int:
        """Write the first `end` bytes again and the record behind them; return where it ends."""
        return self.replace(self.written[:end] + record)

    def replace(self, journal: bytes) -> int:
        """Write a whole journal and return its length."""
        import lance
        import pyarrow as pa

        table = pa.table({"journal": pa.array([journal], pa.large_binary())})
        # A journal that was written is never empty: it has its header.
        mode = "overwrite" if self.written else "create"
        lance.write_dataset(table, self.uri, mode=mode, storage_options=self.storage_options)
        self.written = journal
        return len(journal)
