"""What every result is compared with before anything is timed: plain references, in float64.

A rival may be off by a small multiple of what the same reference is off in float32. Where all of
it would take too long, a part is checked: the gradient of the output is 0 elsewhere.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peers import CausalSelfAttention, DenseProjected
from torch import Tensor
from torch.nn.functional import linear

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import reference

MULTIPLE = 8.0
"""Of the float32 reference's own error: what a rival's may be."""
MOST_QUERIES = 2048
"""Checked, over all rows of the batch."""
TIE = 1e-5
"""Of the largest score. If the last chunk kept is no further than this from the first one left,
float32 may keep either, and both are right: such a query is not checked."""

# The exact gradient is 0, so there is nothing to measure an error by.
ZERO_GRADIENTS = {"to_summary_keys.bias"}

Results = dict[str, Tensor]


class Expected(NamedTuple):
    """What a peer must return, given the gradient of its output."""

    full_cotangent: Tensor
    cotangent: Tensor
    """The same, but 0 at queries that are not checked."""
    checked: Tensor
    """[B, Q] bool."""
    parts: dict[str, Callable[[Tensor], Tensor]]
    """By name, what to compare of a result; others are compared whole."""
    exact: Results
    """In float64: "output" and, unless it is forward only, the gradients by name."""
    single: Results
    """The same in float32."""

    def compare(self, name: str, results: Results) -> float:
        """Stop unless the results are right; return the largest error, in errors of float32."""
        worst = 0.0
        for part in sorted(results.keys() - ZERO_GRADIENTS):
            exact, got = self.exact[part], results[part]
            got = self.parts[part](got) if part in self.parts else got
            own = max(_error(self.single[part], exact), torch.finfo(torch.float32).eps)
            error = _error(got, exact)
            # Not `>`, which would let NaN pass.
            if not error <= MULTIPLE * own:
                raise SystemExit(
                    f"{name}: {part} is off by {error:.1e} of the largest value, "
                    f"the reference in float32 by {own:.1e}"
                )
            worst = max(worst, error / own)
        return worst


def _error(got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        raise SystemExit(f"expected shape {list(exact.shape)}, got {list(got.shape)}")
    largest = exact.abs().max().item()
    return (got - exact).abs().max().item() / (largest or 1.0)


def some_queries(batch: int, length: int, most: int, rows: int | None = None) -> Tensor:
    """Return [B, Q] bool: at most `most` queries, of the last rows and drawn within a row."""
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:most]
    checked = torch.zeros(batch, length, dtype=torch.bool)
    checked[-(rows or max(1, most // length)) :, drawn] = True
    return checked


def expect_layer(
    layer: HTMAttention,
    queries: Tensor,
    memory: ChunkedMemory,
    cotangent: Tensor,
    chunk_mask: Tensor | None = None,
    *,
    backward: bool = True,
) -> Expected:
    """Return what `layer(queries, memory, None, chunk_mask)` must give: `htm_attention`.

    The memory is of batch B with every step valid. Chunks are chosen in float64 among all; the
    reference then gets, for each block of queries, the chunks that any of them keeps.
    """
    checked = some_queries(*queries.shape[:2], MOST_QUERIES)
    blocks = list(_blocks(layer, queries, memory, chunk_mask, checked))
    if not blocks:
        raise SystemExit("nothing to check: every query is nearly tied")

    def compute(dtype: torch.dtype) -> Results:
        weights = {n: p.detach().to(dtype) for n, p in layer.named_parameters()}
        totals = {n: torch.zeros_like(p) for n, p in weights.items()}
        outputs, by_query = [], []
        for block in blocks:
            leaves = {n: p.requires_grad_(backward) for n, p in weights.items()}
            leaves["queries"] = (
                queries[block.row, block.at][None].to(dtype).requires_grad_(backward)
            )
            chunks = memory.contents[block.row, block.kept][None].to(dtype)
            output = _attend(layer, leaves, ChunkedMemory.from_chunks(chunks), block.chunk_mask)
            outputs.append(output.detach()[0])
            if backward:
                given = cotangent[block.row, block.at][None].to(dtype)
                found = torch.autograd.grad(output, list(leaves.values()), given)
                by_query.append(found[-1][0])
                for total, gradient in zip(totals.values(), found, strict=False):
                    total += gradient
        results = {"output": torch.cat(outputs)}
        return results | {"queries": torch.cat(by_query), **totals} if backward else results

    parts = dict.fromkeys(("output", "queries"), lambda result: result[checked])
    both = compute(torch.float64), compute(torch.float32)
    return Expected(cotangent, cotangent * checked[..., None], checked, parts, *both)


class _Block(NamedTuple):
    row: int
    at: Tensor  # which queries of the row
    kept: Tensor  # which chunks of the row, kept by any of them
    chunk_mask: Tensor | None  # [1, queries, kept]


def _blocks(
    layer: HTMAttention,
    queries: Tensor,
    memory: ChunkedMemory,
    chunk_mask: Tensor | None,
    checked: Tensor,
) -> Iterator[_Block]:
    """Cut the queries to check into blocks, and uncheck those that are nearly tied."""
    if memory.step_mask is not None or not memory.valid.all():
        raise ValueError("memory: expected every step valid")
    for row in checked.any(1).nonzero()[:, 0].tolist():
        summaries = [part.double().mean(1) for part in memory.contents[row].split(256)]
        keys = _project(layer.to_summary_keys, torch.cat(summaries))
        for at in checked[row].nonzero()[:, 0].split(128):
            mask = None if chunk_mask is None else chunk_mask[row, at]
            scores = _project(layer.to_summary_queries, queries[row, at].double()) @ keys.T
            kept, is_tied = _keep(scores, mask, layer.topk_mems)
            checked[row, at[is_tied]] = False
            if not is_tied.all():
                chunks = kept[~is_tied].unique()
                mask = None if mask is None else mask[~is_tied][None, :, chunks]
                yield _Block(row, at[~is_tied], chunks, mask)


@torch.no_grad()
def _project(projection: torch.nn.Linear, value: Tensor) -> Tensor:
    bias = projection.bias
    return linear(value, projection.weight.double(), None if bias is None else bias.double())


def _keep(scores: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return each query's k best chunks, and whether the next one is nearly as good."""
    largest = scores.abs().amax(-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    best = scores.topk(min(k + 1, scores.shape[1]), -1)
    if scores.shape[1] <= k:
        return best.indices, torch.zeros(len(scores), dtype=torch.bool)
    last, following = best.values[:, k - 1 :].unbind(-1)
    return best.indices[:, :k], following.isfinite() & (last - following < TIE * largest)


def _attend(
    layer: HTMAttention, leaves: Results, memory: ChunkedMemory, chunk_mask: Tensor | None
) -> Tensor:
    weights = dict(leaves)
    queries = weights.pop("queries")
    sizes = {"heads": layer.attn.heads, "k": layer.topk_mems}
    positions = None
    if layer.add_pos_enc:
        positions = sinusoid(memory.chunk_size, memory.dim, queries.dtype, queries.device)
    return reference.htm_attention(
        queries, memory, weights, **sizes, positions=positions, chunk_mask=chunk_mask
    )


def expect_recall(
    route: Tensor,
    probe: Tensor,
    memory: ChunkedMemory,
    k: int,
    positions: Tensor,
    cotangent: Tensor,
) -> Expected:
    """Return what `recall` must give; of its gradients, that of `probe`."""
    summaries = memory.contents.double().mean(2)
    scores = torch.einsum("bqd,bmd->bqm", route.double(), summaries)
    checked = ~_keep(scores.flatten(0, 1), None, k)[1].view(route.shape[:2])

    def compute(dtype: torch.dtype) -> Results:
        chunked = ChunkedMemory.from_chunks(memory.contents.to(dtype))
        leaf = probe.to(dtype).requires_grad_()
        output = reference.recall(route.to(dtype), leaf, chunked, k, positions.to(dtype), None)[0]
        given = (cotangent * checked[..., None, None]).to(dtype)
        (gradient,) = torch.autograd.grad(output, leaf, given)
        return {"output": output.detach()[checked], "queries": gradient[checked]}

    parts = dict.fromkeys(("output", "queries"), lambda result: result[checked])
    both = compute(torch.float64), compute(torch.float32)
    return Expected(cotangent, cotangent * checked[..., None, None], checked, parts, *both)


def expect_dense(
    layer: DenseProjected, queries: Tensor, steps: Tensor, cotangent: Tensor, *, backward: bool
) -> Expected:
    """Return what attention from [B, H, Q, E] to all steps must give."""
    batch, heads, length, width = queries.shape
    checked = some_queries(batch, length, 4, rows=1)
    at = checked[-1].nonzero()[:, 0]
    # Keys and values of a head.
    weights, biases = (
        p.unflatten(0, (2, heads, width)) for p in (layer.to_kv.weight, layer.to_kv.bias)
    )

    def compute(dtype: torch.dtype) -> Results:
        heads_of: list[tuple[Tensor, ...]] = []
        for head in range(heads):
            leaves = [queries[-1, head, at], weights[:, head], biases[:, head]]
            leaves = [leaf.detach().to(dtype).requires_grad_(backward) for leaf in leaves]
            output = _dense_head(*leaves, steps[-1])
            given = cotangent[-1, head, at].to(dtype)
            gradients = torch.autograd.grad(output, leaves, given) if backward else ()
            heads_of.append((output.detach(), *gradients))
        parts = [torch.stack(part, 1) for part in zip(*heads_of, strict=True)]
        names = ["output", "queries", "to_kv.weight", "to_kv.bias"]
        results = dict(zip(names, parts, strict=False))
        return {n: p.flatten(0, 2) if "to_kv" in n else p for n, p in results.items()}

    parts = dict.fromkeys(("output", "queries"), lambda result: result.transpose(1, 2)[checked])
    both = compute(torch.float64), compute(torch.float32)
    return Expected(cotangent, cotangent * checked[:, None, :, None], checked, parts, *both)


def _dense_head(query: Tensor, weights: Tensor, biases: Tensor, steps: Tensor) -> Tensor:
    """Attend from [q, E] to [N, D], whose copy in another dtype is made in pieces."""
    weight, bias = weights.flatten(0, 1), biases.flatten()
    projected = [linear(part.to(query.dtype), weight, bias) for part in steps.split(2**15)]
    keys, values = torch.cat(projected).chunk(2, -1)
    return (query @ keys.T * query.shape[-1] ** -0.5).softmax(-1) @ values


def expect_causal(layer: CausalSelfAttention, steps: Tensor, cotangent: Tensor) -> Expected:
    """Return what attention of each step to itself and all earlier ones must give."""
    batch, length, _ = steps.shape
    checked = some_queries(batch, length, 64, rows=1)
    at = checked[-1].nonzero()[:, 0]
    later = torch.arange(length) > at[:, None]

    def compute(dtype: torch.dtype) -> Results:
        leaves = {n: p.detach().to(dtype) for n, p in layer.named_parameters()}
        leaves["queries"] = steps[-1].to(dtype)
        leaves = {n: leaf.requires_grad_() for n, leaf in leaves.items()}
        projected = linear(leaves["queries"], leaves["to_qkv.weight"], leaves["to_qkv.bias"])
        queries, keys, values = projected.unflatten(-1, (3, layer.heads, -1)).unbind(1)
        logits = torch.einsum("qhe,nhe->hqn", queries[at], keys) * keys.shape[-1] ** -0.5
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        attended = torch.einsum("hqn,nhe->qhe", weights, values).flatten(1)
        output = linear(attended, leaves["to_out.weight"], leaves["to_out.bias"])
        given = cotangent[-1, at].to(dtype)
        gradients = torch.autograd.grad(output, list(leaves.values()), given)
        return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}

    parts = {"output": lambda result: result[checked], "queries": lambda result: result[-1]}
    both = compute(torch.float64), compute(torch.float32)
    return Expected(cotangent, cotangent * checked[..., None], checked, parts, *both)
