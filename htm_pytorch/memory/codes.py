"""`Codes`: summaries in 8 bits, and how far each is off: what products are bounded by.

    s = centre + scale (u + v / 254) + rest,    u, v in -127 ... 127

The centre is shared by `STRETCH` chunks that follow each other. A product with a route r is within
|r| |rest| of that with the code (Cauchy and Schwarz), wherever the rest points to: a chunk whose
largest possible product lies below the k-th best need not be looked at. See docs/math.md.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from htm_pytorch import kernels

STRETCH = 64
"""Chunks that share a centre."""
MOST_DIM = 2**15
"""Numbers of a summary whose products in 8 bits a sum of 32 bits has room for."""
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
            )

    def encode(self, summaries: Tensor, stretches: Tensor, begin: int = 0) -> None:
        """Code chunks anew, of which these are the summaries [B, M', D], from chunk `begin` on.

        `stretches` [X, 3] int64 say which: row, stretch, and the first of its chunks to be coded;
        where that is its first, the stretch gets a centre of its own.
        """
        if not kernels.IS_AVAILABLE:
            for row, stretch, start in stretches.tolist():
                self._encode(summaries[row].float(), row, stretch, start, begin)
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

    def _encode(self, summaries: Tensor, row: int, stretch: int, start: int, begin: int) -> None:
        """Code chunks of one stretch; the plain version of what the kernel does."""
        first, dim = stretch * STRETCH, summaries.shape[1]
        last = min(first + STRETCH, begin + len(summaries))
        if start == first:
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


class RingCodes:
    """The codes of a ring's summaries: of what was written since, they are found when asked for."""

    def __init__(self, batch: int, chunks: int, dim: int):
        self._codes = Codes.empty(batch, chunks, dim)
        with torch.inference_mode(False):
            self._is_stale = torch.ones(self._codes.radii.shape, dtype=torch.bool, device="cpu")
        self._is_any_stale = True

    def forget(self, rows: Tensor, slots: Tensor) -> None:
        """Note that other chunks lie at the slots [X] of the rows [X]."""
        self._is_stale[rows, slots // STRETCH] = True
        self._is_any_stale = True

    def of(self, summaries: Tensor) -> Codes:
        """Return the codes of the summaries [B, M', D], the first of the ring's."""
        if self._is_any_stale:
            with torch.inference_mode(False):
                used = -(-summaries.shape[1] // STRETCH)
                row, stretch = self._is_stale[:, :used].nonzero(as_tuple=True)
                which = torch.stack([row, stretch, stretch * STRETCH], 1)
                if len(which):
                    self._codes.encode(summaries, which)
                    self._is_stale[:, :used] = False
            self._is_any_stale = used < self._is_stale.shape[1]
        return self._codes
