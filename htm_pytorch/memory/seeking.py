"""The k best chunks by codes, where summaries are not at hand: exactly, and few are fetched.

Codes tell bounds of every score. A chunk whose upper bound lies below the k-th best lower bound is
not among the best. If more than k are left, those scores lie so close together that the summaries
themselves must say.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.memory.best import nearest
from htm_pytorch.memory.codes import BLOCK, Codes
from htm_pytorch.memory.fading import Fading
from htm_pytorch.memory.formats import CPU

_ROOM = 8
"""Chunks that may be left for each that is kept, at first."""
_MOST_POWER = 50
"""Of two, in a route that fades: products of larger ones may be none, and the order is the same."""


class Bounded(NamedTuple):
    """Chunks that may be among the k best of X queries, N for each."""

    chunks: Tensor
    """[X, N] int64, in any order; -1 where there are fewer."""
    upper: Tensor
    """[X, N] float32, what they score at most; -inf where there are fewer."""
    lower: Tensor
    """[X, N] float32, what they score at least."""

    @classmethod
    def join(cls, parts: Sequence["Bounded"]) -> "Bounded":
        """Return what several memories tell."""
        return cls(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def sought(
    codes: Codes,
    length: int,
    vectors: Tensor,
    k: int,
    allowed: Tensor | None,
    fading: Fading | None,
) -> Bounded:
    """Return the chunks that may be among the k best of `length`, as far as their codes say.

    Args:
        codes: of one row, with both parts.
        length: how many chunks there are, M.
        vectors: [X, D] float32, from `as_asked`.
        k: how many are kept.
        allowed: [X, M] bool, which chunks each query may keep; None: all.
        fading: of X queries; ages [X, M], or [1, M].
    """
    if not kernels.IS_AVAILABLE:
        return _sought_plainly(codes, length, vectors, allowed, fading)
    arguments: dict[str, object] = {}
    if allowed is not None:
        allowed = allowed.contiguous()
        arguments |= {"chunk_mask": allowed, "chunk_mask_by_query": allowed.stride(0)}
    if fading is not None:
        # Named, so that they outlive the calls.
        ceiling, decay, ages = (part.float().contiguous() for part in fading)
        arguments |= {"ceiling": ceiling, "decay": decay, "fading": ages}
        arguments["fading_by_query"] = 0 if len(ages) == 1 else ages.stride(0)
    call = kernels.struct(
        "Call",
        **kernels.threads(),
        batch=1,
        queries=len(vectors),
        chunks=length,
        k=min(k, length),
        memory_batch=1,
        route=vectors,
        dim=vectors.shape[1],
        codes=codes.struct(),
        **arguments,
    )
    room = min(length, _ROOM * k)
    while True:
        shape = len(vectors), room
        found = Bounded(
            torch.empty(shape, dtype=torch.int64, device=CPU),
            torch.empty(shape, dtype=torch.float32, device=CPU),
            torch.empty(shape, dtype=torch.float32, device=CPU),
        )
        if not found.chunks.numel():
            return found
        parts = {"found": found.chunks, "upper": found.upper, "lower": found.lower}
        seek = kernels.struct("Seek", recall=call, room=room, **parts)
        kernels.call("seek_f32", seek, seek.recall)
        if not seek.is_short:
            return found
        room = min(length, _ROOM * room)


def _sought_plainly(
    codes: Codes,
    length: int,
    vectors: Tensor,
    allowed: Tensor | None,
    fading: Fading | None,
) -> Bounded:
    """Return bounds of all chunks; the plain version of what the kernel does."""
    size = vectors.norm(dim=1, keepdim=True) * (1 + 2.0**-16)
    about = torch.empty(len(vectors), length, dtype=torch.float32, device=CPU)
    off = size * codes.terms[0, 3, :length]
    for some in torch.arange(length, device=CPU).split(BLOCK):
        about[:, some] = vectors @ codes.decoded(some).T
    upper, lower = about + off, about - off
    if fading is not None:
        ages = fading.ages.expand(len(vectors), -1)
        slack = 2.0**-20 * (1 + 2 * (fading.decay[:, None] * ages).abs())
        upper, lower = (fading.scores(part) for part in (upper, lower))
        upper += slack + 2.0**-20 * upper.abs()
        lower -= slack + 2.0**-20 * lower.abs()
    chunks = torch.arange(length, device=CPU).expand(len(vectors), -1)
    if allowed is not None:
        chunks = chunks.masked_fill(~allowed, -1)
        upper, lower = (part.masked_fill(~allowed, -torch.inf) for part in (upper, lower))
    return Bounded(chunks, upper, lower)


def as_asked(vectors: Tensor, fading: Fading | None) -> Tensor:
    """Return queries [X, D] float32 whose order of all chunks is known: numbers, not too large.

    One that is not a number gives none in the end, whatever it finds. Where scores do not fade,
    the order does not depend on how long a query is, and its largest number becomes about 1.
    """
    vectors = vectors.float().nan_to_num()
    if not vectors.shape[1]:
        return vectors
    most = vectors.abs().amax(1, keepdim=True)
    # By powers of two, which round nothing.
    power = most.frexp().exponent
    if fading is not None:
        power = (power - _MOST_POWER).clamp(min=0)
    return torch.ldexp(torch.ldexp(vectors, -(power // 2)), power // 2 - power).contiguous()


def decided(
    bounded: Bounded,
    vectors: Tensor,
    k: int,
    fading: Fading | None,
    summaries_of: Callable[[Tensor], Tensor],
    digests_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the k best chunks [X, K] int64 in any order; -1 where a query sees fewer.

    Args:
        bounded: all that may be among them.
        vectors: [X, D] float32.
        k: how many are kept.
        fading: of X queries; ages [X, M], or [1, M].
        summaries_of: of chunks [U], [U, D] float32.
        digests_of: of chunks [U], [U] int64, which are alike where summaries are, and there alone.
    """
    chunks, upper, lower = bounded
    exists = chunks >= 0
    kept = min(k, chunks.shape[1])
    if not kept or not len(chunks):
        return chunks[:, :kept]
    known = lower.masked_fill(~exists | lower.isnan(), -torch.inf)
    mark = known.topk(kept, dim=1).values[:, -1:]
    may_be = exists & ~(upper < mark)
    count = may_be.sum(1)
    # Those that are left, first.
    order = may_be.int().argsort(dim=1, descending=True, stable=True)[:, :kept]
    best = chunks.masked_fill(~may_be, -1).gather(1, order)
    unclear = (count > kept).nonzero()[:, 0]
    if len(unclear):
        best[unclear] = _looked_at(
            chunks[unclear].masked_fill(~may_be[unclear], -1),
            vectors[unclear],
            kept,
            None if fading is None else _of(fading, unclear),
            summaries_of,
            digests_of,
        )
    return best


def _looked_at(
    chunks: Tensor,
    vectors: Tensor,
    k: int,
    fading: Fading | None,
    summaries_of: Callable[[Tensor], Tensor],
    digests_of: Callable[[Tensor], Tensor],
) -> Tensor:
    used = chunks.unique()
    used = used[used >= 0]
    may_be = torch.zeros(len(chunks), len(used) + 1, dtype=torch.bool, device=CPU)
    may_be.scatter_(1, torch.searchsorted(used, chunks).masked_fill(chunks < 0, len(used)), True)
    may_be = may_be[:, :-1]
    if fading is None and len(used) > 2 * k:
        # Of chunks with one summary the oldest are kept: k of them are enough.
        may_be &= _is_early(digests_of(used), may_be, k)
        some = may_be.any(0)
        used, may_be = used[some], may_be[:, some]
    if fading is not None:
        fading = Fading(fading.ceiling[None], fading.decay[None], fading.ages[None][..., used])
    summaries = summaries_of(used)
    _, places = nearest(vectors[None], summaries[None], k, may_be[None], fading)
    return used[places[0]]


def _is_early(digests: Tensor, may_be: Tensor, k: int) -> Tensor:
    """Return which of the chunks [X, U] have fewer than k others of one digest before them."""
    _, kind = digests.unique(return_inverse=True)
    order = kind.argsort(stable=True)
    sorted_kind = kind[order]
    counted = may_be[:, order].int()
    total = counted.cumsum(1) - counted
    is_first = torch.ones_like(sorted_kind, dtype=torch.bool)
    is_first[1:] = sorted_kind[1:] != sorted_kind[:-1]
    start = torch.arange(len(order), device=CPU).masked_fill(~is_first, 0).cummax(0).values
    early = torch.empty_like(may_be)
    early[:, order] = total - total[:, start] < k
    return early


def _of(fading: Fading, queries: Tensor) -> Fading:
    ages = fading.ages if len(fading.ages) == 1 else fading.ages[queries]
    return Fading(fading.ceiling[queries], fading.decay[queries], ages)
