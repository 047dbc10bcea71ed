"""Which chunks have the best scores; of equal scores the older chunk is kept.

Neither `torch.matmul` nor `torch.topk` promises that: the one gives equal summaries scores that
differ in their last bits, by where they stand; the other takes any of equal numbers. So scores that
rounding may have put in another order are summed again, each by itself.
"""

import torch
from torch import Tensor

from htm_pytorch.memory.fading import Fading

BLOCK_BYTES = 4 * 2**20
"""How many bytes of numbers are held at a time where they are summed again."""


def nearest(
    route: Tensor,
    summaries: Tensor,
    k: int,
    allowed: Tensor | None = None,
    fading: Fading | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each vector and the chunks that have them, [B, Q, K].

    Best first. A score that is no number counts as the best. Where a vector may keep fewer
    chunks, the last ones mean nothing, and their scores are -inf, which no other score is.

    Args:
        route: [B, Q, D], on the CPU; this looks at what it holds.
        summaries: [B, M, D], or of batch 1, which all rows share; it has the dtype of `route`.
        k: how many chunks a vector keeps, from 1 to M.
        allowed: [B, Q, M] bool, which chunks each vector may keep; None: all.
        fading: of [B, Q] vectors, what makes scores of products; None: they are the scores.
    """
    rough = torch.matmul(route, summaries.mT)
    if fading is not None:
        rough = fading.scores(rough)
    rough.clamp_(min=lowest(rough))
    if allowed is not None:
        rough.masked_fill_(~allowed, -torch.inf)
    top, chunks = rough.topk(min(k + 1, summaries.shape[1]))
    size = _sizes(summaries, chunks[..., :k]).masked_fill_(top[..., :k] == -torch.inf, 0.0)
    # Two sums of the same D products, each in any order, are no farther apart.
    noise = torch.linalg.vector_norm(route, dim=-1, keepdim=True) * size.amax(-1, keepdim=True)
    noise *= route.shape[2] * torch.finfo(route.dtype).eps
    if fading is not None:
        # Scores are no farther apart than products, but for what they are rounded to.
        sizes = top[..., :k].masked_fill(top[..., :k] == -torch.inf, 0.0).abs()
        noise += 8 * torch.finfo(route.dtype).eps * (sizes.amax(-1, keepdim=True) + 1)
    unclear = ~(top[..., :-1] - top[..., 1:] > noise) & (top[..., 1:] != -torch.inf)
    top, chunks, border = top[..., :k], chunks[..., :k], top[..., k - 1 : k]
    if unclear.any():
        some = unclear.any(-1)
        row = some.nonzero()[:, 0].clamp(max=len(summaries) - 1)
        least = (border - noise)[some]
        parts = [part.expand(*rough.shape[:2], *part.shape[2:])[some] for part in fading or ()]
        some_fading = Fading(*parts) if parts else None
        some_of = route[some], row, rough[some], least, some_fading
        top[some], chunks[some] = _decide(*some_of, summaries, k)
    return top, chunks


def where_best(scores: Tensor, k: int, numbers: Tensor | None = None) -> Tensor:
    """Return where the k best of scores [..., X] are, best first; of equals the lowest number.

    A score that is no number counts as the best.

    Args:
        scores: [..., X], of which the largest are wanted.
        k: how many are wanted, at most X.
        numbers: [..., X] int64, those of the chunks; a place of number -1 has no chunk, and comes
            last. None: their places.
    """
    last = torch.iinfo(torch.int64).max
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    if numbers is None:
        numbers = places
    else:
        scores = scores.masked_fill(numbers < 0, -torch.inf)
        numbers = numbers.masked_fill(numbers < 0, last)
    largest = torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(nan=torch.inf, posinf=largest, neginf=-torch.inf)
    # All of a few are sorted; places are not asked how many: a compiler would tell cases apart.
    if k and (numbers is places or 2 * k < scores.shape[-1]):
        border = scores.topk(k).values[..., -1:]
        # All above the border, then of those on it the lowest numbers.
        rank = numbers.masked_fill(scores > border, -1).masked_fill(scores < border, last)
        places = rank.topk(k, largest=False).indices
    places = places.gather(-1, numbers.gather(-1, places).argsort(dim=-1))
    by_score = scores.gather(-1, places).argsort(dim=-1, descending=True, stable=True)
    return places.gather(-1, by_score[..., :k])


def lowest(like: Tensor) -> float:
    """Return the least score of a chunk that may be kept."""
    return torch.finfo(like.dtype).min


def _sizes(summaries: Tensor, chunks: Tensor) -> Tensor:
    """Return the norms [B, Q, K] of the summaries of chunks; of all, or of these if fewer."""
    batch, queries, k = chunks.shape
    rows, total, dim = summaries.shape
    if batch * queries * k < rows * total:
        at = chunks.flatten(1)[..., None].expand(-1, -1, dim)
        few = summaries.expand(batch, -1, -1).gather(1, at)
        return torch.linalg.vector_norm(few, dim=-1).view(batch, queries, k)
    sizes = torch.linalg.vector_norm(summaries, dim=-1)
    return sizes[:, None].expand(batch, queries, -1).gather(2, chunks)


def _decide(
    route: Tensor,
    row: Tensor,
    rough: Tensor,
    least: Tensor,
    fading: Fading | None,
    summaries: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return the k best scores of U queries and their chunks [U, K], best first.

    All chunks whose rough score [U, M] is not below `least` [U, 1] are scored again. `row` [U] says
    which memory a query reads.
    """
    best: list[tuple[Tensor, Tensor]] = []
    each = max(1, BLOCK_BYTES // (16 * rough.shape[1]))
    block = max(1, BLOCK_BYTES // (route.shape[1] * route.itemsize))
    parts = (part.split(each) for part in (route, row, rough, least, *(fading or ())))
    for some_route, some_row, some_rough, some_least, *fades in zip(*parts, strict=True):
        near = ~(some_rough < some_least) & (some_rough != -torch.inf)
        scores = torch.full_like(some_rough, -torch.inf)
        for pairs in near.nonzero().split(block):
            query, chunk = pairs.unbind(1)
            products = some_route[query] * summaries[some_row[query], chunk]
            sums = products.sum(-1)
            if fades:
                ceiling, decay, ages = fades
                of_pairs = Fading(ceiling[query], decay[query], ages[query, chunk][:, None])
                sums = of_pairs.scores(sums[:, None])[:, 0]
            scores[query, chunk] = sums.clamp_(min=lowest(scores))
        chunks = where_best(scores, k)
        best.append((scores.gather(1, chunks), chunks))
    scores, chunks = (torch.cat(part) for part in zip(*best, strict=True))
    return scores, chunks
