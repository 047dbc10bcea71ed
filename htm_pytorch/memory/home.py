"""`Home`: what a memory must do, wherever it lives, to be recalled from."""

import os
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from htm_pytorch.memory.chunked import ChunkedMemory


@runtime_checkable
class Home(Protocol):
    """A memory that may lie elsewhere: on disk, or on other machines.

    Its summaries are at hand, since every query scores all of them; its chunks are fetched, a few
    at a time. `ChunkedMemory` is the home in RAM. What a home returns carries no gradient.
    """

    @property
    def batch(self) -> int:
        """B."""
        ...

    @property
    def chunks(self) -> int:
        """M."""
        ...

    @property
    def chunk_size(self) -> int:
        """C."""
        ...

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the steps, as they are given and fetched."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the summaries and of what is fetched."""
        ...

    @property
    def summaries(self) -> Tensor:
        """[B, M, D]."""
        ...

    @property
    def valid(self) -> Tensor:
        """[B, M] bool, the chunks that can be recalled."""
        ...

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> Self:
        """Return the memory after `steps` [B, T, D]; see `ChunkedMemory.append`."""
        ...

    def reset(self, rows: Tensor) -> Self:
        """Return the memory with the rows [B] bool emptied."""
        ...

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        """Return the chunks numbered [U] int64, of every row, as a memory in RAM."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a copy of the memory to `path`."""
        ...
