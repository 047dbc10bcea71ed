"""What a stored memory answers, from its state at one moment."""

import torch
from torch import Tensor

from htm_pytorch.memory.choice import Chosen
from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.formats import CPU, Chunks, step_mask
from htm_pytorch.memory.span import Span
from htm_pytorch.memory.state import State
from htm_pytorch.shapes import check_numbers


def fetched(now: State, chunks: Tensor) -> ChunkedMemory:
    """Return chunks of a state as a memory in RAM; see `StoredMemory.fetch`."""
    check_numbers("chunks", chunks, now.catalog.length)
    contents = now.fetch(chunks.tolist())
    counts = now.catalog.counts[chunks]
    is_step = None
    if (counts < now.head.chunk_size).any():
        is_step = step_mask(counts, now.head.chunk_size)[None]
    has_summaries = now.catalog.summaries.shape[1]
    summaries = now.catalog.summaries[chunks][None] if has_summaries else None
    return ChunkedMemory.from_chunks(contents[None], is_step, summaries=summaries, copy=False)


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


def searched(
    now: State, vectors: Tensor, k: int, probes: int, chosen: Chosen | None
) -> tuple[Tensor, Tensor]:
    """Return the chunks [X, k] in the table that an index finds, and their products."""
    if now.table is None or not k:
        nothing = torch.empty(len(vectors), 0, dtype=torch.int64, device=CPU)
        return nothing, nothing.float()
    gaps = now.head.gaps
    conditions = [f"NOT (first_step >= {start} AND first_step < {end})" for start, end in gaps]
    conditions += chosen.conditions() if chosen is not None else []
    condition = " AND ".join(conditions) or None
    first_steps, products = now.table.nearest(vectors, k, probes, condition)
    numbers = numbers_of(now, first_steps)
    rest, more = cut(now, vectors)
    if not len(rest):
        return numbers, products
    if chosen is not None:
        more[:, ~chosen.mask(now.catalog)[rest]] = -torch.inf
    products = products.masked_fill(torch.isin(numbers, rest), -torch.inf)
    numbers = torch.cat([numbers, rest.expand(len(vectors), -1)], 1)
    products, place = torch.cat([products, more], 1).topk(k, 1)
    return numbers.gather(1, place).masked_fill(products == -torch.inf, -1), products


def cut(now: State, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chunks [S] that lost steps which rows still tell of, and products [X, S]."""
    summary_of = now.catalog.cut
    numbers = torch.tensor(sorted(summary_of), dtype=torch.int64, device=CPU)
    if not summary_of:
        return numbers, vectors[:, :0].float()
    summaries = torch.stack([summary_of[first_step] for first_step in numbers.tolist()])
    return torch.searchsorted(now.catalog.first_steps, numbers), vectors @ summaries.T


def numbers_of(now: State, first_steps: Tensor) -> Tensor:
    """Return the chunks that begin with these steps in the table; -1 where there is none."""
    own = now.catalog.first_steps
    number = torch.searchsorted(own, first_steps.contiguous())
    # Of a chunk whose oldest steps were forgotten, the first that is left comes later.
    inside = number.clamp(max=max(len(own) - 1, 0))
    if not len(own):
        return torch.full_like(first_steps, -1)
    far = own[inside] - first_steps >= now.head.chunk_size
    return inside.masked_fill((first_steps < 0) | (number >= len(own)) | far, -1)


def numbers_to(now: State, ends: Tensor) -> Tensor:
    """Return the chunks that end before these steps; -1 where there is none."""
    own = now.catalog.first_steps + now.catalog.counts
    if not len(own):
        return torch.full_like(ends, -1)
    number = torch.searchsorted(own, ends.contiguous()).clamp(max=len(own) - 1)
    return number.masked_fill(own[number] != ends, -1)


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
