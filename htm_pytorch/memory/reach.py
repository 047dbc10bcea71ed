"""`Reach`: which chunks each step of a call can recall, as two numbers a chunk."""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory import ring
from htm_pytorch.memory.plan import Plan
from htm_pytorch.memory.ring import Slots


class Reach(NamedTuple):
    """The chunks that any step of a call could recall: those held before it, then the new ones."""

    slots: Slots
    """What the M' chunks of each row hold."""
    valid: Tensor
    """[B, M'] bool, which of the chunks there are."""
    held: int
    """How many of the M' are slots of the ring."""
    times: tuple[Tensor, Tensor] | None
    """[B, M'] each, the first step that sees a chunk, and the first after it that no longer does;
    None: all steps see all valid chunks."""
    next_slot: Tensor
    """[B] int64, the slot that the first of the new chunks takes."""
    room: int
    """How many slots the ring has, those that are left out included."""
    born: Tensor | None
    """[B, X] int64, the first step that sees each of the new chunks; None: there is none."""

    def ages(self, time: Tensor | None) -> Tensor:
        """Return how many chunks closed after each, as the steps `time` [B, P] see it.

        [B, P, M'], or [B, 1, M'] where all see the same.
        """
        slots = torch.arange(self.held, device=self.valid.device)
        ages = ring.ages(self.next_slot, slots, self.room)
        if self.born is None or time is None:
            return ages[:, None]
        new = -1 - torch.arange(self.born.shape[1], device=time.device)
        ages = torch.cat([ages, new.expand(len(ages), -1)], 1)
        closed = (self.born[:, None] <= time[..., None]).sum(-1, keepdim=True)
        return ages[:, None] + closed

    def visible(self, time: Tensor) -> Tensor:
        """Return which chunks the steps `time` [B, P] see, [B, P, M'] bool."""
        if self.times is None:
            return self.valid[:, None].expand(-1, time.shape[1], -1)
        since, until = self.times
        time = time[..., None]
        return (since[:, None] <= time) & (time < until[:, None])

    def within(self, first: int, last: int) -> slice:
        """Return the range of the chunks that any of the steps from `first` to `last` sees."""
        if self.times is None:
            return slice(0, self.valid.shape[1])
        since, until = self.times
        numbers = ((since <= last) & (until > first)).any(0).nonzero()[:, 0].tolist()
        return slice(numbers[0], numbers[-1] + 1) if numbers else slice(0, 0)


def reach(
    slots: Slots, valid: Tensor, next_slot: Tensor, chunks: int, plan: Plan | None, *, keep: bool
) -> Reach:
    """Return what the steps of a plan can recall.

    `slots` and `valid` are of a ring of `chunks`, without slots at its end that hold nothing.
    Without a plan nothing closes and no episode begins.
    """
    held = valid.shape[1]
    found = Reach(slots, valid, held, None, next_slot, chunks, None)
    if plan is None or (not plan.readable and plan.is_first is None):
        return found
    length, most = plan.last_first.shape[1], plan.end.shape[1]
    if length == 1 and not plan.readable:
        begins = plan.is_first
        return found if keep or begins is None else found._replace(valid=valid & ~begins)
    never = length + 1
    ages = (torch.arange(held, device=valid.device) - next_slot[:, None]) % max(chunks, 1)
    # By rank among the chunks that close: when a slot of that age, or a chunk so much older, goes.
    ends = plan.end + 1
    until = torch.full_like(ages, never)
    if most:
        until = ends.gather(1, ages.clamp(max=most - 1)).where(ages < most, until)
    borders = None if keep or plan.is_first is None else plan.next_first()
    if borders is not None:
        until = until.minimum(borders[:, :1])
    until = until.masked_fill(~valid, 0)
    since = torch.zeros_like(ages)
    new = plan.readable
    if not new:
        return found._replace(times=(since, until))
    closed = plan.close().map(lambda part: part[:, :new])
    closed = closed._replace(summaries=closed.summaries.to(slots.summaries.dtype))
    born = ends[:, :new]
    gone = ends[:, chunks : chunks + new]
    gone = torch.nn.functional.pad(gone, (0, new - gone.shape[1]), value=never)
    if borders is not None:
        gone = gone.minimum(borders.gather(1, born.clamp(max=length)))
    exists = torch.arange(new, device=valid.device) < plan.closings[:, None]
    return found._replace(
        slots=slots.beside(closed, lambda old, new: torch.cat([old, new], 1)),
        valid=torch.cat([valid, exists], 1),
        times=(torch.cat([since, born], 1), torch.cat([until, gone], 1)),
        born=born,
    )
