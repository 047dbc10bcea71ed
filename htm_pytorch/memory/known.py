"""What a stored memory knows of its chunks without asking the disk."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

from htm_pytorch.memory.table import Chunks

GROWTH = 1.5
"""Of the room for summaries, when it is full."""


class Known:
    """What is known of every chunk, in RAM; summaries of a width of 0 where they are not wanted."""

    def __init__(self, width: int):
        self.length = 0
        number = torch.empty(0, dtype=torch.int64)
        self._columns = torch.empty(0, width), number.int(), number, number
        self._exists = number.bool()

    @property
    def summaries(self) -> Tensor:
        """[M, D]."""
        return self._columns[0][: self.length]

    @property
    def exists(self) -> Tensor:
        """[M] bool, True."""
        if len(self._exists) < self.length:
            self._exists = torch.ones(len(self._columns[0]), dtype=torch.bool)
        return self._exists[: self.length]

    @property
    def counts(self) -> Tensor:
        """[M] int32."""
        return self._columns[1][: self.length]

    @property
    def episodes(self) -> Tensor:
        """[M] int64."""
        return self._columns[2][: self.length]

    def end(self) -> tuple[int, int]:
        """Return the number of the step after the last chunk, and the episode of that chunk."""
        if not self.length:
            return 0, -1
        _, counts, episodes, first_steps = (column[self.length - 1] for column in self._columns)
        return int(first_steps + counts), int(episodes)

    def add(self, chunks: Chunks) -> None:
        """Add what `chunks` says, but for the steps."""
        length = self.length + chunks.length
        if length > len(self._columns[0]):
            room = max(length, int(GROWTH * len(self._columns[0])))
            self._columns = tuple(_grown(column, self.length, room) for column in self._columns)
        summaries, *numbers = self._columns
        summaries[self.length : length] = chunks.summaries[:, : summaries.shape[1]]
        for column, new in zip(numbers, chunks[2:], strict=True):
            column[self.length : length] = new
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget what comes after the first `length` chunks."""
        self.length = min(self.length, length)


def _grown(column: Tensor, length: int, room: int) -> Tensor:
    shape = room, *column.shape[1:]
    if not math.prod(shape):
        return column.new_empty(shape)
    # Pages that nothing is written to cost nothing; large ones are faster to read from end to end.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        pages = mmap.mmap(-1, math.prod(shape) * column.itemsize, kind)
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        grown = torch.frombuffer(pages, dtype=column.dtype).view(shape)
    else:
        grown = column.new_empty(shape)
    grown[:length] = column[:length]
    return grown
