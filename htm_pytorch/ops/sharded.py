"""`recall` over a memory that is shared out among ranks: best scores gathered, contexts summed.

Each rank picks the k best of its own chunks and sends their scores. All ranks then know the k best
of all, and each attends inside those that it holds; the sum of the contexts is the result. Chunks
stay where they are. Queries and results are the same on all ranks, so gradients of what every rank
was given are summed on the way back. Exchanges are written with plain collectives.
"""

from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from htm_pytorch.memory import ChunkedMemory, ShardedMemory
from htm_pytorch.memory.best import where_best
from htm_pytorch.memory.fading import Fading, log_ages
from htm_pytorch.memory.home import dtype_of_summaries, is_exact, summaries_at
from htm_pytorch.memory.rank_group import HEADER, Fingerprint, RankGroup
from htm_pytorch.ops import native, reference
from htm_pytorch.ops.recency import Recency

_ROUTE, _PROBE, _POSITIONS, _MEMORY = 1, 2, 4, 8
_HIGH = 1e4
"""Of ceilings; higher ones count as alike where ranks compare them."""


class Recalled(NamedTuple):
    """The same on all ranks, in the dtype of sums."""

    context: Tensor
    """[B, Q, H, D], what each query recalls."""
    chunks: Tensor
    """[B, Q, K] int64, numbers among all ranks' chunks, best first; -1 where there are fewer."""
    chunk_weights: Tensor
    """[B, Q, K], the softmax of their scores."""
    step_weights: Tensor | None
    """[B, Q, H, K, C], the softmax inside each chunk; None where it was not asked for."""


class Exchanged(NamedTuple):
    """Bytes that one rank hands to the collectives of one call of `recall`."""

    header: int
    """What the ranks compare first, which is gathered."""
    scores: int
    """k scores and k chunk numbers a query, which are gathered."""
    contexts: int
    """H * D numbers a query, which are summed."""
    gradients: int
    """H * D + D + k numbers a query, and C * D for the positions: summed on the way back."""


def exchanged_bytes(
    queries: int,
    heads: int,
    dim: int,
    k: int,
    *,
    word: int = 4,
    gradients: bool = False,
    positions: int = 0,
) -> Exchanged:
    """Return the bytes that one rank hands to the collectives of one call; no chunk is among them.

    Args:
        queries: how many queries there are, B * Q.
        heads: how many heads there are, H.
        dim: how many numbers a step has, D.
        k: how many chunks a query keeps; the most that one rank holds, if that is less.
        word: how many bytes a number takes in the dtype of sums, 4 or 8.
        gradients: whether route, probe and positions get gradients.
        positions: how many steps a chunk has, C, where positions get gradients; else 0.
    """
    context = heads * dim
    backward = queries * (context + dim + k) + positions * dim if gradients else 0
    return Exchanged(
        header=8 * HEADER,
        scores=queries * 2 * k * word,
        contexts=queries * context * word,
        gradients=backward * word,
    )


def recall(
    route: Tensor,
    probe: Tensor,
    memory: ShardedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    recency: Recency | None = None,
    *,
    with_kernel: bool,
    with_weights: bool = False,
) -> Recalled:
    """Compute what `reference.recall` computes over the chunks of all ranks.

    Args:
        route: [B, Q, D]; like the other arguments, it must be the same on all ranks.
        probe: [B, Q, H, D], what is compared with the steps inside the kept chunks.
        memory: this rank's view of what all ranks hold.
        k: how many chunks a query keeps.
        positions: [C, D], which are added to the steps of every chunk; None: nothing is.
        chunk_mask: [B, Q, M] bool, which chunks each query may see; None: all.
        recency: how the age of chunks counts; None: not at all.
        with_kernel: whether this rank does its part by the compiled kernel.
        with_weights: whether to return the weights inside chunks, which are then summed as well.

    Raises:
        ValueError: on all ranks, where their arguments differ.
        ShardError: not all ranks came in time.
    """
    group, local = memory.ranks, memory.local
    needs = _agree(route, probe, memory, k, positions, chunk_mask, recency, with_weights)
    with group.exchanging():
        dtypes = (memory.dtype, dtype_of_summaries(local), route.dtype)
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        route, probe = route.to(dtype), probe.to(dtype)
        positions = None if positions is None else positions.to(dtype)

        fades = () if recency is None else (recency.ceiling.to(dtype), recency.decay.to(dtype))
        route, *fades = _to_ranks(group, *((part, needs & _ROUTE) for part in (route, *fades)))
        fading = None
        if recency is not None:
            ceiling, decay = fades
            fading = Fading(ceiling, decay, log_ages(memory.own_ages(recency.ages), dtype))
        mask = None if chunk_mask is None else memory.own_columns(chunk_mask)
        picked = _pick(route, local, min(k, local.chunks), mask, fading, with_kernel)
        scores = _score(route, local, picked, fading)
        in_order = where_best(scores.detach(), picked.shape[2], picked)
        picked, scores = picked.gather(2, in_order), scores.gather(2, in_order)
        missing = (0, min(k, max(memory.sizes)) - picked.shape[2])
        scores, chunks = _Gather.apply(
            group, pad(scores, missing, value=-torch.inf), pad(picked, missing, value=-1)
        )
        best = choose(scores.detach(), chunks, min(k, memory.chunks))
        chunks = chunks.flatten(2).gather(2, best)
        kept = chunks >= 0
        weights = reference.masked_softmax(scores.flatten(2).gather(2, best), kept)

        mine = kept & (chunks % group.size == group.rank)
        picked = torch.where(mine, chunks // group.size, -1)
        probe, shares, positions = _to_ranks(
            group,
            (probe, needs & _PROBE),
            (weights, needs & (_ROUTE | _MEMORY)),
            (positions, needs & _POSITIONS),
        )
        shares = shares.masked_fill(~mine, 0.0)
        with_kernel = with_kernel and not with_weights
        context, step_weights = _attend(probe, local, positions, picked, shares, with_kernel)
        context = _Sum.apply(group, "contexts", context)
        step_weights = _Sum.apply(group, "step weights", step_weights) if with_weights else None
        return Recalled(context, chunks, weights, step_weights)


def choose(scores: Tensor, chunks: Tensor, k: int) -> Tensor:
    """Return where the k best of all ranks' lists [B, Q, R, S] are in [B, Q, R * S], best first.

    Each list is in the order of `where_best` itself: falling scores, of equals the lower number
    first, as in one process; last the places with no chunk, of number -1.
    """
    ranks, width = scores.shape[2:]
    if not 0 < k < ranks:
        return where_best(scores.flatten(2), k, chunks.flatten(2))
    # The best k are with those k ranks whose best one is best: of many ranks few are looked at.
    first = where_best(scores[..., 0], k, chunks[..., 0])[..., None] * width
    at = (first + torch.arange(width, device=scores.device)).flatten(2)
    best = where_best(scores.flatten(2).gather(2, at), k, chunks.flatten(2).gather(2, at))
    return at.gather(2, best)


def _agree(
    route: Tensor,
    probe: Tensor,
    memory: ShardedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    recency: Recency | None,
    with_weights: bool,
) -> int:
    """Compare the arguments of all ranks; return which tensors need gradients on any of them."""
    batch, queries, heads, dim = probe.shape
    same: dict[str, int | torch.dtype | None] = {
        "route: B": batch,
        "route: Q": queries,
        "probe: H": heads,
        "memory: D": dim,
        "memory: C": memory.chunk_size,
        "memory: M": memory.chunks,
        "memory: steps appended": memory.appended,
        "memory: what was done to it (append, reset, is_first)": memory.changes,
        "k": k,
        "route: dtype": route.dtype,
        "positions": None if positions is None else positions.dtype,
        "chunk_mask (a checksum)": None if chunk_mask is None else _checksum(chunk_mask),
        "recency (1 if it counts)": int(recency is not None),
        "recency.ages (a checksum)": None
        if recency is None or recency.ages is None
        else _checksum(recency.ages),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
    }
    local = memory.local
    held = [local.summaries, local.contents] if isinstance(local, ChunkedMemory) else []
    needs = 0
    routes = [route] if recency is None else [route, recency.ceiling, recency.decay]
    asked = ((_ROUTE, routes), (_PROBE, [probe]), (_POSITIONS, [positions]), (_MEMORY, held))
    for bit, tensors in asked:
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            needs |= bit
    operation = "recall_with_weights" if with_weights else "recall"
    fingerprints = {"route": Fingerprint.of(route), "probe": Fingerprint.of(probe)}
    if recency is not None:
        both = torch.stack([recency.ceiling.clamp(max=_HIGH), recency.decay], -1)
        fingerprints["recency"] = Fingerprint.of(both.detach())
    answers = memory.ranks.agree(operation, same, [needs, local.chunks], route.device, fingerprints)
    for rank, (_, chunks) in enumerate(answers):
        if chunks != memory.sizes[rank]:
            raise ValueError(
                f"memory: expected {memory.sizes[rank]} chunks on rank {rank}, as when it was made "
                f"or last appended to, got {chunks}"
            )
    if not torch.is_grad_enabled():
        return 0
    return reduce(or_, (bits for bits, _ in answers))


def _checksum(mask: Tensor) -> int:
    """Return a number that tells a mask [B, Q, M], or ages, from others."""
    flat = mask.flatten(0, 1)
    down, across = (torch.arange(1, size + 1, device=mask.device) for size in flat.shape)
    return int((flat.sum(1) * down).sum() * 65_537 + (flat.sum(0) * across).sum()) % 2**62


def _pick(
    route: Tensor,
    local: Any,
    k: int,
    chunk_mask: Tensor | None,
    fading: Fading | None,
    with_kernel: bool,
) -> Tensor:
    """Return this rank's best chunks [B, Q, K] by its own numbers; -1 where there are fewer."""
    with torch.no_grad():
        if not k:
            return torch.empty(*route.shape[:2], 0, dtype=torch.int64, device=route.device)
        if is_exact(local):
            return local.best_chunks(route, k, chunk_mask, fading)
        if with_kernel:
            return native.pick(route, local, k, chunk_mask, fading)[0]
        picked = reference.select(route, local, k, chunk_mask, fading)
        return picked.chunks.masked_fill(~picked.kept, -1)


def _score(route: Tensor, local: Any, picked: Tensor, fading: Fading | None) -> Tensor:
    """Return the scores [B, Q, K] of the picked chunks; they have the gradient."""
    summaries = summaries_at(local, picked)
    summaries = summaries.masked_fill(picked[..., None] < 0, 0.0).to(route.dtype)
    # Not a matrix product, in which equal summaries may have scores that differ in the last bit:
    # ties must be ties on all ranks.
    scores = (route[:, :, None] * summaries).sum(-1)
    if fading is not None:
        scores = fading.scores(scores, fading.of(picked))
    return scores.masked_fill(picked < 0, -torch.inf)


def _attend(
    probe: Tensor,
    local: Any,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    with_kernel: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return this rank's part of the context, and of the step weights without the kernel."""
    memory, picked = _read(local, picked)
    missing = picked.shape[2]
    if not memory.chunks:
        # There is nothing to index, but what follows must be in the graph.
        picked, weights = picked[..., :0], weights[..., :0]
    missing -= picked.shape[2]
    if with_kernel:
        return native.attend(probe, memory, positions, picked, weights), None
    kept = picked >= 0
    selection = reference.Selection(picked.clamp(min=0), kept)
    context, step_weights = reference.attend(probe, memory, positions, selection, weights)
    return context, pad(step_weights, (0, 0, 0, missing))


def _read(local: Any, picked: Tensor) -> tuple[ChunkedMemory, Tensor]:
    """Return a memory with the picked chunks, and their numbers in it."""
    if isinstance(local, ChunkedMemory):
        return local, picked
    kept = picked >= 0
    numbers, place = torch.unique(picked[kept], return_inverse=True)
    return local.fetch(numbers), picked.masked_scatter(kept, place)


def _to_ranks(group: RankGroup, *wanted: tuple[Tensor | None, int]) -> tuple[Any, ...]:
    """Hand what all ranks have alike to each rank's own work; sum gradients where they are wanted.

    Wanted on any rank, so that all take part in the way back.
    """
    tensors = tuple(tensor for tensor, _ in wanted)
    summed = tuple(bool(is_wanted) for _, is_wanted in wanted)
    if not any(summed):
        return tensors
    # Gives the results a gradient also on a rank where none of the tensors needs one.
    anchor = torch.zeros((), requires_grad=True, device="cpu")
    return _ToRanks.apply(group, summed, anchor, *tensors)


class _ToRanks(torch.autograd.Function):
    """The identity, whose gradients are summed over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, group: RankGroup, summed: tuple[bool, ...], _: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.group, ctx.summed = group, summed
        results = tuple(None if x is None else x.view_as(x) for x in tensors)
        others = zip(results, summed, strict=True)
        ctx.mark_non_differentiable(*(x for x, asked in others if x is not None and not asked))
        return results

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        wanted = [grad for grad, asked in zip(grads, ctx.summed, strict=True) if asked]
        flat = torch.cat([grad.reshape(-1) for grad in wanted])
        ctx.group.all_reduce("gradients", flat)
        parts = iter(flat.split([grad.numel() for grad in wanted]))
        pairs = zip(grads, ctx.summed, strict=True)
        return (
            None,
            None,
            None,
            *(next(parts).view(grad.shape) if asked else None for grad, asked in pairs),
        )


class _Gather(torch.autograd.Function):
    """The scores [B, Q, R, S] of all ranks, and the numbers of their chunks.

    What is made of them is the same on all ranks, so its gradient is whole already, and a rank
    takes that of its own scores.
    """

    @staticmethod
    def forward(
        ctx: Any, group: RankGroup, scores: Tensor, picked: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.rank = group.rank
        # One message: a number takes as many bits as a score.
        bits = torch.int32 if scores.dtype == torch.float32 else torch.int64
        message = torch.stack([scores.contiguous().view(bits), picked.to(bits)])
        gathered = group.all_gather("scores", message)
        # [R, 2, B, Q, S] -> [B, Q, R, S]
        every, chunks = gathered.permute(1, 2, 3, 0, 4).contiguous().unbind()
        rank = torch.arange(group.size, device=picked.device)[:, None]
        chunks = torch.where(chunks >= 0, chunks.long() * group.size + rank, -1)
        ctx.mark_non_differentiable(chunks)
        return every.view(scores.dtype), chunks

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, grad[:, :, ctx.rank], None


class _Sum(torch.autograd.Function):
    """The sum over the ranks of what each computed alone.

    All ranks go on with it alike, so its gradient is whole already.
    """

    @staticmethod
    def forward(ctx: Any, group: RankGroup, what: str, part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        group.all_reduce(what, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, grad
