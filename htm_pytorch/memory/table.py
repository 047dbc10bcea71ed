"""The closed chunks of a stored memory, as rows of a Lance table."""

import datetime
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory import index
from htm_pytorch.memory.chunked import summarise
from htm_pytorch.memory.files import MemoryFileError, sync_file, sync_folder

FORMAT = "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
BATCH_BYTES = 16 * 2**20
"""Of contents read or written at a time."""
PIECE_BYTES = 2 * 2**20
"""Of steps in float32, whose means are taken at a time."""
FRAGMENT_BYTES = 256 * 2**20
"""Of contents in a fragment, after `compact`."""
_KEEP = datetime.timedelta(hours=1)
_SCALE_BYTES = 4


class Format(NamedTuple):
    """Sizes of a memory, and how a step becomes bytes."""

    dim: int
    """D."""
    chunk_size: int
    """C."""
    dtype: torch.dtype
    """As stored: one of DTYPES."""

    @property
    def given(self) -> torch.dtype:
        """Of the steps as they come and go."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype

    @property
    def step_bytes(self) -> int:
        """Of a step: its numbers and, behind those of int8, their scale."""
        scale = _SCALE_BYTES if self.dtype == torch.int8 else 0
        return self.dim * self.dtype.itemsize + scale

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk."""
        return self.chunk_size * self.step_bytes

    def encode(self, steps: Tensor) -> Tensor:
        """Return the bytes [T, step_bytes] of `steps` [T, D]."""
        if self.dtype != torch.int8:
            return steps.contiguous().view(torch.uint8)
        scale = steps.abs().amax(1, keepdim=True) / 127
        levels = (steps / scale.clamp(min=torch.finfo(steps.dtype).tiny)).round().to(torch.int8)
        return torch.cat([levels.view(torch.uint8), scale.view(torch.uint8)], 1)

    def decode(self, stored: Tensor) -> Tensor:
        """Return the steps [..., D] of bytes [..., step_bytes]."""
        if self.dtype != torch.int8:
            return stored.view(self.dtype)
        levels = stored[..., : self.dim].view(torch.int8)
        scale = stored[..., self.dim :].contiguous().view(torch.float32)
        return levels * scale

    def summarise(self, stored: Tensor, counts: Tensor) -> Tensor:
        """Return the means [M, D] of chunks [M, C, step_bytes] with `counts` [M] steps, float32."""
        # In pieces that stay in cache, since float32 takes room.
        piece = max(1, PIECE_BYTES // (4 * self.chunk_size * self.dim))
        return torch.cat(
            [
                self._summarise(*part)
                for part in zip(stored.split(piece), counts.split(piece), strict=True)
            ]
        )

    def _summarise(self, stored: Tensor, counts: Tensor) -> Tensor:
        contents = self.decode(stored).float()[None]
        is_whole = bool((counts == self.chunk_size).all())
        is_step = None if is_whole else step_mask(counts, self.chunk_size)[None]
        return summarise(contents, is_step)[0]


class Chunks(NamedTuple):
    """Closed chunks, oldest first."""

    stored: Tensor
    """[M, C, step_bytes] uint8; zeros where a short chunk, at its oldest end, has no steps."""
    summaries: Tensor
    """[M, D] float32, the means of their steps as they are stored."""
    counts: Tensor
    """[M] int32, how many steps they have."""
    episodes: Tensor
    """[M] int64."""
    first_steps: Tensor
    """[M] int64, the number of the first step of each."""

    @classmethod
    def none(cls, form: Format) -> Self:
        """Return no chunks."""
        stored = torch.empty(0, form.chunk_size, form.step_bytes, dtype=torch.uint8)
        number = torch.empty(0, dtype=torch.int64)
        return cls(stored, torch.empty(0, form.dim), number.int(), number, number)

    @property
    def length(self) -> int:
        """M."""
        return len(self.counts)

    def __add__(self, others: "Chunks") -> "Chunks":  # type: ignore[override]
        """Return these and the others."""
        if not self.length or not others.length:
            return others if others.length else self
        pairs = zip(self, others, strict=True)
        return Chunks(*(torch.cat(pair) for pair in pairs))


def step_mask(counts: Tensor, chunk_size: int) -> Tensor:
    """Return which steps [M, C] there are: a short chunk holds them at its newest end."""
    return torch.arange(chunk_size) >= chunk_size - counts[:, None]


class Table:
    """A Lance table of chunks. Every change is a new version, there whole or not at all."""

    def __init__(self, dataset: Any, form: Format, generation: bytes, sync: bool):
        self._dataset = dataset
        self.form = form
        self.generation = generation
        self._sync = sync

    @classmethod
    def open(cls, uri: str, storage_options: dict[str, str] | None, sync: bool) -> Self | None:
        """Open the table at `uri`; None where there is none.

        Raises:
            MemoryFileError: what is there is damaged or no table of this format.
        """
        lance = _lance()
        if "://" not in uri and not Path(uri).exists():
            return None
        try:
            dataset = lance.dataset(uri, storage_options=storage_options)
        except (ValueError, OSError) as error:
            if "://" in uri and "not found" in str(error).lower():
                return None
            raise MemoryFileError(f"uri: {uri!r} is damaged or not a table ({error})") from error
        metadata = {k.decode(): v.decode() for k, v in (dataset.schema.metadata or {}).items()}
        if metadata.get("htm_pytorch") != FORMAT:
            raise MemoryFileError(
                f"uri: expected {uri!r} to hold a memory of format {FORMAT}, "
                f"got {metadata.get('htm_pytorch')!r}"
            )
        dtype = getattr(torch, metadata["dtype"])
        form = Format(int(metadata["dim"]), int(metadata["chunk_size"]), dtype)
        return cls(dataset, form, bytes.fromhex(metadata["generation"]), sync)

    @classmethod
    def create(
        cls, uri: str, form: Format, storage_options: dict[str, str] | None, sync: bool
    ) -> Self:
        """Make an empty table."""
        return cls._empty(uri, form, storage_options, sync, "create")

    @classmethod
    def _empty(
        cls, uri: str, form: Format, options: dict[str, str] | None, sync: bool, mode: str
    ) -> Self:
        generation = uuid.uuid4().bytes
        table = _schema(form, generation).empty_table()
        dataset = _lance().write_dataset(table, uri, mode=mode, storage_options=options)
        made = cls(dataset, form, generation, sync)
        made._reach_disk()
        return made

    @property
    def length(self) -> int:
        """How many chunks there are."""
        return self._dataset.count_rows()

    def chunks(self, start: int, with_summaries: bool) -> Iterator[Chunks]:
        """Yield the chunks from number `start` on, a few at a time, with all but their steps."""
        numbers = ["steps", "episode", "first_step"]
        columns = [*numbers, "summary"] if with_summaries else numbers
        size = max(1, BATCH_BYTES // (4 * self.form.dim))
        scanner = self._dataset.scanner(
            columns=columns, offset=start, batch_size=size, scan_in_order=True
        )
        nothing = Chunks.none(self.form).stored
        try:
            for batch in scanner.to_batches():
                if batch.num_rows:
                    means = _tensor(batch.column("summary")) if with_summaries else torch.empty(0)
                    means = means.view(batch.num_rows, -1)
                    yield Chunks(nothing, means, *(_tensor(batch.column(n)) for n in numbers))
        except (OSError, ValueError) as error:
            raise MemoryFileError(f"chunks from {start} on cannot be read ({error})") from error

    def take(self, numbers: list[int]) -> Tensor:
        """Return the stored chunks [U, C, step_bytes] of these numbers.

        Raises:
            MemoryFileError: one of them is not what was stored.
        """
        # The engine answers in the order it was asked, but is faster when that is its own.
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        asked = [numbers[place] for place in order]
        try:
            found = self._dataset.take(asked, columns=["contents", "checksum"])
        except (OSError, ValueError) as error:
            raise MemoryFileError(f"chunks {asked}: cannot be read ({error})") from error
        stored = torch.empty(
            len(numbers), self.form.chunk_size, self.form.step_bytes, dtype=torch.uint8
        )
        start = 0
        for batch in found.to_batches():
            rows = _tensor(batch.column("contents")).view(-1, *stored.shape[1:])
            for row, checksum in zip(rows, batch.column("checksum").to_pylist(), strict=True):
                if _checksum(row) != checksum:
                    raise MemoryFileError(f"chunk {asked[start]}: damaged, its checksum is wrong")
                stored[order[start]] = row
                start += 1
        return stored

    def nearest(self, vectors: Tensor, k: int, probes: int) -> tuple[Tensor, Tensor]:
        """Do what `index.nearest` does.

        Raises:
            MemoryFileError: the index or the summaries cannot be read.
        """
        try:
            return index.nearest(self._dataset, vectors, k, probes)
        except (OSError, ValueError) as error:
            raise MemoryFileError(f"summaries: cannot be searched ({error})") from error

    def build_index(self) -> None:
        """Make the index of the summaries, instead of the one there was."""
        if self.length:
            self._dataset = index.build(self._dataset, self.form.dim)
            self._reach_disk()

    def append(self, chunks: Chunks) -> None:
        """Add chunks: all of them, or none where this raises."""
        if chunks.length:
            self._add(_batches(chunks, self.form, self.generation))

    def append_from(self, other: "Table") -> None:
        """Add all chunks of another table of this format."""
        schema = _schema(self.form, self.generation)
        if other.length:
            import pyarrow as pa

            self._add(
                pa.RecordBatch.from_arrays(batch.columns, schema=schema)
                for batch in other._scan(schema.names)
            )

    def clear(self) -> None:
        """Begin a new generation, without chunks."""
        dataset = self._dataset
        made = self._empty(
            dataset.uri, self.form, dataset._storage_options, self._sync, "overwrite"
        )
        self._dataset, self.generation = made._dataset, made.generation

    def refresh(self) -> None:
        """Go to the newest version."""
        self._dataset.checkout_latest()
        metadata = self._dataset.schema.metadata
        self.generation = bytes.fromhex(metadata[b"generation"].decode())

    def compact(self) -> None:
        """Join small fragments and delete versions and files that were left an hour ago."""
        rows = max(1, FRAGMENT_BYTES // self.form.chunk_bytes)
        self._dataset.optimize.compact_files(target_rows_per_fragment=rows)
        index.add_missing(self._dataset)
        self._reach_disk()
        self._dataset.cleanup_old_versions(older_than=_KEEP)

    def verify(self) -> Iterator[str]:
        """Read everything and say what is wrong, chunk by chunk."""
        names = _schema(self.form, self.generation).names
        number, next_step = 0, None
        try:
            for batch in self._scan(names):
                column = {name: _tensor(batch.column(name)) for name in names}
                stored = column["contents"].view(-1, self.form.chunk_size, self.form.step_bytes)
                means = self.form.summarise(stored, column["steps"])
                kept = column["summary"].view(means.shape)
                for row in range(batch.num_rows):
                    if _checksum(stored[row]) != int(column["checksum"][row]):
                        yield f"chunk {number}: its checksum is wrong"
                    elif not torch.allclose(means[row], kept[row], rtol=1e-5, atol=1e-6):
                        yield f"chunk {number}: its summary is not the mean of its steps"
                    first, count = int(column["first_step"][row]), int(column["steps"][row])
                    if not 0 < count <= self.form.chunk_size or next_step not in (None, first):
                        yield f"chunk {number}: {count} steps from {first} on, expected {next_step}"
                    number, next_step = number + 1, first + count
        except (OSError, ValueError) as error:
            yield f"chunk {number} or a later one cannot be read ({error})"

    def info(self) -> dict[str, Any]:
        """Return what the engine knows of the table."""
        fragments = self._dataset.get_fragments()
        return {
            "chunks in the index": index.length(self._dataset),
            "fragments": len(fragments),
            "version": self._dataset.version,
        }

    def _scan(self, names: list[str]) -> Iterator[Any]:
        size = max(1, BATCH_BYTES // self.form.chunk_bytes)
        scanner = self._dataset.scanner(columns=names, batch_size=size, scan_in_order=True)
        return (batch for batch in scanner.to_batches() if batch.num_rows)

    def _add(self, batches: Iterator[Any]) -> None:
        import pyarrow as pa

        before = {fragment.fragment_id for fragment in self._dataset.get_fragments()}
        reader = pa.RecordBatchReader.from_batches(_schema(self.form, self.generation), batches)
        self._dataset.insert(reader, mode="append")
        self._reach_disk(before)

    def _reach_disk(self, known: set[int] | None = None) -> None:
        """Wait until the disk has the fragments that are not known, and the newest version.

        Where none is known, the index too.
        """
        root = Path(self._dataset.uri)
        if not self._sync or not root.is_dir():
            return
        for fragment in self._dataset.get_fragments():
            if known is None or fragment.fragment_id not in known:
                for file in fragment.data_files():
                    sync_file(root / "data" / file.path)
        if known is None:
            for path in (root / "_indices").rglob("*"):
                (sync_folder if path.is_dir() else sync_file)(path)
        versions = root / "_versions"
        sync_file(max(versions.iterdir(), key=os.path.getmtime))
        for folder in (versions, root / "data", root):
            if folder.exists():
                sync_folder(folder)


def _lance() -> Any:
    try:
        import lance
    except ImportError as error:
        raise ImportError(
            "memory.open needs the extra `store`: pip install 'htm-pytorch[store]'"
        ) from error
    return lance


def _schema(form: Format, generation: bytes) -> Any:
    import pyarrow as pa

    metadata = {
        "htm_pytorch": FORMAT,
        "generation": generation.hex(),
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
    }
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()], metadata)


def _batches(chunks: Chunks, form: Format, generation: bytes) -> Iterator[Any]:
    import pyarrow as pa

    schema = _schema(form, generation)
    size = max(1, BATCH_BYTES // form.chunk_bytes)
    for start in range(0, chunks.length, size):
        part = Chunks(*(column[start : start + size] for column in chunks))
        stored = part.stored.contiguous()
        columns = [
            pa.FixedSizeListArray.from_arrays(_array(stored, pa.uint8()), form.chunk_bytes),
            pa.FixedSizeListArray.from_arrays(_array(part.summaries, pa.float32()), form.dim),
            _array(part.counts, pa.int32()),
            _array(part.episodes, pa.int64()),
            _array(part.first_steps, pa.int64()),
            pa.array([_checksum(row) for row in stored], pa.int64()),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _array(tensor: Tensor, kind: Any) -> Any:
    import pyarrow as pa

    flat = tensor.contiguous().flatten()
    return pa.Array.from_buffers(kind, flat.numel(), [None, pa.py_buffer(flat.numpy())])


def _tensor(column: Any) -> Tensor:
    """Return the numbers or bytes of an Arrow column, flat: not a copy, so not to be written."""
    import pyarrow as pa

    if isinstance(column.type, pa.FixedSizeListType):
        column = column.flatten()
    return torch.from_dlpack(column) if len(column) else torch.empty(0)


def _checksum(stored: Tensor) -> int:
    return zlib.crc32(stored.numpy().data)
