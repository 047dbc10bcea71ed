"""What a recall reads of stored memories: one as it is at a moment, some of it, or many at once."""

import os
from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from htm_pytorch.memory.answers import fetched
from htm_pytorch.memory.choice import Chosen
from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.fading import Fading
from htm_pytorch.memory.formats import CPU
from htm_pytorch.memory.home import Readable
from htm_pytorch.memory.searching import by_codes, by_index
from htm_pytorch.memory.span import Span
from htm_pytorch.memory.state import State
from htm_pytorch.shapes import check_number, check_numbers, check_tensor


class Moment:
    """Stored memories as they are at one moment: what one recall reads.

    Of several memories, the chunks of all stand one behind the other, and each row of queries sees
    those of its own.
    """

    batch = 1
    device = CPU

    def __init__(self, states: Sequence[State], chosen: Chosen | None, has_rows: bool):
        self.states = states
        self._chosen = chosen
        self._has_rows = has_rows
        lengths = [state.catalog.length for state in states]
        self._starts = [sum(lengths[:number]) for number in range(len(states))]
        self.chunks = sum(lengths)
        form = states[0].head.form
        self.chunk_size, self.dim, self.dtype = form.chunk_size, form.dim, form.given

    @property
    def seen(self) -> Tensor | None:
        """[B, M] bool, the chunks that each row of queries sees; None: all rows see all."""
        if not self._has_rows:
            return None
        seen = torch.zeros(len(self.states), self.chunks, dtype=torch.bool, device=CPU)
        for row, (start, state) in enumerate(zip(self._starts, self.states, strict=True)):
            seen[row, start : start + state.catalog.length] = True
        return seen

    @property
    def allowed(self) -> Tensor | None:
        """[M] bool, the chunks that were chosen; None: all."""
        if self._chosen is None:
            return None
        return torch.cat([self._chosen.mask(state.catalog) for state in self.states])

    @property
    def ages(self) -> Tensor:
        """[1, M] int64, how many chunks of the same memory closed after each."""
        lengths = [state.catalog.length for state in self.states]
        return torch.cat([torch.arange(n - 1, -1, -1, device=CPU) for n in lengths])[None]

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        """Return the chunks numbered [U] int64; see `StoredMemory.fetch`."""
        if len(self.states) == 1:
            return fetched(self.states[0], chunks)
        check_numbers("chunks", chunks, self.chunks)
        starts = torch.tensor(self._starts, dtype=torch.int64, device=CPU)
        owner = torch.searchsorted(starts, chunks, right=True) - 1
        parts, order = [], []
        for number in owner.unique().tolist():
            place = (owner == number).nonzero()[:, 0]
            parts.append(fetched(self.states[number], chunks[place] - self._starts[number]))
            order.append(place)
        if not parts:
            return fetched(self.states[0], chunks)
        back = torch.cat(order).argsort()
        sizes = parts[0].contents.shape[2]
        masks = [
            part.valid[..., None].expand(-1, -1, sizes)
            if part.step_mask is None
            else part.step_mask
            for part in parts
        ]
        return ChunkedMemory.from_chunks(
            torch.cat([part.contents for part in parts], 1)[:, back],
            torch.cat(masks, 1)[:, back],
            summaries=torch.cat([part.summaries for part in parts], 1)[:, back],
            copy=False,
        )


class ExactMoment(Moment):
    """A moment of memories of whose summaries there are codes in RAM."""

    def best_chunks(
        self, route: Tensor, k: int, chunk_mask: Tensor | None, fading: Fading | None
    ) -> Tensor:
        """Return the k best chunks of each query; see `ExactHome`."""
        batch, queries, _ = route.shape
        allowed = self.allowed
        mask = None if chunk_mask is None else chunk_mask.flatten(0, 1)
        if allowed is not None:
            mask = allowed.expand(batch * queries, -1) if mask is None else mask & allowed
        fades = None
        if fading is not None:
            ages = fading.ages
            if ages.shape[:2] != (1, 1):
                ages = ages.expand(batch, queries, -1)
            fades = Fading(fading.ceiling.flatten(), fading.decay.flatten(), ages.flatten(0, 1))
        found = by_codes(self.states, route.detach().flatten(0, 1), k, mask, fades)
        return found.view(batch, queries, -1)


class SearchedMoment(Moment):
    """A moment of a memory whose summaries are on the disk."""

    def __init__(self, state: State, probes: int, chosen: Chosen | None):
        super().__init__([state], chosen, has_rows=False)
        self._probes = probes

    def search(self, route: Tensor, k: int) -> Tensor:
        """Return the chunks that an index finds for `route`; see `IndexedMemory.search`."""
        check_tensor("route", route, "B Q D", D=self.dim)
        # A query that is not a number gives none in the end, whatever it finds here.
        vectors = route.detach().flatten(0, 1).float().nan_to_num()
        found = by_index(self.states[0], vectors, k, self._probes, self._chosen)
        return found.view(*route.shape[:2], -1)


class Viewed(Readable, Protocol):
    """What a view needs of a stored memory."""

    def moment(self, chosen: Chosen | None = None) -> Moment:
        """Return the memory as it is now, or some of its chunks."""
        ...


class View:
    """Some chunks of stored memories, to be recalled from; layers take it as any other memory.

    It follows what it is a view of, and is only read: chunks keep the numbers that they have there.
    """

    device = CPU

    def __init__(self, memories: Sequence[Viewed], chosen: Chosen | None, has_rows: bool):
        self._memories = memories
        self._chosen = chosen
        self._has_rows = has_rows

    @property
    def batch(self) -> int:
        """How many rows there are, B: one for each memory, or 1 where all queries share one."""
        return len(self._memories) if self._has_rows else 1

    @property
    def chunks(self) -> int:
        """How many chunks there are, M; those that are not to be recalled count, too."""
        return sum(memory.chunks for memory in self._memories)

    @property
    def chunk_size(self) -> int:
        """How many steps a chunk holds at most, C."""
        return self._memories[0].chunk_size

    @property
    def dim(self) -> int:
        """How many numbers a step has, D."""
        return self._memories[0].dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that steps have when they are fetched."""
        return self._memories[0].dtype

    def moment(self) -> Moment:
        """Return what one recall reads."""
        if len(self._memories) == 1 and not self._has_rows:
            return self._memories[0].moment(self._chosen)
        states = [memory.moment().states[0] for memory in self._memories]
        return ExactMoment(states, self._chosen, self._has_rows)

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        """Return the chunks numbered [U] int64 as a memory in RAM."""
        return self.moment().fetch(chunks)

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        """Return which steps the chunks numbered [U] int64 hold; see `StoredMemory.spans`.

        Chunks of several memories are numbered one behind the other, whatever the `row`.
        """
        check_number("row", row, self.batch)
        found: list[Span] = []
        starts = [0]
        for memory in self._memories:
            starts.append(starts[-1] + memory.chunks)
        check_numbers("chunks", chunks, starts[-1])
        for number in chunks.tolist():
            owner = max(i for i, start in enumerate(starts[:-1]) if start <= number)
            inside = torch.tensor([number - starts[owner]], device=CPU)
            (span,) = self._memories[owner].spans(inside)
            found.append(span._replace(chunk=number))
        return found

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> NoReturn:
        """Raise: a view is only read."""
        raise ValueError("memory: a view is only read; append to the memory that it is a view of")

    def reset(self, rows: Tensor) -> NoReturn:
        """Raise: a view is only read."""
        raise ValueError("memory: a view is only read; reset the memory that it is a view of")

    def save(self, path: str | os.PathLike[str]) -> NoReturn:
        """Raise: a view is only read."""
        raise ValueError("memory: a view is only read; save the memory that it is a view of")
