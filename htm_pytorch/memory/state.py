"""`State`: what a stored memory is at one moment."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory.cache import ChunkCache
from htm_pytorch.memory.catalog import Catalog, Unflushed
from htm_pytorch.memory.formats import CPU, Marks, step_mask
from htm_pytorch.memory.log import Head
from htm_pytorch.memory.open_chunk import OpenChunk
from htm_pytorch.memory.table import Table


class State(NamedTuple):
    """A stored memory at one moment. It does not change: a change makes another one."""

    head: Head
    table: Table | None
    catalog: Catalog
    """What is known of all closed chunks."""
    unflushed: Unflushed
    """The newest of them, which the table does not hold yet."""
    open_chunk: OpenChunk
    cache: ChunkCache

    @classmethod
    def nothing(cls, head: Head, width: int, cache_slots: int) -> Self:
        """Return a memory to which nothing was written."""
        form = head.form
        return cls(
            head,
            None,
            Catalog.nothing(width),
            Unflushed.none(form),
            OpenChunk.nothing(form, 0, -1),
            ChunkCache(form, cache_slots),
        )

    def emptied(self, head: Head) -> "State":
        """Return a memory of the same sizes to which nothing was written, with another head."""
        return State.nothing(head, self.catalog.width, self.cache.slots)

    def unread(self) -> "State":
        """Return the state of a reader of this memory that has read nothing yet."""
        return self.emptied(self.head._replace(sequence=0, generation="", table=None))

    @property
    def in_table(self) -> int:
        """How many of the chunks are in the table."""
        return self.catalog.length - self.unflushed.length

    def fetch(self, numbers: list[int]) -> Tensor:
        """Return the steps [U, C, D] of the chunks of these numbers; see `StoredMemory.fetch`."""
        form = self.head.form
        shape = len(numbers), form.chunk_size, form.dim
        contents = torch.empty(shape, dtype=form.given, device=CPU)
        index = torch.tensor(numbers, dtype=torch.int64, device=CPU)
        names = self.catalog.first_steps[index].tolist()
        missing = self.cache.read(names, contents)
        waiting = [place for place in missing if numbers[place] >= self.in_table]
        if waiting:
            stored = self.unflushed.catalog.stored[index[waiting] - self.in_table]
            contents[waiting] = form.decode(stored)
        cold = [place for place in missing if numbers[place] < self.in_table]
        if cold:
            assert self.table is not None
            stored = self.table.take([numbers[place] for place in cold])
            counts = self.catalog.counts[index[cold]]
            if (counts < form.chunk_size).any():
                # Steps that are to be forgotten may still be stored.
                stored[~step_mask(counts, form.chunk_size)] = 0
            fetched = form.decode(stored)
            contents[cold] = fetched
            self.cache.write([names[place] for place in cold], fetched)
        return contents

    def marks(self, number: int) -> Marks | None:
        """Return what there is to say of the steps of a chunk."""
        if not self.catalog.marked[number]:
            return None
        count = int(self.catalog.counts[number])
        if number >= self.in_table:
            found = self.unflushed.marks[number - self.in_table]
        else:
            assert self.table is not None
            (found,) = self.table.marks([number])
        # Of a chunk whose oldest steps were forgotten, what is left.
        return found and Marks(found.times[-count:], found.keys[-count:])
