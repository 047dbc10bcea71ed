"""`StoredMemory`: a memory on disk or in an object store, larger than RAM, that outlives a crash.

Closed chunks are rows of a Lance table. What the table does not hold yet, the open chunk and
chunks too few to be worth a version of the table, is in a log, which also says which version of
the table counts. A step that `append` has acknowledged is in one of the two.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from htm_pytorch.memory import entries, log, searching
from htm_pytorch.memory.catalog import Unflushed
from htm_pytorch.memory.fading import Fading
from htm_pytorch.memory.following import follow
from htm_pytorch.memory.formats import CPU
from htm_pytorch.memory.log import Contents, Head, merged
from htm_pytorch.memory.open_chunk import Batch, OpenChunk
from htm_pytorch.memory.reading import Reading
from htm_pytorch.memory.state import State
from htm_pytorch.memory.table import Table
from htm_pytorch.memory.trimming import left_in_table
from htm_pytorch.memory.versions import FRAGMENT_BYTES, SMALL_BYTES, Versions
from htm_pytorch.memory.view import Chosen, ExactMoment, SearchedMoment
from htm_pytorch.shapes import (
    check_at_least,
    check_mask,
    check_tensor,
)

GROUP_BYTES = 4 * 2**20
"""How many bytes of closed chunks the log holds before they become a version of the table."""


class StoredMemory(Reading):
    """One row of memory in a folder or an object store; `memory.open` opens it.

    A new episode closes the open chunk early, and chunks of all episodes stay visible until they
    are forgotten on purpose. Chunks are numbered from the oldest on; steps keep their numbers for
    ever. Chunks are fetched when they are recalled; how they are found is what `ExactMemory` and
    `IndexedMemory` differ in. Unlike a `ChunkedMemory` it changes in place; `append`, `reset` and
    `forget` return the memory itself.

    Several threads may read, and one or several append, at the same time. A call that raises has
    happened or has not; the next one looks at what the disk holds. In a forked child the memory is
    open for reading only.
    """

    def append(
        self,
        steps: Tensor,
        is_first: Tensor | None = None,
        *,
        keys: str | Sequence[str | None] | None = None,
        times: float | Tensor | None = None,
    ) -> Self:
        """Store `steps` [1, T, D], oldest first; when this returns, they are safe.

        Args:
            steps: [1, T, D] on the CPU, finite, which have this memory's `dtype`.
            is_first: [1, T] bool, True where an episode begins: the open chunk closes early.
            keys: what leads back to where the steps came from, one for all or T of them; `spans`
                gives them back.
            times: when they happened, in seconds of any clock that never falls, one for all or
                [T]; default now, `time.time()`.

        Raises:
            ValueError: an argument that does not fit; nothing is changed.
            OSError: it cannot be written, since the disk is full for one; nothing is changed.
        """

        def change(before: State) -> None:
            batch = entries.batch(before, steps, is_first, keys, times)
            if batch is not None:
                self._write(before, batch)

        return self._change(change)

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
        """Forget everything, where `rows` [1] bool says so, and count steps from 0 again.

        What was forgotten is in the files until `compact`.
        """
        self._check_writable()
        check_tensor("rows", rows, "B", B=1)
        check_mask("rows", rows, "B", self.device, B=1)

        def change(before: State) -> None:
            head = Head.first(before.head.form)
            head = head._replace(sequence=before.head.sequence + 1, purge=True)
            self._log.write(head, [], replace=True)
            self._state = before.emptied(head)

        return self._change(change) if rows.any() else self

    def forget(
        self,
        *,
        episodes: Iterable[int] = (),
        before: float | None = None,
        before_step: int | None = None,
    ) -> Self:
        """Recall some of the past no more, from now on, in this memory and in all that follow it.

        The other steps keep their numbers, chunks are numbered anew. What was forgotten is in the
        files until `compact`.

        Args:
            episodes: the numbers of episodes, all steps of which go. Steps that are appended later
                are not concerned, even if they belong to the last of them.
            before: all steps that happened before this time go.
            before_step: all steps with lower numbers go.

        Raises:
            ValueError: `before`, where there are steps of which no time is known.
        """
        self._check_writable()
        wanted = entries.numbers_of_episodes(episodes)
        moment = entries.moment("before", before)
        if before_step is not None:
            check_at_least("before_step", before_step, 0)

        def change(now: State) -> None:
            gone = entries.steps_of(now, wanted)
            if before_step:
                gone.append((0, min(before_step, now.head.steps)))
            if moment is not None:
                gone.append((0, entries.step_at(now, moment)))
            gone = [(start, end) for start, end in merged(gone) if start < end]
            if any(not entries.within(part, now.head.gaps) for part in gone):
                self._forget(now, gone)

        return self._change(change)

    def flush(self) -> Self:
        """Move the closed chunks that the log holds to the table."""
        return self._change(lambda before: self._flush(before))

    def build_index(self) -> Self:
        """Make the index that memories opened with `search="index"` ask; again, if there is one.

        It takes the chunks of now. Later ones are compared one by one, until `compact` adds them.
        """
        self._check_writable()
        if self._versions is None:
            raise ValueError(f"memory: {self.uri!r} is small and has no table, so no index either")
        versions = self._versions

        def change(before: State) -> None:
            now = self._flush(before)
            if now.table is not None and now.table.length:
                self._replace_table(now, versions.build_index(now.table))

        return self._change(change)

    def compact(self) -> Self:
        """Join small files, and delete what has not been needed for an hour.

        Where something was forgotten, no byte of it is left in any file afterwards; readers that
        are behind then have to `refresh`. Also adds chunks to the index that came after it was
        built.
        """

        def change(before: State) -> None:
            now = self._flush(before)
            # To say that this writer is still the one, before anything is deleted.
            is_gone = now.head.purge and now.table is None
            others = self._versions.others(None) if self._versions and is_gone else ()
            now = self._rewrite_head(now, now.head)
            if self._versions is not None:
                now = self._compact(now, self._versions, others)
            if now.head.purge:
                self._log.purge()
                self._rewrite_head(now, now.head._replace(purge=False))

        return self._change(change)

    def close(self) -> None:
        """Give up the right to write, and let go of the files; what was appended is stored.

        The memory can still be read.
        """
        with self.mutex:
            if not self.read_only:
                self.read_only, self._why_read_only = True, "it was closed"
            self._log.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        """Return the memory, to be closed at the end."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _change(self, change: Callable[[State], object]) -> Self:
        """Let the state be changed; where that does not come to its end, look at the disk next.

        `_state` is replaced when the disk has the new one.
        """
        self._check_writable()
        with self.mutex, self._busy:
            self._check_writable()
            self.recover()
            self._is_changing = True
            change(self._state)
            self._is_changing = False
        return self

    def _check_writable(self) -> None:
        if self.read_only:
            why = f" ({self._why_read_only})" if self._why_read_only else ""
            raise ValueError(
                f"memory: {self.uri!r} is open for reading only{why}; {self._way.format('')} opens "
                "it for writing"
            )

    def _write(self, before: State, batch: Batch) -> None:
        now, closed = entries.appended(before, batch)
        waiting = before.unflushed.catalog.stored.nbytes + closed.stored.nbytes
        if self._versions is None or waiting < GROUP_BYTES:
            now = now._replace(unflushed=before.unflushed.extended(closed))
            self._log.write(now.head, [batch.record()], replace=False)
            self._state = now
            return
        table = self._versions.append(now.table, now.head, before.unflushed.chunks + closed)
        head = now.head._replace(table=table.pinned)
        self._log.write(head, now.open_chunk.records(), replace=True, pin=table.pin)
        none = Unflushed.none(head.form)
        self._state = now._replace(head=head, table=table.is_kept(), unflushed=none)
        self._tidy(self._state)

    def _flush(self, before: State) -> State:
        """Move what is closed to the table, and return the state after that."""
        if self._versions is None or not before.unflushed.length:
            return before
        table = self._versions.append(before.table, before.head, before.unflushed.chunks)
        head = before.head._replace(sequence=before.head.sequence + 1, table=table.pinned)
        self._log.write(head, before.open_chunk.records(), replace=True, pin=table.pin)
        table = table.is_kept()
        none = Unflushed.none(head.form)
        self._state = before._replace(head=head, table=table, unflushed=none)
        return self._tidy(self._state)

    def _tidy(self, now: State) -> State:
        """Join small fragments, if there are many; that nothing is lost does not depend on it."""
        assert self._versions is not None
        assert now.table is not None
        try:
            if self._versions.is_scattered(now.table):
                now = self._replace_table(now, self._versions.join(now.table, SMALL_BYTES))
                self._versions.clean(now.table, everything=False)
        except (OSError, MemoryError):
            # What was appended is stored. The next call looks at the disk.
            self._log.reopen()
            now = self._state = self._followed(self._state.unread())
        return now

    def _replace_table(self, now: State, table: Table) -> State:
        """Make a version with the same chunks the one that counts."""
        head = now.head._replace(sequence=now.head.sequence + 1, table=table.pinned)
        records = entries.records_of(now.unflushed.chunks) + now.open_chunk.records()
        self._log.write(head, records, replace=True, pin=table.pin)
        table = table.is_kept()
        contents = Contents(head, [], table.pin)
        self._state = follow(now, contents, table, self.holds_summaries)
        return self._state

    def _rewrite_head(self, now: State, head: Head) -> State:
        head = head._replace(sequence=now.head.sequence + 1)
        self._log.write(head, [], replace=False)
        self._state = now._replace(head=head)
        return self._state

    def _compact(self, now: State, versions: Versions, others: Sequence[str]) -> State:
        if now.table is None:
            if now.head.purge:
                versions.empty(now.head)
                versions.clean(None, everything=True, others=others)
            return now
        table, was_indexed = now.table, versions.is_indexed(now.table)
        if now.head.purge:
            left = left_in_table(now)
            table = versions.without(table, now.head.gaps, left, now.head.generation)
        table = versions.join(table, FRAGMENT_BYTES)
        if was_indexed and not table.length:
            table = versions.drop_index(table)
        elif was_indexed:
            # One that was built with what is forgotten still tells of it; a damaged one is gone.
            is_sound = not now.head.purge and versions.is_indexed(table)
            table = (versions.extend_index if is_sound else versions.build_index)(table)
        others = versions.others(table) if now.head.purge else ()
        now = self._replace_table(now, table)
        versions.clean(table, everything=now.head.purge, others=others)
        return now

    def _forget(self, before: State, gone: Sequence[log.Range]) -> None:
        now = self._flush(before)
        open_chunk = now.open_chunk
        end = max((end for start, end in gone if start <= open_chunk.first_step), default=0)
        dropped = min(max(end - open_chunk.first_step, 0), len(open_chunk.stored))
        open_chunk = OpenChunk(
            open_chunk.stored[dropped:],
            open_chunk.times[dropped:],
            None if open_chunk.keys is None else open_chunk.keys[dropped:],
            open_chunk.first_step + dropped,
            open_chunk.episode,
        )
        head = now.head._replace(
            sequence=now.head.sequence + 1,
            forgotten=merged((*now.head.forgotten, *gone)),
            purge=True,
        )
        unflushed = entries.without(now.unflushed.chunks, gone, head)
        records = entries.records_of(unflushed) + open_chunk.records()
        self._log.write(head, records, replace=True)
        contents = Contents(head, records)
        self._state = follow(now.emptied(head), contents, now.table, self.holds_summaries)


class ExactMemory(StoredMemory):
    """A stored memory of whose summaries there are codes in RAM: every query scores them all.

    They take 2 bytes a number. Where scores are too close for them, the chunks are fetched.
    """

    holds_summaries = True

    @property
    def summaries(self) -> Tensor:
        """[1, M, D] float32, the means of the steps as they are stored, read from the disk."""
        return searching.all_summaries(self._now())[None]

    @property
    def valid(self) -> Tensor:
        """[1, M] bool, which chunks can be recalled: all of them."""
        return torch.ones(1, self._now().catalog.length, dtype=torch.bool, device=CPU)

    def best_chunks(
        self, route: Tensor, k: int, chunk_mask: Tensor | None, fading: Fading | None
    ) -> Tensor:
        """Return the k best chunks [B, Q, K] of each query; see `ExactHome`."""
        return self.moment().best_chunks(route, k, chunk_mask, fading)

    def moment(self, chosen: Chosen | None = None) -> ExactMoment:
        """Return the memory as it is now, whatever other threads do: what one recall reads."""
        return ExactMoment([self._now()], chosen, has_rows=False)

    def _nearest(self, now: State, vectors: Tensor, k: int) -> Tensor:
        return searching.by_codes([now], vectors, k)


class IndexedMemory(StoredMemory):
    """A stored memory whose summaries stay on the disk, where an index finds the best of them.

    It takes 45 bytes of RAM a chunk and what the engine keeps of the index (at most all of it: at a
    width of 512, 155 bytes a chunk), and may miss some of the best. Chunks that are not in the
    index yet, or all where there is none, are read from the disk for every call.
    """

    holds_summaries = False

    def search(self, route: Tensor, k: int) -> Tensor:
        """Return the chunks [B, Q, K] int64 of about the largest `route` [B, Q, D] . summary.

        Best first; K = min(k, M), and -1 where fewer were found.
        """
        return self.moment().search(route, k)

    def moment(self, chosen: Chosen | None = None) -> SearchedMoment:
        """Return the memory as it is now, whatever other threads do: what one recall reads."""
        return SearchedMoment(self._now(), self._probes, chosen)

    def _nearest(self, now: State, vectors: Tensor, k: int) -> Tensor:
        return searching.by_index(now, vectors, k, self._probes, None)
