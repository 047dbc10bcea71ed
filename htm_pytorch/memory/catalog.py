"""`Catalog`: what a stored memory has in RAM of every chunk, so as not to ask the disk."""

import contextlib
import math
import mmap
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch.memory.codes import Codes
from htm_pytorch.memory.formats import CPU, Chunks, Format, Marks

GROWTH = 1.5
"""How many times as large the room becomes when it is full."""


class Catalog:
    """What is known of every chunk, in RAM; what is not wanted in RAM has a width of 0.

    A value: `extended` returns another one. Both share their room, of which each sees its own part.
    """

    def __init__(
        self,
        columns: tuple[Tensor, ...],
        length: int,
        cut: Mapping[int, Tensor] | None = None,
        codes: Codes | None = None,
    ):
        self._columns = columns
        self.length = length
        self.codes = codes
        """Of the summaries, where every query scores all of them."""
        self.cut = cut or {}
        """[D] float32 each, the summaries of chunks that lost their oldest steps, by the number of
        the first step that is left; rows of the table tell of all steps."""

    @classmethod
    def nothing(cls, width: int) -> Self:
        """Return what is known of no chunks, with codes of summaries of this width; 0: without."""
        codes = Codes.empty(1, 0, width, with_fine=True) if width else None
        return cls(_empty(0, 0, 0), 0, codes=codes)

    @classmethod
    def whole(cls, form: Format) -> Self:
        """Return what is known of no chunks, where all that is stored of each is to be."""
        return cls(_empty(form.chunk_size, form.step_bytes, form.dim), 0)

    @property
    def stored(self) -> Tensor:
        """[M, C, step_bytes] uint8, what is stored of the steps; [M, 0, 0] where it is not here."""
        return self._columns[0][: self.length]

    @property
    def summaries(self) -> Tensor:
        """[M, D] float32, the means of the steps; [M, 0] where they are not here, but coded."""
        return self._columns[1][: self.length]

    @property
    def counts(self) -> Tensor:
        """[M] int32, how many steps each chunk has."""
        return self._columns[2][: self.length]

    @property
    def episodes(self) -> Tensor:
        """[M] int64, which episode each chunk is of."""
        return self._columns[3][: self.length]

    @property
    def first_steps(self) -> Tensor:
        """[M] int64, the number that the first step of each has; they rise."""
        return self._columns[4][: self.length]

    @property
    def times(self) -> Tensor:
        """[M, 2] float64, when the first and the last step were; NaN where that is not known."""
        return self._columns[5][: self.length]

    @property
    def marked(self) -> Tensor:
        """[M] bool, those of whose steps there is more to say."""
        return self._columns[6][: self.length]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All of these columns, which come in the order of `Chunks`."""
        return tuple(column[: self.length] for column in self._columns)

    @property
    def nbytes(self) -> int:
        """How many bytes of the room are used."""
        codes = 0 if self.codes is None else self.codes.nbytes(self.length)
        return sum(column.nbytes for column in self.columns) + codes

    @property
    def width(self) -> int:
        """Of the summaries that are coded; 0: none are."""
        return 0 if self.codes is None else self.codes.centres.shape[2]

    def extended(self, chunks: Chunks) -> "Catalog":
        """Return what is known of these and `chunks`; only the newest of such values may grow."""
        if not chunks.length:
            return self
        length = self.length + chunks.length
        columns, codes = self._columns, self.codes
        if length > len(columns[2]):
            grown = self.with_room(max(length, int(GROWTH * len(columns[2]))))
            columns, codes = grown._columns, grown.codes
        if codes is not None:
            codes = codes.appended(self.length, chunks.summaries)
        for column, new in zip(columns, chunks.columns, strict=True):
            part = column[self.length : length]
            if part.numel():
                part.copy_(new[:, : part.shape[1]] if part.ndim == 2 else new)
        return Catalog(columns, length, self.cut, codes)

    def with_room(self, room: int) -> "Catalog":
        """Return the same, which can grow to so many chunks."""
        if room <= len(self._columns[2]):
            return self
        columns = tuple(_grown(column, self.length, room) for column in self._columns)
        codes = None if self.codes is None else self.codes.with_room(room, self.length)
        return Catalog(columns, self.length, self.cut, codes)

    def part(self, length: int) -> "Catalog":
        """Return what is known of the first `length` chunks."""
        return Catalog(self._columns, min(length, self.length), self.cut, self.codes)

    def chosen(self, order: Tensor) -> "Catalog":
        """Return what is known of the chunks `order` [M] int64, in room of its own."""
        columns = tuple(_grown(column, self.length, len(column)) for column in self._columns)
        for column, old in zip(columns, self._columns, strict=True):
            torch.index_select(old[: self.length], 0, order, out=column[: len(order)])
        codes = None if self.codes is None else self.codes.chosen(order)
        return Catalog(columns, len(order), self.cut, codes)

    def shortened(self, number: int, chunk: Chunks) -> "Catalog":
        """Return the same with what is left of a chunk; only the newest of such values may."""
        first = int(chunk.first_steps[0])
        self.first_steps[number] = first
        self.counts[number] = chunk.counts[0]
        self.times[number] = chunk.times[0]
        if self.codes is not None:
            self.codes.recoded(number, chunk.summaries[0])
        return Catalog(
            self._columns, self.length, {**self.cut, first: chunk.summaries[0]}, self.codes
        )


class Unflushed(NamedTuple):
    """Closed chunks that the table does not hold; like `Catalog`, a value that shares room."""

    catalog: Catalog
    marks: tuple[Marks | None, ...]

    @classmethod
    def none(cls, form: Format) -> Self:
        """Return no chunks."""
        return cls(Catalog.whole(form), ())

    @property
    def length(self) -> int:
        """How many chunks there are, M."""
        return self.catalog.length

    @property
    def chunks(self) -> Chunks:
        """The chunks, with all that is stored of them."""
        return Chunks._make((*self.catalog.columns, self.marks))

    def extended(self, chunks: Chunks) -> "Unflushed":
        """Return these and `chunks`; only the newest of such values may grow."""
        if not chunks.length:
            return self
        return Unflushed(self.catalog.extended(chunks), self.marks + chunks.marks)


def _empty(size: int, step_bytes: int, width: int) -> tuple[Tensor, ...]:
    stored = torch.empty(0, size, step_bytes, dtype=torch.uint8, device=CPU)
    summaries = torch.empty(0, width, dtype=torch.float32, device=CPU)
    number = torch.empty(0, dtype=torch.int64, device=CPU)
    times = torch.empty(0, 2, dtype=torch.float64, device=CPU)
    return stored, summaries, number.int(), number, number, times, number.bool()


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
