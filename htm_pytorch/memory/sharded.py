"""`ShardedMemory`: one memory of which every rank of a process group holds a part."""

import copy
import json
import os
import zlib
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch import distributed as dist

from htm_pytorch.memory import dealing, parts
from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.home import Home, dtype_of_summaries, is_exact, is_home, is_scored
from htm_pytorch.memory.plan import Plan
from htm_pytorch.memory.rank_group import RankGroup
from htm_pytorch.memory.span import Span, no_such_chunks
from htm_pytorch.shapes import check_mask, check_number, check_numbers, check_tensor


class ShardedMemory:
    """A memory whose chunk g is held by rank g % R, as that rank's chunk g // R.

    Every rank makes one around its own part and then calls the same methods and the same layers
    with the same arguments, in the same order: queries, results and parameters are on all ranks
    alike, chunks are not. `recall` over it equals `recall` over the whole memory in one process.
    Like a `ChunkedMemory` it is a value: `append` returns a new one.

    Ranks may hold different numbers of chunks, or none. A number g with no chunk behind it counts
    as a chunk that is not valid.

    Args:
        local: this rank's part, of the same batch, chunk size, width and dtype on every rank; a
            `ChunkedMemory`, or another `ScoredHome` or `ExactHome` that keeps all whole chunks
            appended to it. One that changes in place is not a value: use only the newest memory
            around it.
        group: the process group that shares it (gloo, or NCCL for CUDA); None: the default one.
        timeout: how many seconds any exchange with the other ranks may take.

    Raises:
        ValueError: on all ranks, where their parts do not fit each other.
        ShardError: not all ranks came in time.
    """

    def __init__(
        self,
        local: Home,
        group: "dist.ProcessGroup | None" = None,
        *,
        timeout: float = 60.0,
    ):
        self.ranks = RankGroup(group, timeout)
        with self.ranks.refusing(torch.device(getattr(local, "device", "cpu"))):
            if not (is_home(local) and (is_exact(local) or is_scored(local))):
                kind = type(local).__name__
                raise ValueError(
                    f"local: expected a ChunkedMemory or another ScoredHome or ExactHome, "
                    f"got {kind}"
                )
        self.local = local
        in_memory = isinstance(local, ChunkedMemory)
        same = {
            "local.batch": local.batch,
            "local.chunk_size": local.chunk_size,
            "local.dim": local.dim,
            "local.dtype": local.dtype,
            "local.summaries.dtype": dtype_of_summaries(local),
            "local (a ChunkedMemory)": in_memory,
            "local.keep_across_episodes": in_memory and local.keep_across_episodes,
        }
        own = [local.chunks, self.ranks.next_number]
        numbers = self.ranks.agree("ShardedMemory", same, own, local.device)
        self.ranks.number_memory([number for _, number in numbers])
        self.sizes = tuple(chunks for chunks, _ in numbers)
        """Chunks of every rank, by rank."""
        self.appended = 0
        """Steps appended since this was made; as many on all ranks, or `recall` complains."""
        self.changes = 0
        """A checksum of all calls that led from there to this value, and of their masks."""
        self._next, self._open = self._where_to_write()

    @classmethod
    def split(
        cls,
        whole: ChunkedMemory,
        group: "dist.ProcessGroup | None" = None,
        *,
        timeout: float = 60.0,
    ) -> Self:
        """Return the sharded form of `whole`, which every rank has: each keeps a copy of its part.

        Args:
            whole: the memory that is split; it must be the same on all ranks.
            group: the process group that shares it; None: the default one.
            timeout: how many seconds any exchange with the other ranks may take.
        """
        peers = RankGroup(group, timeout)
        local = dealing.part_of(whole, peers.rank, peers.size)
        sharded = cls(local, group, timeout=timeout)
        if sharded._next is not None:
            # Exactly, where the parts do not say.
            sharded._next = whole.next_slot
        return sharded

    @property
    def batch(self) -> int:
        """How many rows there are, B."""
        return self.local.batch

    @property
    def chunks(self) -> int:
        """How many chunks there are, M: the least number above every g with a chunk behind it."""
        return dealing.end(self.sizes)

    @property
    def chunk_size(self) -> int:
        """How many steps a chunk holds at most, C."""
        return self.local.chunk_size

    @property
    def dim(self) -> int:
        """How many numbers a step has, D."""
        return self.local.dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that steps have, the same on all ranks."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """The device that this rank's tensors are on."""
        return self.local.device

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> Self:
        """Return the memory after `steps` [B, T, D], which every rank must be given alike.

        Nothing is sent. Every rank holds the open chunk, of less than C steps a row, and so knows
        which chunks close and whose they are; only the owner keeps a closed chunk. Slots are those
        of a `ChunkedMemory` with the chunks of all ranks, whose ring forgets its oldest chunk. In
        another `Home`, which should begin with no open chunk, nothing is forgotten; steps that are
        not yet a whole chunk are in RAM alone.

        Args:
            steps: [B, T, D], which come oldest first and have this memory's dtype and device.
                Gradients flow to them from the chunks that this rank keeps; their sum over the
                ranks is the gradient of one process.
            is_first: [B, T] bool, True where a row starts a new episode; it must be None where
                `local` is no `ChunkedMemory`.

        Raises:
            ValueError: an argument, or parts that are not those of one memory dealt out in turn.
        """
        if self._next is None:
            raise ValueError(
                "append: expected chunks dealt out in turn, chunk g on rank g % R, at least one a "
                f"rank, and one open chunk; got parts of {dealing.spell(self.sizes)} chunks"
            )
        new = copy.copy(self)
        new.changes = self._changed("append", steps.shape[:2], is_first)
        if self._open is None:
            assert isinstance(self.local, ChunkedMemory)
            plan = self.local._plan(steps, is_first)
            new.local = self.local._after(plan.only(self._is_mine(plan)))
            new._next = (self._next + plan.closings) % self.chunks
            new.appended += steps.shape[1]
            return new
        if is_first is not None:
            kind = type(self.local).__name__
            raise ValueError(f"is_first: expected None for parts that are a {kind}, got a tensor")
        plan = self._open._plan(steps, None)
        # All rows are in step, since no episode ends.
        closed = int(plan.closings.max())
        mine = plan.only(self._is_mine(plan))
        new._open = self._open._replace(
            open_steps=plan.newest(plan.count_after).detach(), open_count=plan.count_after
        )
        if mine.end.shape[1]:
            new.local = self.local.append(mine.close().contents.detach().flatten(1, 2))
        total = sum(self.sizes) + closed
        new.sizes = dealing.dealt(total, self.ranks.size)
        new._next = self._next + closed
        new.appended += steps.shape[1]
        if new.local.chunks != new.sizes[self.ranks.rank]:
            raise RuntimeError(
                f"local.append: expected {new.sizes[self.ranks.rank]} chunks after it, "
                f"got {new.local.chunks}"
            )
        return new

    def detach(self) -> Self:
        """Return the memory cut from the graph that its steps came from."""
        if not isinstance(self.local, ChunkedMemory):
            return self
        new = copy.copy(self)
        new.local = self.local.detach()
        return new

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        """Return the chunks numbered [U] int64 as a memory in RAM, on all ranks alike.

        All ranks must ask for the same. Not valid where there is no chunk of a number.

        Raises:
            ValueError: there can be no chunk of such a number, or ranks ask for others.
            ShardError: not all ranks came in time.
        """
        with self.ranks.refusing(self.device):
            check_numbers("chunks", chunks, self.chunks)
        self.ranks.agree("fetch", dealing.asked(chunks), [], self.device)
        chunks = chunks.to(self.device)
        number = chunks // self.ranks.size
        mine = (chunks % self.ranks.size == self.ranks.rank) & (number < self.local.chunks)
        part = self.local.fetch(number[mine])
        shape = (self.batch, len(chunks))
        contents = part.contents.new_zeros(*shape, *part.contents.shape[2:])
        summaries = part.summaries.new_zeros(*shape, self.dim)
        is_step = contents.new_zeros(contents.shape[:3], dtype=torch.bool)
        contents[:, mine] = part.contents.detach()
        summaries[:, mine] = part.summaries.detach()
        is_step[:, mine] = part.valid[..., None]
        if part.step_mask is not None:
            is_step[:, mine] &= part.step_mask
        self.ranks.unite("chunks", contents, summaries, is_step)
        return ChunkedMemory.from_chunks(contents, is_step, summaries=summaries, copy=False)

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        """Return which steps the chunks numbered [U] int64 of a row hold, on all ranks alike.

        All ranks must ask for the same. A part that is a `ChunkedMemory` knows which of all steps
        it holds, if it was appended to here or is of `split`. A part that is another `Home` knows
        its own steps alone: there, the number of a step counts those of all ranks' chunks before.

        Raises:
            ValueError: there is no such row, no chunk of a number that can be recalled, or ranks
                ask for others.
            ShardError: not all ranks came in time.
        """
        with self.ranks.refusing(self.device):
            check_numbers("chunks", chunks, self.chunks)
            check_number("row", row, self.batch)
            known = dealing.own_spans(
                self.local,
                chunks.tolist(),
                row,
                self.ranks.rank,
                self.ranks.size,
                with_newest=self._open is not None,
            )
            own = json.dumps(known).encode()
        same = dealing.asked(chunks) | {"row": row}
        lengths = self.ranks.agree("spans", same, [len(own)], self.device)
        texts = self.ranks.gather_texts("spans", own, [n for (n,) in lengths], self.device)
        answers = [json.loads(text) for text in texts]
        if missing := sorted(chunk for answer in answers for chunk in answer["missing"]):
            raise no_such_chunks(missing)
        every = [Span(*span[:-1], keys=tuple(span[-1])) for x in answers for span in x["spans"]]
        by_chunk = {span.chunk: span for span in every}
        spans = [by_chunk[chunk] for chunk in chunks.tolist()]
        if self._open is None:
            return spans
        before = zip(*(answer["before"] for answer in answers), strict=True)
        return [s._replace(first_step=sum(b)) for s, b in zip(spans, before, strict=True)]

    def reset(self, rows: Tensor) -> Self:
        """Return the memory with the rows [B] bool emptied; nothing is sent.

        Raises:
            ValueError: `rows` names some rows only, and parts are not of `ChunkedMemory`.
        """
        check_tensor("rows", rows, "B", B=self.batch)
        check_mask("rows", rows, "B", self.device, B=self.batch)
        if not rows.any():
            return self
        if self._open is not None and not rows.all():
            kind = type(self.local).__name__
            raise ValueError(f"rows: expected all of them or none for parts that are a {kind}")
        new = copy.copy(self)
        new.changes = self._changed("reset", rows.shape, rows)
        new.local = self.local.reset(rows)
        if self._open is not None:
            new._open = self._open.reset(rows)
            new._next, new.sizes = new._open.next_slot, (0,) * self.ranks.size
        elif self._next is not None:
            new._next = self._next.masked_fill(rows, 0)
        return new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this rank's part to the folder `path`, where there must be none; see `load`.

        Nothing is sent, so ranks may name folders of their own.
        """
        tensors = {} if self._next is None else {"next": self._next}
        if self._open is not None:
            tensors |= {name: getattr(self._open, name) for name in ("open_steps", "open_count")}
        part = parts.Part(self.local, (self.appended, self.changes), tensors)
        parts.write(path, self.ranks.rank, self.ranks.size, part)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        group: "dist.ProcessGroup | None" = None,
        *,
        timeout: float = 60.0,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return what ranks wrote by `save`.

        As many ranks find their own parts, which on disk are opened where they are, for writing.
        Another number of ranks can load parts that were in RAM, from one folder with all of them:
        each then reads all parts, and keeps its own chunks.

        Args:
            path: the folder that this rank's part is in.
            group: the process group that shares the memory; None: the default one.
            timeout: how many seconds any exchange with the other ranks may take.
            device: where parts in RAM are put; None: on the CPU.

        Raises:
            FileNotFoundError: this rank has no part there; the others raise a ValueError.
            MemoryFileError: a ValueError; damaged, or no part of a memory, or one that was appended
                to after it was saved.
            ValueError: on all ranks, where parts were saved at different moments.
        """
        peers = RankGroup(group, timeout)
        with peers.refusing(torch.device("cpu" if device is None else device)):
            ranks = parts.saved_by(path, peers.rank, peers.size)
            if ranks == peers.size:
                read = [parts.read(path, peers.rank, ranks, device)]
            else:
                read = [parts.read(path, rank, ranks, device) for rank in range(ranks)]
            moments = {part.moment for part in read}
            if len(moments) > 1:
                raise MemoryFileError(f"path: parts of different moments in {str(path)!r}")
        ((appended, changes),) = moments
        same = {"path: ranks": ranks, "path: steps appended": appended, "path: changes": changes}
        peers.agree("load", same, [], read[0].local.device)
        if ranks == peers.size:
            ((local, _, tensors),) = read
            loaded = cls(local, group, timeout=timeout)
            tensors = {name: tensor.to(loaded.device) for name, tensor in tensors.items()}
            loaded._next = tensors.pop("next", None)
            if loaded._open is not None:
                loaded._open = loaded._open._replace(**tensors)
        else:
            loaded = cls.split(parts.joined(read), group, timeout=timeout)
        loaded.appended, loaded.changes = appended, changes
        return loaded

    def _changed(self, call: str, shape: Sequence[int], mask: Tensor | None) -> int:
        """Return the checksum of the calls so far and one more."""
        body = b"" if mask is None else mask.cpu().numpy().tobytes()
        return zlib.crc32(body, zlib.crc32(repr((self.changes, call, *shape)).encode()))

    def own_columns(self, of_all: Tensor) -> Tensor:
        """Return the columns of what is said of all chunks [B, Q, M] that are this rank's."""
        return of_all[:, :, self.ranks.rank :: self.ranks.size][:, :, : self.local.chunks]

    def own_ages(self, ages: Tensor | None) -> Tensor:
        """Return how many chunks closed after each of this rank's, [B, Q, M]; B and Q may be 1.

        `ages` [B, Q, M] int64 are those of all ranks' chunks; None: by the order they closed in.
        """
        if ages is not None:
            return self.own_columns(ages)
        following = self._next if self._open is None else None
        return dealing.ages(following, self.sizes, self.ranks.rank, self.device)[:, None]

    def _where_to_write(self) -> tuple[Tensor | None, ChunkedMemory | None]:
        """The number of the next chunk [B], and the open chunk where `local` cannot hold it.

        The number is None where there is no such: then the memory can be read only.
        """
        total, local = sum(self.sizes), self.local
        dealt = dealing.dealt(total, self.ranks.size)
        in_turn = self.sizes == dealt
        if not isinstance(local, ChunkedMemory):
            kinds = {"dtype": local.dtype, "device": local.device}
            holder = ChunkedMemory.empty(local.batch, 1, local.chunk_size, local.dim, **kinds)
            return (holder.next_slot + total if in_turn else None), holder
        state = torch.stack([local.next_slot, local.open_count])
        slots, counts = self.ranks.all_gather("the rings' positions", state).unbind(1)
        if not in_turn or min(dealt) == 0 or not (counts == counts[0]).all():
            return None, None
        return dealing.next_of_all(slots, dealt), None

    def _is_mine(self, plan: Plan) -> Tensor:
        """Return which of the chunks that close [B, M'] this rank keeps."""
        assert self._next is not None
        order = torch.arange(plan.end.shape[1], device=plan.end.device)
        slot = self._next[:, None] + order
        if self._open is None:
            slot = slot % self.chunks
        return (slot % self.ranks.size == self.ranks.rank) & (order < plan.closings[:, None])
