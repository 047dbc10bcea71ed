"""`Written`: how steps are appended to a memory, and what they could recall on their way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from htm_pytorch.memory.plan import OpenChunks, Plan, existing, plan
from htm_pytorch.memory.reach import Reach, reach
from htm_pytorch.memory.ring import Slots, alone, copied
from htm_pytorch.memory.summaries import summarise
from htm_pytorch.memory.value import Value
from htm_pytorch.shapes import (
    check_at_least,
    check_device,
    check_floating,
    check_mask,
    check_tensor,
    may_look_at,
)

Memory = TypeVar("Memory", bound=Value)


class Unrolled(NamedTuple, Generic[Memory]):
    """What T steps could recall while they were appended (`ChunkedMemory.unroll`)."""

    read: Memory
    """Every chunk that any of the steps could recall: the ring, then the newly closed ones."""
    visible: Tensor
    """[B, T, M'] bool, which of `read`'s chunks each step sees."""
    after: Memory
    """The memory after all the steps."""


class Reached(NamedTuple, Generic[Memory]):
    """What T steps could recall while they were appended (`ChunkedMemory.reach`)."""

    read: Memory
    """Every chunk that any of the steps could recall."""
    reach: Reach
    """Which steps see which of them."""
    after: Callable[[], Memory]
    """Write, and return the memory after all the steps; then `read`, which may lie where it was
    written, has served."""

    def seen(
        self, time: Tensor, *, with_ages: bool = False
    ) -> tuple[Memory, Tensor | None, Tensor | None]:
        """Return the chunks that any of the steps `time` [B, P] sees, who sees which, and how old.

        That is a mask [B, P, U], or None where all see all; and ages [B, P, U] or [B, 1, U], if
        they are asked for.
        """
        ages = self.reach.ages(time) if with_ages else None
        if self.reach.times is None or not time.numel():
            visible = None if self.reach.times is None else self.reach.visible(time)
            return self.read, visible, ages
        some = self.reach.within(int(time.min()), int(time.max()))
        reach = self.reach._replace(
            slots=self.reach.slots.map(lambda part: part[:, some]),
            valid=self.reach.valid[:, some],
            times=(self.reach.times[0][:, some], self.reach.times[1][:, some]),
        )
        ages = None if ages is None else ages[..., some]
        return self.read._reading(reach), reach.visible(time), ages


@dataclass(frozen=True, eq=False, repr=False)
class Written(Value):
    """The part of `ChunkedMemory` that writes; see there."""

    def append(
        self, steps: Tensor, is_first: Tensor | None = None, mask: Tensor | None = None
    ) -> Self:
        """Return the memory after `steps` [B, T, D]; T steps at once equal T times one step.

        A chunk that closes takes the place of the oldest without a copy of the others, where no
        gradient flows to or from the memory and nobody took tensors out of it before; this memory
        stays what it is, at the cost of a copy if it is read again.

        Args:
            steps: oldest first, of this memory's dtype and device. Gradients flow from the new
                memory to them.
            is_first: [B, T] bool, True where a row starts a new episode: its open chunk is
                dropped and its earlier chunks become invisible (or stay, and the open chunk
                closes early, with `keep_across_episodes`). Other rows are not touched. The first
                step of an empty row begins episode 0, marked or not.
            mask: [B, T] bool, False for steps that do not exist: the row goes on without them.

        Raises:
            ValueError: an argument; or the past was given whole, and there is no room for more.
        """
        self._check_steps(steps, is_first, mask)
        return self._append(*existing(steps, is_first, mask)[:3])

    def unroll(
        self, steps: Tensor, is_first: Tensor | None = None, mask: Tensor | None = None
    ) -> Unrolled[Self]:
        """Append `steps` [B, T, D] and say what each of them could recall on its way.

        A step sees the chunks that closed before it, of its own episode (all episodes with
        `keep_across_episodes`), and that the ring had not forgotten by then. One that does not
        exist (see `append`) sees none.
        """
        self._check_steps(steps, is_first, mask)
        steps, is_first, lengths, place = existing(steps, is_first, mask)
        self._ring.keep()
        found, then = self._reach(steps, is_first, lengths, None)
        time = torch.arange(steps.shape[1], device=steps.device)
        visible = found.visible(time.expand(self.batch, -1))
        if place is not None and mask is not None:
            visible = visible.gather(1, place[..., None].expand(-1, -1, visible.shape[2]))
            visible = visible & mask[..., None]
        return Unrolled(self._reading(found), visible, then())

    def reach(
        self, steps: Tensor, is_first: Tensor | None = None, lengths: Tensor | None = None
    ) -> Reached[Self]:
        """Append the first `lengths` [B] of `steps` [B, T, D] to each row, as `unroll` does.

        Slots of the ring that were never written are left out, and no mask of all steps by all
        chunks is made.
        """
        self._check_steps(steps, is_first, None)
        _check_lengths(lengths, steps)
        if torch.is_grad_enabled():
            self._ring.keep()
        used = None if torch.compiler.is_compiling() else self._ring.used
        with alone():
            # Before another thread writes over what was found.
            found, then = self._reach(steps, is_first, lengths, used)
            read = self._reading(found)

        def after() -> Self:
            self._ring.give_back(read._ring)
            return then()

        return Reached(read, found, after)

    def reset(self, rows: Tensor) -> Self:
        """Return the memory with the rows [B] bool emptied and the others untouched."""
        check_tensor("rows", rows, "B", B=self.batch)
        check_mask("rows", rows, "B", self.device, B=self.batch)
        return self._changed(
            valid=self.valid & ~rows[:, None],
            open_steps=self.open_steps.masked_fill(rows[:, None, None], 0.0),
            open_count=self.open_count.masked_fill(rows, 0),
            next_slot=self.next_slot.masked_fill(rows, 0),
            step_count=self.step_count.masked_fill(rows, 0),
            episode=self.episode.masked_fill(rows, -1),
        )

    def begin(self, rows: Tensor) -> Self:
        """Return the memory whose rows [B] bool begin an episode with the step that comes next.

        That step is then appended as if it were none's first. Not with `keep_across_episodes`.
        """
        check_mask("rows", rows, "B", self.device, B=self.batch)
        return self._changed(
            valid=self.valid & ~rows[:, None],
            open_steps=self.open_steps.masked_fill(rows[:, None, None], 0.0),
            open_count=self.open_count.masked_fill(rows, 0),
            episode=self.episode + rows,
        )

    def _check_steps(self, steps: Tensor, is_first: Tensor | None, mask: Tensor | None) -> None:
        check_at_least("chunks (of the memory that is written)", self.chunks, 1)
        check_tensor("steps", steps, "B T D", B=self.batch, D=self.dim)
        check_floating("steps", steps, self.dtype)
        check_device("steps", steps, self.device)
        batch, length, _ = steps.shape
        check_mask("is_first", is_first, "B T", steps.device, B=batch, T=length)
        check_mask("mask", mask, "B T", steps.device, B=batch, T=length)
        if not self.open_steps.shape[1]:
            raise ValueError(
                "steps: expected none for a past that was given whole, without room for more; "
                "from_steps(..., chunks=...) leaves room"
            )

    def _plan(self, steps: Tensor, is_first: Tensor | None, lengths: Tensor | None = None) -> Plan:
        self._check_steps(steps, is_first, None)
        opened = OpenChunks(self.open_steps, self.open_count, self.step_count, self.episode)
        return plan(opened, steps, is_first, lengths, keep=self.keep_across_episodes)

    def _append(self, steps: Tensor, is_first: Tensor | None, lengths: Tensor | None) -> Self:
        if fills := self._fills(steps, is_first, lengths):
            return self._filled(steps, fills)
        return self._after(self._plan(steps, is_first, lengths))

    def _reach(
        self, steps: Tensor, is_first: Tensor | None, lengths: Tensor | None, used: int | None
    ) -> tuple[Reach, Callable[[], Self]]:
        keep = self.keep_across_episodes
        if keep and is_first is not None and self._ring.read().step_mask is None:
            return self._masked()._reach(steps, is_first, lengths, used)
        slots, valid = self._ring.head(used), self.valid
        if used is not None:
            valid = valid[:, :used]
        if fills := self._fills(steps, is_first, lengths):
            found = reach(slots, valid, self.next_slot, self.chunks, None, keep=keep)
            return found, lambda: self._filled(steps, fills)
        made = self._plan(steps, is_first, lengths)
        found = reach(slots, valid, self.next_slot, self.chunks, made, keep=keep)
        return found, lambda: self._after(made)

    def _fills(
        self, steps: Tensor, is_first: Tensor | None, lengths: Tensor | None
    ) -> Literal["", "in part", "to the brim"]:
        """Say how the steps fill open chunks, if it is known that none of them is the first again.

        That is "" where one may be, of a chunk or of an episode.
        """
        length, size = steps.shape[1], self.open_steps.shape[1]
        if is_first is not None or lengths is not None or not 0 < length <= size:
            return ""
        if not (self.batch and may_look_at(steps)):
            return ""
        most = int(self.open_count.max()) + length
        return "" if most > size else "to the brim" if most == size else "in part"

    def _filled(self, steps: Tensor, fills: str) -> Self:
        length, size = steps.shape[1], self.open_steps.shape[1]
        open_count, next_slot = _saved(self.open_count), _saved(self.next_slot)
        at = open_count.view(-1, 1, 1)
        if length > 1:
            at = at + torch.arange(length, device=steps.device)[:, None]
        opened = self.open_steps.scatter(1, at.expand(steps.shape), steps)
        count, step_count = self.open_count + length, self.step_count + length
        episode = self.episode.clamp(min=0)
        if fills == "in part":
            return self._changed(
                open_steps=opened, open_count=count, step_count=step_count, episode=episode
            )
        is_full = count == size
        slot, happened, contents = next_slot[:, None], is_full[:, None], opened[:, None]
        closed = Slots(
            contents,
            summarise(contents, None),
            contents.new_ones(contents.shape[:3], dtype=torch.bool),
            (step_count - size)[:, None],
            episode[:, None],
        )
        return self._changed(
            _ring=self._ring.write(slot, happened, closed),
            valid=self.valid.scatter(1, slot, self.valid.gather(1, slot) | happened),
            open_steps=opened.masked_fill(is_full[:, None, None], 0.0),
            open_count=count.masked_fill(is_full, 0),
            next_slot=(self.next_slot + is_full) % self.chunks,
            step_count=step_count,
            episode=episode,
        )

    def _masked(self) -> Self:
        """Return the memory with a mask of its steps, since short chunks may come."""
        slots = self._ring.share()
        step_mask = copied(self.valid[..., None].expand(slots.contents.shape[:3]))
        return self._changed(_ring=self._ring.with_slots(slots._replace(step_mask=step_mask)))

    def _after(self, plan: Plan) -> Self:
        keep = self.keep_across_episodes
        if keep and plan.is_first is not None and self._ring.read().step_mask is None:
            return self._masked()._after(plan)
        opened = {
            "open_steps": plan.newest(plan.count_after),
            "open_count": plan.count_after,
            "step_count": plan.step_after,
            "episode": plan.episode_after,
        }
        valid = self.valid
        if not keep and plan.is_first is not None:
            valid = valid & ~(plan.last_first >= 0).any(1, keepdim=True)
        if not plan.end.shape[1] or (may_look_at(valid) and not plan.closings.any()):
            return self._changed(valid=valid, **opened)
        # Of more new chunks than the ring has slots, the newest stay.
        stay = min(plan.end.shape[1], self.chunks)
        rank = plan.closings[:, None] - stay + torch.arange(stay, device=valid.device)
        slot = (self.next_slot[:, None] + rank) % self.chunks
        happened = rank >= 0
        rank = rank.clamp(min=0)
        plan = plan._replace(end=plan.end.gather(1, rank), length=plan.length.gather(1, rank))
        closed = plan.close()
        is_visible = happened
        if not keep and plan.is_first is not None:
            is_visible = plan.end >= plan.last_first[:, -1:]
        is_valid = is_visible.where(happened, valid.gather(1, slot))
        return self._changed(
            **opened,
            _ring=self._ring.write(slot, happened, closed),
            valid=valid.scatter(1, slot, is_valid),
            next_slot=(self.next_slot + plan.closings) % self.chunks,
        )


def _check_lengths(lengths: Tensor | None, steps: Tensor) -> None:
    """Raise a ValueError unless it is how many of `steps` [B, T, D] there are of each row, [B]."""
    if lengths is None:
        return
    batch, length, _ = steps.shape
    check_tensor("lengths", lengths, "B", B=batch)
    check_device("lengths", lengths, steps.device)
    if lengths.dtype != torch.int64:
        raise ValueError(f"lengths: expected dtype torch.int64, got {lengths.dtype}")
    if may_look_at(lengths) and batch:
        least, most = int(lengths.min()), int(lengths.max())
        if not 0 <= least <= most <= length:
            raise ValueError(f"lengths: expected from 0 to T = {length}, got {least} to {most}")


def _saved(part: Tensor) -> Tensor:
    """Return what a backward may keep: made in inference mode, it may not be kept as it is."""
    return part.clone() if part.is_inference() and torch.is_grad_enabled() else part
