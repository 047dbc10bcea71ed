"""`StoredMemory`: a memory on disk or in an object store, larger than RAM, that outlives a crash.

Closed chunks are rows of a Lance table. What the table does not hold yet, the open chunk and
chunks too few to be worth a version of the table, is in a journal. A step that `append` has
acknowledged is in one of the two.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from filelock import FileLock
from torch import Tensor

from htm_pytorch.memory.cache import ChunkCache
from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.journal import LocalJournal, Record, RemoteJournal, decode, encode
from htm_pytorch.memory.known import Known
from htm_pytorch.memory.table import FORMAT, Chunks, Format, Table, step_mask
from htm_pytorch.shapes import (
    check_device,
    check_floating,
    check_mask,
    check_numbers,
    check_tensor,
)

GROUP_BYTES = 4 * 2**20
"""Of closed chunks that the journal holds, before they become a version of the table."""


class _Open(NamedTuple):
    """The chunk that is open, and where the memory stands."""

    stored: Tensor  # [t, step_bytes] uint8, t < C
    first_step: int  # its number, or that of the step to come
    episode: int  # -1 before the first step of all

    @property
    def next_step(self) -> int:
        return self.first_step + len(self.stored)

    def encode(self) -> bytes:
        """Return the record of its steps; nothing where there are none."""
        if not len(self.stored):
            return b""
        return Record(self.first_step, self.episode, (), self.stored.numpy().tobytes()).encode()


class StoredMemory:
    """One row of memory in a folder or an object store; `memory.open` opens it.

    Nothing is forgotten: a new episode closes the open chunk early, and chunks of all episodes
    stay visible. Chunks are fetched when they are recalled; how they are found is what
    `ExactMemory` and `IndexedMemory` differ in. Unlike a `ChunkedMemory` it changes in place;
    `append` and `reset` return the memory itself.
    """

    holds_summaries: bool

    batch = 1
    """B: shared by all rows of queries."""
    device = torch.device("cpu")
    """Where summaries and fetched chunks are."""

    def __init__(
        self,
        uri: str,
        table: Table,
        journal: LocalJournal | RemoteJournal,
        lock: FileLock | None,
        read_only: bool,
        cache_bytes: int,
        probes: int,
    ):
        self._probes = probes
        self.uri = uri
        self.read_only = read_only
        self._table = table
        self._journal = journal
        self._lock = lock
        form = table.form
        chunk_bytes = form.chunk_size * form.dim * form.given.itemsize
        self._cache = ChunkCache(form, cache_bytes // chunk_bytes)
        self._known = self._nothing_known()
        # Chunks that are closed and not in the table yet.
        self._pending = Chunks.none(form)
        self._open = _Open(self._pending.stored.flatten(0, 1), 0, -1)
        self._journal_end = 0
        self._load()

    @property
    def chunks(self) -> int:
        """M."""
        return self._known.length

    @property
    def chunk_size(self) -> int:
        """C."""
        return self._table.form.chunk_size

    @property
    def dim(self) -> int:
        """D."""
        return self._table.form.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the steps, as they are given and fetched."""
        return self._table.form.given

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the steps, as they are stored."""
        return self._table.form.dtype

    @property
    def steps(self) -> int:
        """How many steps there are, those of the open chunk among them."""
        return self._open.next_step

    @property
    def episodes(self) -> Tensor:
        """[M] int64, the episode of each chunk, counted from 0."""
        return self._known.episodes

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> Self:
        """Store `steps` [1, T, D], oldest first; when this returns, they are safe.

        Args:
            steps: of this memory's `dtype`, on the CPU.
            is_first: [1, T] bool, True where an episode begins: the open chunk closes early.

        Raises:
            ValueError: names the argument; nothing is changed.
            OSError: they could not be written (no space, no right to); nothing is changed.
        """
        self._check_writable()
        check_tensor("steps", steps, "B T D", B=1, D=self.dim)
        check_floating("steps", steps, self.dtype)
        check_device("steps", steps, self.device)
        check_mask("is_first", is_first, "B T", self.device, B=1, T=steps.shape[1])
        if steps.shape[1]:
            borders = () if is_first is None else tuple(is_first[0].nonzero()[:, 0].tolist())
            self._write(self._table.form.encode(steps[0].detach()), borders)
        return self

    def ingest(
        self, pieces: Iterable[Tensor], *, total: int | None = None, progress: bool = True
    ) -> Self:
        """Append every piece [1, T, D], with a progress bar over `total` steps."""
        from tqdm import tqdm

        with tqdm(total=total, unit=" steps", unit_scale=True, disable=not progress) as bar:
            for piece in pieces:
                self.append(piece)
                bar.update(piece.shape[1])
        return self

    def reset(self, rows: Tensor) -> Self:
        """Forget everything, where `rows` [1] bool says so."""
        self._check_writable()
        check_tensor("rows", rows, "B", B=1)
        check_mask("rows", rows, "B", self.device, B=1)
        if rows.any():
            self._table.clear()
            self._load()
        return self

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        """Return the chunks numbered [U] int64 as a memory in RAM, of batch 1.

        Raises:
            ValueError: there is no chunk of such a number.
            MemoryFileError: a chunk is not what was stored.
        """
        check_numbers("chunks", chunks, self.chunks)
        numbers: list[int] = chunks.tolist()
        form, in_table = self._table.form, self._table.length
        contents = torch.empty(len(numbers), self.chunk_size, self.dim, dtype=self.dtype)
        missing = self._cache.read(numbers, contents)
        waiting = [place for place in missing if numbers[place] >= in_table]
        if waiting:
            contents[waiting] = form.decode(self._pending.stored[chunks[waiting] - in_table])
        cold = [place for place in missing if numbers[place] < in_table]
        if cold:
            asked = [numbers[place] for place in cold]
            fetched = form.decode(self._table.take(asked))
            contents[cold] = fetched
            self._cache.write(asked, fetched)
        counts = self._known.counts[chunks]
        is_step = None
        if (counts < self.chunk_size).any():
            is_step = step_mask(counts, self.chunk_size)[None]
        summaries = self._known.summaries[chunks][None] if self.holds_summaries else None
        return ChunkedMemory.from_chunks(contents[None], is_step, summaries=summaries)

    def refresh(self) -> Self:
        """Show what the writer has stored since this was opened with `read_only`."""
        if self.read_only:
            self._load()
        return self

    def flush(self) -> Self:
        """Move the closed chunks that the journal holds to the table."""
        self._check_writable()
        if self._pending.length:
            self._commit(self._pending, self._open)
            self._pending = Chunks.none(self._table.form)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a copy to `path`, where there must be nothing."""
        if Path(path).exists():
            raise FileExistsError(f"path: {str(path)!r} exists")
        copy = Table.create(f"{path}/chunks.lance", self._table.form, None, sync=True)
        copy.append_from(self._table)
        copy.append(self._pending)
        journal = encode(copy.generation, self._open.encode())
        LocalJournal(Path(path, "journal"), sync=True).replace(journal)

    def verify(self) -> list[str]:
        """Read everything, compare it with its checksums and return what is wrong."""
        return list(self._table.verify())

    def build_index(self) -> Self:
        """Make the index that memories opened with `search="index"` ask; again, if there is one.

        It takes the chunks of now. Later ones are compared one by one, until `compact` adds them.
        """
        self.flush()
        self._table.build_index()
        return self

    def index_recall(self, route: Tensor | None = None, k: int = 8) -> float:
        """Return the share of the k best chunks that the index finds; 1.0 where there is nothing.

        Reads every summary from the disk.

        Args:
            route: [B, Q, D], what the layers ask; None: 64 summaries of the memory, with as much
                noise as there is difference between them.
            k: how many chunks a query keeps.
        """
        if route is None:
            if not self.chunks:
                return 1.0
            route = self.fetch(torch.randint(self.chunks, (64,))).summaries.float()
            route = route + torch.randn_like(route) * route.std(1, keepdim=True)
        check_tensor("route", route, "B Q D", D=self.dim)
        vectors = route.detach().flatten(0, 1).float()
        kept = min(k, self._table.length)
        if not kept or not len(vectors):
            return 1.0
        found, _ = self._table.nearest(vectors, kept, self._probes)
        best = torch.full((len(vectors), kept), -torch.inf)
        exact = torch.full(best.shape, -1)
        first = 0
        for chunks in self._table.chunks(0, True):
            numbers = torch.arange(first, first + chunks.length).expand(len(vectors), -1)
            best, place = torch.cat([best, vectors @ chunks.summaries.T], 1).topk(kept, 1)
            exact = torch.cat([exact, numbers], 1).gather(1, place)
            first += chunks.length
        return float((exact[:, :, None] == found[:, None]).any(2).float().mean())

    def compact(self) -> Self:
        """Join small fragments of the table and delete what has not been needed for an hour.

        Also adds chunks to the index that came after it was built.
        """
        self.flush()
        self._table.compact()
        return self

    def info(self) -> dict[str, Any]:
        """Return what people ask first, by name."""
        form = self._table.form
        return {
            "uri": self.uri,
            "format": FORMAT,
            "steps": self.steps,
            "episodes": self._open.episode + 1,
            "dim": form.dim,
            "chunk_size": form.chunk_size,
            "dtype": str(form.dtype).removeprefix("torch."),
            "chunks": self.chunks,
            "chunks in the journal": self._pending.length,
            "steps of the open chunk": len(self._open.stored),
            **self._table.info(),
        }

    def close(self) -> None:
        """Give up the right to write. What was appended is stored already."""
        self.read_only = True
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        """Return the memory, to be closed at the end."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Say where it is and how large."""
        return (
            f"{type(self).__name__}({self.uri!r}, steps={self.steps:,}, chunks={self.chunks:,}, "
            f"chunk_size={self.chunk_size}, dim={self.dim}, dtype={self.stored_dtype})"
        )

    def _nothing_known(self) -> Known:
        return Known(self.dim if self.holds_summaries else 0)

    def _check_writable(self) -> None:
        if self.read_only:
            raise ValueError(f"memory: {self.uri!r} is open for reading only")

    def _write(self, stored: Tensor, borders: tuple[int, ...]) -> None:
        form = self._table.form
        closed, rest = _close(self._open, stored, borders, form)
        pending = self._pending + closed
        if pending.stored.nbytes >= GROUP_BYTES:
            self._commit(pending, rest)
            pending = Chunks.none(form)
        else:
            episode = _first_episode(self._open, borders)
            record = Record(self._open.next_step, episode, borders, stored.numpy().tobytes())
            self._journal_end = self._journal.add(record.encode(), self._journal_end)
        self._known.add(closed)
        self._pending, self._open = pending, rest

    def _commit(self, closed: Chunks, rest: _Open) -> None:
        """Make chunks rows of the table, and the steps `rest` all that the journal holds."""
        # The rest goes ahead: it counts from the moment that the table has what comes before it.
        record = rest.encode()
        end = self._journal_end
        if record:
            end = self._journal.add(record, end)
        self._table.append(closed)
        self._journal_end = end
        # Should this fail, then the old one says the same, and what the table has now as well.
        with contextlib.suppress(OSError):
            self._journal_end = self._journal.replace(encode(self._table.generation, record))

    def _load(self) -> None:
        """Read what is stored: the journal first, which a writer changes after the table."""
        form, generation = self._table.form, self._table.generation
        journal = self._journal.read()
        self._table.refresh()
        if self._table.generation != generation:
            self._cache = ChunkCache(form, self._cache.slots)
            self._known = self._nothing_known()
        self._known.truncate(self._table.length)
        for chunks in self._table.chunks(self._known.length, self.holds_summaries):
            self._known.add(chunks)
        self._pending = Chunks.none(form)
        self._open = _Open(self._pending.stored.flatten(0, 1), *self._known.end())
        records, end = decode(journal, self._table.generation)
        is_whole = 0 < end == len(journal)
        for record in records:
            is_whole = self._replay(record) and is_whole
        self._journal_end = end
        if self.read_only or is_whole:
            return
        if not end:
            self._journal_end = self._journal.replace(encode(self._table.generation, b""))
        self._commit(self._pending, self._open)
        self._pending = Chunks.none(form)

    def _replay(self, record: Record) -> bool:
        """Append what a record holds and the table does not; False where steps before it lack.

        Then it is the rest of chunks that never reached the table, and nobody was told they had.
        """
        form = self._table.form
        known = self._open.next_step - record.first_step
        if known < 0:
            return False
        stored = torch.frombuffer(bytearray(record.steps), dtype=torch.uint8)
        stored = stored.view(-1, form.step_bytes)[known:]
        if len(stored):
            begun = sum(0 < border <= known for border in record.borders)
            borders = [border - known for border in record.borders if border > known]
            if 0 <= self._open.episode < record.episode + begun:
                borders.insert(0, 0)
            closed, self._open = _close(self._open, stored, tuple(borders), form)
            self._pending = self._pending + closed
            self._known.add(closed)
        return True


class ExactMemory(StoredMemory):
    """A stored memory whose summaries are in RAM, 4 bytes a number: every query scores them all."""

    holds_summaries = True

    @property
    def summaries(self) -> Tensor:
        """[1, M, D] float32, the means of the steps as they are stored."""
        return self._known.summaries[None]

    @property
    def valid(self) -> Tensor:
        """[1, M] bool: all of them."""
        return self._known.exists[None]


class IndexedMemory(StoredMemory):
    """A stored memory whose summaries stay on the disk, where an index finds the best of them.

    It takes 20 bytes of RAM a chunk and what the engine keeps of the index (at most all of it: at a
    width of 512, 155 bytes a chunk), and may miss some of the best. Chunks that are not in the
    index yet, or all where there is none, are read from the disk for every call.
    """

    holds_summaries = False

    def search(self, route: Tensor, k: int) -> Tensor:
        """Return the chunks [B, Q, K] int64 of about the largest `route` [B, Q, D] . summary.

        Best first; K = min(k, M), and -1 where fewer were found.
        """
        check_tensor("route", route, "B Q D", D=self.dim)
        # A query that is not a number gives none in the end, whatever it finds here.
        vectors = route.detach().flatten(0, 1).float().nan_to_num()
        numbers, scores = self._table.nearest(vectors, min(k, self._table.length), self._probes)
        pending = self._table.length + torch.arange(self._pending.length)
        numbers = torch.cat([numbers, pending.expand(len(vectors), -1)], 1)
        scores = torch.cat([scores, vectors @ self._pending.summaries.T], 1)
        best = scores.topk(min(k, self.chunks), 1).indices
        return numbers.gather(1, best).view(*route.shape[:2], -1)


def _first_episode(before: _Open, borders: tuple[int, ...]) -> int:
    """Of the first step that comes after what is open."""
    return max(before.episode + (borders[:1] == (0,)), 0)


def _close(
    before: _Open, stored: Tensor, borders: tuple[int, ...], form: Format
) -> tuple[Chunks, _Open]:
    """Return the chunks that the steps [T, step_bytes] close, and the chunk that is open then.

    At each of `borders` an episode begins, and the chunk before it closes early.
    """
    size, held = form.chunk_size, len(before.stored)
    sequence = torch.cat([before.stored, stored]) if held else stored
    episode = before.episode if held else _first_episode(before, borders)
    starts = [0, *(held + border for border in borders if held + border)]
    ends: list[Tensor] = []
    counts: list[Tensor] = []
    episodes: list[Tensor] = []
    rest = 0
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(sequence)], strict=True)):
        is_last = number == len(starts) - 1
        rest = (end - start) % size if is_last else 0
        closes = torch.arange(start, end - rest, size) + size
        ends.append(closes.clamp(max=end - rest))
        counts.append((size - (closes - ends[-1])).int())
        episodes.append(torch.full_like(closes, episode + number))
    last, count, of_episode = torch.cat(ends), torch.cat(counts), torch.cat(episodes)
    if (count == size).all():
        chunks = sequence[: len(sequence) - rest].view(len(last), size, form.step_bytes)
    else:
        index = last[:, None] - size + torch.arange(size)
        chunks = sequence[index.clamp(min=0)]
        chunks[~step_mask(count, size)] = 0
    closed = Chunks(
        chunks,
        form.summarise(chunks, count),
        count,
        of_episode,
        before.first_step + last - count,
    )
    # A copy, so that it does not hold on to the whole sequence.
    opened = sequence[len(sequence) - rest :].clone()
    first = before.first_step + len(sequence) - rest
    return closed, _Open(opened, first, episode + len(starts) - 1)
