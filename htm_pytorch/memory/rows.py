"""Closed chunks as rows of a Lance table, with checksums over all that they say."""

import functools
import itertools
import json
import math
import operator
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.carved import sealed_lists, windows
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.formats import CPU, Chunks, Format, Marks
from htm_pytorch.memory.log import REPAIR, sealed, unsealed

BATCH_BYTES = 16 * 2**20
"""Of contents read or written at a time."""
NUMBERS = ("steps", "episode", "first_step", "first_time", "last_time", "marked", "sum", "numbers")


class Row(NamedTuple):
    """What a table says of its chunks, in the order of its rows, but for their steps."""

    chunks: Chunks
    is_right: Tensor
    """[M] bool, False where summary and numbers are not what was stored."""


def decoded(batch: Any, nothing: Chunks, with_summaries: bool) -> Row:
    """Return what rows say of chunks, but for their steps."""
    count = joined(batch.column("steps"), torch.int32)
    summaries = torch.empty(len(count), 0, dtype=torch.float32, device=CPU)
    if with_summaries:
        summaries = joined(batch.column("summary"), torch.float32).view(len(count), -1)
    length, names = batch.num_rows, batch.schema.names
    times = torch.full((length, 2), torch.nan, dtype=torch.float64, device=CPU)
    marked = torch.zeros(length, dtype=torch.bool, device=CPU)
    if "numbers" in names:
        both = [joined(batch.column(n), torch.float64) for n in ("first_time", "last_time")]
        times, marked = torch.stack(both, 1), _flags(_filled(batch.column("marked"), False))
    chunks = Chunks(
        nothing.stored,
        summaries,
        count,
        joined(batch.column("episode"), torch.int64),
        joined(batch.column("first_step"), torch.int64),
        times,
        marked,
        (),
    )
    if "numbers" not in names:
        return Row(chunks, torch.ones(length, dtype=torch.bool, device=CPU))
    sums = joined(_filled(batch.column("sum"), 0), torch.int64)
    stored = batch.column("numbers")
    is_right = joined(_filled(stored, 0), torch.int64) == _numbers(chunks, sums)
    if with_summaries:
        is_right &= sums == _sums(summaries)
    if stored.null_count:
        is_right |= _flags(stored.is_null())
    return Row(chunks, is_right)


def _filled(column: Any, value: Any) -> Any:
    """Return a column with a value in the place of those that are missing."""
    return column.fill_null(value) if column.null_count else column


def _flags(column: Any) -> Tensor:
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())


def _sums(summaries: Tensor) -> Tensor:
    """Return checksums [M] int64 of summaries; one flipped bit makes another one."""
    width = summaries.shape[1]
    weights = _odd(2**31, width).int()
    return torch.mv(summaries.contiguous().view(torch.int32), weights).long()


def _numbers(chunks: Chunks, sums: Tensor) -> Tensor:
    """Return checksums [M] int64 of all that is known of chunks."""
    numbers = [sums, chunks.counts.long(), chunks.episodes, chunks.first_steps]
    numbers += list(chunks.times.contiguous().view(torch.int64).unbind(1))
    total = chunks.marked.long()
    for factor, number in zip(_odd(2**62, len(numbers)).tolist(), numbers, strict=True):
        total = total + factor * number
    return total


def _odd(most: int, count: int) -> Tensor:
    """Return odd numbers [count] int64, always the same."""
    generator = torch.Generator(CPU).manual_seed(count)
    size: dict[str, Any] = {"generator": generator, "device": CPU, "dtype": torch.int64}
    return torch.randint(-most, most, (count,), **size) | 1


def problems(batch: Any, form: Format, names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with whole rows, which are chunks that go by these names."""
    row = decoded(batch, Chunks.none(form), True)
    stored = joined(batch.column("contents"), torch.uint8)
    stored = stored.view(-1, form.chunk_size, form.step_bytes)
    checksums = batch.column("checksum").to_pylist()
    counts = row.chunks.counts
    means = form.summarise(stored, counts)
    finite = form.decode(stored).float().isfinite().flatten(1).all(1)
    marked = batch.column("marks").to_pylist() if "marks" in batch.schema.names else ()
    for place, marks in enumerate(marked or [None] * batch.num_rows):
        chunk, count = names[place], int(counts[place])
        mean, kept = means[place], row.chunks.summaries[place]
        if zlib.crc32(stored[place].numpy().data) != checksums[place]:
            yield f"{chunk}: its checksum is wrong"
        elif not finite[place]:
            yield f"{chunk}: its steps are not finite"
        elif not torch.allclose(mean, kept, rtol=1e-5, atol=1e-6):
            yield f"{chunk}: its summary is not the mean of its steps"
        elif not row.is_right[place]:
            yield f"{chunk}: the checksum of its numbers is wrong"
        elif not 0 < count <= form.chunk_size:
            yield f"{chunk}: it has {count} steps"
        else:
            try:
                unmarked(marks, chunk)
            except MemoryFileError as error:
                yield str(error)


def encoded(chunks: Chunks, form: Format, generation: str) -> Iterator[Any]:
    """Yield chunks as rows, a few at a time."""
    import pyarrow as pa

    columns_of = schema(form, generation)
    size = max(1, BATCH_BYTES // form.chunk_bytes)
    for start in range(0, chunks.length, size):
        part = chunks.part(start, start + size)
        stored, sums = part.stored.contiguous(), _sums(part.summaries)
        columns = [
            pa.FixedSizeListArray.from_arrays(_array(stored, pa.uint8()), form.chunk_bytes),
            pa.FixedSizeListArray.from_arrays(_array(part.summaries, pa.float32()), form.dim),
            _array(part.counts, pa.int32()),
            _array(part.episodes, pa.int64()),
            _array(part.first_steps, pa.int64()),
            pa.array([zlib.crc32(row.numpy().data) for row in stored], pa.int64()),
            _array(part.times[:, 0], pa.float64()),
            _array(part.times[:, 1], pa.float64()),
            pa.array(part.marked.tolist(), pa.bool_()),
            pa.array([_marked(marks) for marks in part.marks], pa.large_binary()),
            _array(sums, pa.int64()),
            _array(_numbers(part, sums), pa.int64()),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=columns_of)


def _marked(marks: Marks | None) -> bytes | None:
    return None if marks is None else sealed(json.dumps(marks, separators=(",", ":")).encode())


def unmarked(stored: bytes | None, chunk: str) -> Marks | None:
    """Return what was marked in a chunk that goes by the name `chunk`.

    Raises:
        MemoryFileError: it is not what was stored.
    """
    if stored is None:
        return None
    try:
        times, keys = json.loads(unsealed(stored))
    except ValueError as error:
        raise MemoryFileError(
            f"{chunk}: its times and keys are damaged ({error}); {REPAIR}"
        ) from error
    return Marks(tuple(times), tuple(keys))


def schema(form: Format, generation: str = "") -> Any:
    """Return the columns of a table, and what it says of itself."""
    import pyarrow as pa

    metadata = {
        "htm_pytorch": "2",
        "generation": generation,
        "dim": str(form.dim),
        "chunk_size": str(form.chunk_size),
        "dtype": str(form.dtype).removeprefix("torch."),
    }
    fields = {
        "contents": pa.list_(pa.uint8(), form.chunk_bytes),
        "summary": pa.list_(pa.float32(), form.dim),
        "steps": pa.int32(),
        "episode": pa.int64(),
        "first_step": pa.int64(),
        "checksum": pa.int64(),
        "first_time": pa.float64(),
        "last_time": pa.float64(),
        "marked": pa.bool_(),
        "marks": pa.large_binary(),
        "sum": pa.int64(),
        "numbers": pa.int64(),
    }
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()], metadata)


def _array(tensor: Tensor, kind: Any) -> Any:
    import pyarrow as pa

    flat = tensor.contiguous().flatten()
    return pa.Array.from_buffers(kind, flat.numel(), [None, pa.py_buffer(flat.numpy())])


def _lists(tensor: Tensor, size: int) -> Any:
    """Return an Arrow column of lists of `size` numbers, float32 or uint8."""
    import pyarrow as pa

    kind = pa.float32() if tensor.is_floating_point() else pa.uint8()
    return pa.FixedSizeListArray.from_arrays(_array(tensor, kind), size)


def joined(column: Any, dtype: torch.dtype) -> Tensor:
    """Return the numbers of an Arrow column, flat: not always a copy, so not to be written."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column.type, pa.FixedSizeListType):
        column = column.flatten()
    if not len(column):
        return torch.empty(0, dtype=dtype, device=CPU)
    if column.null_count:
        if not pa.types.is_floating(column.type):
            raise ValueError("numbers are missing")
        column = column.fill_null(float("nan"))
    return torch.from_dlpack(column)


TOGETHER_BYTES = 1024
"""Of a chunk, from which on the engine stores each by itself; its own bound is lower."""


class Salvage(NamedTuple):
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
    """C."""
    source: tuple[int, int, tuple[str, ...]]
    """What was asked for when it could be read: rows from, up to, and columns."""


class Damaged:
    """The rows of an engine's table, some of which cannot be read."""

    def __init__(self, dataset: Any, form: Format):
        self._dataset = dataset
        self._form = form
        self._last: tuple[tuple[int, int, tuple[str, ...]], Any] | None = None
        self._windows: dict[str, dict[int, bytes]] = {}
        self._marks: dict[str, dict[Any, bytes | None]] = {}

    def rows(self) -> list[Salvage]:
        """Return those that can be read."""
        length = self._dataset.count_rows()
        size = max(1, BATCH_BYTES // self._form.chunk_bytes)
        there = self._dataset.schema.names
        names = tuple(name for name in schema(self._form).names if name in there)
        found: list[Salvage] = []
        for start in range(0, length, size):
            found += self._from(start, min(start + size, length), names)
        return found

    def stored(self, row: Salvage) -> Tensor:
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
        if "contents" not in names:
            checksums = enumerate(batch["checksum"].to_pylist(), start)
            found = [self._carved(row, checksum) for row, checksum in checksums]
            contents = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8)
            column = _lists(contents, self._form.chunk_bytes)
            batch = batch.append_column("contents", column)
        if "marks" not in names and "marks" in self._dataset.schema.names:
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

    def _from(self, start: int, end: int, names: tuple[str, ...]) -> list[Salvage]:
        whole = self._salvaged(start, end, names)
        if whole is not None:
            return whole
        if end - start > 1:
            middle = (start + end) // 2
            return self._from(start, middle, names) + self._from(middle, end, names)
        # None is needed: a summary is made again, and steps may be found otherwise.
        needless = [name for name in ("marks", "summary", "contents") if name in names]
        for count in range(1, len(needless) + 1):
            for missing in itertools.combinations(needless, count):
                left = tuple(name for name in names if name not in missing)
                found = self._salvaged(start, end, left)
                if found is not None:
                    return found
        return []

    def _salvaged(self, start: int, end: int, names: tuple[str, ...]) -> list[Salvage] | None:
        """Return rows; None where these columns of them cannot be read."""
        try:
            batch = self._read(start, end, names)
            return list(_whole_rows(batch, self._form, (start, end, names)))
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
        return None


def _mended(row: Chunks, place: int, kept: int, right: int) -> Chunks | None:
    """Return the numbers of a row with the one bit flipped that makes its checksum right."""
    part = row.part(place, place + 1)
    total = int(_numbers(part, torch.tensor([kept], device=CPU)))
    if (total ^ right) % 2**64 in {1 << bit for bit in range(64)}:
        return part
    missing = (right - total) % 2**64
    columns = [
        part.counts.long(),
        part.episodes,
        part.first_steps,
        *part.times.contiguous().view(torch.int64).unbind(1),
    ]
    # The factor of the checksum of the summary is the first, of which nothing is needed here.
    for number, factor in enumerate(_odd(2**62, 1 + len(columns)).tolist()):
        if number == 0:
            continue
        value = int(columns[number - 1])
        for bit in range(64):
            changed = value ^ (1 << bit) if bit < 63 else value ^ -(1 << 63)
            if factor * (changed - value) % 2**64 == missing:
                columns[number - 1] = torch.tensor([changed], dtype=torch.int64, device=CPU)
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
) -> Iterator[Salvage]:
    if "summary" not in batch.schema.names:
        nothing = torch.zeros(batch.num_rows, form.dim, dtype=torch.float32, device=CPU)
        batch = batch.append_column("summary", _lists(nothing, form.dim))
    row = decoded(batch, Chunks.none(form), True)
    chunks = row.chunks
    is_certain = row.is_right
    if "numbers" in batch.schema.names:
        # Where a summary, or its checksum, is all that is wrong, the numbers are right.
        stored = joined(batch.column("numbers").fill_null(0), torch.int64)
        kept = joined(_filled(batch.column("sum"), 0), torch.int64)
        for sums in (kept, _sums(chunks.summaries)):
            is_certain = is_certain | (stored == _numbers(chunks, sums))
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
        yield Salvage(
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
