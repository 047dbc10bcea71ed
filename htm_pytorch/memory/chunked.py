"""`ChunkedMemory`: the past as raw steps in chunks, one summary a chunk, no parameters."""

import os
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory.files import MemoryFileError, load_tensors, save_tensors
from htm_pytorch.memory.span import Span, no_such_chunks
from htm_pytorch.shapes import (
    check_at_least,
    check_device,
    check_floating,
    check_mask,
    check_number,
    check_numbers,
    check_tensor,
    may_look_at,
)

_AXES = {
    "contents": "B M C D",
    "summaries": "B M D",
    "valid": "B M",
    "step_mask": "B M C",
    "open_steps": "B C D",
    "open_count": "B",
    "next_slot": "B",
    "first_steps": "B M",
    "episodes": "B M",
    "step_count": "B",
    "episode": "B",
}
_NUMBERS = ("first_steps", "episodes", "step_count", "episode")
"""The parts that older files lack: the numbers of steps and episodes."""


class ChunkedMemory(NamedTuple):
    """A memory of M chunks of C steps, as a value: every method returns a new one.

    Steps collect in the open chunk; when it holds C steps it closes, its summary is fixed, and
    from then on it can be recalled. The M closed chunks are a ring: each row writes at its own
    slot and forgets its oldest chunk when full. A step never moves from its chunk, and its number
    is its place in everything that its row was given since it was emptied (`spans`).

    Build one with `empty`, `from_steps` or `from_chunks`. Batch 1 may be read by any batch of
    queries without a copy.
    """

    contents: Tensor
    """[B, M, C, D] steps of the closed chunks; what lies in invalid chunks is never read."""
    summaries: Tensor
    """[B, M, D] mean of each chunk's valid steps."""
    valid: Tensor
    """[B, M] bool, the chunks that can be recalled."""
    step_mask: Tensor | None
    """[B, M, C] bool, the steps that can be recalled; None: every step of a valid chunk."""
    open_steps: Tensor
    """[B, C, D] steps of the chunk that is still open, oldest first, then zeros."""
    open_count: Tensor
    """[B] int64, how many steps the open chunk holds."""
    next_slot: Tensor
    """[B] int64, the slot that the next closed chunk takes."""
    first_steps: Tensor
    """[B, M] int64, the number of each chunk's first step; says nothing of invalid chunks."""
    episodes: Tensor
    """[B, M] int64, the episode of each chunk; says nothing of invalid chunks."""
    step_count: Tensor
    """[B] int64, how many steps the row was given, those that were dropped or forgotten too."""
    episode: Tensor
    """[B] int64, the episode of the newest step, counted from 0; -1 before the first step."""
    keep_across_episodes: bool = False
    """Whether chunks of earlier episodes stay visible after `is_first`."""

    @classmethod
    def empty(
        cls,
        batch: int,
        chunks: int,
        chunk_size: int,
        dim: int,
        *,
        keep_across_episodes: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a memory that holds nothing, with room for `chunks` closed chunks a row.

        With `keep_across_episodes`, a new episode closes the open chunk early (a shorter chunk)
        instead of dropping it, and everything stays visible.
        """
        for name, value in {"batch": batch, "chunks": chunks}.items():
            check_at_least(name, value, 1)
        check_at_least("chunk_size", chunk_size, 1)
        check_at_least("dim", dim, 1)
        contents = torch.zeros(batch, chunks, chunk_size, dim, dtype=dtype, device=device)
        check_floating("dtype", contents)
        valid = contents.new_zeros(batch, chunks, dtype=torch.bool)
        step_mask = valid.new_zeros(batch, chunks, chunk_size) if keep_across_episodes else None
        summaries = contents.new_zeros(batch, chunks, dim)
        first_steps = valid.new_zeros(batch, chunks, dtype=torch.int64)
        counted = first_steps, first_steps.new_zeros(batch)
        return cls._closed(contents, summaries, valid, step_mask, *counted, keep_across_episodes)

    @classmethod
    def from_steps(
        cls,
        steps: Tensor,
        chunk_size: int,
        mask: Tensor | None = None,
        *,
        borders: Literal["oldest", "newest"] = "oldest",
        eps: float = 0.0,
    ) -> Self:
        """Return a memory of all `steps` [B, N, D], every one of which can be recalled.

        Step n of them has the number n, in episode 0. With a mask, `spans` says of a chunk which
        is the first of its valid steps, and how many are valid: others may lie between them.

        Args:
            steps: the past, oldest first; N may be 0 and need not be a multiple of `chunk_size`.
            chunk_size: C. The one chunk that N leaves short holds its steps at its newest end.
            mask: [B, N] bool, False for steps that must never be attended nor averaged.
            borders: count the chunk borders from this end. With "oldest", a longer history has
                the same chunks plus new ones; the published package counts from the newest.
            eps: with a mask, a summary is the sum of its steps over (count + eps).
        """
        check_at_least("chunk_size", chunk_size, 1)
        check_tensor("steps", steps, "B N D")
        check_floating("steps", steps)
        batch, length, dim = steps.shape
        check_mask("mask", mask, "B N", steps.device, B=batch, N=length)
        if borders not in ("oldest", "newest"):
            raise ValueError(f"borders: expected 'oldest' or 'newest', got {borders!r}")
        missing = -length % chunk_size
        if mask is None:
            eps = 0.0
        elif may_look_at(mask) and bool(mask.all()):
            mask = None
        # A short chunk is padded at its oldest end, where positions are largest.
        before = 0 if borders == "newest" else length - length % chunk_size
        if missing:
            if mask is None:
                mask = steps.new_ones(batch, length, dtype=torch.bool)
            steps = _insert(steps, before, missing)
            mask = _insert(mask, before, missing)
        # The number of chunks is spelled out: it could not be inferred for a batch of 0.
        sizes = (batch, steps.shape[1] // chunk_size, chunk_size)
        contents = steps.reshape(*sizes, dim)
        step_mask = None if mask is None else mask.reshape(sizes)
        summaries = summarise(contents, step_mask, eps)
        valid = (
            steps.new_ones(contents.shape[:2], dtype=torch.bool)
            if step_mask is None
            else step_mask.any(-1)
        )
        place = torch.arange(0, sizes[1] * chunk_size, chunk_size, device=steps.device)
        place = place.repeat(batch, 1)
        if step_mask is not None:
            place = place + step_mask.byte().argmax(-1)
        if missing:
            place = torch.where(place < before, place, place - missing)
        step_count = place.new_full((batch,), length)
        return cls._closed(contents, summaries, valid, step_mask, place, step_count)

    @classmethod
    def from_chunks(
        cls, contents: Tensor, valid: Tensor | None = None, *, summaries: Tensor | None = None
    ) -> Self:
        """Return a memory of closed chunks, oldest first.

        Its steps that can be recalled are numbered from 0 on, in episode 0.

        Args:
            contents: [B, M, C, D].
            valid: bool, [B, M] chunks or [B, M, C] steps that can be recalled.
            summaries: [B, M, D], where they are not the means of the valid steps.
        """
        check_tensor("contents", contents, "B M C D")
        check_floating("contents", contents)
        batch, chunks, chunk_size, dim = contents.shape
        check_at_least("contents: C", chunk_size, 1)
        by_step = isinstance(valid, Tensor) and valid.ndim == 3
        sizes = {"B": batch, "M": chunks, "C": chunk_size}
        check_mask("valid", valid, "B M C" if by_step else "B M", contents.device, **sizes)
        step_mask = valid if by_step else None
        if summaries is None:
            summaries = summarise(contents, step_mask)
        check_tensor("summaries", summaries, "B M D", B=batch, M=chunks, D=dim)
        check_device("summaries", summaries, contents.device)
        if valid is None:
            valid = contents.new_ones(batch, chunks, dtype=torch.bool)
        elif by_step:
            valid = valid.any(-1)
        counts = _count(valid, step_mask, chunk_size)
        first_steps = counts.cumsum(1) - counts
        return cls._closed(contents, summaries, valid, step_mask, first_steps, counts.sum(1))

    @classmethod
    def _closed(
        cls,
        contents: Tensor,
        summaries: Tensor,
        valid: Tensor,
        step_mask: Tensor | None,
        first_steps: Tensor,
        step_count: Tensor,
        keep_across_episodes: bool = False,
    ) -> Self:
        batch, chunks, chunk_size, dim = contents.shape
        numbers = torch.arange(1, chunks + 1, device=contents.device)
        newest = (numbers * valid).amax(1) if chunks else numbers.new_zeros(batch)
        return cls(
            contents=contents,
            summaries=summaries,
            valid=valid,
            step_mask=step_mask,
            open_steps=contents.new_zeros(batch, chunk_size, dim),
            open_count=newest.new_zeros(batch),
            next_slot=newest % max(chunks, 1),
            first_steps=first_steps,
            episodes=torch.zeros_like(first_steps),
            step_count=step_count,
            episode=step_count.clamp(max=1) - 1,
            keep_across_episodes=keep_across_episodes,
        )

    @property
    def batch(self) -> int:
        """B."""
        return self.contents.shape[0]

    @property
    def chunks(self) -> int:
        """M, the closed chunks there is room for."""
        return self.contents.shape[1]

    @property
    def chunk_size(self) -> int:
        """C."""
        return self.contents.shape[2]

    @property
    def dim(self) -> int:
        """D."""
        return self.contents.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of the steps."""
        return self.contents.dtype

    @property
    def device(self) -> torch.device:
        """Of all parts."""
        return self.contents.device

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> Self:
        """Return the memory after `steps` [B, T, D]; T steps at once equal T times one step.

        Args:
            steps: oldest first, of this memory's dtype and device. Gradients flow from the new
                memory to them.
            is_first: [B, T] bool, True where a row starts a new episode: its open chunk is
                dropped and its earlier chunks become invisible (or stay, and the open chunk
                closes early, with `keep_across_episodes`). Other rows are not touched. The first
                step of an empty row begins episode 0, marked or not.
        """
        return self._after(self._plan(steps, is_first))

    def unroll(self, steps: Tensor, is_first: Tensor | None = None) -> "Unrolled":
        """Append `steps` [B, T, D] and say what each of them could recall on its way.

        A step sees the chunks that closed before it, of its own episode (all episodes with
        `keep_across_episodes`), and that the ring had not forgotten by then.
        """
        plan = self._plan(steps, is_first)
        age = self._age()
        visible = self.valid[:, None] & (age[:, None] >= plan.closed_before[..., None])
        if not self.keep_across_episodes:
            visible = visible & (plan.last_first < 0)[..., None]
        new = plan.readable
        if not new:
            return Unrolled(self, visible, self._after(plan))
        closed = plan.close()
        rank = torch.arange(new, device=steps.device)
        end = plan.end[:, None, :new]
        exists = rank < plan.closings[:, None]
        time = torch.arange(steps.shape[1], device=steps.device)
        seen = exists[:, None] & (end < time[:, None])
        seen = seen & (rank >= plan.closed_before[..., None] - self.chunks)
        if not self.keep_across_episodes:
            seen = seen & (end >= plan.last_first[..., None])
        step_mask = None
        if self.step_mask is not None:
            step_mask = torch.cat([self.step_mask, closed.step_mask[:, :new]], 1)
        read = self._replace(
            contents=torch.cat([self.contents, closed.contents[:, :new]], 1),
            summaries=torch.cat([self.summaries, closed.summaries[:, :new]], 1),
            valid=torch.cat([self.valid, exists], 1),
            step_mask=step_mask,
            first_steps=torch.cat([self.first_steps, closed.first_steps[:, :new]], 1),
            episodes=torch.cat([self.episodes, closed.episodes[:, :new]], 1),
        )
        return Unrolled(read, torch.cat([visible, seen], 2), self._after(plan, closed))

    def reset(self, rows: Tensor) -> Self:
        """Return the memory with the rows [B] bool emptied and the others untouched."""
        check_mask("rows", rows, "B", self.contents.device, B=self.batch)
        check_tensor("rows", rows, "B", B=self.batch)
        return self._replace(
            valid=self.valid & ~rows[:, None],
            open_steps=self.open_steps.masked_fill(rows[:, None, None], 0.0),
            open_count=self.open_count.masked_fill(rows, 0),
            next_slot=self.next_slot.masked_fill(rows, 0),
            step_count=self.step_count.masked_fill(rows, 0),
            episode=self.episode.masked_fill(rows, -1),
        )

    def fetch(self, chunks: Tensor) -> Self:
        """Return the chunks numbered [U] int64, of every row, as a memory of U chunks.

        They hold the steps that they held here, by the same numbers.
        """
        check_tensor("chunks", chunks, "U")
        fetched = self._closed(
            self.contents[:, chunks],
            self.summaries[:, chunks],
            self.valid[:, chunks],
            None if self.step_mask is None else self.step_mask[:, chunks],
            self.first_steps[:, chunks],
            self.step_count,
        )
        return fetched._replace(episodes=self.episodes[:, chunks], episode=self.episode)

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        """Return which steps the chunks numbered [U] int64 of a row hold, in the order asked.

        Steps that were dropped, since an episode began before their chunk was full, have numbers
        like others.

        Raises:
            ValueError: there is no such row, or no chunk of a number that can be recalled.
        """
        check_numbers("chunks", chunks, self.chunks)
        check_number("row", row, self.batch)
        at = row, chunks.to(self.device)
        step_mask = None if self.step_mask is None else self.step_mask[at]
        counts = _count(self.valid[at], step_mask, self.chunk_size)
        columns = torch.stack([at[1], self.first_steps[at], counts, self.episodes[at]], 1)
        spans = [Span(*numbers) for numbers in columns.tolist()]
        if missing := [span.chunk for span in spans if not span.count]:
            raise no_such_chunks(missing)
        return spans

    def detach(self) -> Self:
        """Return the memory cut from the graph that its steps came from."""
        return self._replace(
            contents=self.contents.detach(),
            summaries=self.summaries.detach(),
            open_steps=self.open_steps.detach(),
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return the memory on `device`, its steps and summaries in `dtype`."""
        moved = {name: tensor.to(device=device) for name, tensor in self._tensors().items()}
        for name in ("contents", "summaries", "open_steps"):
            moved[name] = moved[name].to(dtype=dtype)
        return self._replace(**moved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a safetensors file, whole or not at all.

        Needs the package `safetensors` (extra `files`).
        """
        keep = str(int(self.keep_across_episodes))
        save_tensors(path, "ChunkedMemory", self._tensors(), keep_across_episodes=keep)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> Self:
        """Read what `save` wrote.

        A file from before steps had numbers does not say which it holds: then the first of the
        oldest chunk that can be recalled is step 0, and all are of episode 0.

        Raises:
            FileNotFoundError: no such file.
            MemoryFileError: a ValueError; truncated, or not a memory of this format.
        """
        tensors, metadata = load_tensors(path, "ChunkedMemory")
        needed = set(_AXES) - {"step_mask"}
        if needed - set(tensors) == set(_NUMBERS):
            needed -= set(_NUMBERS)
        if set(tensors) - {"step_mask"} != needed or "keep_across_episodes" not in metadata:
            raise MemoryFileError(
                f"path: {str(path)!r} lacks a part: expected {sorted(needed)}, "
                f"got {sorted(tensors)}"
            )
        try:
            _check_parts(tensors)
        except ValueError as error:
            raise MemoryFileError(f"path: {str(path)!r} is damaged ({error})") from error
        if "first_steps" not in tensors:
            tensors |= _number(tensors)
        keep = metadata["keep_across_episodes"] == "1"
        step_mask = tensors.pop("step_mask", None)
        memory = cls(**tensors, step_mask=step_mask, keep_across_episodes=keep)
        return memory.to(device=device)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: part for name, part in self._asdict().items() if isinstance(part, Tensor)}

    def _age(self) -> Tensor:
        """[B, M]: a slot is overwritten by the chunk of this rank among those closed from now."""
        slots = torch.arange(self.chunks, device=self.contents.device)
        return (slots - self.next_slot[:, None]) % max(self.chunks, 1)

    def _plan(self, steps: Tensor, is_first: Tensor | None) -> "_Plan":
        check_at_least("chunks (of the memory that is written)", self.chunks, 1)
        check_tensor("steps", steps, "B T D", B=self.batch, D=self.dim)
        check_floating("steps", steps, self.contents.dtype)
        check_device("steps", steps, self.contents.device)
        batch, length, _ = steps.shape
        check_mask("is_first", is_first, "B T", steps.device, B=batch, T=length)
        keep, size, count = self.keep_across_episodes, self.chunk_size, self.open_count
        time = torch.arange(length, device=steps.device)
        if is_first is None:
            last_first = time.new_full((batch, length), -1)
        else:
            last_first = torch.where(is_first, time, -1).cummax(1).values
        episode = self.episode
        if length:
            # The first step of all begins episode 0, marked or not.
            begun = episode if is_first is None else episode + is_first[:, 0]
            episode = begun.clamp(min=0)
        if is_first is not None and length > 1:
            episode = episode + is_first[:, 1:].sum(1)
        since_border = torch.where(last_first < 0, count[:, None] + time, time - last_first)
        held = since_border % size + 1
        # Column t: the chunk that closed just before step t; the last column: after all steps.
        before = torch.cat([count[:, None], held % size], 1)
        closed = torch.cat([torch.zeros_like(count)[:, None], held.where(held == size, 0)], 1)
        if keep and is_first is not None:
            early = torch.where(is_first, before[:, :-1], 0)
            closed = closed + torch.nn.functional.pad(early, (0, 1))
        happened = closed > 0
        total = happened.cumsum(1)
        most = (size - 1 + length) // size
        readable = (size - 1 + max(length - 1, 0)) // size
        if keep and is_first is not None:
            most = readable = int(total[:, -1].max())
        elif may_look_at(steps) and length:
            most, readable = int(total[:, -1].max()), int(total[:, -2].max())
        # Scatter the events to the front; column `most` takes what did not happen.
        order = torch.where(happened, total - 1, most)
        events = torch.arange(-1, length, device=steps.device).expand(batch, -1)
        end = time.new_full((batch, most + 1), length).scatter(1, order, events)[:, :most]
        lengths = time.new_zeros(batch, most + 1).scatter(1, order, closed)[:, :most]
        return _Plan(
            sequence=torch.cat([self.open_steps, steps], 1),
            count_before=count,
            count_after=before[:, -1],
            step_before=self.step_count,
            episode_before=self.episode,
            episode_after=episode,
            is_first=is_first,
            last_first=last_first,
            closed_before=total[:, :-1],
            closings=total[:, -1],
            end=end,
            length=lengths,
            readable=readable,
        )

    def _after(self, plan: "_Plan", closed: "_Closed | None" = None) -> Self:
        opened = self._replace(
            open_steps=plan.newest(plan.count_after),
            open_count=plan.count_after,
            step_count=plan.step_before + plan.last_first.shape[1],
            episode=plan.episode_after,
        )
        if not self.keep_across_episodes:
            forgotten = (plan.last_first >= 0).any(1, keepdim=True)
            opened = opened._replace(valid=self.valid & ~forgotten)
        if not plan.end.shape[1] or (may_look_at(self.contents) and not plan.closings.any()):
            return opened
        closed = closed or plan.close()
        total = plan.closings[:, None]
        # Of more new chunks than the ring has slots, the newest stay.
        stay = min(plan.end.shape[1], self.chunks)
        rank = total - stay + torch.arange(stay, device=total.device)
        slot = (self.next_slot[:, None] + rank) % self.chunks
        happened = rank >= 0
        rank = rank.clamp(min=0)

        def put(new: Tensor, old: Tensor) -> Tensor:
            source, target, is_new = rank, slot, happened
            if rest := new.shape[2:]:
                source, target, is_new = (
                    index.view(*index.shape, *(1,) * len(rest)).expand(-1, -1, *rest)
                    for index in (rank, slot, happened)
                )
            written = new.gather(1, source).where(is_new, old.gather(1, target))
            return old.scatter(1, target, written)

        visible = torch.ones_like(plan.end, dtype=torch.bool)
        if not self.keep_across_episodes:
            visible = plan.end >= plan.last_first[:, -1:]
        return opened._replace(
            contents=put(closed.contents, self.contents),
            summaries=put(closed.summaries, self.summaries),
            valid=put(visible, opened.valid),
            step_mask=None if self.step_mask is None else put(closed.step_mask, self.step_mask),
            next_slot=(self.next_slot + plan.closings) % self.chunks,
            first_steps=put(closed.first_steps, self.first_steps),
            episodes=put(closed.episodes, self.episodes),
        )


class Unrolled(NamedTuple):
    """What T steps could recall while they were appended (`ChunkedMemory.unroll`)."""

    read: ChunkedMemory
    """Every chunk that any of the steps could recall: the ring, then the newly closed ones."""
    visible: Tensor
    """[B, T, M'] bool, which of `read`'s chunks each step sees."""
    after: ChunkedMemory
    """The memory after all the steps."""


def summarise(contents: Tensor, step_mask: Tensor | None, eps: float = 0.0) -> Tensor:
    """Return the summaries [B, M, D]: sums of the valid steps over (count + eps).

    Zero where no step is valid.
    """
    chunks, chunk_size = contents.shape[1:3]
    if step_mask is None:
        return contents.mean(2) if not eps else contents.sum(2) / (chunk_size + eps)
    # In pieces: masking copies, and a copy of the whole memory would double it.
    piece = max(64, -(-chunks // 16))
    pairs = zip(contents.split(piece, 1), step_mask.split(piece, 1), strict=True)
    total = torch.cat([part.masked_fill(~mask[..., None], 0.0).sum(2) for part, mask in pairs], 1)
    count = step_mask.sum(2).clamp(min=1)[..., None]
    exact = torch.promote_types(total.dtype, torch.float32)
    return total / (count.to(exact) + eps).to(total.dtype)


class _Plan(NamedTuple):
    """Which chunks a call to `append` closes, and where their steps are."""

    sequence: Tensor  # [B, C + T, D] the open chunk's steps and the new ones
    count_before: Tensor  # [B] steps in the open chunk before the call
    count_after: Tensor  # [B] and after it
    step_before: Tensor  # [B] the number of the first new step
    episode_before: Tensor  # [B] the episode of the step before the call
    episode_after: Tensor  # [B] and of the last new one
    is_first: Tensor | None  # [B, T] which of the new steps begin an episode
    last_first: Tensor  # [B, T] when the episode of each step began; -1: before this call
    closed_before: Tensor  # [B, T] chunks closed in this call before each step
    closings: Tensor  # [B] chunks closed in this call
    end: Tensor  # [B, M'] the last step of each of them; -1: a step of an earlier call
    length: Tensor  # [B, M'] their steps; fewer than C where an episode ended
    readable: int  # how many of them could be seen by a step of this call

    def at(self, time: Tensor) -> Tensor:
        """Return the steps at `time` [B, X]; times before 0 are the open chunk's."""
        chunk_size = self.sequence.shape[1] - self.last_first.shape[1]
        index = torch.where(time < 0, self.count_before[:, None] + time, chunk_size + time)
        index = index.clamp(0, self.sequence.shape[1] - 1)
        return self.sequence.gather(1, index[..., None].expand(-1, -1, self.sequence.shape[2]))

    def newest(self, count: Tensor) -> Tensor:
        """Return the newest `count` [B] steps, oldest first, then zeros: [B, C, D]."""
        length = self.last_first.shape[1]
        slot = torch.arange(self.sequence.shape[1] - length, device=count.device)
        steps = self.at(length - count[:, None] + slot)
        return steps.masked_fill((slot >= count[:, None])[..., None], 0.0)

    def only(self, chosen: Tensor) -> "_Plan":
        """Return the plan with the chunks `chosen` [B, M'] bool, of those that close, alone."""
        closings = chosen.sum(1)
        most = int(closings.max()) if closings.numel() else 0
        order = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        end, length = self.end.gather(1, order), self.length.gather(1, order)
        return self._replace(closings=closings, end=end, length=length)

    def close(self) -> "_Closed":
        """Gather the closed chunks; a short one holds its steps at its newest end."""
        size = self.sequence.shape[1] - self.last_first.shape[1]
        slot = torch.arange(size, device=self.end.device)
        step_mask = slot >= size - self.length[..., None]
        steps = self.at((self.end[..., None] - (size - 1) + slot).flatten(1))
        contents = steps.view(*step_mask.shape, -1).masked_fill(~step_mask[..., None], 0.0)
        return _Closed(
            contents,
            summarise(contents, step_mask),
            step_mask,
            self.step_before[:, None] + self.end - self.length + 1,
            self._episodes(),
        )

    def _episodes(self) -> Tensor:
        """Return the episodes [B, M'] of the chunks that close."""
        after = self.episode_after[:, None]
        if self.is_first is None:
            return after.expand_as(self.end)
        begun = self.is_first.cumsum(1)
        of_steps = torch.cat([self.episode_before[:, None], after - begun[:, -1:] + begun], 1)
        # What did not happen ends after the last step.
        return of_steps.gather(1, (self.end + 1).clamp(max=begun.shape[1]))


class _Closed(NamedTuple):
    contents: Tensor  # [B, M', C, D]
    summaries: Tensor  # [B, M', D]
    step_mask: Tensor  # [B, M', C]
    first_steps: Tensor  # [B, M']
    episodes: Tensor  # [B, M']


def _insert(steps: Tensor, before: int, missing: int) -> Tensor:
    padding = steps.new_zeros(steps.shape[0], missing, *steps.shape[2:])
    return torch.cat([steps[:, :before], padding, steps[:, before:]], 1)


def _count(valid: Tensor, step_mask: Tensor | None, chunk_size: int) -> Tensor:
    """How many steps chunks [...] hold that can be recalled; `step_mask` is [..., C]."""
    return valid * (chunk_size if step_mask is None else step_mask.sum(-1))


def _check_parts(tensors: dict[str, Tensor]) -> None:
    check_tensor("contents", tensors["contents"], _AXES["contents"])
    sizes = dict(zip("BMCD", tensors["contents"].shape, strict=True))
    for name, part in tensors.items():
        axes = _AXES[name]
        check_tensor(name, part, axes, **{axis: sizes[axis] for axis in axes.split()})
        if name in _NUMBERS and part.dtype != torch.int64:
            raise ValueError(f"{name}: expected dtype torch.int64, got {part.dtype}")


def _number(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number the steps of parts that do not say, from the oldest chunk on."""
    valid, next_slot = tensors["valid"], tensors["next_slot"]
    counts = _count(valid, tensors.get("step_mask"), tensors["contents"].shape[2])
    chunks = valid.shape[1]
    oldest_first = (next_slot[:, None] + torch.arange(chunks)) % max(chunks, 1)
    ordered = counts.gather(1, oldest_first)
    first_steps = torch.zeros_like(counts).scatter(1, oldest_first, ordered.cumsum(1) - ordered)
    step_count = counts.sum(1) + tensors["open_count"]
    return {
        "first_steps": first_steps,
        "episodes": torch.zeros_like(first_steps),
        "step_count": step_count,
        "episode": step_count.clamp(max=1) - 1,
    }
