"""Chunks of which the oldest steps were forgotten: what is left of them."""

import torch

from htm_pytorch.memory.catalog import Catalog
from htm_pytorch.memory.formats import CPU, Chunks, Format, Marks, step_mask
from htm_pytorch.memory.log import Head
from htm_pytorch.memory.state import State
from htm_pytorch.memory.table import Table


def left_in_table(state: State) -> Chunks:
    """Return what is left of those chunks in the table that lost steps; rows hold all of them."""
    left = Chunks.none(state.head.form)
    if state.table is None or not state.head.gaps:
        return left
    first = state.table.first_steps()
    if state.table.order is not None:
        first = first[state.table.order]
    kept = state.catalog.first_steps[: state.in_table]
    for number in (first != kept).nonzero()[:, 0].tolist():
        chunk = _whole(state.table, state.catalog, number)
        left = left + trimmed(chunk, int(kept[number]), state.head.form)
    return left


def without_gaps(catalog: Catalog, table: Table, head: Head, start: int) -> Catalog:
    """Return what is known of chunks; of those from number `start` on without steps in a gap."""
    first = catalog.first_steps
    ends = first + catalog.counts
    for gap, end in head.gaps:
        cut = (first[start:] < end) & (first[start:] >= gap) & (ends[start:] > end)
        for number in (start + cut.nonzero()[:, 0]).tolist():
            chunk = trimmed(_whole(table, catalog, number), end, head.form)
            catalog = catalog.shortened(number, chunk)
    return catalog


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


def _whole(table: Table, catalog: Catalog, number: int) -> Chunks:
    """Return a chunk of a table with all that is stored of it; its summary is not."""
    part = slice(number, number + 1)
    marks = tuple(table.marks([number])) if catalog.marked[number] else (None,)
    return Chunks(
        table.take([number]),
        catalog.summaries[part],
        catalog.counts[part],
        catalog.episodes[part],
        catalog.first_steps[part],
        catalog.times[part],
        catalog.marked[part],
        marks,
    )
