"""Which chunks of a stored memory have the largest products with a query.

Of equal products the older chunk is kept; of those that an index finds, among what it returns.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from htm_pytorch.memory.answers import fetched, summaries_of
from htm_pytorch.memory.best import BLOCK_BYTES, nearest, where_best
from htm_pytorch.memory.choice import Chosen
from htm_pytorch.memory.fading import Fading
from htm_pytorch.memory.formats import CPU
from htm_pytorch.memory.seeking import Bounded, as_asked, decided, sought
from htm_pytorch.memory.state import State


def by_codes(
    states: Sequence[State],
    vectors: Tensor,
    k: int,
    allowed: Tensor | None = None,
    fading: Fading | None = None,
) -> Tensor:
    """Return the k best chunks [X, K] in any order, where codes of all are in RAM; -1 where fewer.

    Args:
        states: of memories whose chunks stand one behind the other, M in all.
        vectors: [X, D].
        k: how many are kept.
        allowed: [X, M] bool, which chunks each query may keep; None: all.
        fading: of X queries; ages [X, M], or [1, M].
    """
    if fading is not None and not fading.decay.any():
        # Then scores rise with products.
        fading = None
    vectors = as_asked(vectors, fading)
    starts, found = [0], []
    for state in states:
        start, catalog = starts[-1], state.catalog
        assert catalog.codes is not None
        starts.append(end := start + catalog.length)
        own = None if allowed is None else allowed[:, start:end]
        if own is not None and not own.any():
            continue
        fades = None if fading is None else fading.part(start, end)
        part = sought(catalog.codes, catalog.length, vectors, k, own, fades)
        moved = (part.chunks + start).masked_fill(part.chunks < 0, -1)
        found.append(part._replace(chunks=moved))
    if not found:
        return torch.empty(len(vectors), 0, dtype=torch.int64, device=CPU)

    def of_owners(chunks: Tensor, of: Callable[[State, Tensor], Tensor]) -> Tensor:
        # They rise, and so do their owners.
        owner = torch.searchsorted(torch.tensor(starts[1:], device=CPU), chunks, right=True)
        return torch.cat(
            [of(states[n], chunks[owner == n] - starts[n]) for n in owner.unique().tolist()]
        )

    return decided(
        Bounded.join(found),
        vectors,
        k,
        fading,
        lambda chunks: of_owners(chunks, summaries_of),
        lambda chunks: of_owners(chunks, _digests_of),
    )


def _digests_of(state: State, chunks: Tensor) -> Tensor:
    codes = state.catalog.codes
    assert codes is not None
    assert codes.digests is not None
    return codes.digests[0, chunks]


def by_index(now: State, vectors: Tensor, k: int, probes: int, chosen: Chosen | None) -> Tensor:
    """Return the k best chunks [X, K] that an index finds, and the log holds; -1 where fewer."""
    numbers, products = in_table(now, vectors, min(k, now.in_table), probes, chosen)
    allowed = None if chosen is None else chosen.mask(now.catalog)[now.in_table :]
    in_log, more = _nearest(vectors, now.unflushed.catalog.summaries, k, allowed)
    numbers = torch.cat([numbers, in_log + now.in_table], 1)
    return _best(numbers, torch.cat([products, more], 1), k)[0]


def in_table(
    now: State, vectors: Tensor, k: int, probes: int, chosen: Chosen | None
) -> tuple[Tensor, Tensor]:
    """Return the chunks [X, k] in the table that an index finds, and their products."""
    if now.table is None or not k:
        nothing = torch.empty(len(vectors), 0, dtype=torch.int64, device=CPU)
        return nothing, nothing.float()
    gaps = now.head.gaps
    conditions = [f"NOT (first_step >= {start} AND first_step < {end})" for start, end in gaps]
    conditions += chosen.conditions() if chosen is not None else []
    condition = " AND ".join(conditions) or None
    first_steps, products = now.table.nearest(vectors, k, probes, condition)
    numbers = _starting_at(now, first_steps)
    rest, more = _cut(now, vectors)
    if len(rest):
        if chosen is not None:
            more[:, ~chosen.mask(now.catalog)[rest]] = -torch.inf
        products = products.masked_fill(torch.isin(numbers, rest), -torch.inf)
        numbers = torch.cat([numbers, rest.expand(len(vectors), -1)], 1)
        products = torch.cat([products, more], 1)
    return _best(numbers, products, k)


def ranked(now: State, query: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return chunks [Q, K] in the order of their products with each query [Q, D], and those.

    -1 and -inf where there are fewer. The products are of the summaries as they are fetched.
    """
    scores = torch.full(numbers.shape, -torch.inf, dtype=torch.float32, device=CPU)
    used, place = torch.unique(numbers, return_inverse=True)
    if len(used) and used[0] < 0:
        used, place = used[1:], place - 1
    if not len(used):
        return numbers, scores
    summaries = fetched(now, used).summaries[0].float()
    # Each by itself: in a matrix product equal summaries may get others in their last bits.
    block = max(1, BLOCK_BYTES // summaries[:1].expand(numbers.shape[1], -1).nbytes)
    pairs = zip(query.split(block), place.clamp(min=0).split(block), strict=True)
    scores = torch.cat([(some[:, None] * summaries[at]).sum(-1) for some, at in pairs])
    return _best(numbers, scores.masked_fill(numbers < 0, -torch.inf), numbers.shape[1])


def share_found(now: State, vectors: Tensor, k: int, probes: int) -> float:
    """Return the share of the k best chunks in the table that its index finds."""
    kept = min(k, now.in_table)
    if now.table is None or not kept or not len(vectors):
        return 1.0
    found, _ = in_table(now, vectors, kept, probes, None)
    rest, products = _cut(now, vectors)
    numbers = rest.expand(len(vectors), -1)
    for row in now.table.rows(0, True):
        ends = row.chunks.first_steps + row.chunks.counts
        some = _ending_at(now, ends).expand(len(vectors), -1)
        is_other = (some >= 0) & ~torch.isin(some, rest)
        more = (vectors @ row.chunks.summaries.T).masked_fill(~is_other, -torch.inf)
        numbers, products = torch.cat([numbers, some], 1), torch.cat([products, more], 1)
        numbers, products = _best(numbers, products, kept)
    return float((numbers[:, :, None] == found[:, None]).any(2).float().mean())


def all_summaries(now: State) -> Tensor:
    """Return the summaries [M, D] float32 of all chunks, read from where they are stored."""
    summaries = torch.empty(now.catalog.length, now.head.form.dim, dtype=torch.float32, device=CPU)
    if now.table is not None:
        for row in now.table.rows(0, True):
            numbers = _ending_at(now, row.chunks.first_steps + row.chunks.counts)
            is_known = numbers >= 0
            summaries[numbers[is_known]] = row.chunks.summaries[is_known]
            if (wrong := numbers[is_known & ~row.is_right]).numel():
                summaries[wrong] = summaries_of(now, wrong)
    summaries[now.in_table :] = now.unflushed.catalog.summaries
    for first_step, summary in now.catalog.cut.items():
        number = torch.searchsorted(now.catalog.first_steps, first_step)
        summaries[number] = summary
    return summaries


def _nearest(
    vectors: Tensor, summaries: Tensor, k: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the best K = min(k, M) rows [X, K] of summaries [M, D], and their products."""
    k = min(k, len(summaries))
    if not k:
        nothing = torch.empty(len(vectors), 0, dtype=torch.int64, device=CPU)
        return nothing, nothing.float()
    products, places = nearest(
        vectors[None], summaries[None], k, None if allowed is None else allowed[None, None]
    )
    return places[0], products[0]


def _best(numbers: Tensor, products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of chunks [X, Y] and their products, best first; -1 of a product -inf."""
    best = where_best(products, min(k, products.shape[1]), numbers)
    numbers, products = numbers.gather(1, best), products.gather(1, best)
    products = products.masked_fill(numbers < 0, -torch.inf)
    return numbers.masked_fill(products == -torch.inf, -1), products


def _cut(now: State, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chunks [S] that lost steps which rows still tell of, and products [X, S]."""
    summary_of = now.catalog.cut
    numbers = torch.tensor(sorted(summary_of), dtype=torch.int64, device=CPU)
    if not summary_of:
        return numbers, vectors[:, :0].float()
    summaries = torch.stack([summary_of[first_step] for first_step in numbers.tolist()])
    return torch.searchsorted(now.catalog.first_steps, numbers), vectors @ summaries.T


def _starting_at(now: State, first_steps: Tensor) -> Tensor:
    """Return the chunks that begin with these steps in the table; -1 where there is none."""
    own = now.catalog.first_steps
    number = torch.searchsorted(own, first_steps.contiguous())
    # Of a chunk whose oldest steps were forgotten, the first that is left comes later.
    inside = number.clamp(max=max(len(own) - 1, 0))
    if not len(own):
        return torch.full_like(first_steps, -1)
    far = own[inside] - first_steps >= now.head.chunk_size
    return inside.masked_fill((first_steps < 0) | (number >= len(own)) | far, -1)


def _ending_at(now: State, ends: Tensor) -> Tensor:
    """Return the chunks that end before these steps; -1 where there is none."""
    own = now.catalog.first_steps + now.catalog.counts
    if not len(own):
        return torch.full_like(ends, -1)
    number = torch.searchsorted(own, ends.contiguous()).clamp(max=len(own) - 1)
    return number.masked_fill(own[number] != ends, -1)
