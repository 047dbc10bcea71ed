"""`Table`: one version of the closed chunks of a stored memory, as rows of a Lance table."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.memory import index, pins
from htm_pytorch.memory.files import MemoryFileError, sync_file, sync_folder
from htm_pytorch.memory.formats import CPU, Chunks, Format, Marks
from htm_pytorch.memory.lance_access import check_process, reading
from htm_pytorch.memory.log import REPAIR, Pin, Pinned, Range
from htm_pytorch.memory.rows import (
    BATCH_BYTES,
    NUMBERS,
    Row,
    decoded,
    joined,
    problems,
    schema,
    unmarked,
)


class Table:
    """A version of the table of a memory."""

    def __init__(
        self,
        dataset: Any,
        form: Format,
        pinned: Pinned,
        pin: Pin | None,
        order: Tensor | None = None,
    ):
        self._opened = dataset
        self.form = form
        self.pinned = pinned
        self.pin = pin
        """What the log keeps of it, against damage."""
        self.order = order
        """[M] int64, the row of each chunk; None: the row of its number."""

    @property
    def dataset(self) -> Any:
        """The engine's own form of it, which only the process that opened it may use."""
        check_process()
        return self._opened

    @property
    def length(self) -> int:
        """How many rows there are."""
        return self.pinned.rows

    def ordered(self, order: Tensor | None) -> "Table":
        """Return the same version with these rows for its chunks."""
        return Table(self.dataset, self.form, self.pinned, self.pin, order)

    def is_kept(self) -> "Table":
        """Note that the log has what is to be kept of this version."""
        if self.pin is not None:
            self.pin = self.pin._replace(ends={})
        return self

    def rows(self, start: int, with_summaries: bool) -> Iterator[Row]:
        """Yield what is known of the rows from `start` on, a few at a time.

        Raises:
            MemoryFileError: they cannot be read.
        """
        size = max(1, BATCH_BYTES // (4 * self.form.dim))
        columns = self._there([*NUMBERS, "summary"] if with_summaries else NUMBERS)
        nothing = Chunks.none(self.form)
        with reading(f"chunks from row {start} on"):
            scanner = self.dataset.scanner(
                columns=columns, offset=start, batch_size=size, scan_in_order=True
            )
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield decoded(batch, nothing, with_summaries)

    def first_steps(self) -> Tensor:
        """Return the numbers of the first steps [rows] int64, in the order of the rows."""
        with reading("the numbers of its chunks"):
            column = self.dataset.to_table(columns=["first_step"])["first_step"]
            return joined(column, torch.int64)

    def take(self, numbers: Sequence[int]) -> Tensor:
        """Return the stored chunks [U, C, step_bytes] of these numbers.

        Raises:
            MemoryFileError: one of them is not what was stored.
        """
        stored = torch.empty(
            len(numbers), self.form.chunk_size, self.form.step_bytes, dtype=torch.uint8, device=CPU
        )
        order, found = self._take(numbers, ["contents", "checksum"])
        start = 0
        for batch in found.to_batches():
            rows = joined(batch.column("contents"), torch.uint8).view(-1, *stored.shape[1:])
            for row, checksum in zip(rows, batch.column("checksum").to_pylist(), strict=True):
                if zlib.crc32(row.numpy().data) != checksum:
                    raise MemoryFileError(
                        f"chunk {numbers[order[start]]}: damaged, its checksum is wrong; the "
                        f"others are unharmed, and {REPAIR}"
                    )
                stored[order[start]] = row
                start += 1
        return stored

    def marks(self, numbers: Sequence[int]) -> list[Marks | None]:
        """Return what is marked in the chunks of these numbers.

        Raises:
            MemoryFileError: it is not what was stored.
        """
        order, found = self._take(numbers, ["marks"])
        marks: list[Marks | None] = [None] * len(numbers)
        for place, stored in zip(order, found["marks"].to_pylist(), strict=True):
            marks[place] = unmarked(stored, f"chunk {numbers[place]}")
        return marks

    def nearest(
        self, vectors: Tensor, k: int, probes: int, condition: str | None
    ) -> tuple[Tensor, Tensor]:
        """Do what `index.nearest` does.

        Raises:
            MemoryFileError: the index or the summaries cannot be read.
        """
        with reading("summaries: cannot be searched"):
            return index.nearest(self.dataset, vectors, k, probes, condition)

    def verify(self, gaps: Sequence[Range]) -> Iterator[str]:
        """Read everything and say what is wrong, chunk by chunk."""
        columns = self._there(schema(self.form).names)
        number, ends = 0, []
        order = range(self.length) if self.order is None else self.order.tolist()
        chunks = {row: f"chunk {chunk}" for chunk, row in enumerate(order)}
        # Rows of forgotten chunks have no number of a chunk.
        names = [chunks.get(row, f"a forgotten chunk in row {row}") for row in range(self.length)]
        try:
            with reading("chunks"):
                size = max(1, BATCH_BYTES // self.form.chunk_bytes)
                scanner = self.dataset.scanner(columns=columns, batch_size=size, scan_in_order=True)
                for batch in scanner.to_batches():
                    if not batch.num_rows:
                        continue
                    some = names[number : number + batch.num_rows]
                    for problem in problems(batch, self.form, some):
                        yield f"{problem}; {REPAIR}"
                    first = joined(batch.column("first_step"), torch.int64)
                    count = joined(batch.column("steps"), torch.int32)
                    ends += zip(first.tolist(), (first + count).tolist(), strict=True)
                    number += batch.num_rows
        except MemoryFileError as error:
            yield f"chunk {number} or a later one cannot be read ({error})"
            return
        for problem in holes(ends, gaps, self.pinned.end):
            yield f"{problem}; {REPAIR}"

    def info(self) -> dict[str, Any]:
        """Return what the engine knows of the table."""
        fragments = self.dataset.get_fragments()
        return {
            "chunks in the index": index.length(self.dataset),
            "fragments": len(fragments),
            "version": self.pinned.version,
        }

    def needs(self) -> tuple[str, ...]:
        """Return the names of all files of this version, or of the folders that they are in."""
        names = [f"_versions/{2**64 - 1 - self.pinned.version:020d}.manifest"]
        change = self.dataset.read_transaction(self.pinned.version)
        if change is not None:
            names.append(f"_transactions/{change.read_version}-{change.uuid}.txn")
        for found in self.dataset.describe_indices():
            names += [f"_indices/{segment.uuid}/" for segment in found.segments]
        for fragment in self.dataset.get_fragments():
            names += [f"data/{file.path}" for file in fragment.data_files()]
            deleted = fragment.deletion_file()
            if deleted:
                names.append(deleted)
        return tuple(names)

    def _there(self, columns: Sequence[str]) -> list[str]:
        """Return those columns that there are; a table of format 1 has not all of them."""
        names = self.dataset.schema.names
        return [name for name in columns if name in names]

    def _take(self, numbers: Sequence[int], columns: list[str]) -> tuple[list[int], Any]:
        """Return columns of these chunks, and the place of each row of them among the numbers."""
        rows = list(numbers) if self.order is None else self.order[list(numbers)].tolist()
        # The engine answers in the order it was asked, but is faster when that is its own.
        order = sorted(range(len(rows)), key=rows.__getitem__)
        with reading(f"chunks {_few(numbers)}"):
            return order, self.dataset.take([rows[place] for place in order], columns=columns)


def holes(ends: Sequence[tuple[int, int]], gaps: Sequence[Range], end: int) -> list[str]:
    """Return what is wrong with chunks that reach from a first step up to a last one."""
    found, at = [], 0
    for first, last in [*sorted(ends), (end, end)]:
        if first < at and last > first:
            found.append(f"steps {first} to {min(at, last) - 1} are there twice")
        elif first > at and not any(a <= at and first <= b for a, b in gaps):
            found.append(f"steps {at} to {first - 1} are missing")
        at = max(at, last)
    return found


def _few(numbers: Sequence[int]) -> str:
    return f"{list(numbers[:8])}" + (" and others" if len(numbers) > 8 else "")


def synced(folder: Path, before: set[str]) -> set[str]:
    """Wait until the disk has each file of a table, and its name; return the names of all.

    Of those of `before` it is sure already.
    """
    files = set(pins.files(folder))
    folders = {folder.parent, folder}
    for name in sorted(files - before):
        path = folder / name
        sync_file(path)
        while path != folder:
            path = path.parent
            folders.add(path)
    for one in sorted(folders):
        sync_folder(one)
    return files
