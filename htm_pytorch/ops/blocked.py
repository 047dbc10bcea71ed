"""`recall` in blocks of queries: one reused buffer that stays in cache, a backward that recomputes.

Picked chunks are gathered a few queries at a time, so extra memory grows neither with the memory
nor with Q * k * C * D. Plain torch operations, on any device, in one operator.
"""

from typing import Any

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.memory.fading import LEAK, Fading
from htm_pytorch.ops import operators
from htm_pytorch.ops.reference import Selection, masked_softmax
from htm_pytorch.ops.topk import best_chunks, merge, scores_alone

BUFFER_BYTES = 4 * 2**20
"""Of gathered steps: about what two cores keep in their caches."""
SCORE_BYTES = 16 * 2**20
"""Of router scores held at a time."""


def recall(
    route: Tensor,
    probe: Tensor,
    memory: ChunkedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    fading: Fading | None = None,
) -> tuple[Tensor, Selection, Tensor, None]:
    """Compute what `reference.recall` computes, but for the step weights."""
    context, chunks, weights = torch.ops.htm_pytorch.blocked_recall(
        route,
        probe,
        memory.contents,
        memory.summaries,
        memory.valid,
        memory.step_mask,
        positions,
        chunk_mask,
        *(fading or (None,) * 3),
        k,
    )
    kept = chunks >= 0
    return context, Selection(chunks.clamp(min=0), kept), weights, None


def _forward(
    route: Tensor,
    probe: Tensor,
    contents: Tensor,
    summaries: Tensor,
    valid: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    ceiling: Tensor | None,
    decay: Tensor | None,
    ages: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    fading = _fading(ceiling, decay, ages)
    scores, chunks = _select(route, summaries, valid, chunk_mask, fading, k)
    weights = masked_softmax(scores, chunks >= 0)
    blocks = _Blocks(probe, contents, step_mask, positions, chunks, weights)
    context = probe.new_zeros(probe.shape)
    by_position = blocks.new_by_position()
    for rows in blocks.split():
        steps, mask = blocks.gather(rows)
        attended = blocks.attend(rows, steps, mask).mul_(blocks.weights[rows, None, :, None])
        torch.bmm(attended.flatten(2), steps, out=context.flatten(0, 1)[rows])
        if positions is not None:
            torch.sum(attended, 2, out=by_position[rows])
    if positions is not None:
        context += (by_position @ positions).view(probe.shape)
    return context, chunks, weights


def _forward_shapes(
    route: Tensor, probe: Tensor, contents: Tensor, summaries: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    k = rest[-1]
    kept = min(k, summaries.shape[1])
    weights = route.new_empty(*route.shape[:2], kept)
    return probe.new_empty(probe.shape), weights.to(torch.int64), weights


def _backward(
    grad: Tensor,
    route: Tensor,
    probe: Tensor,
    contents: Tensor,
    summaries: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    ceiling: Tensor | None,
    decay: Tensor | None,
    ages: Tensor | None,
    chunks: Tensor,
    weights: Tensor,
    to_contents: bool,
    to_summaries: bool,
) -> tuple[Tensor, ...]:
    """Gradients of route, probe, contents, summaries, positions, ceiling, decay.

    Empty where they are not asked for.
    """
    blocks = _Blocks(probe, contents, step_mask, positions, chunks, weights)
    grad = grad.flatten(0, 1)
    grad_probe = probe.new_zeros(probe.shape)
    grad_weights = weights.new_zeros(weights.shape)
    # How much each position was attended to, and how much its logit gained, over all chunks.
    attended, earned = blocks.new_by_position(), blocks.new_by_position()
    grad_by_position = None if positions is None else grad @ positions.mT
    # Whole, in the precision of the sums; cast once at the end.
    grad_contents = probe.new_zeros(contents.shape if to_contents else (0,) * 4)
    for rows in blocks.split():
        steps, mask = blocks.gather(rows)
        inside = blocks.attend(rows, steps, mask)
        weight = blocks.weights[rows, None, :, None]
        mixed = inside * weight
        grad_inside = torch.bmm(grad[rows], steps.mT).unflatten(2, inside.shape[2:])
        if grad_by_position is not None:
            grad_inside += grad_by_position[rows, :, None]
        gained = inside * grad_inside
        total = gained.sum(3, keepdim=True)
        grad_weights.flatten(0, 1)[rows] = total.sum((1, 3))
        grad_logits = (gained - inside * total) * weight
        torch.bmm(grad_logits.flatten(2), steps, out=grad_probe.flatten(0, 1)[rows])
        if positions is not None:
            torch.sum(grad_logits, 2, out=earned[rows])
            torch.sum(mixed, 2, out=attended[rows])
        if to_contents:
            grad_steps = torch.bmm(grad_logits.flatten(2).mT, blocks.probe[rows])
            grad_steps += torch.bmm(mixed.flatten(2).mT, grad[rows])
            grad_steps = grad_steps.unflatten(1, (-1, contents.shape[2]))
            if mask is not None:
                grad_steps = grad_steps.masked_fill(~mask[..., None], 0.0)
            target = grad_contents.flatten(0, 1)
            target.index_add_(0, blocks.slots[rows].flatten(), grad_steps.flatten(0, 1))
    grad_positions = probe.new_zeros(0)
    if positions is not None:
        grad_probe += (earned @ positions).view(probe.shape)
        grad_positions = earned.flatten(0, 1).mT @ blocks.probe.flatten(0, 1)
        grad_positions += attended.flatten(0, 1).mT @ grad.flatten(0, 1)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    row = _memory_row(contents, route.shape[0])
    picked = chunks.clamp(min=0)
    kept_summaries = summaries[row, picked].masked_fill((chunks < 0)[..., None], 0.0)
    kept_summaries = kept_summaries.to(route.dtype)
    grad_ceiling = grad_decay = route.new_zeros(0)
    fading = _fading(ceiling, decay, ages)
    if fading is not None:
        products = torch.einsum("bqd,bqkd->bqk", route, kept_summaries)
        share = 1 - (1 - LEAK) * torch.sigmoid(products - fading.ceiling[..., None])
        grad_ceiling = (grad_scores * (1 - share)).sum(-1)
        grad_decay = -(grad_scores * fading.of(chunks)).sum(-1)
        grad_scores = grad_scores * share
    grad_route = torch.einsum("bqk,bqkd->bqd", grad_scores, kept_summaries)
    grad_summaries = route.new_zeros(summaries.shape if to_summaries else (0,) * 3)
    if to_summaries:
        slots = (row * contents.shape[1] + picked).flatten()
        by_chunk = grad_scores[..., None] * route[:, :, None]
        grad_summaries.flatten(0, 1).index_add_(0, slots, by_chunk.flatten(0, 2))
    return (
        grad_route.contiguous(),
        grad_probe,
        grad_contents.to(contents.dtype),
        grad_summaries.to(summaries.dtype),
        grad_positions,
        grad_ceiling,
        grad_decay,
    )


def _fading(ceiling: Tensor | None, decay: Tensor | None, ages: Tensor | None) -> Fading | None:
    if ceiling is None or decay is None or ages is None:
        return None
    return Fading(ceiling, decay, ages)


def _backward_shapes(
    grad: Tensor,
    route: Tensor,
    probe: Tensor,
    contents: Tensor,
    summaries: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    ceiling: Tensor | None,
    decay: Tensor | None,
    ages: Tensor | None,
    chunks: Tensor,
    weights: Tensor,
    to_contents: bool,
    to_summaries: bool,
) -> tuple[Tensor, ...]:
    queries = 0 if ceiling is None else ceiling.shape
    return (
        route.new_empty(route.shape),
        probe.new_empty(probe.shape),
        contents.new_empty(contents.shape if to_contents else (0,) * 4),
        summaries.new_empty(summaries.shape if to_summaries else (0,) * 3),
        probe.new_empty(positions.shape if positions is not None else 0),
        route.new_empty(queries),
        route.new_empty(queries),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    route, probe, contents, summaries, _, step_mask, positions, _, *fading, _ = inputs
    _, chunks, weights = output
    ctx.mark_non_differentiable(chunks, weights)
    given = route, probe, contents, summaries, step_mask, positions, *fading
    operators.save(ctx, *given, chunks, weights)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grads = torch.ops.htm_pytorch.blocked_recall_backward(
        grad.contiguous(), *operators.saved(ctx), needs[2], needs[3]
    )
    route, probe, contents, summaries, positions, ceiling, decay = grads
    return (
        route,
        probe,
        contents if needs[2] else None,
        summaries if needs[3] else None,
        None,
        None,
        positions if needs[6] else None,
        None,
        ceiling if needs[8] else None,
        decay if needs[9] else None,
        None,
        None,
    )


operators.register(
    "blocked_recall(Tensor route, Tensor probe, Tensor contents, Tensor summaries, Tensor valid, "
    "Tensor? step_mask, Tensor? positions, Tensor? chunk_mask, Tensor? ceiling, Tensor? decay, "
    "Tensor? ages, SymInt k) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_shapes,
)
operators.register(
    "blocked_recall_backward(Tensor grad, Tensor route, Tensor probe, Tensor contents, "
    "Tensor summaries, Tensor? step_mask, Tensor? positions, Tensor? ceiling, Tensor? decay, "
    "Tensor? ages, Tensor chunks, Tensor weights, bool to_contents, bool to_summaries) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_shapes,
)
operators.differentiate("blocked_recall", _differentiate, _setup_context)


class _Blocks:
    """The (row, query) pairs in blocks, and the steps they picked."""

    def __init__(
        self,
        probe: Tensor,
        contents: Tensor,
        step_mask: Tensor | None,
        positions: Tensor | None,
        chunks: Tensor,
        weights: Tensor,
    ):
        self.probe = probe.flatten(0, 1)
        self.contents = contents
        self.step_mask = step_mask
        self.by_position = None if positions is None else self.probe @ positions.mT
        self.chunks = chunks.flatten(0, 1)
        self.weights = weights.flatten(0, 1)
        batch, queries, k = chunks.shape
        row = _memory_row(contents, batch)
        self.row = row.expand(batch, queries, k).flatten(0, 1)
        self.slots = self.row * contents.shape[1] + self.chunks.clamp(min=0)
        # Looking at data would wait for an accelerator; there, the mask is always applied.
        self.complete = chunks.device.type == "cpu" and bool((chunks >= 0).all())
        picked = k * contents.shape[2] * contents.shape[3]
        self.size = max(1, BUFFER_BYTES // max(1, picked * probe.itemsize))
        same = contents.dtype == probe.dtype and contents.is_contiguous()
        shape = (min(self.size, len(self.probe)) * k, *contents.shape[2:])
        self.buffer = contents.new_empty(shape) if same else None

    def split(self) -> list[slice]:
        rows = len(self.probe)
        if not self.chunks.shape[1]:
            return []
        return [slice(start, min(start + self.size, rows)) for start in range(0, rows, self.size)]

    def new_by_position(self) -> Tensor:
        """Return zeros [X, H, C] for all (row, query) pairs X."""
        return self.probe.new_zeros(*self.probe.shape[:2], self.contents.shape[2])

    def gather(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return the picked steps [X, K * C, D], blank where the mask [X, K, C] says so."""
        slots = self.slots[rows]
        if self.buffer is not None:
            steps = self.buffer[: slots.numel()]
            torch.index_select(self.contents.flatten(0, 1), 0, slots.flatten(), out=steps)
            steps = steps.unflatten(0, slots.shape)
        else:
            steps = self.contents[self.row[rows], self.chunks[rows].clamp(min=0)]
            steps = steps.to(self.probe.dtype)
        mask = None
        if not self.complete:
            mask = (self.chunks[rows] >= 0)[..., None].expand(steps.shape[:3])
        if self.step_mask is not None:
            stepwise = self.step_mask[self.row[rows], self.chunks[rows].clamp(min=0)]
            mask = stepwise if mask is None else mask & stepwise
        if mask is not None:
            steps.masked_fill_(~mask[..., None], 0.0)
        return steps.flatten(1, 2), mask

    def attend(self, rows: slice, steps: Tensor, mask: Tensor | None) -> Tensor:
        """Return the softmax inside each chunk, [X, H, K, C]."""
        logits = torch.bmm(self.probe[rows], steps.mT).unflatten(2, (self.chunks.shape[1], -1))
        if self.by_position is not None:
            logits += self.by_position[rows, :, None]
        return logits.softmax(-1) if mask is None else masked_softmax(logits, mask[:, None])


def _memory_row(contents: Tensor, batch: int) -> Tensor:
    """[B, 1, 1]: the memory's row that each row of queries reads."""
    row = torch.arange(batch, device=contents.device)[:, None, None]
    return row if contents.shape[0] > 1 else torch.zeros_like(row)


def _select(
    route: Tensor,
    summaries: Tensor,
    valid: Tensor,
    chunk_mask: Tensor | None,
    fading: Fading | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return the best scores and their chunks [B, Q, K], best first; -1 where there are fewer.

    Scores of at most SCORE_BYTES at a time: the memory is scanned in pieces, oldest first.
    """
    batch, queries, _ = route.shape
    chunks = summaries.shape[1]
    k = min(k, chunks)
    piece = max(k, 1, SCORE_BYTES // max(1, batch * queries * route.itemsize))
    best = route.new_empty(batch, queries, 0)
    found = torch.empty(batch, queries, 0, dtype=torch.int64, device=route.device)
    for start in range(0, chunks, piece):
        end = min(start + piece, chunks)
        allowed = valid[:, None, start:end]
        if chunk_mask is not None:
            allowed = allowed & chunk_mask[:, :, start:end]
        part = summaries[:, start:end].to(route.dtype)
        fades = None if fading is None else fading.part(start, end)
        top, index = best_chunks(route, part, allowed, k, fades)
        if piece < chunks:
            top = scores_alone(route, part, index, fades).masked_fill(top == -torch.inf, -torch.inf)
        index = (index + start).masked_fill_(top == -torch.inf, -1)
        best, found = torch.cat([best, top], -1), torch.cat([found, index], -1)
        if start:
            best, found = merge(best, found, k)
    return best, found
