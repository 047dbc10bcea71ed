"""The k best chunks of each query in plain PyTorch; of equal scores the older chunk is kept.

Neither `torch.matmul` nor `torch.topk` promises that: the one gives equal summaries scores that
differ in their last bits, by where they stand; the other takes any of equal numbers. So scores that
rounding may have put in another order are summed again, each by itself.
"""

import torch
from torch import Tensor

from htm_pytorch.shapes import may_look_at

BLOCK_BYTES = 4 * 2**20
"""Of numbers held at a time where they are summed again."""


def best_chunks(route: Tensor, summaries: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each query and the chunks that have them, [B, Q, K], best first.

    A score that is no number counts as the best. K is min(k, M); where a query may keep fewer
    chunks, the last ones mean nothing, and their scores are -inf, which no other score is.

    Args:
        route: [B, Q, D].
        summaries: [B, M, D], or of batch 1; of the dtype of `route`.
        allowed: [B, Q, M] bool, which chunks each query may keep; B and Q may be 1.
        k: how many chunks a query keeps.
    """
    k = min(k, summaries.shape[1])
    allowed = allowed.expand(*route.shape[:2], -1)
    if not (k and may_look_at(route) and type(route) is type(summaries) is Tensor):
        return _best_of_all(route, summaries, allowed, k)
    rough = torch.matmul(route, summaries.mT)
    rough.clamp_(min=_lowest(rough)).masked_fill_(~allowed, -torch.inf)
    top, chunks = rough.topk(min(k + 1, summaries.shape[1]))
    size = _sizes(summaries, chunks[..., :k]).masked_fill_(top[..., :k] == -torch.inf, 0.0)
    # Two sums of the same D products, each in any order, are no farther apart.
    noise = torch.linalg.vector_norm(route, dim=-1, keepdim=True) * size.amax(-1, keepdim=True)
    noise *= route.shape[2] * torch.finfo(route.dtype).eps
    unclear = ~(top[..., :-1] - top[..., 1:] > noise) & (top[..., 1:] != -torch.inf)
    top, chunks, border = top[..., :k], chunks[..., :k], top[..., k - 1 : k]
    if unclear.any():
        some = unclear.any(-1)
        row = some.nonzero()[:, 0].clamp(max=len(summaries) - 1)
        least = (border - noise)[some]
        top[some], chunks[some] = _decide(route[some], row, summaries, rough[some], least, k)
    return top, chunks


def scores_alone(route: Tensor, summaries: Tensor, chunks: Tensor) -> Tensor:
    """Return the scores [B, Q, K] of chunks, equal ones of equal summaries."""
    row = torch.arange(len(summaries), device=route.device)[:, None, None]
    batch, _, k = chunks.shape
    block = max(1, BLOCK_BYTES // max(1, batch * k * route.shape[2] * route.itemsize))
    parts = zip(route.split(block, 1), chunks.split(block, 1), strict=True)
    scores = [(some[:, :, None] * summaries[row, kept]).sum(-1) for some, kept in parts]
    return torch.cat(scores, 1).clamp(min=_lowest(route))


def merge(scores: Tensor, chunks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of scores [B, Q, X] and their chunks, best first, of equals the older."""
    by_age = chunks.argsort(dim=-1)
    scores, order = scores.gather(2, by_age).sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], chunks.gather(2, by_age).gather(2, order[..., :k])


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
    route: Tensor, row: Tensor, summaries: Tensor, rough: Tensor, least: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k best scores of U queries and their chunks [U, K], best first.

    All chunks whose rough score [U, M] is not below `least` [U, 1] are scored again. `row` [U] says
    which memory a query reads.
    """
    best: list[tuple[Tensor, Tensor]] = []
    each = max(1, BLOCK_BYTES // (16 * rough.shape[1]))
    block = max(1, BLOCK_BYTES // (route.shape[1] * route.itemsize))
    parts = (part.split(each) for part in (route, row, rough, least))
    for some_route, some_row, some_rough, some_least in zip(*parts, strict=True):
        near = ~(some_rough < some_least) & (some_rough != -torch.inf)
        scores = torch.full_like(some_rough, -torch.inf)
        for pairs in near.nonzero().split(block):
            query, chunk = pairs.unbind(1)
            products = some_route[query] * summaries[some_row[query], chunk]
            scores[query, chunk] = products.sum(-1).clamp_(min=_lowest(scores))
        chunks = _highest(scores, k)
        best.append(_in_order(scores.gather(1, chunks), chunks))
    scores, chunks = (torch.cat(part) for part in zip(*best, strict=True))
    return scores, chunks


def _best_of_all(
    route: Tensor, summaries: Tensor, allowed: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Do it without looking at data, which compilers cannot and accelerators would wait for."""
    if route.device.type != "cpu":
        scores = torch.matmul(route, summaries.mT)
    elif torch.compiler.is_compiling():
        scores = (route[:, :, None] * summaries[:, None]).sum(-1)
    else:
        each = max(1, BLOCK_BYTES // max(1, route.numel() * route.itemsize))
        parts = [(route[:, :, None] * part[:, None]).sum(-1) for part in summaries.split(each, 1)]
        scores = torch.cat(parts, -1)
    scores = scores.clamp(min=_lowest(scores)).masked_fill(~allowed, -torch.inf)
    chunks = _highest(scores, k)
    return _in_order(scores.gather(2, chunks), chunks)


def _highest(scores: Tensor, k: int) -> Tensor:
    """Return where the k highest of the last axis are, ascending; of equal ones the first."""
    largest = torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(nan=torch.inf, posinf=largest, neginf=-torch.inf)
    border = scores.topk(k).values[..., -1:] if k else scores[..., :0]
    # All above the border, then of those on it the first.
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    rank = rank.masked_fill(scores > border, -1).masked_fill(scores < border, scores.shape[-1])
    return rank.topk(k, largest=False).indices.sort(-1).values


def _in_order(scores: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by score, best first; of equals the one that came first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return scores.gather(-1, order), chunks.gather(-1, order)


def _lowest(like: Tensor) -> float:
    """The least score of a chunk that may be kept."""
    return torch.finfo(like.dtype).min
