"""What a stored memory answers, from its state at one moment."""

import torch
from torch import Tensor

from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.formats import CPU, Chunks, step_mask
from htm_pytorch.memory.span import Span
from htm_pytorch.memory.state import State
from htm_pytorch.memory.summaries import summarise
from htm_pytorch.shapes import check_numbers

_FETCHED = 512


def fetched(now: State, chunks: Tensor) -> ChunkedMemory:
    """Return chunks of a state as a memory in RAM; see `StoredMemory.fetch`."""
    check_numbers("chunks", chunks, now.catalog.length)
    contents = now.fetch(chunks.tolist())
    counts = now.catalog.counts[chunks]
    is_step = None
    if (counts < now.head.chunk_size).any():
        is_step = step_mask(counts, now.head.chunk_size)[None]
    summaries = summarise(contents[None].float(), is_step)
    return ChunkedMemory.from_chunks(contents[None], is_step, summaries=summaries, copy=False)


def summaries_of(now: State, chunks: Tensor) -> Tensor:
    """Return the summaries [U, D] float32 of chunks [U], of which few are fetched at a time."""
    parts = [fetched(now, some).summaries[0] for some in chunks.split(_FETCHED)]
    return torch.cat(parts) if parts else torch.empty(0, now.head.form.dim, device=CPU)


def span(now: State, number: int) -> Span:
    """Return which steps a chunk holds; see `StoredMemory.spans`."""
    catalog = now.catalog
    count = int(catalog.counts[number])
    first, last = (None if t != t else t for t in catalog.times[number].tolist())
    marks = now.marks(number)
    return Span(
        number,
        int(catalog.first_steps[number]),
        count,
        int(catalog.episodes[number]),
        first,
        last,
        marks.keys if marks else (),
    )


def read(now: State, first: int, last: int) -> Tensor:
    """Return the steps [1, last - first, D] of a range of numbers; see `StoredMemory.read`."""
    catalog, form = now.catalog, now.head.form
    ends = catalog.first_steps + catalog.counts
    numbers = ((catalog.first_steps < last) & (ends > first)).nonzero()[:, 0]
    counts = catalog.counts[numbers]
    is_step = step_mask(counts, form.chunk_size)
    steps = [now.fetch(numbers.tolist())[is_step], form.decode(now.open_chunk.stored)]
    of_chunks = catalog.first_steps[numbers].repeat_interleave(counts.long())
    place = torch.arange(len(of_chunks), device=CPU)
    place = place - (counts.cumsum(0) - counts).repeat_interleave(counts.long())
    open_steps = torch.arange(now.open_chunk.first_step, now.open_chunk.next_step, device=CPU)
    number = torch.cat([of_chunks + place, open_steps])
    wanted = (number >= first) & (number < last)
    if int(wanted.sum()) != last - first:
        there = f"{now.head.steps} steps" + (", some forgotten" if now.head.gaps else "")
        raise ValueError(
            f"first, last: expected steps that are there ({there}), got {first} and {last}"
        )
    return torch.cat(steps)[wanted][None]


def whole(now: State, start: int, end: int) -> Chunks:
    """Return chunks of the table with all that is stored of them."""
    assert now.table is not None
    form, catalog, numbers = now.head.form, now.catalog, list(range(start, end))
    stored = now.table.take(numbers)
    counts = catalog.counts[start:end]
    stored[~step_mask(counts, form.chunk_size)] = 0
    return Chunks(
        stored,
        form.summarise(stored, counts),
        counts,
        catalog.episodes[start:end],
        catalog.first_steps[start:end],
        catalog.times[start:end],
        catalog.marked[start:end],
        tuple(now.marks(number) for number in numbers),
    )
