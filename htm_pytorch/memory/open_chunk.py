"""Steps that come, and the open chunk in which they collect until it is full."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory.formats import CPU, Chunks, Format, Marks, step_mask
from htm_pytorch.memory.log import Record


class Batch(NamedTuple):
    """Steps that come together."""

    stored: Tensor  # [T, step_bytes] uint8
    times: Tensor  # [T] float64
    keys: tuple[str | None, ...] | None  # one for each, where there is any
    first_step: int
    episode: int  # of the first of them
    borders: tuple[int, ...]  # which of them begin an episode

    @classmethod
    def of(cls, records: Sequence[Record], form: Format) -> Self:
        """Return the steps of records that follow each other."""
        borders: list[int] = []
        times: list[Tensor] = []
        keys: list[str | None] = []
        at, episode = 0, records[0].episode
        for record in records:
            length = len(record.steps) // form.step_bytes
            if record.episode > episode and 0 not in record.borders:
                borders.append(at)
            borders += [at + border for border in record.borders]
            episode = record.episode + sum(border > 0 for border in record.borders)
            time = torch.tensor(record.times or [torch.nan], dtype=torch.float64, device=CPU)
            times.append(time.expand(length))
            some = record.keys or (None,)
            keys += some if len(some) == length else some * length
            at += length
        steps = bytearray(b"".join(record.steps for record in records))
        stored = torch.frombuffer(steps, dtype=torch.uint8).view(at, form.step_bytes)
        names = None if keys.count(None) == at else tuple(keys)
        first = records[0].first_step, records[0].episode
        return cls(stored, torch.cat(times), names, *first, tuple(borders))

    def since(self, step: int) -> Self:
        """Return those from number `step` on."""
        old = step - self.first_step
        if old <= 0:
            return self
        return type(self)(
            self.stored[old:],
            self.times[old:],
            None if self.keys is None else self.keys[old:],
            step,
            self.episode + sum(0 < border <= old for border in self.borders),
            tuple(border - old for border in self.borders if border >= old),
        )

    def record(self) -> Record:
        """Return what the log keeps of it."""
        times, keys = self.times, self.keys or ()
        first, last = (float(times[0]), float(times[-1])) if times.shape[0] else (0.0, 0.0)
        # Times never fall, and those that are not known come first.
        if first == last or last != last:
            times = times[:1] if last == last else times[:0]
        if len(set(keys)) == 1:
            keys = keys[:1]
        stored = self.stored.contiguous().numpy().tobytes()
        of_steps = tuple(times.tolist()), keys
        return Record(self.first_step, self.episode, self.borders, *of_steps, False, stored)


class OpenChunk(NamedTuple):
    """The chunk that is open."""

    stored: Tensor  # [t, step_bytes] uint8, t < C
    times: Tensor  # [t] float64
    keys: tuple[str | None, ...] | None
    first_step: int  # its number, or that of the step to come
    episode: int  # -1 before the first step of all

    @classmethod
    def nothing(cls, form: Format, first_step: int, episode: int) -> Self:
        """Return a chunk without steps."""
        none = Chunks.none(form)
        return cls(none.stored.flatten(0, 1), none.times[:, 0], None, first_step, episode)

    @property
    def next_step(self) -> int:
        """The number of the step to come."""
        return self.first_step + self.stored.shape[0]

    def records(self) -> list[Record]:
        """Return what the log keeps of it."""
        if not self.stored.shape[0]:
            return []
        return [
            Batch(self.stored, self.times, self.keys, self.first_step, self.episode, ()).record()
        ]

    def end(self, form: Format) -> tuple[Chunks, "OpenChunk"]:
        """Return the open chunk, closed early, and the chunk that is open then."""
        at = self.next_step, self.episode
        nothing = Batch(self.stored[:0], self.times[:0], None, *at, ())
        return self.close(nothing, form, closes=self.stored.shape[0] > 0)

    def follow(self, batch: Batch, form: Format, closes: bool) -> tuple[Chunks, "OpenChunk"]:
        """Return the chunks that steps of a log close, and the chunk that is open then.

        Unlike in `close`, steps may be missing before them, and what tells that an episode begins
        with the first of them may be its number alone.
        """
        before, open_chunk = Chunks.none(form), self
        if batch.first_step > self.next_step:
            before, open_chunk = self.end(form)
            open_chunk = open_chunk._replace(first_step=batch.first_step)
        is_later = batch.episode > open_chunk.episode
        if len(open_chunk.stored) and is_later and batch.borders[:1] != (0,):
            batch = batch._replace(borders=(0, *batch.borders))
        closed, open_chunk = open_chunk.close(batch, form, closes)
        return before + closed, open_chunk

    def close(self, batch: Batch, form: Format, closes: bool = False) -> tuple[Chunks, "OpenChunk"]:
        """Return the chunks that more steps close, and the chunk that is open then.

        Where an episode begins, the chunk before it closes early; `closes` says that the last one
        does, too.
        """
        size, held = form.chunk_size, self.stored.shape[0]
        is_plain = not batch.borders or (not held and batch.borders == (0,))
        if is_plain and not closes and held + batch.stored.shape[0] < size:
            return Chunks.none(form), self._longer(batch)
        sequence = torch.cat([self.stored, batch.stored]) if held else batch.stored
        times = torch.cat([self.times, batch.times]) if held else batch.times
        keys = None
        if self.keys is not None or batch.keys is not None:
            keys = (self.keys or (None,) * held) + (batch.keys or (None,) * batch.stored.shape[0])
        episode = self.episode if held else batch.episode
        begins = [0, *(held + border for border in batch.borders if held + border)]
        ends: list[Tensor] = []
        counts: list[Tensor] = []
        episodes: list[Tensor] = []
        rest = 0
        pairs = zip(begins, [*begins[1:], sequence.shape[0]], strict=True)
        for number, (start, end) in enumerate(pairs):
            rest = (end - start) % size if number == len(begins) - 1 and not closes else 0
            whole = torch.arange(start, end - rest, size, device=CPU) + size
            ends.append(whole.clamp(max=end - rest))
            counts.append((size - (whole - ends[-1])).int())
            episodes.append(torch.full_like(whole, episode + number))
        last, count, of_episode = torch.cat(ends), torch.cat(counts), torch.cat(episodes)
        if (count == size).all():
            chunks = sequence[: sequence.shape[0] - rest].view(len(last), size, form.step_bytes)
        else:
            index = last[:, None] - size + torch.arange(size, device=CPU)
            chunks = sequence[index.clamp(min=0)]
            chunks[~step_mask(count, size)] = 0
        first = last - count
        of_chunk = torch.stack([times[first], times[last - 1]], 1)
        # Times never fall: alike at both ends, alike between.
        marked = (of_chunk[:, 0] != of_chunk[:, 1]) & ~of_chunk.isnan().all(1)
        marks: list[Marks | None] = [None] * len(last)
        if keys is not None or marked.any():
            for number, (start, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
                some = () if keys is None else keys[start:end]
                has_key = any(key is not None for key in some)
                if has_key or marked[number]:
                    marked[number] = True
                    marks[number] = Marks(tuple(times[start:end].tolist()), some if has_key else ())
        start = sequence.shape[0] - rest
        open_chunk = OpenChunk(
            # Copies, so that it does not hold on to the whole sequence.
            sequence[start:].clone(),
            times[start:].clone(),
            None if keys is None or keys[start:].count(None) == rest else keys[start:],
            self.first_step + start,
            episode + len(begins) - 1,
        )
        closed = Chunks(
            chunks,
            form.summarise(chunks, count),
            count,
            of_episode,
            self.first_step + first,
            of_chunk,
            marked,
            tuple(marks),
        )
        return closed, open_chunk

    def _longer(self, batch: Batch) -> "OpenChunk":
        """Return the same chunk with more steps, of which none begins an episode."""
        if not self.stored.shape[0]:
            at = batch.first_step, batch.episode
            return OpenChunk(batch.stored.clone(), batch.times.clone(), batch.keys, *at)
        keys = None
        if self.keys is not None or batch.keys is not None:
            keys = self.keys or (None,) * self.stored.shape[0]
            keys += batch.keys or (None,) * batch.stored.shape[0]
        return self._replace(
            stored=torch.cat([self.stored, batch.stored]),
            times=torch.cat([self.times, batch.times]),
            keys=keys,
        )
