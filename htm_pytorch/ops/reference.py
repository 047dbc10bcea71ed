"""What is correct, in readable PyTorch. Nothing here is fast, and nothing here imports fast code.

`htm_attention` is the whole layer in the paper's order, with the memory projected plainly;
`recall` is the parameter-free part that every engine computes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory, ScoredHome
from htm_pytorch.memory.fading import Fading, limited
from htm_pytorch.ops.topk import best_chunks


class Selection(NamedTuple):
    """The chunks each query keeps; what lies at picks that are not `kept` means nothing."""

    chunks: Tensor
    """[B, Q, K] int64, best first; 0 where not kept."""
    kept: Tensor
    """[B, Q, K] bool, False where a query had fewer than K chunks to choose from."""


def allowed_chunks(memory: ChunkedMemory | ScoredHome, chunk_mask: Tensor | None) -> Tensor:
    """Return which chunks each query may keep, [B, Q, M] or [B, 1, M] where all queries agree."""
    valid = memory.valid[:, None]
    return valid if chunk_mask is None else valid & chunk_mask


def select(
    route: Tensor,
    memory: ChunkedMemory | ScoredHome,
    k: int,
    chunk_mask: Tensor | None,
    fading: Fading | None = None,
) -> Selection:
    """Keep the `k` chunks with the best scores for `route` [B, Q, D]; see `best_chunks`."""
    with torch.no_grad():
        allowed = allowed_chunks(memory, chunk_mask)
        scores, chunks = best_chunks(route, memory.summaries.to(route.dtype), allowed, k, fading)
        kept = scores != -torch.inf
        return Selection(chunks.masked_fill(~kept, 0), kept)


def recall(
    route: Tensor,
    probe: Tensor,
    memory: ChunkedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    fading: Fading | None = None,
) -> tuple[Tensor, Selection, Tensor, Tensor]:
    """Return context [B, Q, H, D], the selection, chunk weights and step weights.

    All of one dtype, which is at least float32.
    """
    picked = select(route, memory, k, chunk_mask, fading)
    weights = chunk_weights(route, memory, picked, fading)
    context, step_weights = attend(probe, memory, positions, picked, weights)
    return context, picked, weights, step_weights


def attend(
    probe: Tensor,
    memory: ChunkedMemory,
    positions: Tensor | None,
    picked: Selection,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return context [B, Q, H, D] and step weights, inside the picked chunks of these weights."""
    row = torch.arange(memory.batch, device=probe.device)[:, None, None]
    step_mask = picked.kept[..., None].expand(*picked.kept.shape, memory.chunk_size)
    if memory.step_mask is not None:
        step_mask = step_mask & memory.step_mask[row, picked.chunks]
    steps = memory.contents[row, picked.chunks].masked_fill(~step_mask[..., None], 0.0)
    steps = steps.to(probe.dtype)
    if positions is not None:
        steps = steps + positions
    step_logits = torch.einsum("bqhd,bqkcd->bqhkc", probe, steps)
    step_weights = masked_softmax(step_logits, step_mask[:, :, None])
    context = torch.einsum("bqk,bqhkc,bqkcd->bqhd", weights, step_weights, steps)
    return context, step_weights


def chunk_weights(
    route: Tensor, memory: ChunkedMemory, picked: Selection, fading: Fading | None = None
) -> Tensor:
    """Return the softmax [B, Q, K] over the scores of the kept chunks; it has the gradient."""
    row = torch.arange(memory.batch, device=route.device)[:, None, None]
    summaries = memory.summaries[row, picked.chunks].masked_fill(~picked.kept[..., None], 0.0)
    logits = torch.einsum("bqd,bqkd->bqk", route, summaries.to(route.dtype))
    if fading is not None:
        logits = fading.scores(logits, fading.of(picked.chunks))
    return masked_softmax(logits, picked.kept)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where `mask`; rows with nothing to choose are all zero."""
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0.0)


def htm_attention(
    queries: Tensor,
    memory: ChunkedMemory,
    weights: dict[str, Tensor],
    *,
    heads: int,
    k: int,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
) -> Tensor:
    """Attend from `queries` [B, Q, D] as the paper writes it (section 3, figure 1): [B, Q, D].

    `weights` holds the parameters of `nn.HTMAttention` by name; missing biases are zero. Every
    step of the memory is projected to keys and values, and positions and memory carry gradients.
    With recency the last chunk counts as the newest.
    """

    def project(name: str, value: Tensor) -> Tensor:
        bias = weights.get(f"{name}.bias")
        return torch.nn.functional.linear(value, weights[f"{name}.weight"], bias)

    batch, length = queries.shape[:2]
    summary_queries = project("to_summary_queries", queries)
    summary_keys = project("to_summary_keys", memory.summaries)
    relevance = torch.einsum("bqf,bmf->bqm", summary_queries, summary_keys)
    relevance = relevance * summary_queries.shape[-1] ** -0.5
    if "to_recency.weight" in weights:
        # Of what is the same for all chunks, the ceiling knows nothing.
        bias = weights.get("to_summary_keys.bias")
        if bias is not None:
            shared = torch.einsum("bqf,f->bq", summary_queries, bias)
            relevance = relevance - shared[..., None] * summary_queries.shape[-1] ** -0.5
        ceiling, decay = project("to_recency", queries).unbind(-1)
        ages = torch.arange(relevance.shape[2] - 1, -1, -1, device=relevance.device)
        forgotten = decay[..., None] * torch.log1p(ages.to(relevance.dtype))
        relevance = limited(relevance, ceiling[..., None]) - forgotten
    allowed = allowed_chunks(memory, chunk_mask).expand_as(relevance)
    relevance = relevance.masked_fill(~allowed, -torch.inf)
    top, chunks = relevance.sort(dim=-1, descending=True, stable=True)
    top, chunks = top[..., :k], chunks[..., :k]
    mixture = masked_softmax(top, allowed.gather(2, chunks))

    steps = memory.contents if positions is None else memory.contents + positions
    step_keys, values = project("attn.to_kv", steps).chunk(2, -1)
    step_queries = project("attn.to_q", queries)
    step_queries, step_keys, values = (
        part.unflatten(-1, (heads, -1)) for part in (step_queries, step_keys, values)
    )
    scale = step_queries.shape[-1] ** -0.5
    outputs = queries.new_zeros(batch, length, weights["attn.to_out.weight"].shape[0])
    row = torch.arange(batch, device=queries.device)
    for rank in range(chunks.shape[2]):
        chunk = chunks[:, :, rank]
        picked = [part[row[:, None], chunk] for part in (step_keys, values)]
        logits = torch.einsum("bqhe,bqche->bqhc", step_queries, picked[0]) * scale
        mask = torch.ones_like(logits, dtype=torch.bool)
        if memory.step_mask is not None:
            mask = mask & memory.step_mask[row[:, None], chunk][:, :, None]
        attended = torch.einsum("bqhc,bqche->bqhe", masked_softmax(logits, mask), picked[1])
        weight = mixture[:, :, rank, None]
        # The weights sum to 1, so the output bias may stay inside the mixture.
        outputs = outputs + weight * project("attn.to_out", attended.flatten(2))
    return outputs
