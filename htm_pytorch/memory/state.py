"""What a stored memory is at one moment, and how it follows from what was there before."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory.cache import ChunkCache
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.formats import CPU, Chunks, Format, Marks, step_mask
from htm_pytorch.memory.known import Known, Pending
from htm_pytorch.memory.log import REPAIR, Contents, Head, Range, Record
from htm_pytorch.memory.table import Table, holes


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


class Open(NamedTuple):
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

    def end(self, form: Format) -> tuple[Chunks, "Open"]:
        """Return the open chunk, closed early, and the chunk that is open then."""
        at = self.next_step, self.episode
        nothing = Batch(self.stored[:0], self.times[:0], None, *at, ())
        return self.close(nothing, form, closes=self.stored.shape[0] > 0)

    def close(self, batch: Batch, form: Format, closes: bool = False) -> tuple[Chunks, "Open"]:
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
        opened = Open(
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
        return closed, opened

    def _longer(self, batch: Batch) -> "Open":
        """Return the same chunk with more steps, of which none begins an episode."""
        if not self.stored.shape[0]:
            at = batch.first_step, batch.episode
            return Open(batch.stored.clone(), batch.times.clone(), batch.keys, *at)
        keys = None
        if self.keys is not None or batch.keys is not None:
            keys = self.keys or (None,) * self.stored.shape[0]
            keys += batch.keys or (None,) * batch.stored.shape[0]
        return self._replace(
            stored=torch.cat([self.stored, batch.stored]),
            times=torch.cat([self.times, batch.times]),
            keys=keys,
        )


class State(NamedTuple):
    """A stored memory at one moment. It does not change: a change makes another one."""

    head: Head
    table: Table | None
    known: Known
    """Of all chunks."""
    pending: Pending
    """Those that the table does not hold."""
    opened: Open
    cache: ChunkCache

    @classmethod
    def nothing(cls, head: Head, width: int, cache_slots: int) -> Self:
        """Return a memory to which nothing was written."""
        form = head.form
        return cls(
            head,
            None,
            Known.nothing(width),
            Pending.none(form),
            Open.nothing(form, 0, -1),
            ChunkCache(form, cache_slots),
        )

    @property
    def in_table(self) -> int:
        """How many of the chunks are in the table."""
        return self.known.length - self.pending.length

    def fetch(self, numbers: list[int]) -> Tensor:
        """Return the steps [U, C, D] of the chunks of these numbers; see `StoredMemory.fetch`."""
        form = self.head.form
        shape = len(numbers), form.chunk_size, form.dim
        contents = torch.empty(shape, dtype=form.given, device=CPU)
        index = torch.tensor(numbers, dtype=torch.int64, device=CPU)
        names = self.known.first_steps[index].tolist()
        missing = self.cache.read(names, contents)
        waiting = [place for place in missing if numbers[place] >= self.in_table]
        if waiting:
            stored = self.pending.known.stored[index[waiting] - self.in_table]
            contents[waiting] = form.decode(stored)
        cold = [place for place in missing if numbers[place] < self.in_table]
        if cold:
            assert self.table is not None
            stored = self.table.take([numbers[place] for place in cold])
            counts = self.known.counts[index[cold]]
            if (counts < form.chunk_size).any():
                # Steps that are to be forgotten may still be stored.
                stored[~step_mask(counts, form.chunk_size)] = 0
            fetched = form.decode(stored)
            contents[cold] = fetched
            self.cache.write([names[place] for place in cold], fetched)
        return contents

    def marks(self, number: int) -> Marks | None:
        """Return what there is to say of the steps of a chunk."""
        if not self.known.marked[number]:
            return None
        count = int(self.known.counts[number])
        if number >= self.in_table:
            found = self.pending.marks[number - self.in_table]
        else:
            assert self.table is not None
            (found,) = self.table.marks([number])
        # Of a chunk whose oldest steps were forgotten, what is left.
        return found and Marks(found.times[-count:], found.keys[-count:])


def follow(before: State, contents: Contents, table: Table | None, has_summaries: bool) -> State:
    """Return the state that a log and its table tell, from one that was right before.

    Raises:
        MemoryFileError: they do not fit each other, or are damaged.
    """
    head, pinned = contents.head, contents.head.table
    is_same = before.head.generation == head.generation and before.head.gaps == head.gaps
    end = pinned.end if pinned else 0
    if not is_same or (before.head.table is not None and pinned is None):
        before = State.nothing(head, before.known.summaries.shape[1], before.cache.slots)
    known_end = before.opened.first_step
    known, pending, opened = before.known, before.pending, before.opened
    if pinned is not None:
        assert table is not None
        if before.table is None or before.table.pinned.layout != pinned.layout:
            if end <= known_end:
                # The same chunks, in other places.
                table = table.ordered(_order(table, known, end, head.gaps))
            else:
                known, table = _read(table, head, has_summaries)
                pending, opened = Pending.none(head.form), _after(known, head, end)
        elif end > known_end:
            known, table = _read_on(before, table, head, has_summaries)
            pending, opened = Pending.none(head.form), _after(known, head, end)
        else:
            rows = before.table.pinned.rows
            order = before.table.order
            if order is not None:
                more = torch.arange(rows, pinned.rows, device=CPU)
                table = table.ordered(torch.cat([order, more]))
        kept = int((pending.known.first_steps < end).sum())
        if kept:
            pending = Pending.none(head.form).extended(pending.chunks.part(kept))
    for run in _runs(contents.records, head.form):
        batch = Batch.of(run, head.form).since(opened.next_step)
        if not len(batch.stored):
            continue
        parts = []
        if batch.first_step > opened.next_step:
            # Over a gap, which the log and its head agree on.
            chunks, opened = opened.end(head.form)
            parts.append(chunks)
            opened = opened._replace(first_step=batch.first_step)
        elif batch.first_step < opened.next_step:
            raise MemoryFileError(f"the log has step {batch.first_step} twice; {REPAIR}")
        if len(opened.stored) and batch.episode > opened.episode and batch.borders[:1] != (0,):
            batch = batch._replace(borders=(0, *batch.borders))
        chunks, opened = opened.close(batch, head.form, run[-1].closes)
        for closed in (*parts, chunks):
            known, pending = known.extended(closed), pending.extended(closed)
    if not len(opened.stored):
        opened = opened._replace(first_step=head.steps, episode=head.episode)
    return State(head, table, known, pending, opened, before.cache)


def _runs(records: Sequence[Record], form: Format) -> Iterator[list[Record]]:
    """Yield the records in parts: of steps that follow each other, up to where a chunk closes."""
    run: list[Record] = []
    end = 0
    for record in records:
        if run and (run[-1].closes or record.first_step != end):
            yield run
            run = []
        run.append(record)
        end = record.first_step + len(record.steps) // form.step_bytes
    if run:
        yield run


def _after(known: Known, head: Head, end: int) -> Open:
    episode = int(known.episodes[-1]) if known.length else -1
    return Open.nothing(head.form, end, episode)


def _read(table: Table, head: Head, has_summaries: bool) -> tuple[Known, Table]:
    """Read all rows of a table and put its chunks in the order of their steps."""
    known = Known.nothing(head.dim if has_summaries else 0)
    return _add_rows(known, 0, table.ordered(None), head, has_summaries)


def _read_on(before: State, table: Table, head: Head, has_summaries: bool) -> tuple[Known, Table]:
    """Read the rows that came since."""
    rows = before.table.pinned.rows if before.table else 0
    # Those that were pending are known: what others may look at is not read again.
    start = rows + before.pending.length
    if before.table is not None and before.table.order is not None:
        pending = torch.arange(rows, start, device=CPU)
        table = table.ordered(torch.cat([before.table.order, pending]))
    return _add_rows(before.known, start, table, head, has_summaries)


def _add_rows(
    known: Known, start: int, table: Table, head: Head, has_summaries: bool
) -> tuple[Known, Table]:
    old, order = known.length, table.order
    known = known.with_room(old + table.pinned.rows - start)
    wrong: list[int] = []
    for row in table.rows(start, has_summaries):
        wrong += (known.length - old + (~row.is_right).nonzero()[:, 0]).tolist()
        known = known.extended(row.chunks)
    rows = torch.arange(start, start + known.length - old, device=CPU)
    if len(rows) != table.pinned.rows - start:
        raise MemoryFileError(f"the table has {start + len(rows)} rows; {REPAIR}")
    if wrong:
        raise MemoryFileError(
            f"chunks in rows {wrong[:8]}: what is stored of their numbers or their summary is "
            f"damaged; {REPAIR}"
        )
    first = known.first_steps[old:]
    is_rising = bool((first.diff() > 0).all()) and (
        not old or not len(first) or bool(first[0] > known.first_steps[old - 1])
    )
    ends = first + known.counts[old:]
    hidden = _hidden(first, ends, head.gaps)
    if not is_rising or hidden.any():
        chosen = first.argsort(stable=True)
        chosen = chosen[~hidden[chosen]]
        if order is None:
            order = torch.arange(start, device=CPU)
        known = known.chosen(torch.cat([torch.arange(old, device=CPU), old + chosen]))
        order = torch.cat([order, rows[chosen]])
    elif order is not None:
        order = torch.cat([order, rows])
    table = table.ordered(order)
    known = _shortened(known, table, head, old)
    first, ends = known.first_steps, known.first_steps + known.counts
    # A look at all of them at once, and at each only where that finds something.
    is_whole = bool((first[1:] == ends[:-1]).all()) if known.length else True
    if not is_whole or (known.length and (int(first[0]), int(ends[-1])) != (0, table.pinned.end)):
        wrong_holes = holes(
            list(zip(first.tolist(), ends.tolist(), strict=True)), head.gaps, table.pinned.end
        )
        if wrong_holes:
            raise MemoryFileError(f"the table is damaged: {wrong_holes[0]}; {REPAIR}")
    elif not known.length and holes([], head.gaps, table.pinned.end):
        raise MemoryFileError(f"the table is damaged: it has no rows; {REPAIR}")
    return known, table


def _hidden(first: Tensor, ends: Tensor, gaps: Sequence[Range]) -> Tensor:
    """Return which chunks [M] bool lie in a gap with all their steps."""
    hidden = torch.zeros_like(first, dtype=torch.bool)
    for start, end in gaps:
        hidden |= (first >= start) & (ends <= end)
    return hidden


def _shortened(known: Known, table: Table, head: Head, old: int) -> Known:
    """Return what is known of chunks without their oldest steps, where those are in a gap."""
    first = known.first_steps
    ends = first + known.counts
    for start, end in head.gaps:
        cut = (first[old:] < end) & (first[old:] >= start) & (ends[old:] > end)
        for number in (old + cut.nonzero()[:, 0]).tolist():
            known = known.shortened(number, trimmed(one(table, known, number), end, head.form))
    return known


def one(table: Table, known: Known, number: int) -> Chunks:
    """Return a chunk of a table with all that is stored of it; its summary is not."""
    part = slice(number, number + 1)
    marks = tuple(table.marks([number])) if known.marked[number] else (None,)
    return Chunks(
        table.take([number]),
        known.summaries[part],
        known.counts[part],
        known.episodes[part],
        known.first_steps[part],
        known.times[part],
        known.marked[part],
        marks,
    )


def trimmed(chunk: Chunks, first: int, form: Format) -> Chunks:
    """Return a chunk without its steps before number `first`."""
    last = int(chunk.first_steps[0] + chunk.counts[0])
    count = torch.tensor([last - first], dtype=torch.int32, device=CPU)
    stored = chunk.stored.clone()
    stored[~step_mask(count, form.chunk_size)] = 0
    times, (marks,) = chunk.times.clone(), chunk.marks
    if marks is not None:
        marks = Marks(marks.times[-int(count) :], marks.keys[-int(count) :])
        times[0, 0] = marks.times[0]
    elif times[0, 0] != times[0, 1]:
        # What was said of each step was damaged; the time of the first was that of another one.
        times[0, 0] = torch.nan
    return chunk._replace(
        stored=stored,
        summaries=form.summarise(stored, count),
        counts=count,
        first_steps=torch.tensor([first], device=CPU),
        times=times,
        marks=(marks,),
    )


def _order(table: Table, known: Known, end: int, gaps: Sequence[Range]) -> Tensor | None:
    """Return the row of each chunk up to step `end`, where they lie otherwise than before."""
    first = table.first_steps()
    order = first.argsort(stable=True)
    first = first[order]
    length = int((known.first_steps < end).sum())
    expected = known.first_steps[:length]
    # Rows of forgotten steps may still be there, and chunks of which only the newest are left.
    place = torch.searchsorted(first, expected, right=True) - 1
    if length and (int(place.min()) < 0 or len(place.unique()) < length):
        raise MemoryFileError(f"the table lacks chunks that it had; {REPAIR}")
    if not gaps and not torch.equal(first[place], expected):
        raise MemoryFileError(f"the table has other chunks than it had; {REPAIR}")
    order = order[place]
    is_plain = torch.equal(order, torch.arange(table.pinned.rows, device=CPU))
    return None if is_plain else order


def shortened(state: State) -> list[int]:
    """Return the chunks in the table of which only the newest steps are left."""
    if state.table is None or not state.head.gaps:
        return []
    first = state.table.first_steps()
    if state.table.order is not None:
        first = first[state.table.order]
    return (first != state.known.first_steps[: state.in_table]).nonzero()[:, 0].tolist()
