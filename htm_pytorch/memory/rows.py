"""Closed chunks as rows of a Lance table, with checksums over all that they say."""

import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.formats import CPU, DTYPES, Chunks, Format, Marks
from htm_pytorch.memory.log import REPAIR, sealed, unsealed

BATCH_BYTES = 16 * 2**20
"""How many bytes of contents are read or written at a time."""
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
        times, marked = torch.stack(both, 1), _flags(filled(batch.column("marked"), False))
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
    sums = joined(filled(batch.column("sum"), 0), torch.int64)
    stored = batch.column("numbers")
    is_right = joined(filled(stored, 0), torch.int64) == sums_of_numbers(chunks, sums)
    if with_summaries:
        is_right &= sums == sums_of_summaries(summaries)
    if stored.null_count:
        is_right |= _flags(stored.is_null())
    return Row(chunks, is_right)


def filled(column: Any, value: Any) -> Any:
    """Return a column with a value in the place of those that are missing."""
    return column.fill_null(value) if column.null_count else column


def _flags(column: Any) -> Tensor:
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())


def sums_of_summaries(summaries: Tensor) -> Tensor:
    """Return checksums [M] int64 of summaries; one flipped bit makes another one."""
    width = summaries.shape[1]
    weights = odd_factors(2**31, width).int()
    return torch.mv(summaries.contiguous().view(torch.int32), weights).long()


def sums_of_numbers(chunks: Chunks, sums: Tensor) -> Tensor:
    """Return checksums [M] int64 of all that is known of chunks."""
    numbers = [sums, chunks.counts.long(), chunks.episodes, chunks.first_steps]
    numbers += list(chunks.times.contiguous().view(torch.int64).unbind(1))
    total = chunks.marked.long()
    for factor, number in zip(FACTORS.values(), numbers, strict=True):
        total = total + factor * number
    return total


def odd_factors(most: int, count: int) -> Tensor:
    """Return odd numbers [count] int64, always the same."""
    generator = torch.Generator(CPU).manual_seed(count)
    size: dict[str, Any] = {"generator": generator, "device": CPU, "dtype": torch.int64}
    return torch.randint(-most, most, (count,), **size) | 1


FACTORS = dict(zip(("sum", *NUMBERS[:5]), odd_factors(2**62, 6).tolist(), strict=True))
"""Of each number in the checksum of all, by its column; `marked` counts once."""


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
        stored, sums = part.stored.contiguous(), sums_of_summaries(part.summaries)
        columns = [
            list_column(stored, form.chunk_bytes),
            list_column(part.summaries, form.dim),
            _array(part.counts, pa.int32()),
            _array(part.episodes, pa.int64()),
            _array(part.first_steps, pa.int64()),
            pa.array([zlib.crc32(row.numpy().data) for row in stored], pa.int64()),
            _array(part.times[:, 0], pa.float64()),
            _array(part.times[:, 1], pa.float64()),
            pa.array(part.marked.tolist(), pa.bool_()),
            pa.array([_marked(marks) for marks in part.marks], pa.large_binary()),
            _array(sums, pa.int64()),
            _array(sums_of_numbers(part, sums), pa.int64()),
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


def facts_of(dataset: Any) -> dict[str, str]:
    """Return what a table says of itself; see `schema`."""
    metadata = dataset.schema.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def form_of(facts: dict[str, str]) -> Format:
    """Return the sizes that a table says of itself.

    Raises:
        KeyError, ValueError, AttributeError: it does not say them.
    """
    form = Format(int(facts["dim"]), int(facts["chunk_size"]), getattr(torch, facts["dtype"]))
    if form.dtype not in DTYPES:
        raise ValueError(f"dtype {facts['dtype']!r}")
    return form


def _array(tensor: Tensor, kind: Any) -> Any:
    import pyarrow as pa

    flat = tensor.contiguous().flatten()
    return pa.Array.from_buffers(kind, flat.numel(), [None, pa.py_buffer(flat.numpy())])


def list_column(tensor: Tensor, size: int) -> Any:
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
