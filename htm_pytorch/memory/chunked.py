"""`ChunkedMemory`: the past as raw steps in chunks, one summary a chunk, no parameters."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from htm_pytorch.memory.fields import (
    FLOATING,
    check_alike,
    check_fields,
    complete,
    said_to_keep,
)
from htm_pytorch.memory.files import MemoryFileError, load_tensors, save_tensors
from htm_pytorch.memory.ring import Ring, Slots, copied
from htm_pytorch.memory.span import Span, no_such_chunks
from htm_pytorch.memory.summaries import count_steps, summarise
from htm_pytorch.memory.whole import cut
from htm_pytorch.memory.writing import Written
from htm_pytorch.shapes import (
    check_at_least,
    check_device,
    check_floating,
    check_kind,
    check_made,
    check_mask,
    check_number,
    check_numbers,
    check_rows,
    check_tensor,
    to_arguments,
)


@dataclass(frozen=True, eq=False, repr=False)
class ChunkedMemory(Written):
    """A memory of M chunks of C steps, as a value: every method returns a new one.

    Steps collect in the open chunk; when it holds C steps it closes, its summary is fixed, and
    from then on it can be recalled. The M closed chunks are a ring: each row writes at its own
    slot and forgets its oldest chunk when full. A step never moves from its chunk, and its number
    is its place in everything that its row was given since it was emptied (`spans`).

    Build one with `empty`, `from_steps` or `from_chunks`. Batch 1 may be read by any batch of
    queries without a copy. It is a node of torch's pytrees, whose leaves are its tensors.
    """

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
        check_at_least("batch", batch, 0)
        for name, value in {"chunks": chunks, "chunk_size": chunk_size, "dim": dim}.items():
            check_at_least(name, value, 1)
        check_kind("keep_across_episodes", keep_across_episodes, bool, "a bool")
        check_made(device, dtype)
        contents = torch.zeros(batch, chunks, chunk_size, dim, dtype=dtype, device=device)
        valid = contents.new_zeros(batch, chunks, dtype=torch.bool)
        first_steps = valid.new_zeros(batch, chunks, dtype=torch.int64)
        slots = Slots(
            contents,
            contents.new_zeros(batch, chunks, dim),
            valid.new_zeros(batch, chunks, chunk_size) if keep_across_episodes else None,
            first_steps,
            first_steps.clone(),
        )
        ring = Ring(slots, 0, is_own=not torch.compiler.is_compiling())
        return cls(
            ring,
            valid,
            open_steps=contents.new_zeros(batch, chunk_size, dim),
            open_count=first_steps.new_zeros(batch),
            next_slot=first_steps.new_zeros(batch),
            step_count=first_steps.new_zeros(batch),
            episode=first_steps.new_full((batch,), -1),
            keep_across_episodes=keep_across_episodes,
        )

    @classmethod
    def from_steps(
        cls,
        steps: Tensor,
        chunk_size: int,
        mask: Tensor | None = None,
        *,
        borders: Literal["oldest", "newest"] = "oldest",
        eps: float = 0.0,
        chunks: int | None = None,
        copy: bool = True,
    ) -> Self:
        """Return a memory of a copy of `steps` [B, N, D], every one of which can be recalled.

        Step n of them has the number n, in episode 0. With a mask, `spans` says of a chunk which
        is the first of its valid steps, and how many are valid: others may lie between them.

        Such a memory is whole: there is no room for more, and `append` refuses. With `chunks`,
        there is: then it is `empty` after `append`, and the newest steps that are not yet a whole
        chunk wait in the open one.

        Args:
            steps: the past, oldest first; N may be 0 and need not be a multiple of `chunk_size`.
            chunk_size: C. The one chunk that N leaves short holds its steps at its newest end.
            mask: [B, N] bool, False for steps that must never be attended nor averaged.
            borders: count the chunk borders from this end. With "oldest", a longer history has
                the same chunks plus new ones; the published package counts from the newest.
            eps: with a mask, a summary is the sum of its steps over (count + eps).
            chunks: M, room for so many closed chunks a row, for a past that goes on; beside it
                neither a mask nor other borders.
            copy: False where nobody writes to `steps` any more, so that the memory may lie there.
        """
        if chunks is None:
            slots, valid = cut(steps, chunk_size, mask, borders=borders, eps=eps, is_copy=copy)
            step_count = slots.first_steps.new_full(steps.shape[:1], steps.shape[1])
            return cls._closed(slots, valid, step_count, room=0, is_own=copy)
        check_tensor("steps", steps, "B N D")
        if mask is not None:
            raise ValueError("mask: expected None beside `chunks` (append takes one), got a mask")
        if borders != "oldest":
            raise ValueError(f"borders: expected 'oldest' beside `chunks`, got {borders!r}")
        sizes = steps.shape[0], chunks, chunk_size, steps.shape[2]
        return cls.empty(*sizes, dtype=steps.dtype, device=steps.device).append(steps)

    @classmethod
    def from_chunks(
        cls,
        contents: Tensor,
        valid: Tensor | None = None,
        *,
        summaries: Tensor | None = None,
        copy: bool = True,
    ) -> Self:
        """Return a memory of a copy of closed chunks, oldest first, with room for as many.

        Its steps that can be recalled are numbered from 0 on, in episode 0.

        Args:
            contents: [B, M, C, D].
            valid: bool, [B, M] chunks or [B, M, C] steps that can be recalled.
            summaries: [B, M, D], where they are not the means of the valid steps.
            copy: False where nobody writes to the tensors any more, so that the memory may hold
                them.
        """
        check_tensor("contents", contents, "B M C D")
        check_floating("contents", contents)
        batch, chunks, chunk_size, dim = contents.shape
        check_at_least("contents: C", chunk_size, 1)
        by_step = isinstance(valid, Tensor) and valid.ndim == 3
        sizes = {"B": batch, "M": chunks, "C": chunk_size}
        check_mask("valid", valid, "B M C" if by_step else "B M", contents.device, **sizes)
        if summaries is None:
            summaries = summarise(contents, valid if by_step else None)
        check_tensor("summaries", summaries, "B M D", B=batch, M=chunks, D=dim)
        check_floating("summaries", summaries)
        check_device("summaries", summaries, contents.device)
        if valid is None:
            valid = contents.new_ones(batch, chunks, dtype=torch.bool)
        if copy:
            contents, valid, summaries = copied(contents), copied(valid), copied(summaries)
        step_mask = valid if by_step else None
        if by_step:
            valid = valid.any(-1)
        counts = count_steps(valid, step_mask, chunk_size)
        first_steps = counts.cumsum(1) - counts
        slots = Slots(contents, summaries, step_mask, first_steps, torch.zeros_like(first_steps))
        return cls._closed(slots, valid, counts.sum(1), room=chunk_size, is_own=copy)

    @classmethod
    def _closed(
        cls,
        slots: Slots,
        valid: Tensor,
        step_count: Tensor,
        episode: Tensor | None = None,
        *,
        room: int,
        is_own: bool,
    ) -> Self:
        """Return a memory with nothing but closed chunks, and an open one of `room` steps.

        All steps are of episode 0 unless `episode` says which the last one is of. `is_own` says
        whether nobody else has the tensors of its slots.
        """
        episode = step_count.clamp(max=1) - 1 if episode is None else episode
        batch, chunks, _, dim = slots.contents.shape
        numbers = torch.arange(1, chunks + 1, device=valid.device)
        newest = (numbers * valid).amax(1) if chunks else numbers.new_zeros(batch)
        opened = slots.contents.new_zeros(batch, room, dim)
        next_slot = newest % max(chunks, 1)
        count = newest.new_zeros(batch)
        is_own = is_own and not torch.compiler.is_compiling()
        ring = Ring(slots, is_own=is_own)
        return cls(ring, valid, opened, count, next_slot, step_count, episode)

    def select_rows(self, rows: Tensor) -> Self:
        """Return a copy of the rows [R] int64, in the order asked, or of those that [B] marks."""
        rows = check_rows("rows", rows, self.batch, self.device)
        parts = {name: part[rows] for name, part in self._tensors(self._ring.read()).items()}
        return self._of(parts, self.keep_across_episodes)

    @classmethod
    def cat(cls, memories: Sequence["ChunkedMemory"]) -> Self:
        """Return the rows of all the memories, which must be alike in all else, one after another.

        Raises:
            ValueError: there is none, or they are not alike.
        """
        check_kind("memories", memories, Sequence, "several ChunkedMemory")
        if not memories:
            raise ValueError("memories: expected at least one, got none")
        for number, memory in enumerate(memories):
            check_kind(f"memories[{number}]", memory, ChunkedMemory, "a ChunkedMemory")
        every = [memory._tensors(memory._ring.read()) for memory in memories]
        first = memories[0]
        if any("step_mask" in parts for parts in every):
            for parts in every:
                exists = parts["valid"][..., None].expand(-1, -1, first.chunk_size)
                parts.setdefault("step_mask", exists)
        sizes = {"M": first.chunks, "C": first.chunk_size, "D": first.dim}
        for number, (memory, parts) in enumerate(zip(memories, every, strict=True)):
            prefix = f"memories[{number}]."
            check_fields(parts, prefix, **sizes)
            check_alike(parts, every[0], prefix)
            if memory.keep_across_episodes != first.keep_across_episodes:
                raise ValueError(
                    f"{prefix}keep_across_episodes: expected {first.keep_across_episodes}, "
                    f"got {memory.keep_across_episodes}"
                )
        joined = {name: torch.cat([parts[name] for parts in every]) for name in every[0]}
        return cls._of(joined, first.keep_across_episodes)

    def fetch(self, chunks: Tensor) -> Self:
        """Return a copy of the chunks numbered [U] int64, of every row, as a memory of U chunks.

        They hold the steps that they held here, by the same numbers. Nothing can be appended to
        them.

        Raises:
            ValueError: there is no chunk of such a number.
        """
        check_numbers("chunks", chunks, self.chunks)
        chunks = chunks.to(self.device, torch.int64)
        slots = self._ring.read().map(lambda part: part[:, chunks])
        numbers = self.step_count.clone(), self.episode.clone()
        return self._closed(slots, self.valid[:, chunks], *numbers, room=0, is_own=True)

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        """Return which steps the chunks numbered [U] int64 of a row hold, in the order asked.

        Steps that were dropped, since an episode began before their chunk was full, have numbers
        like others.

        Raises:
            ValueError: there is no such row, or no chunk of a number that can be recalled.
        """
        check_numbers("chunks", chunks, self.chunks)
        check_number("row", row, self.batch)
        at = row, chunks.to(self.device, torch.int64)
        slots = self._ring.read()
        step_mask = None if slots.step_mask is None else slots.step_mask[at]
        counts = count_steps(self.valid[at], step_mask, self.chunk_size)
        columns = torch.stack([at[1], slots.first_steps[at], counts, slots.episodes[at]], 1)
        spans = [Span(*numbers) for numbers in columns.tolist()]
        if missing := [span.chunk for span in spans if not span.count]:
            raise no_such_chunks(missing)
        return spans

    def detach(self) -> Self:
        """Return the memory cut from the graph that its steps came from."""
        slots = self._ring.read()
        if not any(p.requires_grad for p in (slots.contents, slots.summaries, self.open_steps)):
            return self
        ring = self._ring.with_slots(self._ring.share().map(torch.Tensor.detach))
        return self._changed(_ring=ring, open_steps=self.open_steps.detach())

    def donate(self) -> Self:
        """Return the memory, given up to whoever appends to it next.

        Without a gradient its chunks are then written where they lie, also in tensors that were
        taken out of it since, by a compiled function and in a CUDA graph as well, which otherwise
        copy all of them at each step. What comes after it is donated, too. Chunks that others may
        hold now are copied once, here. This memory, those before it in whose place it was
        written, and each one after it that was appended to are gone: to read one is a
        RuntimeError. An append that raises an error may have written.
        """
        return self._changed(_ring=self._ring.donate())

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return the memory on `device`, its steps and summaries in `dtype`.

        As in torch, a dtype may come alone, and parts that are so already are not copied.
        """
        there, kind = to_arguments(device, dtype)
        # Tensors of a donated one may be written over.
        copy = self._ring.is_donated
        moved = {
            name: part.to(device=there, copy=copy and name in Slots._fields)
            for name, part in self._tensors().items()
        }
        moved |= {name: moved[name].to(dtype=kind) for name in FLOATING}
        return self._of(moved, self.keep_across_episodes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a safetensors file, whole or not at all.

        Needs the package `safetensors` (extra `files`).
        """
        keep = str(int(self.keep_across_episodes))
        parts = self._tensors(self._ring.read())
        save_tensors(path, "ChunkedMemory", parts, keep_across_episodes=keep)

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
        return cls._from_file(path, tensors, metadata.get("keep_across_episodes")).to(device)

    @classmethod
    def _from_file(
        cls, path: str | os.PathLike[str], parts: dict[str, Tensor], keep: str | None
    ) -> Self:
        try:
            return cls._of(complete(parts), said_to_keep(keep))
        except ValueError as error:
            raise MemoryFileError(f"path: {str(path)!r} is damaged ({error})") from error


_Context = tuple[bool, tuple[str, ...], bool]
"""Whether earlier episodes stay, the names of the leaves, and whether it was donated."""


def _flatten(memory: ChunkedMemory) -> tuple[list[Tensor], _Context]:
    memory._ring.free()
    parts = memory._tensors()
    is_donated = memory._ring.is_donated
    return list(parts.values()), (memory.keep_across_episodes, tuple(parts), is_donated)


def _flatten_with_keys(memory: ChunkedMemory) -> tuple[list[Any], Any]:
    leaves, context = _flatten(memory)
    keys = [pytree.GetAttrKey(name) for name in context[1]]
    return list(zip(keys, leaves, strict=True)), context


def _unflatten(leaves: Iterable[Any], context: _Context) -> ChunkedMemory:
    keep, names, is_donated = context
    memory = ChunkedMemory._of(dict(zip(names, leaves, strict=True)), keep)
    memory._ring.is_donated = is_donated
    return memory


def _from_dumpable(context: list[Any]) -> _Context:
    # Programs that were exported before memories could be donated do not say.
    keep, names, *donated = context
    return keep, tuple(names), bool(donated and donated[0])


pytree.register_pytree_node(
    ChunkedMemory,
    _flatten,
    _unflatten,
    serialized_type_name="htm_pytorch.memory.ChunkedMemory",
    to_dumpable_context=lambda context: [context[0], list(context[1]), context[2]],
    from_dumpable_context=_from_dumpable,
    flatten_with_keys_fn=_flatten_with_keys,
)
# A state is data: `torch.load` reads it without being told that it may.
torch.serialization.add_safe_globals([ChunkedMemory])
