"""What is appended, and what is forgotten: from arguments to what a log keeps."""

import math
import operator
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from htm_pytorch.memory.formats import CPU, Chunks
from htm_pytorch.memory.log import Head, Range, Record
from htm_pytorch.memory.open_chunk import Batch, OpenChunk
from htm_pytorch.memory.state import State
from htm_pytorch.memory.trimming import trimmed
from htm_pytorch.shapes import check_device, check_floating, check_kind, check_mask, check_tensor


def batch(
    before: State,
    steps: Tensor,
    is_first: Tensor | None,
    keys: str | Sequence[str | None] | None,
    times: float | Tensor | None,
) -> Batch | None:
    """Return the steps that are to be appended; None where there are none.

    Raises:
        ValueError: an argument does not fit; see `StoredMemory.append`.
    """
    head = before.head
    check_tensor("steps", steps, "B T D", B=1, D=head.dim)
    check_floating("steps", steps, head.form.given)
    check_device("steps", steps, CPU)
    length = steps.shape[1]
    check_mask("is_first", is_first, "B T", CPU, B=1, T=length)
    borders = () if is_first is None else tuple(is_first[0].nonzero()[:, 0].tolist())
    names = key_of_each(keys, length)
    when = time_of_each(times, length, head.time)
    if not length:
        return None
    episode = max(head.episode + (borders[:1] == (0,)), 0)
    stored = head.form.encode(steps[0].detach())
    return Batch(stored, when, names, head.steps, episode, borders)


def appended(before: State, batch: Batch) -> tuple[State, Chunks]:
    """Return the state after more steps, but for what the log holds, and the chunks they close.

    Raises:
        ValueError: they are not finite.
    """
    head = before.head
    closed, open_chunk = before.open_chunk.close(batch, head.form)
    check_finite(closed, open_chunk, batch, head)
    head = head._replace(
        sequence=head.sequence + 1,
        steps=open_chunk.next_step,
        episode=open_chunk.episode,
        time=float(batch.times[-1]),
    )
    catalog = before.catalog.extended(closed)
    return before._replace(head=head, catalog=catalog, open_chunk=open_chunk), closed


def numbers_of_episodes(episodes: Iterable[int]) -> tuple[int, ...]:
    """Return them in order, without those that no episode can have.

    Raises:
        ValueError: they are not numbers of episodes.
    """
    try:
        numbers = {operator.index(episode) for episode in episodes}
        return tuple(sorted(number for number in numbers if 0 <= number < 2**63))
    except TypeError as error:
        raise ValueError(f"episodes: expected their numbers, got {episodes!r} ({error})") from error


def moment(name: str, time: float | None) -> float | None:
    """Return a time that bounds others.

    Raises:
        ValueError: it is none.
    """
    if time is None:
        return None
    return _seconds(name, time)


def _seconds(name: str, time: float) -> float:
    try:
        found = float(time)
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    if math.isnan(found):
        raise ValueError(f"{name}: expected a time in seconds, got {time!r}")
    return found


def key_of_each(
    keys: str | Sequence[str | None] | None, length: int
) -> tuple[str | None, ...] | None:
    """Return one for each step.

    Raises:
        ValueError: they are none, or not as many.
    """
    if keys is None:
        return None
    check_kind("keys", keys, Sequence, "a str, or one or None for each step")
    found = (keys,) * length if isinstance(keys, str) else tuple(keys)
    wrong = [key for key in found if key is not None and not isinstance(key, str)]
    if wrong:
        raise ValueError(f"keys: expected a str, or one or None for each step, got {wrong[0]!r}")
    if len(found) != length:
        raise ValueError(f"keys: expected {length}, one for each step, got {len(found)}")
    return None if found.count(None) == length else found


def time_of_each(times: float | Tensor | None, length: int, last: float | None) -> Tensor:
    """Return one for each step [T] float64.

    Raises:
        ValueError: they are not numbers, not as many, or fall.
    """
    if times is None:
        # A clock may be set back.
        now = max(time.time(), last if last is not None else -math.inf)
        return torch.full((length,), now, dtype=torch.float64, device=CPU)
    if not isinstance(times, Tensor):
        times = torch.tensor(_seconds("times", times), dtype=torch.float64, device=CPU)
    if times.ndim == 0:
        times = times.expand(length)
    check_tensor("times", times, "T", T=length)
    check_device("times", times, CPU)
    found = times.detach().double()
    if not found.isfinite().all():
        raise ValueError("times: expected finite numbers, got some that are not")
    least = -torch.inf if last is None else last
    if length and (float(found[0]) < least or bool((found.diff() < 0).any())):
        raise ValueError(
            f"times: expected times that never fall, from {least} on, got {found[:4].tolist()}"
        )
    return found


def check_finite(closed: Chunks, open_chunk: OpenChunk, batch: Batch, head: Head) -> None:
    """Raise a ValueError where steps are no numbers: they would spoil every answer."""
    # A mean is finite only if all its steps are; so the few numbers tell of all.
    if _is_finite(closed.summaries):
        # Of an open chunk only what is new: the steps before were looked at when they came.
        if _is_finite(head.form.decode(batch.stored[-max(open_chunk.stored.shape[0], 1) :])):
            return
        wrong = open_chunk.first_step
    else:
        bad = ~closed.summaries.isfinite().all(1)
        wrong = int(closed.first_steps[bad][0])
    raise ValueError(
        f"steps: expected finite numbers, got NaN or inf in the chunk of step {wrong}; "
        "nothing was stored"
    )


def _is_finite(numbers: Tensor) -> bool:
    # Where the sum is, all are, and it is the faster question.
    return math.isfinite(float(numbers.sum())) or bool(numbers.isfinite().all())


def records_of(unflushed: Chunks) -> list[Record]:
    """Return what a log keeps of closed chunks."""
    records: list[Record] = []
    for place in range(unflushed.length):
        chunk, marks = unflushed.part(place, place + 1), unflushed.marks[place]
        size, count = chunk.stored.shape[1], int(chunk.counts[0])
        times = chunk.times[0, :1].expand(count)
        if marks is not None:
            times = torch.tensor(marks.times, dtype=torch.float64, device=CPU)
        keys = (marks.keys or None) if marks else None
        first_step, episode = int(chunk.first_steps[0]), int(chunk.episodes[0])
        begins = bool(records) and records[-1].episode < episode
        stored = chunk.stored[0, size - count :]
        batch = Batch(stored, times, keys, first_step, episode, (0,) * begins)
        records.append(batch.record()._replace(closes=count < size))
    return records


def without(unflushed: Chunks, gone: Sequence[Range], head: Head) -> Chunks:
    """Return the chunks that are left, and of some of them the newest steps."""
    left = Chunks.none(head.form)
    for place in range(unflushed.length):
        chunk = unflushed.part(place, place + 1)
        first = int(chunk.first_steps[0])
        last = first + int(chunk.counts[0])
        if within((first, last), gone):
            continue
        cut = max((end for start, end in gone if start <= first < end), default=first)
        left = left + (trimmed(chunk, cut, head.form) if cut > first else chunk)
    return left


def steps_of(now: State, episodes: Sequence[int]) -> list[Range]:
    """Return the steps of episodes."""
    catalog, open_chunk = now.catalog, now.open_chunk
    chosen = torch.isin(catalog.episodes, torch.tensor(episodes, dtype=torch.int64, device=CPU))
    first = catalog.first_steps[chosen]
    ranges = list(zip(first.tolist(), (first + catalog.counts[chosen]).tolist(), strict=True))
    if len(open_chunk.stored) and open_chunk.episode in episodes:
        ranges.append((open_chunk.first_step, open_chunk.next_step))
    return ranges


def within(part: Range, ranges: Sequence[Range]) -> bool:
    """Whether one of the ranges holds all of a part."""
    return any(start <= part[0] and part[1] <= end for start, end in ranges)


def step_at(now: State, moment: float) -> int:
    """Return the number of the first step that happened at this time or later.

    Raises:
        ValueError: there are steps of which no time is known.
    """
    catalog, open_chunk = now.catalog, now.open_chunk
    if catalog.times.isnan().any() or open_chunk.times.isnan().any():
        raise ValueError(
            "before: expected times of all steps, got some that were stored without; "
            "before_step forgets by number"
        )
    later = (open_chunk.times >= moment).nonzero()[:, 0]
    step = open_chunk.first_step + (int(later[0]) if len(later) else len(open_chunk.times))
    chunks = (catalog.times[:, 1] >= moment).nonzero()[:, 0]
    if len(chunks):
        number = int(chunks[0])
        step, marks = int(catalog.first_steps[number]), now.marks(number)
        if marks is not None:
            step += sum(time < moment for time in marks.times)
    return step
