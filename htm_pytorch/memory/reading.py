"""`Reading`: what is read of a memory on disk or in an object store."""

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory import answers, entries, forks, log, saving, searching
from htm_pytorch.memory.cache import ChunkCache
from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.following import follow
from htm_pytorch.memory.formats import CPU
from htm_pytorch.memory.home import Span
from htm_pytorch.memory.log import Contents, Log
from htm_pytorch.memory.place import Lock, Place
from htm_pytorch.memory.state import State
from htm_pytorch.memory.versions import Versions
from htm_pytorch.memory.view import Chosen, Moment, View
from htm_pytorch.shapes import (
    check_at_least,
    check_number,
    check_numbers,
    check_tensor,
)


class Found(NamedTuple):
    """The chunks whose summaries fit a query best."""

    chunks: Tensor
    """[Q, K] int64, best first; -1 where there are fewer."""
    scores: Tensor
    """[Q, K] float32, the products of query and summary; -inf where there are fewer."""


class Reading:
    """What a stored memory is, and what it answers; `StoredMemory` also changes it."""

    holds_summaries: bool

    batch = 1
    """How many rows there are, B: one, which all rows of queries share."""
    device = CPU
    """Where summaries and fetched chunks are."""

    def __init__(
        self,
        place: Place,
        log: Log,
        versions: Versions | None,
        lock: Lock | None,
        read_only: bool,
        cache_bytes: int,
        probes: int,
        mutex: Any = None,
    ):
        self.uri = place.uri
        self.read_only = read_only
        self._why_read_only = ""
        self._place = place
        self._log = log
        self._versions = versions
        self._lock = lock
        self._probes = probes
        self._inherited: list[Any] = []
        # Set by those who open it; `_way` is how, up to its options.
        self._again: tuple[Any, ...] = ()
        self._way = "memory.open(uri{})"
        self.mutex = mutex or threading.RLock()
        # Whether a call has begun to change something, and whether it is still at it.
        self._is_changing = False
        self._busy = threading.Lock()
        contents = log.read()
        if contents is None:
            raise MemoryFileError(f"{log.where} holds no memory")
        form = contents.head.form
        chunk_bytes = form.chunk_size * form.dim * form.given.itemsize
        width = form.dim if self.holds_summaries else 0
        nothing = State.nothing(contents.head, width, cache_bytes // chunk_bytes)
        self._state = self._followed(nothing.unread(), contents)
        forks.watch(self)

    @property
    def chunks(self) -> int:
        """How many closed chunks there are, M."""
        return self._now().catalog.length

    @property
    def chunk_size(self) -> int:
        """How many steps a chunk holds at most, C."""
        return self._state.head.chunk_size

    @property
    def dim(self) -> int:
        """How many numbers a step has, D."""
        return self._state.head.dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that steps have when they are given and fetched."""
        return self._state.head.form.given

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that steps have as they are stored."""
        return self._state.head.form.dtype

    @property
    def steps(self) -> int:
        """How many steps there are, those of the open chunk among them."""
        head = self._now().head
        return head.steps - sum(end - start for start, end in head.gaps)

    @property
    def next_step(self) -> int:
        """The number of the step to come; `steps`, where none was forgotten."""
        return self._now().head.steps

    @property
    def episodes(self) -> Tensor:
        """[M] int64, which episode each chunk is of, counted from 0."""
        return self._now().catalog.episodes

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        """Return the chunks numbered [U] int64 as a memory in RAM, of batch 1.

        Raises:
            ValueError: there is no chunk of such a number.
            MemoryFileError: a chunk is not what was stored.
        """
        return answers.fetched(self._now(), chunks)

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        """Return which steps the chunks numbered [U] int64 hold, when they happened, their keys.

        Raises:
            ValueError: there is no chunk of such a number, or no such row.
            MemoryFileError: what was stored of a chunk is damaged.
        """
        now = self._now()
        check_number("row", row, self.batch)
        check_numbers("chunks", chunks, now.catalog.length)
        return [answers.span(now, number) for number in chunks.tolist()]

    def read(self, first: int, last: int) -> Tensor:
        """Return the steps [1, last - first, D] from number `first` up to, without, `last`.

        Raises:
            ValueError: some of them are not there, or were forgotten.
        """
        now = self._now()
        check_at_least("first", first, 0)
        check_at_least("last", last, first)
        return answers.read(now, first, last)

    def find(self, query: Tensor, k: int = 8) -> Found:
        """Return the k chunks whose summaries have the largest products with each query [Q, D]."""
        check_tensor("query", query, "Q D", D=self.dim)
        check_at_least("k", k, 1)
        if not query.isfinite().all():
            raise ValueError("query: expected finite numbers, got some that are not")
        now, query = self._now(), query.detach().float()
        return Found(*searching.ranked(now, query, self._nearest(now, query, k)))

    def refresh(self) -> Self:
        """Show what the writer has stored since this was opened with `read_only`."""
        if self.read_only:
            with self.mutex:
                self._state = self._followed(self._state)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a copy to the folder `path`, where there must be nothing, as of this moment."""
        target = Path(path).expanduser().absolute()
        if target.exists():
            raise FileExistsError(f"path: {str(path)!r} exists; expected a name that is free")
        # What came since a reader looked is not missing in a copy.
        saving.save(self.refresh()._now(), target)

    def verify(self) -> list[str]:
        """Read everything, compare it with its checksums and return what is wrong."""
        now = self._now()
        # Not while this process is forked.
        with self.mutex:
            found = self._log.problems()
        if now.table is not None and self._versions is not None:
            found += self._versions.damaged_indices(now.table.pin)
            found += now.table.verify(now.head.gaps)
        return found + self.unfit()

    def unfit(self) -> list[str]:
        """Return what is wrong with the chunks that the log holds."""
        now = self._now()
        decoded = now.head.form.decode(now.unflushed.catalog.stored).float()
        finite = decoded.isfinite().flatten(1).all(1)
        wrong = (now.in_table + (~finite).nonzero()[:, 0]).tolist()
        return [f"chunk {number}: its steps are not finite" for number in wrong]

    def index_recall(self, route: Tensor | None = None, k: int = 8) -> float:
        """Return the share of the k best chunks that the index finds; 1.0 where there is nothing.

        Reads every summary from the disk.

        Args:
            route: [B, Q, D], what the layers ask; None: 64 summaries of the memory, with as much
                noise as there is difference between them.
            k: how many chunks a query keeps.
        """
        check_at_least("k", k, 1)
        now = self._now()
        if route is None:
            if not now.catalog.length:
                return 1.0
            chosen = torch.randint(now.catalog.length, (64,), device=CPU)
            route = answers.fetched(now, chosen).summaries.float()
            route = route + torch.randn_like(route) * route.std(1, keepdim=True)
        check_tensor("route", route, "B Q D", D=self.dim)
        vectors = route.detach().flatten(0, 1).float()
        return searching.share_found(now, vectors, k, self._probes)

    def info(self) -> dict[str, Any]:
        """Return what people ask first, by name; sizes are in bytes."""
        now = self._now()
        form = now.head.form
        found: dict[str, Any] = {
            "uri": self.uri,
            "format": log.FORMAT,
            "steps": self.steps,
            "episodes": now.head.episode + 1,
            "dim": form.dim,
            "chunk_size": form.chunk_size,
            "dtype": str(form.dtype).removeprefix("torch."),
            "chunks": now.catalog.length,
            "chunks in the log": now.unflushed.length,
            "steps of the open chunk": len(now.open_chunk.stored),
            "steps forgotten": sum(end - start for start, end in now.head.forgotten),
            "forgotten and still in files": now.head.purge,
            "steps lost by damage": sum(end - start for start, end in now.head.lost),
            "bytes of the log": self._log.size(),
            "bytes of the table": self._versions.size() if self._versions else 0,
            "bytes in RAM": now.catalog.nbytes + now.cache.nbytes + now.unflushed.catalog.nbytes,
        }
        nothing = {"chunks in the index": 0, "fragments": 0, "version": 0}
        return found | (now.table.info() if now.table else nothing)

    def to_compact(self) -> dict[str, Any]:
        """Return what `compact` would find to do, by name; nothing is changed."""
        now = self._now()
        if self._versions is None:
            return {"forgotten and still in files": now.head.purge}
        return {
            "chunks to move from the log": now.unflushed.length,
            **self._versions.to_compact(now.table),
            "forgotten and still in files": now.head.purge,
        }

    def where(
        self,
        *,
        episodes: Iterable[int] | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> View:
        """Return a view of the chunks of some episodes, or of a range of time, to be recalled from.

        It follows the memory. Chunks keep their numbers.

        Args:
            episodes: the numbers of the episodes that chunks must be of; None: of any.
            since: chunks whose steps all happened at this time or later.
            until: chunks whose steps all happened at this time or earlier.
        """
        wanted = None if episodes is None else entries.numbers_of_episodes(episodes)
        chosen = Chosen(wanted, entries.moment("since", since), entries.moment("until", until))
        return View([self], chosen, has_rows=False)

    def moment(self, chosen: Chosen | None = None) -> Moment:
        """Return the memory as it is now, whatever other threads do: what one recall reads."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a memory that is only read open it again."""
        if not self.read_only:
            raise TypeError(
                f"{self.uri!r} is open for writing, and two writers would spoil it: share this "
                f"memory among threads, or give others {self._way.format(', read_only=True')}"
            )
        return self._again

    def reopens_as(self, again: Callable[..., Any], *arguments: Any, way: str = "") -> None:
        """Note what gives copies of this memory, and how users open it."""
        self._again = again, arguments
        self._way = way or self._way

    def distrust(self) -> None:
        """Look at what is stored before the next answer."""
        self._is_changing = True

    def become(self, now: State) -> None:
        """Show what others have stored for this memory."""
        self._state, self._is_changing = now, False

    def recover(self) -> None:
        """Look at what is stored, if the last change did not come to its end."""
        if self._is_changing:
            self._log.reopen()
            self._state = self._followed(self._state)
            self._is_changing = False

    def inherit(self) -> None:
        """Go on in a forked child, for reading only."""
        self.mutex, self._busy = threading.RLock(), threading.Lock()
        if not self.read_only:
            self.read_only = True
            self._why_read_only = f"process {os.getppid()}, of which this is a fork, writes to it"
        # Not closed here: that would let go of what the parent holds.
        self._inherited.append(self._lock)
        self._lock = None
        self._log.inherit()
        # Another thread may have been at it.
        form, slots = self._state.head.form, self._state.cache.slots
        self._state = self._state._replace(cache=ChunkCache(form, slots))

    def __repr__(self) -> str:
        """Say where it is and how large."""
        return (
            f"{type(self).__name__}({self.uri!r}, steps={self.steps:,}, chunks={self.chunks:,}, "
            f"chunk_size={self.chunk_size}, dim={self.dim}, dtype={self.stored_dtype})"
        )

    def _now(self) -> State:
        """Return the state to read from; after a call that did not end, that of the disk."""
        if self._is_changing and not self._busy.locked():
            with self.mutex:
                self.recover()
        return self._state

    def _followed(self, before: State, contents: Contents | None = None) -> State:
        """Return the state that is stored."""
        # A reader may find a version of the table that was deleted after it had read the log.
        for is_last in (False, False, False, True):
            contents = contents or self._log.read(before.head)
            if contents is None:
                raise MemoryFileError(
                    f"{self._log.where} holds this memory no more: its writer has removed it"
                )
            head, table = contents.head, before.table
            if head.sequence < before.head.sequence:
                # What this one knows was taken back, or a copy from before was put in its place.
                before, contents = before.unread(), None
                continue
            if head.is_same(before.head):
                return before
            try:
                if head.table is None:
                    table = None
                elif (
                    table is None
                    or table.pinned != head.table
                    # Another table, made by `repair`, may look the same.
                    or before.head.generation != head.generation
                ):
                    assert self._versions is not None
                    end_of = None if self.read_only else self._log.end
                    with_index = not self.holds_summaries
                    table = self._versions.open(head, contents.pin, end_of, with_index)
                return follow(before, contents, table, self.holds_summaries)
            except MemoryFileError:
                newest = self._log.read()
                if is_last or newest is None or newest.head.sequence == head.sequence:
                    raise
                contents, before = newest, before.unread()
        raise AssertionError

    def _nearest(self, now: State, vectors: Tensor, k: int) -> Tensor:
        """Return the best chunks [X, K] of vectors [X, D]; -1 where there are fewer."""
        raise NotImplementedError
