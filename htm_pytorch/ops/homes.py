"""Memories that lie elsewhere: find the best chunks, fetch them, recall from those."""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.memory import ChunkedMemory, Home, ScoredHome, StoredMemory, View
from htm_pytorch.memory.fading import Fading
from htm_pytorch.memory.home import ages_of, is_exact, is_scored, is_searched
from htm_pytorch.memory.view import Moment
from htm_pytorch.ops import native, reference
from htm_pytorch.ops.recency import Recency

_CANDIDATES = 4
"""By content, and as many of the newest (and oldest, if such are sought), for each chunk that is
kept, where an index is asked and ages count: it knows of contents alone."""


class Fetched(NamedTuple):
    """The chunks that any query keeps, as a memory in RAM."""

    memory: ChunkedMemory
    """Of batch 1, with U chunks, oldest first."""
    chunk_mask: Tensor
    """[B, Q, U] bool, those that each query keeps: `recall` keeps them again."""
    numbers: Tensor
    """[U] int64, their numbers in the home."""
    ages: Tensor | None
    """[B, Q, U] int64, their ages in the home; B and Q may be 1. None where they do not count."""


@torch.no_grad()
def fetch(
    route: Tensor,
    home: Home,
    k: int,
    chunk_mask: Tensor | None,
    recency: Recency | None = None,
) -> Fetched:
    """Fetch the k best chunks of each query; to the device of `route` [B, Q, D].

    What was scored here without a gradient is scored again, among the few that were fetched.

    Raises:
        ValueError: chunks of the home cannot be found, or not under a mask.
    """
    if isinstance(home, StoredMemory | View):
        # Other threads may append meanwhile.
        moment = home.moment()
        if moment.seen is not None:
            seen = moment.seen[:, None].expand(-1, route.shape[1], -1)
            chunk_mask = seen if chunk_mask is None else seen & chunk_mask
        return _fetch(route, moment, k, chunk_mask, recency)
    return _fetch(route, home, k, chunk_mask, recency)


def _fetch(
    route: Tensor,
    home: Home | Moment,
    k: int,
    chunk_mask: Tensor | None,
    recency: Recency | None,
) -> Fetched:
    device = home.device
    ages = None
    if recency is not None:
        ages = (ages_of(home)[:, None] if recency.ages is None else recency.ages).to(device)
        recency = recency._replace(ages=ages)
    exact = route.detach().to(device, torch.promote_types(route.dtype, torch.float32))
    mask = None if chunk_mask is None else chunk_mask.to(device)
    fading = None
    if recency is not None and not is_searched(home):
        fading = recency.fading(home, exact.dtype, device)
    if is_exact(home):
        chunks = home.best_chunks(exact, k, mask, fading)
    elif is_scored(home):
        chunks = _score(exact, home, k, mask, fading)
    elif is_searched(home):
        if chunk_mask is not None:
            kind = type(home).__name__
            raise ValueError(f"chunk_mask: expected None beside an index ({kind}), got a mask")
        chunks = home.search(exact, k if recency is None else _CANDIDATES * k)
        if recency is not None:
            chunks = _with_ends(chunks, home, recency, _CANDIDATES * k)
    else:
        kind = type(home).__name__
        raise ValueError(
            f"memory: expected a ScoredHome, an ExactHome or a SearchedHome, got {kind}"
        )
    numbers, place = torch.unique(chunks, return_inverse=True)
    if len(numbers) and numbers[0] < 0:
        # Those of a query that sees fewer: a column to be dropped.
        numbers, place = numbers[1:], place - 1
    keeps = torch.zeros(*chunks.shape[:2], len(numbers) + 1, dtype=torch.bool, device=device)
    keeps.scatter_(2, place % (len(numbers) + 1), True)
    memory = home.fetch(numbers).to(route.device)
    if ages is not None:
        ages = ages[..., numbers].to(route.device)
    return Fetched(memory, keeps[..., :-1].to(route.device), numbers.to(route.device), ages)


def _with_ends(chunks: Tensor, home: Home | Moment, recency: Recency, count: int) -> Tensor:
    """Return the chunks [B, Q, K], and the newest that are not among them; or those of both ends.

    Of a view, those that are chosen.
    """
    assert recency.ages is not None
    allowed = home.allowed if isinstance(home, Moment) else None
    numbers = torch.arange(home.chunks, device=chunks.device)
    ages = recency.ages
    if allowed is not None:
        numbers, ages = numbers[allowed], ages[..., allowed]
    count = min(count, len(numbers))
    ends = [ages.topk(count, largest=False).indices]
    if bool((recency.decay < 0).any()):
        ends.append(ages.topk(count).indices)
    every = numbers[torch.cat(ends, -1)].expand(*chunks.shape[:2], -1)
    return torch.cat([chunks, every], -1)


def _score(
    route: Tensor, home: ScoredHome, k: int, chunk_mask: Tensor | None, fading: Fading | None
) -> Tensor:
    """Return the k best chunks of each query, -1 where it sees fewer."""
    if kernels.IS_AVAILABLE and home.device.type == "cpu":
        return native.pick(route, home, k, chunk_mask, fading)[0]
    picked = reference.select(route, home, k, chunk_mask, fading)
    return picked.chunks.masked_fill(~picked.kept, -1)
