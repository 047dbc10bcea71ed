"""`Home`: what a memory must do, wherever it lives; and how its best chunks can be found."""

import os
from typing import Protocol, Self, TypeGuard

import torch
from torch import Tensor

from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.fading import Fading
from htm_pytorch.memory.span import Span


class Readable(Protocol):
    """Chunks that may lie elsewhere, and are fetched a few at a time."""

    @property
    def batch(self) -> int:
        """How many rows there are, B."""
        ...

    @property
    def chunks(self) -> int:
        """How many chunks there are, M."""
        ...

    @property
    def chunk_size(self) -> int:
        """How many steps a chunk holds at most, C."""
        ...

    @property
    def dim(self) -> int:
        """How many numbers a step has, D."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that steps have when they are given and fetched."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that fetched chunks are on."""
        ...

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        """Return the chunks numbered [U] int64, of every row, as a memory in RAM."""
        ...

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        """Return which steps the chunks numbered [U] int64 of a row hold, in the order asked.

        The home knows; the memory that `fetch` returns may number its steps anew.

        Raises:
            ValueError: there is no such row, or no chunk of a number that can be recalled.
        """
        ...


class Home(Readable, Protocol):
    """A memory that may lie elsewhere: on disk, or on other machines.

    Its chunks are fetched, a few at a time. `ChunkedMemory` is the home in RAM. What a home
    returns carries no gradient. To be recalled from, it is a `ScoredHome`, an `ExactHome` or
    a `SearchedHome`.
    """

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> Self:
        """Return the memory after `steps` [B, T, D]; see `ChunkedMemory.append`."""
        ...

    def reset(self, rows: Tensor) -> Self:
        """Return the memory with the rows [B] bool emptied."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a copy of the memory to `path`."""
        ...


class ScoredHome(Home, Protocol):
    """A home whose summaries are at hand: every query scores all of them, exactly."""

    @property
    def summaries(self) -> Tensor:
        """[B, M, D], the summary that each chunk is scored by."""
        ...

    @property
    def valid(self) -> Tensor:
        """[B, M] bool, the chunks that can be recalled."""
        ...


class ExactHome(Home, Protocol):
    """A home that finds the best chunks itself, exactly."""

    @property
    def valid(self) -> Tensor:
        """[B, M] bool, the chunks that can be recalled."""
        ...

    def best_chunks(
        self, route: Tensor, k: int, chunk_mask: Tensor | None, fading: Fading | None
    ) -> Tensor:
        """Return the k best chunks [B, Q, K] int64 of each query, in any order; -1 where fewer.

        Of equal scores the older chunk is kept.

        Args:
            route: [B, Q, D], whose products with the summaries are the scores.
            k: how many are kept; K <= k.
            chunk_mask: [B, Q, M] bool, the chunks that each query may see; None: all.
            fading: of [B, Q] queries, what makes scores of products; None: they are the scores.
        """
        ...


class SearchedHome(Home, Protocol):
    """A home that finds chunks itself, by an index, and may miss some of the best."""

    def search(self, route: Tensor, k: int) -> Tensor:
        """Return the chunks [B, Q, K] int64 of about the largest `route` [B, Q, D] . summary.

        K <= k; -1 where fewer were found.
        """
        ...


# Not `isinstance`, which before Python 3.12 takes 0.1 ms for a protocol.
_MEMBERS = tuple(n for n in (*vars(Readable), *vars(Home)) if not n.startswith("_"))


def is_home(memory: object) -> TypeGuard[Home]:
    """Whether it has all that a `Home` must have."""
    return all(hasattr(memory, name) for name in _MEMBERS)


class Numbered(Protocol):
    """Chunks that are numbered in the order they closed in, unless it has `ages`."""

    @property
    def chunks(self) -> int:
        """How many chunks there are, M."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that fetched chunks are on."""
        ...


def ages_of(memory: Numbered) -> Tensor:
    """Return how many chunks closed after each, [B, M] int64; B may be 1.

    Where a memory has no `ages` of its own, its chunks are numbered in the order they closed in.
    """
    ages = getattr(memory, "ages", None)
    if ages is None:
        ages = torch.arange(memory.chunks - 1, -1, -1, device=memory.device)[None]
    return ages


def is_scored(memory: object) -> TypeGuard[ScoredHome]:
    """Whether its summaries are at hand."""
    return hasattr(memory, "summaries") and hasattr(memory, "valid")


def is_exact(memory: object) -> TypeGuard[ExactHome]:
    """Whether it finds the best chunks itself."""
    return hasattr(memory, "best_chunks")


def dtype_of_summaries(memory: "ScoredHome | ExactHome") -> torch.dtype:
    """Return what summaries are in; those that are not at hand are fetched in float32."""
    return memory.summaries.dtype if not is_exact(memory) and is_scored(memory) else torch.float32


def summaries_at(memory: ScoredHome | ExactHome, chunks: Tensor) -> Tensor:
    """Return the summaries [B, Q, K, D] of chunks [B, Q, K]; of -1, those of any."""
    chunks = chunks.clamp(min=0)
    if is_exact(memory):
        used, place = chunks.unique(return_inverse=True)
        return memory.fetch(used).summaries[0][place]
    assert is_scored(memory)
    row = torch.arange(memory.batch, device=chunks.device)[:, None, None]
    return memory.summaries[row, chunks]


def is_searched(memory: object) -> TypeGuard[SearchedHome]:
    """Whether it finds chunks itself."""
    return hasattr(memory, "search")
