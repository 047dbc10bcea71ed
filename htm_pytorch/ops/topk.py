"""The k best chunks of each query in plain PyTorch; of equal scores the older chunk is kept."""

import torch
from torch import Tensor

from htm_pytorch.memory.best import BLOCK_BYTES, lowest, nearest, where_best
from htm_pytorch.memory.fading import Fading
from htm_pytorch.shapes import may_look_at


def best_chunks(
    route: Tensor, summaries: Tensor, allowed: Tensor, k: int, fading: Fading | None = None
) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each query and the chunks that have them, [B, Q, K], best first.

    A score that is no number counts as the best. K is min(k, M); where a query may keep fewer
    chunks, the last ones mean nothing, and their scores are -inf, which no other score is.

    Args:
        route: [B, Q, D], whose products with the summaries make the scores.
        summaries: [B, M, D], or of batch 1, which all rows share; it has the dtype of `route`.
        allowed: [B, Q, M] bool, which chunks each query may keep; B and Q may be 1.
        k: how many chunks a query keeps.
        fading: what makes scores of products; None: they are the scores.
    """
    k = min(k, summaries.shape[1])
    allowed = allowed.expand(*route.shape[:2], -1)
    if k and may_look_at(route) and type(route) is type(summaries) is Tensor:
        return nearest(route, summaries, k, allowed, fading)
    return _best_of_all(route, summaries, allowed, k, fading)


def scores_alone(
    route: Tensor, summaries: Tensor, chunks: Tensor, fading: Fading | None = None
) -> Tensor:
    """Return the scores [B, Q, K] of chunks, equal ones of equal summaries."""
    row = torch.arange(len(summaries), device=route.device)[:, None, None]
    batch, _, k = chunks.shape
    block = max(1, BLOCK_BYTES // max(1, batch * k * route.shape[2] * route.itemsize))
    parts = zip(route.split(block, 1), chunks.split(block, 1), strict=True)
    scores = [(some[:, :, None] * summaries[row, kept]).sum(-1) for some, kept in parts]
    every = torch.cat(scores, 1)
    if fading is not None:
        every = fading.scores(every, fading.of(chunks))
    return every.clamp(min=lowest(route))


def merge(scores: Tensor, chunks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of scores [B, Q, X] and their chunks, best first, of equals the older."""
    best = where_best(scores, min(k, scores.shape[2]), chunks)
    return scores.gather(2, best), chunks.gather(2, best)


def _best_of_all(
    route: Tensor, summaries: Tensor, allowed: Tensor, k: int, fading: Fading | None
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
    if fading is not None:
        scores = fading.scores(scores)
    scores = scores.clamp(min=lowest(scores)).masked_fill(~allowed, -torch.inf)
    chunks = where_best(scores, k)
    return scores.gather(2, chunks), chunks
