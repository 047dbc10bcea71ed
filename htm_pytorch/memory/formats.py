"""How steps become bytes, and what closed chunks are made of."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.summaries import summarise

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
PIECE_BYTES = 2 * 2**20
"""How many bytes of steps in float32 are averaged at a time."""
_SCALE_BYTES = 4
CONTIGUOUS = torch.contiguous_format
CPU = torch.device("cpu")


class Format(NamedTuple):
    """Sizes of a memory, and how a step becomes bytes."""

    dim: int
    """How many numbers a step has, D."""
    chunk_size: int
    """How many steps a chunk holds at most, C."""
    dtype: torch.dtype
    """The dtype that steps are stored in, one of DTYPES."""

    @property
    def given(self) -> torch.dtype:
        """The dtype that steps have as they come and go."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype

    @property
    def step_bytes(self) -> int:
        """How many bytes a step takes: its numbers and, behind those of int8, their scale."""
        scale = _SCALE_BYTES if self.dtype == torch.int8 else 0
        return self.dim * self.dtype.itemsize + scale

    @property
    def chunk_bytes(self) -> int:
        """How many bytes a chunk takes."""
        return self.chunk_size * self.step_bytes

    def encode(self, steps: Tensor) -> Tensor:
        """Return the bytes [T, step_bytes] of `steps` [T, D]."""
        if self.dtype != torch.int8:
            steps = steps.contiguous()
            # To torch, one number a step is contiguous whatever its stride.
            steps = steps if steps.stride(-1) == 1 else steps.clone(memory_format=CONTIGUOUS)
            return steps.view(torch.uint8)
        scale = steps.abs().amax(1, keepdim=True) / 127
        levels = (steps / scale.clamp(min=torch.finfo(steps.dtype).tiny)).round().to(torch.int8)
        return torch.cat([levels.view(torch.uint8), scale.view(torch.uint8)], 1)

    def decode(self, stored: Tensor) -> Tensor:
        """Return the steps [..., D] of bytes [..., step_bytes]."""
        if self.dtype != torch.int8:
            return stored.view(self.dtype)
        levels = stored[..., : self.dim].view(torch.int8)
        # A copy, which begins where numbers may begin.
        scale = stored[..., self.dim :].clone(memory_format=CONTIGUOUS)
        return levels * scale.view(torch.float32)

    def summarise(self, stored: Tensor, counts: Tensor) -> Tensor:
        """Return the means [M, D] of chunks [M, C, step_bytes] with `counts` [M] steps, float32."""
        # In pieces that stay in cache, since float32 takes room.
        piece = max(1, PIECE_BYTES // (4 * self.chunk_size * self.dim))
        return torch.cat(
            [
                self._summarise(*part)
                for part in zip(stored.split(piece), counts.split(piece), strict=True)
            ]
        )

    def _summarise(self, stored: Tensor, counts: Tensor) -> Tensor:
        contents = self.decode(stored).float()[None]
        is_whole = bool((counts == self.chunk_size).all())
        is_step = None if is_whole else step_mask(counts, self.chunk_size)[None]
        return summarise(contents, is_step)[0]


class Chunks(NamedTuple):
    """Closed chunks, oldest first."""

    stored: Tensor
    """[M, C, step_bytes] uint8; zeros where a short chunk, at its oldest end, has no steps."""
    summaries: Tensor
    """[M, D] float32, the means of their steps as they are stored."""
    counts: Tensor
    """[M] int32, how many steps they have."""
    episodes: Tensor
    """[M] int64, which episode each chunk is of."""
    first_steps: Tensor
    """[M] int64, the number that the first step of each has."""
    times: Tensor
    """[M, 2] float64, when the first and last step of each were; NaN where that is not known."""
    marked: Tensor
    """[M] bool, those of whose single steps there is more to say."""
    marks: tuple["Marks | None", ...]
    """What there is to say of those steps; it is empty where it was not asked for."""

    @staticmethod
    def none(form: Format) -> "Chunks":
        """Return no chunks."""
        return _none(form)

    @property
    def length(self) -> int:
        """How many chunks there are, M."""
        return self.counts.shape[0]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All of these tensors, in this order; that is, without the marks."""
        return self[:-1]

    def __add__(self, others: "Chunks") -> "Chunks":  # type: ignore[override]
        """Return these and the others."""
        if not self.length or not others.length:
            return others if others.length else self
        pairs = zip(self.columns, others.columns, strict=True)
        return Chunks._make((*map(torch.cat, pairs), self.marks + others.marks))

    def part(self, start: int, end: int | None = None) -> "Chunks":
        """Return those from `start` up to `end`."""
        return Chunks._make(column[start:end] for column in self)


@functools.cache
def _none(form: Format) -> Chunks:
    stored = torch.empty(0, form.chunk_size, form.step_bytes, dtype=torch.uint8, device=CPU)
    number = torch.empty(0, dtype=torch.int64, device=CPU)
    summaries = torch.empty(0, form.dim, dtype=torch.float32, device=CPU)
    times = torch.empty(0, 2, dtype=torch.float64, device=CPU)
    return Chunks(stored, summaries, number.int(), number, number, times, number.bool(), ())


class Marks(NamedTuple):
    """The times and keys of the steps of a chunk, oldest first."""

    times: tuple[float, ...]
    keys: tuple[str | None, ...]


def step_mask(counts: Tensor, chunk_size: int) -> Tensor:
    """Return which steps [M, C] there are: a short chunk holds them at its newest end."""
    return torch.arange(chunk_size, device=CPU) >= chunk_size - counts[:, None]
