"""What can still be read of the rows of a damaged table."""

import functools
import itertools
import json
import math
import operator
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.carved import sealed_lists, windows
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.formats import CPU, Chunks, Format, Marks
from htm_pytorch.memory.rows import (
    BATCH_BYTES,
    FACTORS,
    NUMBERS,
    decoded,
    filled,
    joined,
    list_column,
    schema,
    sums_of_numbers,
    sums_of_summaries,
    unmarked,
)

TOGETHER_BYTES = 1024
"""The engine stores chunks of more bytes each by itself; its own bound is lower."""


_NOTHING = {**FACTORS, "marked": 1, "numbers": -1}
"""With these the numbers of a row come to nothing, as the last one is the sum of the others."""


class SalvagedRow(NamedTuple):
    """A row that can be read."""

    row: int
    first_step: int
    length: int
    episode: int
    checksum: int
    times: tuple[float, float]
    marks: Marks | None
    is_certain: bool
    """Whether the numbers are what was stored."""
    is_whole: bool
    """Whether the steps are."""
    most: int
    """How many steps a chunk holds at most, C."""
    source: tuple[int, int, tuple[str, ...]]
    """What was asked for when it could be read: rows from, up to, and columns."""


class DamagedRows:
    """The rows of an engine's table, some of which cannot be read."""

    def __init__(self, dataset: Any, form: Format):
        self._dataset = dataset
        self._form = form
        self._last: tuple[tuple[int, int, tuple[str, ...]], Any] | None = None
        self._windows: dict[str, dict[int, bytes]] = {}
        self._marks: dict[str, dict[Any, bytes | None]] = {}
        self._missing: tuple[str, ...] = ()
        """Columns without which the last row could be read."""

    def rows(self) -> list[SalvagedRow]:
        """Return those that can be read."""
        length = self._dataset.count_rows()
        size = max(1, BATCH_BYTES // self._form.chunk_bytes)
        there = self._dataset.schema.names
        names = tuple(name for name in schema(self._form).names if name in there)
        found: list[SalvagedRow] = []
        for start in range(0, length, size):
            found += self._from(start, min(start + size, length), names)
        return found

    def stored(self, row: SalvagedRow) -> Tensor:
        """Return the chunk [C, step_bytes] of a row, by the request that could read it."""
        if self._last is None or self._last[0] != row.source:
            self._last = row.source, self._read(*row.source)
        contents = joined(self._last[1].column("contents"), torch.uint8)
        return contents.view(-1, self._form.chunk_size, self._form.step_bytes)[
            row.row - row.source[0]
        ]

    def _read(self, start: int, end: int, names: tuple[str, ...]) -> Any:
        table = self._dataset.take(list(range(start, end)), columns=list(names))
        (batch,) = table.combine_chunks().to_batches()
        there = self._dataset.schema.names
        for missing in [n for n in (*NUMBERS, "checksum") if n in there and n not in names]:
            batch = batch.append_column(missing, determined(missing, batch, self._form))
        if "contents" not in names:
            checksums = enumerate(batch["checksum"].to_pylist(), start)
            found = [self._carved(row, checksum) for row, checksum in checksums]
            contents = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8)
            column = list_column(contents, self._form.chunk_bytes)
            batch = batch.append_column("contents", column)
        if "marks" not in names and "marks" in there:
            batch = batch.append_column("marks", self._carved_marks(start, batch))
        return batch

    def _carved_marks(self, start: int, batch: Any) -> Any:
        """Return what its file holds of times and keys for rows of these times, if it is clear."""
        import pyarrow as pa

        columns = [batch[name].to_pylist() for name in ("first_time", "last_time", "steps")]
        found: list[bytes | None] = []
        for row, times in enumerate(zip(*columns, strict=True), start):
            path = self._file_of(row)
            if path not in self._marks:
                self._marks[path] = {}
                for sealed_ in sealed_lists(self._body(path)):
                    marks = json.loads(sealed_[4:])[0]
                    of = (marks[0], marks[-1], len(marks)) if marks else ()
                    # Of two with the same times nobody knows which is whose.
                    is_clear = self._marks[path].setdefault(of, sealed_) == sealed_
                    self._marks[path][of] = sealed_ if is_clear else None
            is_marked = batch["marked"][row - start].as_py()
            found.append(self._marks[path].get(times) if is_marked else None)
        return pa.array(found, pa.large_binary())

    def _file_of(self, row: int) -> str:
        for fragment in self._dataset.get_fragments():
            row -= fragment.count_rows()
            if row < 0:
                return fragment.data_files()[0].path
        raise IndexError(row)

    def _body(self, path: str) -> bytes:
        return Path(self._dataset.uri, "data", path).read_bytes()

    def _carved(self, row: int, checksum: int) -> bytes:
        """Return the bytes of its file that have the checksum of a row; zeros where none have.

        Small chunks lie together, behind a few bytes without which the engine reads none of them.
        """
        size = self._form.chunk_bytes
        if size > TOGETHER_BYTES:
            return bytes(size)
        path = self._file_of(row)
        if path not in self._windows:
            column = self._dataset.to_table(columns=["checksum"])["checksum"]
            self._windows[path] = windows(self._body(path), size, set(column.to_pylist()))
        return self._windows[path].get(checksum, bytes(size))

    def _from(self, start: int, end: int, names: tuple[str, ...]) -> list[SalvagedRow]:
        whole = self._salvaged(start, end, names)
        if whole is not None:
            return whole
        if end - start > 1:
            middle = (start + end) // 2
            return self._from(start, middle, names) + self._from(middle, end, names)
        # None is needed: a summary is made again, steps may be found otherwise, and of numbers each
        # one follows from the others and their checksum.
        needless = [name for name in ("marks", "summary", "contents") if name in names]
        ways = [c for count in (1, 2, 3) for c in itertools.combinations(needless, count)]
        ways += [(name,) for name in (*NUMBERS, "checksum") if name in names]
        for missing in (self._missing, *ways):
            left = tuple(name for name in names if name not in missing)
            found = self._salvaged(start, end, left)
            if found is not None:
                self._missing = missing
                return found
        return []

    def _salvaged(self, start: int, end: int, names: tuple[str, ...]) -> list[SalvagedRow] | None:
        """Return rows; None where these columns of them cannot be read."""
        try:
            batch = self._read(start, end, names)
            return list(_whole_rows(batch, self._form, (start, end, names)))
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
        return None


def determined(missing: str, batch: Any, form: Format) -> Any:
    """Return the one column of numbers that cannot be read, as all others say what it held.

    Raises:
        ValueError: it is not the only one, or they say what it cannot have held.
    """
    import pyarrow as pa

    kind = schema(form).field(missing).type
    if missing == "checksum":
        counts = joined(batch["steps"], torch.int32)
        stored = joined(batch["contents"], torch.uint8)
        stored = stored.view(-1, form.chunk_size, form.step_bytes)
        kept = joined(batch["summary"], torch.float32).view(len(counts), -1)
        is_right = torch.isclose(form.summarise(stored, counts), kept, rtol=1e-5, atol=1e-6).all(1)
        pairs = zip(stored, is_right.tolist(), strict=True)
        return pa.array(
            [zlib.crc32(row.numpy().data) if right else -1 for row, right in pairs], kind
        )
    others = {name: factor for name, factor in _NOTHING.items() if name != missing}
    if not others.keys() <= set(batch.schema.names):
        raise ValueError("several numbers are missing")
    found: list[Any] = []
    for row in zip(*(batch[name].to_pylist() for name in others), strict=True):
        total = sum(f * _bits(value) for f, value in zip(others.values(), row, strict=True))
        found.append(_value(-total * pow(_NOTHING[missing], -1, 2**64), kind))
    return pa.array(found, kind)


def _bits(value: float | bool | None) -> int:
    """Return a number as a checksum takes it."""
    if value is None:
        raise ValueError("a number is missing")
    return struct.unpack("<q", struct.pack("<d", value))[0] if type(value) is float else int(value)


def _value(bits: int, kind: Any) -> float | bool | int:
    """Return the number of this kind that a checksum takes for these bits, of 64."""
    stored = struct.pack("<Q", bits % 2**64)
    value = struct.unpack("<d" if str(kind) == "double" else "<q", stored)[0]
    if str(kind) != "bool":
        return value
    if value not in (0, 1):
        raise ValueError(f"expected a flag, got {value}")
    return bool(value)


def _mended(row: Chunks, place: int, kept: int, right: int) -> Chunks | None:
    """Return the numbers of a row with the one bit flipped that makes its checksum right."""
    part = row.part(place, place + 1)
    total = int(sums_of_numbers(part, torch.tensor([kept], device=CPU)))
    if (total ^ right) % 2**64 in {1 << bit for bit in range(64)}:
        return part
    missing = (right - total) % 2**64
    columns = [
        part.counts.long(),
        part.episodes,
        part.first_steps,
        *part.times.contiguous().view(torch.int64).unbind(1),
    ]
    # The checksum of the summary comes first, of which nothing is needed here.
    _, *factors = FACTORS.values()
    for number, factor in enumerate(factors):
        value = int(columns[number])
        for bit in range(64):
            changed = value ^ (1 << bit) if bit < 63 else value ^ -(1 << 63)
            if factor * (changed - value) % 2**64 == missing:
                columns[number] = torch.tensor([changed], dtype=torch.int64, device=CPU)
                counts, episodes, first_steps, *times = columns
                return part._replace(
                    counts=counts.int(),
                    episodes=episodes,
                    first_steps=first_steps,
                    times=torch.stack(times, 1).view(torch.float64),
                )
    return None


def _whole_rows(
    batch: Any, form: Format, source: tuple[int, int, tuple[str, ...]]
) -> Iterator[SalvagedRow]:
    if "summary" not in batch.schema.names:
        nothing = torch.zeros(batch.num_rows, form.dim, dtype=torch.float32, device=CPU)
        batch = batch.append_column("summary", list_column(nothing, form.dim))
    row = decoded(batch, Chunks.none(form), True)
    chunks = row.chunks
    is_certain = row.is_right
    if "numbers" in batch.schema.names:
        # Where a summary, or its checksum, is all that is wrong, the numbers are right.
        stored = joined(batch.column("numbers").fill_null(0), torch.int64)
        kept = joined(filled(batch.column("sum"), 0), torch.int64)
        for sums in (kept, sums_of_summaries(chunks.summaries)):
            is_certain = is_certain | (stored == sums_of_numbers(chunks, sums))
        mended: list[Chunks] = []
        for place in range(batch.num_rows):
            part = chunks.part(place, place + 1)
            if not is_certain[place]:
                found = _mended(chunks, place, int(kept[place]), int(stored[place]))
                is_certain[place] = found is not None
                part = found or part
            mended.append(part)
        if mended:
            chunks = functools.reduce(operator.add, mended)
    contents = joined(batch.column("contents"), torch.uint8).view(batch.num_rows, -1)
    checksums = batch.column("checksum").to_pylist()
    marked = batch.column("marks").to_pylist() if "marks" in batch.schema.names else None
    decoded_steps = form.decode(contents.view(batch.num_rows, form.chunk_size, form.step_bytes))
    is_finite = decoded_steps.float().isfinite().flatten(1).all(1)
    for place in range(batch.num_rows):
        is_whole = zlib.crc32(contents[place].numpy().data) == checksums[place]
        count = int(chunks.counts[place])
        try:
            marks = unmarked(marked[place], f"row {place}") if marked else None
        except MemoryFileError:
            marks = None
        first, last = chunks.times[place].tolist()
        if not is_certain[place]:
            # Rather none than another one.
            first, last = (marks.times[0], marks.times[-1]) if marks else (math.nan, math.nan)
        yield SalvagedRow(
            source[0] + place,
            int(chunks.first_steps[place]),
            count,
            int(chunks.episodes[place]),
            checksums[place],
            (first, last),
            marks,
            bool(is_certain[place]) and 0 < count <= form.chunk_size,
            is_whole and bool(is_finite[place]),
            form.chunk_size,
            source,
        )
