"""What a stored memory knows of its chunks without asking the disk."""

import contextlib
import math
import mmap
from typing import Self

import torch
from torch import Tensor

from htm_pytorch.memory.formats import CPU, Chunks

GROWTH = 1.5
"""Of the room for summaries, when it is full."""


class Known:
    """What is known of every chunk, in RAM; summaries of a width of 0 where they are not wanted.

    A value: `extended` returns another one. Both share their room, of which each sees its own part.
    """

    def __init__(self, columns: tuple[Tensor, ...], length: int):
        self._columns = columns
        self.length = length

    @classmethod
    def nothing(cls, width: int) -> Self:
        """Return what is known of no chunks."""
        number = torch.empty(0, dtype=torch.int64, device=CPU)
        summaries = torch.empty(0, width, dtype=torch.float32, device=CPU)
        times = torch.empty(0, 2, dtype=torch.float64, device=CPU)
        return cls((summaries, number.int(), number, number, times, number.bool()), 0)

    @property
    def summaries(self) -> Tensor:
        """[M, D] float32."""
        return self._columns[0][: self.length]

    @property
    def counts(self) -> Tensor:
        """[M] int32."""
        return self._columns[1][: self.length]

    @property
    def episodes(self) -> Tensor:
        """[M] int64."""
        return self._columns[2][: self.length]

    @property
    def first_steps(self) -> Tensor:
        """[M] int64, rising."""
        return self._columns[3][: self.length]

    @property
    def times(self) -> Tensor:
        """[M, 2] float64, of the first and the last step; NaN where none is known."""
        return self._columns[4][: self.length]

    @property
    def marked(self) -> Tensor:
        """[M] bool, those of whose steps there is more to say."""
        return self._columns[5][: self.length]

    @property
    def nbytes(self) -> int:
        """Of the part of the room that is used."""
        return sum(column[: self.length].nbytes for column in self._columns)

    def extended(self, chunks: Chunks) -> "Known":
        """Return what is known of these and `chunks`; only the newest of such values may grow."""
        if not chunks.length:
            return self
        length = self.length + chunks.length
        columns = self._columns
        if length > len(columns[1]):
            room = max(length, int(GROWTH * len(columns[1])))
            columns = tuple(_grown(column, self.length, room) for column in columns)
        summaries, counts, episodes, first_steps, times, marked = (
            column[self.length : length] for column in columns
        )
        summaries.copy_(chunks.summaries[:, : summaries.shape[1]])
        counts.copy_(chunks.counts)
        episodes.copy_(chunks.episodes)
        first_steps.copy_(chunks.first_steps)
        times.copy_(chunks.times)
        marked.copy_(chunks.marked)
        return Known(columns, length)

    def part(self, length: int) -> "Known":
        """Return what is known of the first `length` chunks."""
        return Known(self._columns, min(length, self.length))

    def chosen(self, order: Tensor) -> "Known":
        """Return what is known of the chunks `order` [M] int64, in room of its own."""
        columns = tuple(_grown(column, self.length, len(column)) for column in self._columns)
        for column, old in zip(columns, self._columns, strict=True):
            torch.index_select(old[: self.length], 0, order, out=column[: len(order)])
        return Known(columns, len(order))


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
