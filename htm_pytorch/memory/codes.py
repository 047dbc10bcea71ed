"""`Codes`: summaries in 8 bits, and how far each is off: what products are bounded by.

    s = centre + scale (u + v / 254) + rest,    u, v in -127 ... 127

The centre is shared by `STRETCH` chunks that follow each other. A product with a route r is within
|r| |rest| of that with the code (Cauchy and Schwarz), wherever the rest points to: a chunk whose
largest possible product lies below the k-th best need not be looked at. See docs/math.md.
"""

import functools
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch import kernels

STRETCH = 64
"""Chunks that share a centre."""
MOST_DIM = 2**15
"""Numbers of a summary whose products in 8 bits a sum of 32 bits has room for."""
BLOCK = 64 * STRETCH
"""Chunks of which float32 numbers are held at a time."""
_CODE_BYTES = 64
_ZERO, _MOST = 128, 127
_SHORTEST, _LONGEST = 1e-30, 1e30
"""Of what is coded; other summaries are looked at as they are."""


class Codes(NamedTuple):
    """Codes of M chunks' summaries, with room for whole stretches, of which there are S."""

    coarse: Tensor
    """[B, 64 S, W] uint8, u + 128: D numbers, then zeros up to a whole cache line."""
    fine: Tensor | None
    """[B, 64 S, W] uint8, v + 128; None: v is zero."""
    centres: Tensor
    """[B, S, D] float32."""
    radii: Tensor
    """[B, S] float32: no summary is farther from its centre."""
    terms: Tensor
    """[B, 4, 64 S] float32: scales, the lengths of scale u, those of what u leaves, and those of
    what both leave. The last two count what is rounded when products are taken."""
    digests: Tensor | None = None
    """[B, 64 S] int64 beside fine codes, which are alike where summaries are, and there alone."""

    @classmethod
    def empty(cls, batch: int, chunks: int, dim: int, *, with_fine: bool = False) -> Self:
        """Return room for the codes of so many chunks."""
        stretches = -(-chunks // STRETCH)
        shape = batch, stretches * STRETCH, -(-dim // _CODE_BYTES) * _CODE_BYTES
        # Written to in inference mode and out of it.
        with torch.inference_mode(False):
            return cls(
                torch.empty(shape, dtype=torch.uint8, device="cpu"),
                torch.empty(shape, dtype=torch.uint8, device="cpu") if with_fine else None,
                torch.zeros(batch, stretches, dim, dtype=torch.float32, device="cpu"),
                torch.zeros(batch, stretches, dtype=torch.float32, device="cpu"),
                torch.zeros(batch, 4, shape[1], dtype=torch.float32, device="cpu"),
                torch.zeros(shape[:2], dtype=torch.int64, device="cpu") if with_fine else None,
            )

    def encode(self, summaries: Tensor, stretches: Tensor, begin: int = 0) -> None:
        """Code chunks anew, of which these are the summaries [B, M', D], from chunk `begin` on.

        `stretches` [X, 4] int64 say which: row, stretch, the first of its chunks to be coded, and
        whether the stretch gets a new centre, which is then its first.
        """
        if not kernels.IS_AVAILABLE:
            for row, stretch, start, is_new in stretches.tolist():
                self._encode(summaries[row].float(), row, stretch, start, begin, bool(is_new))
            return
        encoding = kernels.struct(
            "Encoding",
            **kernels.threads(),
            codes=self.struct(),
            summaries=summaries,
            summaries_by_batch=summaries.stride(0),
            summaries_by_chunk=summaries.stride(1),
            begin=begin,
            chunks=begin + summaries.shape[1],
            dim=summaries.shape[2],
            stretches=stretches,
            count=len(stretches),
        )
        kernels.call(f"encode_{kernels.NAMES[summaries.dtype]}", encoding, encoding)

    def _encode(
        self, summaries: Tensor, row: int, stretch: int, start: int, begin: int, is_new: bool
    ) -> None:
        """Code chunks of one stretch; the plain version of what the kernel does."""
        first, dim = stretch * STRETCH, summaries.shape[1]
        last = min(first + STRETCH, begin + len(summaries))
        if is_new:
            self.centres[row, stretch] = self._centre(summaries[first - begin :], row, stretch)
            self.radii[row, stretch] = 0.0
        centre = self.centres[row, stretch]
        rest = (summaries[start - begin : last - begin] - centre).double()
        far, most = centre.double().norm(), rest.abs().amax(1, keepdim=True)
        is_coded = (most < _LONGEST) & (far < _LONGEST)
        is_tiny = most < _SHORTEST
        scale = (most / _MOST).float().masked_fill(is_tiny | ~is_coded, 0.0)
        x = (rest / scale).masked_fill(scale == 0, 0.0)
        u = x.round()
        v = ((x - u) * 2 * _MOST).round()
        norms = [part.norm(dim=1) for part in (u, x - u, x - u - v / (2 * _MOST))]
        size, error, fine_error = (1.001 * scale[:, 0] * norm for norm in norms)
        tiny_rest = is_tiny[:, 0] * _SHORTEST * dim**0.5
        always = 2 * (dim / 4 + 16) * 2.0**-24 * (far + size + error) + tiny_rest
        terms = torch.stack([scale[:, 0], size, error + always, fine_error + always])
        terms[2:].masked_fill_(~is_coded[:, 0], torch.inf)
        self.terms[row, :, start:last] = terms.float()
        for part, code in ((self.coarse, u), (self.fine, v)):
            if part is not None:
                part[row, start:last] = _ZERO
                part[row, start:last, :dim] = (code + _ZERO).to(torch.uint8)
        distance = (terms[1] + terms[2]).amax() * (1 + 2.0**-20)
        self.radii[row, stretch] = torch.maximum(self.radii[row, stretch], distance.float())

    def _centre(self, summaries: Tensor, row: int, stretch: int) -> Tensor:
        """Return the mean [D] of a stretch's summaries; of few, of the stretch before them."""
        if stretch and len(summaries) < STRETCH // 4:
            before = slice((stretch - 1) * STRETCH, stretch * STRETCH)
            coarse = self.coarse[row, before, : summaries.shape[1]].float() - _ZERO
            mean = (coarse * self.terms[row, 0, before, None]).mean(0)
            return self.centres[row, stretch - 1] + mean
        some = summaries[:STRETCH]
        some = some[some.abs().amax(1) < _LONGEST]
        return some.mean(0) if len(some) else torch.zeros_like(summaries[0])

    def appended(self, length: int, summaries: Tensor) -> Self:
        """Return codes, of more room if that is needed, of `length` chunks and more [M', D]."""
        end = length + len(summaries)
        codes = self.with_room(end, length)
        first = range(length // STRETCH, -(-end // STRETCH))
        which = [[0, s, max(s * STRETCH, length), int(s * STRETCH >= length)] for s in first]
        codes.encode(summaries[None], torch.tensor(which, device="cpu"), length)
        if codes.digests is not None:
            codes.digests[0, length:end] = _digests(summaries)
        return codes

    def recoded(self, number: int, summary: Tensor) -> None:
        """Code one chunk anew, by its summary [D]."""
        which = torch.tensor([[0, number // STRETCH, number, 0]], device="cpu")
        self.encode(summary[None, None], which, number)
        if self.digests is not None:
            self.digests[0, number] = _digests(summary[None])[0]

    def with_room(self, room: int, length: int) -> Self:
        """Return the codes of the first `length` chunks, with room for so many."""
        if room <= self.coarse.shape[1]:
            return self
        rows, _, dim = self.centres.shape
        return self._copied(self.empty(rows, room, dim, with_fine=self.fine is not None), length)

    def chosen(self, order: Tensor) -> Self:
        """Return codes of the chunks `order` [M] int64, in that order, in room of their own.

        Those that change their places are coded anew from their codes, and are off by both.
        """
        assert self.fine is not None
        rows, _, dim = self.centres.shape
        codes = self.empty(rows, self.coarse.shape[1], dim, with_fine=True)
        moved = (order != torch.arange(len(order), device="cpu")).nonzero()[:, 0]
        same = int(moved[0]) // STRETCH * STRETCH if len(moved) else len(order)
        codes = self._copied(codes, same)
        for start in range(same, len(order), BLOCK):
            some = order[start : start + BLOCK]
            _, size, _, error = self.terms[0][:, some]
            codes.appended(start, self.decoded(some))
            centres = self.centres[0, some // STRETCH]
            error = error + 2.0**-21 * (centres.norm(dim=1) + size)
            codes.terms[0, 2:, start : start + len(some)] += error
            stretch = torch.arange(start, start + len(some), device="cpu") // STRETCH
            codes.radii[0].index_add_(0, stretch, error)
            if codes.digests is not None and self.digests is not None:
                codes.digests[0, start : start + len(some)] = self.digests[0, some]
        return codes

    def decoded(self, numbers: Tensor) -> Tensor:
        """Return about the summaries [U, D] float32 of chunks of the first row."""
        dim = self.centres.shape[2]
        coded = self.coarse[0, numbers, :dim].float() - _ZERO
        if self.fine is not None:
            coded += (self.fine[0, numbers, :dim].float() - _ZERO) / (2 * _MOST)
        return self.centres[0, numbers // STRETCH] + self.terms[0, 0, numbers, None] * coded

    def _copied(self, to: Self, length: int) -> Self:
        stretches = -(-length // STRETCH)
        to.coarse[:, :length] = self.coarse[:, :length]
        if to.fine is not None and self.fine is not None:
            to.fine[:, :length] = self.fine[:, :length]
        to.centres[:, :stretches] = self.centres[:, :stretches]
        to.radii[:, :stretches] = self.radii[:, :stretches]
        to.terms[:, :, :length] = self.terms[:, :, :length]
        if to.digests is not None and self.digests is not None:
            to.digests[:, :length] = self.digests[:, :length]
        return to

    def nbytes(self, length: int) -> int:
        """Return how many bytes the codes of so many chunks take."""
        each = sum(part.nbytes for part in self if part is not None) / max(self.coarse.shape[1], 1)
        return round(length * each)

    def check(self, summaries: Tensor) -> None:
        """Raise a ValueError unless there is as much as the kernel reads for the summaries."""
        batch, chunks, dim = summaries.shape
        stretches = self.centres.shape[1]
        width = -(-dim // _CODE_BYTES) * _CODE_BYTES
        wanted = (
            ("coarse", self.coarse, (batch, stretches * STRETCH, width), torch.uint8),
            ("centres", self.centres, (batch, stretches, dim), torch.float32),
            ("radii", self.radii, (batch, stretches), torch.float32),
            ("terms", self.terms, (batch, 4, stretches * STRETCH), torch.float32),
        )
        for name, part, shape, dtype in wanted:
            fits = part.shape == shape and part.dtype == dtype and part.is_contiguous()
            if not fits or chunks > stretches * STRETCH:
                raise ValueError(
                    f"{name}: expected {dtype} {list(shape)} for {chunks} chunks, "
                    f"got {part.dtype} {list(part.shape)}"
                )

    def struct(self) -> Any:
        """Return what the kernel reads and writes, which must outlive it."""
        terms = self.terms
        at = [terms.data_ptr() + number * terms.stride(1) * terms.itemsize for number in range(4)]
        return kernels.struct(
            "Codes",
            coarse=self.coarse,
            fine=self.fine,
            by_batch=self.coarse.stride(0),
            width=self.coarse.shape[2],
            centres=self.centres,
            centres_by_batch=self.centres.stride(0),
            radii=self.radii,
            radii_by_batch=self.radii.stride(0),
            scales=at[0],
            sizes=at[1],
            errors=at[2],
            fine_errors=at[3],
            terms_by_batch=terms.stride(0),
        )


def _digests(summaries: Tensor) -> Tensor:
    """Return numbers [M] int64 of summaries [M, D] float32; one other bit makes another one."""
    factors = _factors(summaries.shape[1])
    parts = [part.long() @ factors for part in summaries.view(torch.int32).split(BLOCK)]
    return torch.cat(parts) if parts else factors[:0]


@functools.cache
def _factors(width: int) -> Tensor:
    """Return odd numbers [D] int64, always the same."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(1)
        return 2 * torch.randint(2**62, (width,), generator=generator, device="cpu") + 1


class RingCodes:
    """The codes of a ring's summaries: of what was written since, they are found when asked for."""

    def __init__(self, batch: int, chunks: int, dim: int):
        self._codes = Codes.empty(batch, chunks, dim)
        with torch.inference_mode(False):
            self._is_stale = torch.ones(self._codes.radii.shape, dtype=torch.bool, device="cpu")
        self._is_any_stale = True
        self._version: int | None = None
        self._chunks = 0

    def forget(self, rows: Tensor, slots: Tensor) -> None:
        """Note that other chunks lie at the slots [X] of the rows [X]."""
        self._is_stale[rows, slots // STRETCH] = True
        self._is_any_stale = True

    def of(self, summaries: Tensor, version: int | None) -> Codes:
        """Return the codes of the summaries [B, M', D], the first of the ring's.

        All are found anew where `version` is another one than before.
        """
        if version != self._version:
            self._version, self._is_any_stale = version, True
            with torch.inference_mode(False):
                self._is_stale.fill_(True)
        if summaries.shape[1] > self._chunks:
            with torch.inference_mode(False):
                self._is_stale[:, self._chunks // STRETCH] = True
            self._chunks, self._is_any_stale = summaries.shape[1], True
        if self._is_any_stale:
            with torch.inference_mode(False):
                used = -(-summaries.shape[1] // STRETCH)
                row, stretch = self._is_stale[:, :used].nonzero(as_tuple=True)
                which = torch.stack([row, stretch, stretch * STRETCH, torch.ones_like(row)], 1)
                if len(which):
                    self._codes.encode(summaries, which)
                    self._is_stale[:, :used] = False
            self._is_any_stale = used < self._is_stale.shape[1]
        return self._codes
