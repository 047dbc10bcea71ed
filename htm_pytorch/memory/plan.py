"""`Plan`: which chunks close while steps are appended, and where their steps are."""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.ring import Slots
from htm_pytorch.memory.summaries import summarise
from htm_pytorch.shapes import is_seen, may_look_at


class OpenChunks(NamedTuple):
    """The open chunk of each row, and what its newest step is called."""

    steps: Tensor  # [B, C, D]
    held: Tensor  # [B] how many steps it has
    step_count: Tensor  # [B]
    episode: Tensor  # [B]


class Plan(NamedTuple):
    """Which chunks a call to `append` closes, and where their steps are."""

    sequence: Tensor  # [B, C + T, D] the open chunk's steps and the new ones
    count_before: Tensor  # [B] steps in the open chunk before the call
    count_after: Tensor  # [B] and after it
    step_before: Tensor  # [B] the number of the first new step
    step_after: Tensor  # [B] and of the next one
    episode_before: Tensor  # [B] the episode of the step before the call
    episode_after: Tensor  # [B] and of the last new one
    lengths: Tensor | None  # [B] new steps of each row; None: T
    is_first: Tensor | None  # [B, T] which of the new steps begin an episode
    last_first: Tensor  # [B, T] when the episode of each step began; -1: before this call
    closings: Tensor  # [B] chunks closed in this call
    end: Tensor  # [B, M'] the last step of each of them; -1: a step of an earlier call
    length: Tensor  # [B, M'] their steps; fewer than C where an episode ended
    readable: int  # how many of them could be seen by a step of this call

    def at(self, time: Tensor) -> Tensor:
        """Return the steps at `time` [B, X]; times before 0 are the open chunk's."""
        chunk_size = self.sequence.shape[1] - self.last_first.shape[1]
        index = torch.where(time < 0, self.count_before[:, None] + time, chunk_size + time)
        batch, total, dim = self.sequence.shape
        index = index.clamp(0, total - 1)
        rows = torch.arange(batch, device=index.device)[:, None] * total
        # Whole steps are copied, not numbers one by one as by `gather`.
        steps = self.sequence.flatten(0, 1).index_select(0, (index + rows).flatten())
        return steps.view(batch, index.shape[1], dim)

    def newest(self, count: Tensor) -> Tensor:
        """Return the newest `count` [B] steps, oldest first, then zeros: [B, C, D]."""
        length = self.last_first.shape[1]
        slot = torch.arange(self.sequence.shape[1] - length, device=count.device)
        end = length if self.lengths is None else self.lengths[:, None]
        steps = self.at(end - count[:, None] + slot)
        return steps.masked_fill((slot >= count[:, None])[..., None], 0.0)

    def only(self, chosen: Tensor) -> "Plan":
        """Return the plan with the chunks `chosen` [B, M'] bool, of those that close, alone."""
        closings = chosen.sum(1)
        order = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, : _largest(closings)]
        end, length = self.end.gather(1, order), self.length.gather(1, order)
        return self._replace(closings=closings, end=end, length=length)

    def close(self) -> Slots:
        """Gather the closed chunks; a short one holds its steps at its newest end."""
        size = self.sequence.shape[1] - self.last_first.shape[1]
        slot = torch.arange(size, device=self.end.device)
        step_mask = slot >= size - self.length[..., None]
        steps = self.at((self.end[..., None] - (size - 1) + slot).flatten(1))
        contents = steps.view(*step_mask.shape, -1).masked_fill(~step_mask[..., None], 0.0)
        return Slots(
            contents,
            summarise(contents, step_mask),
            step_mask,
            self.step_before[:, None] + self.end - self.length + 1,
            self._episodes(),
        )

    def next_first(self) -> Tensor:
        """Return when the next episode begins, from each step on [B, T + 1]; T: in no step."""
        length = self.last_first.shape[1]
        if self.is_first is None:
            return self.closings.new_full((len(self.closings), length + 1), length)
        time = torch.arange(length, device=self.closings.device)
        back = torch.where(self.is_first, -time, -length).flip(1).cummax(1).values
        return torch.nn.functional.pad(-back.flip(1), (0, 1), value=length)

    def _episodes(self) -> Tensor:
        """Return the episodes [B, M'] of the chunks that close."""
        after = self.episode_after[:, None]
        if self.is_first is None:
            return after.expand_as(self.end)
        begun = self.is_first.cumsum(1)
        of_steps = torch.cat([self.episode_before[:, None], after - begun[:, -1:] + begun], 1)
        # What did not happen ends after the last step.
        return of_steps.gather(1, (self.end + 1).clamp(max=begun.shape[1]))


def existing(
    steps: Tensor, is_first: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Move the steps that exist to the front of their rows; the rest becomes zeros.

    Return [B, T, D] steps, which of them begin an episode, [B] how many there are, and [B, T]
    where each of the old ones is now; None where no episode begins, and where all exist.
    """
    if is_first is not None and may_look_at(is_first) and not bool(is_first.any()):
        is_first = None
    if mask is None or (may_look_at(mask) and bool(mask.all())):
        return steps, is_first, None, None
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    lengths = mask.sum(1)
    missing = torch.arange(mask.shape[1], device=mask.device) >= lengths[:, None]
    steps = steps.gather(1, order[..., None].expand_as(steps))
    steps = steps.masked_fill(missing[..., None], 0.0)
    if is_first is not None:
        is_first = is_first.gather(1, order) & ~missing
    return steps, is_first, lengths, order.argsort(1)


def plan(
    opened: OpenChunks,
    steps: Tensor,
    is_first: Tensor | None,
    lengths: Tensor | None,
    *,
    keep: bool,
) -> Plan:
    """Plan to append the first `lengths` [B] of `steps` [B, T, D] to each row.

    `keep` says whether the end of an episode closes the open chunk, or drops it.
    """
    batch, length, _ = steps.shape
    size, count = opened.steps.shape[1], opened.held
    time = torch.arange(length, device=steps.device)
    exists = None if lengths is None else time < lengths[:, None]
    if is_first is not None and exists is not None:
        is_first = is_first & exists
    if is_first is None:
        last_first = time.new_full((batch, length), -1)
        since_border = count[:, None] + time
    else:
        last_first = torch.where(is_first, time, -1).cummax(1).values
        since_border = torch.where(last_first < 0, count[:, None] + time, time - last_first)
    held = since_border % size + 1
    # Column t: the chunk that closed just before step t; the last column: after all steps.
    before = torch.cat([count[:, None], held % size], 1)
    is_full = held == size if exists is None else (held == size) & exists
    closed = torch.nn.functional.pad(torch.where(is_full, size, 0), (1, 0))
    ending = is_first if keep else None
    if ending is not None:
        early = torch.where(ending, before[:, :-1], 0)
        closed = closed + torch.nn.functional.pad(early, (0, 1))
    happened = closed > 0
    total = happened.cumsum(1)
    most = (size - 1 + length) // size
    readable = (size - 1 + max(length - 1, 0)) // size
    if length and (may_look_at(steps) or (ending is not None and is_seen())):
        most, readable = _largest(total[:, -1]), _largest(total[:, -2])
    elif ending is not None:
        # At most one a step, whatever the episodes are.
        most = readable = length
    # Scatter the events to the front; column `most` takes what did not happen.
    order = torch.where(happened, total - 1, most)
    events = torch.arange(-1, length, device=steps.device).expand(batch, -1)
    end = time.new_full((batch, most + 1), length).scatter(1, order, events)[:, :most]
    of_chunks = time.new_zeros(batch, most + 1).scatter(1, order, closed)[:, :most]
    # On its own, not as a column of all counts.
    at_end = before[:, -1:] if lengths is None else before.gather(1, lengths[:, None])
    count_after = at_end.flatten().clone()
    return Plan(
        sequence=torch.cat([opened.steps, steps], 1),
        count_before=count,
        count_after=count_after,
        step_before=opened.step_count,
        step_after=opened.step_count + (length if lengths is None else lengths),
        episode_before=opened.episode,
        episode_after=_episode_after(opened.episode, length, is_first, lengths),
        lengths=lengths,
        is_first=is_first,
        last_first=last_first,
        closings=total[:, -1],
        end=end,
        length=of_chunks,
        readable=readable,
    )


def _episode_after(
    episode: Tensor, length: int, is_first: Tensor | None, lengths: Tensor | None
) -> Tensor:
    if not length:
        return episode
    # The first step of all begins episode 0, marked or not.
    begun = episode if is_first is None else episode + is_first[:, 0]
    begun = begun.clamp(min=0)
    if is_first is not None and length > 1:
        begun = begun + is_first[:, 1:].sum(1)
    return begun if lengths is None else torch.where(lengths > 0, begun, episode)


def _largest(counts: Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0
