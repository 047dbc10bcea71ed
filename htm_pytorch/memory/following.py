"""How a stored memory follows from its log and its table, and from what was there before."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from htm_pytorch.memory.catalog import Catalog, Unflushed
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.formats import CPU, Format
from htm_pytorch.memory.log import REPAIR, Contents, Head, Range, Record
from htm_pytorch.memory.open_chunk import Batch, OpenChunk
from htm_pytorch.memory.state import State
from htm_pytorch.memory.table import Table, holes
from htm_pytorch.memory.trimming import without_gaps


def follow(before: State, contents: Contents, table: Table | None, has_summaries: bool) -> State:
    """Return the state that a log and its table tell, from one that was right before.

    Raises:
        MemoryFileError: they do not fit each other, or are damaged.
    """
    head, pinned = contents.head, contents.head.table
    is_same = before.head.generation == head.generation and before.head.gaps == head.gaps
    end = pinned.end if pinned else 0
    if not is_same or (before.head.table is not None and pinned is None):
        before = before.emptied(head)
    known_end = before.open_chunk.first_step
    catalog, unflushed, open_chunk = before.catalog, before.unflushed, before.open_chunk
    if pinned is not None:
        assert table is not None
        if before.table is None or before.table.pinned.layout != pinned.layout:
            if end <= known_end:
                # The same chunks, in other places.
                table = table.ordered(_order(table, catalog, end, head.gaps))
            else:
                catalog, table = _read(table, head, has_summaries)
                unflushed, open_chunk = Unflushed.none(head.form), _after(catalog, head, end)
        elif end > known_end:
            catalog, table = _read_on(before, table, head, has_summaries)
            unflushed, open_chunk = Unflushed.none(head.form), _after(catalog, head, end)
        else:
            rows = before.table.pinned.rows
            order = before.table.order
            if order is not None:
                more = torch.arange(rows, pinned.rows, device=CPU)
                table = table.ordered(torch.cat([order, more]))
        kept = int((unflushed.catalog.first_steps < end).sum())
        if kept:
            unflushed = Unflushed.none(head.form).extended(unflushed.chunks.part(kept))
    for run in _runs(contents.records, head.form):
        batch = Batch.of(run, head.form).since(open_chunk.next_step)
        if not len(batch.stored):
            continue
        if batch.first_step < open_chunk.next_step:
            raise MemoryFileError(f"the log has step {batch.first_step} twice; {REPAIR}")
        closed, open_chunk = open_chunk.follow(batch, head.form, run[-1].closes)
        catalog, unflushed = catalog.extended(closed), unflushed.extended(closed)
    if not len(open_chunk.stored):
        open_chunk = open_chunk._replace(first_step=head.steps, episode=head.episode)
    return State(head, table, catalog, unflushed, open_chunk, before.cache)


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


def _after(catalog: Catalog, head: Head, end: int) -> OpenChunk:
    episode = int(catalog.episodes[-1]) if catalog.length else -1
    return OpenChunk.nothing(head.form, end, episode)


def _read(table: Table, head: Head, has_summaries: bool) -> tuple[Catalog, Table]:
    """Read all rows of a table and put its chunks in the order of their steps."""
    catalog = Catalog.nothing(head.dim if has_summaries else 0)
    return _add_rows(catalog, 0, table.ordered(None), head, has_summaries)


def _read_on(before: State, table: Table, head: Head, has_summaries: bool) -> tuple[Catalog, Table]:
    """Read the rows that came since."""
    rows = before.table.pinned.rows if before.table else 0
    # Those that were not flushed are known: what others may look at is not read again.
    start = rows + before.unflushed.length
    if before.table is not None and before.table.order is not None:
        unflushed = torch.arange(rows, start, device=CPU)
        table = table.ordered(torch.cat([before.table.order, unflushed]))
    return _add_rows(before.catalog, start, table, head, has_summaries)


def _add_rows(
    catalog: Catalog, start: int, table: Table, head: Head, has_summaries: bool
) -> tuple[Catalog, Table]:
    old, order = catalog.length, table.order
    catalog = catalog.with_room(old + table.pinned.rows - start)
    wrong: list[int] = []
    for row in table.rows(start, has_summaries):
        wrong += (catalog.length - old + (~row.is_right).nonzero()[:, 0]).tolist()
        catalog = catalog.extended(row.chunks)
    rows = torch.arange(start, start + catalog.length - old, device=CPU)
    if len(rows) != table.pinned.rows - start:
        raise MemoryFileError(f"the table has {start + len(rows)} rows; {REPAIR}")
    if wrong:
        raise MemoryFileError(
            f"chunks in rows {wrong[:8]}: what is stored of their numbers or their summary is "
            f"damaged; {REPAIR}"
        )
    first = catalog.first_steps[old:]
    is_rising = bool((first.diff() > 0).all()) and (
        not old or not len(first) or bool(first[0] > catalog.first_steps[old - 1])
    )
    ends = first + catalog.counts[old:]
    hidden = _hidden(first, ends, head.gaps)
    if not is_rising or hidden.any():
        chosen = first.argsort(stable=True)
        chosen = chosen[~hidden[chosen]]
        if order is None:
            order = torch.arange(start, device=CPU)
        catalog = catalog.chosen(torch.cat([torch.arange(old, device=CPU), old + chosen]))
        order = torch.cat([order, rows[chosen]])
    elif order is not None:
        order = torch.cat([order, rows])
    table = table.ordered(order)
    catalog = without_gaps(catalog, table, head, old)
    first, ends = catalog.first_steps, catalog.first_steps + catalog.counts
    # A look at all of them at once, and at each only where that finds something.
    is_whole = bool((first[1:] == ends[:-1]).all()) if catalog.length else True
    if not is_whole or (catalog.length and (int(first[0]), int(ends[-1])) != (0, table.pinned.end)):
        wrong_holes = holes(
            list(zip(first.tolist(), ends.tolist(), strict=True)), head.gaps, table.pinned.end
        )
        if wrong_holes:
            raise MemoryFileError(f"the table is damaged: {wrong_holes[0]}; {REPAIR}")
    elif not catalog.length and holes([], head.gaps, table.pinned.end):
        raise MemoryFileError(f"the table is damaged: it has no rows; {REPAIR}")
    return catalog, table


def _hidden(first: Tensor, ends: Tensor, gaps: Sequence[Range]) -> Tensor:
    """Return which chunks [M] bool lie in a gap with all their steps."""
    hidden = torch.zeros_like(first, dtype=torch.bool)
    for start, end in gaps:
        hidden |= (first >= start) & (ends <= end)
    return hidden


def _order(table: Table, catalog: Catalog, end: int, gaps: Sequence[Range]) -> Tensor | None:
    """Return the row of each chunk up to step `end`, where they lie otherwise than before."""
    first = table.first_steps()
    order = first.argsort(stable=True)
    first = first[order]
    length = int((catalog.first_steps < end).sum())
    expected = catalog.first_steps[:length]
    # Rows of forgotten steps may still be there, and chunks of which only the newest are left.
    place = torch.searchsorted(first, expected, right=True) - 1
    if length and (int(place.min()) < 0 or len(place.unique()) < length):
        raise MemoryFileError(f"the table lacks chunks that it had; {REPAIR}")
    if not gaps and not torch.equal(first[place], expected):
        raise MemoryFileError(f"the table has other chunks than it had; {REPAIR}")
    order = order[place]
    is_plain = torch.equal(order, torch.arange(table.pinned.rows, device=CPU))
    return None if is_plain else order
