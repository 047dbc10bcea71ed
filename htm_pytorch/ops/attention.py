"""`recall` and `attend`: the operations on a memory, and their contracts."""

from typing import cast

import torch
from torch import Tensor

from htm_pytorch.memory import ShardedMemory
from htm_pytorch.ops import projected
from htm_pytorch.ops.call import Memory, check, check_projections, check_queries, no_autocast
from htm_pytorch.ops.engines import Impl, Projecting, RecallImpl, check_impl, choose
from htm_pytorch.ops.places import at_hand, check_ranks, on_ranks, together
from htm_pytorch.ops.projected import absorb, read
from htm_pytorch.ops.recency import Recency
from htm_pytorch.shapes import check_kind


def recall(
    route: Tensor,
    probe: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    recency: Recency | None = None,
    impl: RecallImpl = "auto",
) -> Tensor:
    """Look up the past in two steps: keep the k best chunks, then attend inside each of them.

        l_j  = route . s_j                       for every chunk j with summary s_j; see `Recency`
        w    = softmax of l over the k best chunks the query may see
        a_hc = softmax over c of probe_h . (m_jc + p_c)     inside each kept chunk, for each head
        context_h = sum_j w_j sum_c a_hjc (m_jc + p_c)

    There are no parameters: scales and projections are the caller's (arXiv 2105.14039, section 3,
    with the projections of the memory moved to the query's side; see `docs/math.md`).

    Args:
        route: [B, Q, D], what each query compares with the summaries of chunks.
        probe: [B, Q, H, D], what each head compares with the steps inside a chunk; it has the
            dtype of `route`.
        memory: what is recalled from, of batch B, or 1 to be shared. Its dtype may differ. From one
            that lies elsewhere only the chunks that are kept are fetched; no gradient reaches it. A
            `ShardedMemory` is given on all ranks, beside arguments that are the same on all. A
            `SearchedHome` may miss some of the k best.
        k: how many chunks a query keeps, >= 1; all there are where there are fewer.
        positions: [C, D], which are added to the steps of every chunk; None: nothing is.
        chunk_mask: [B, Q, M] bool, the chunks each query may see (of those that are valid); None
            beside a `SearchedHome`.
        recency: how the age of chunks counts; None: not at all.
        impl: "native" (a compiled kernel, on the CPU), "triton" (kernels on the GPU, not in
            float64), "blocked" (plain PyTorch on any device, a few queries at a time), "reference"
            (gathers all kept steps) or "auto". A named one never falls back; "auto" takes "triton"
            only on GPUs that it was tested on. Only "reference" has second derivatives and works
            under `torch.func`. Over a `ShardedMemory` it says how a rank does its part: "auto",
            "native" or "reference", with neither second derivatives nor `torch.func`.

    Returns:
        context [B, Q, H, D] in the dtype of `probe`; scores and softmaxes are at least float32.
        Zeros where a query sees no chunk. Steps that are masked, in invalid chunks or in chunks
        not kept never reach it, whatever they hold. Differentiable by route, probe, positions
        and the memory's contents and summaries.

    Raises:
        ValueError: names the argument, what came and what was expected.
        ShardError: a rank of a `ShardedMemory` is gone or did not come in time.
    """
    with together(memory):
        check_impl(impl, RecallImpl)
        check(route, memory, k, positions, chunk_mask, recency)
        check_queries(route, "probe", probe, "B Q H D", D=memory.dim)
        check_ranks(memory, impl, route)
    if isinstance(memory, ShardedMemory):
        return on_ranks(route, probe, memory, k, positions, chunk_mask, impl, recency).context
    call, _ = at_hand(route, memory, k, positions, chunk_mask, impl, recency)
    with no_autocast(route.device):
        return choose(impl, call).recall(call, probe)[0]


def attend(
    route: Tensor,
    queries: Tensor,
    projections: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    recency: Recency | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend to a memory through projections to keys and values.

        attended_h = sum_j w_j sum_c a_hjc W_v^h (m_jc + p_c),
        a_hjc = softmax over c of scale queries_h . W_k^h (m_jc + p_c)

    with chunks and their weights w as in `recall`. Either the projections are moved to the query's
    side, for a `recall` of probes W_k^h^T queries_h; or the chunks that any query keeps are
    projected once. Which is cheaper depends on how many queries share a chunk (`docs/math.md`).

    Args:
        route: [B, Q, D], what each query compares with the summaries of chunks.
        queries: [B, Q, H, E], what each head compares with the keys of steps.
        projections: [2, H, E, D], which are W_k and W_v of each head.
        memory: what is attended to, as `recall` takes it, of batch B, or 1 to be shared.
        k: how many chunks a query keeps, >= 1; all there are where there are fewer.
        positions: [C, D], which are added to the steps of every chunk; None: nothing is.
        chunk_mask: [B, Q, M] bool, the chunks each query may see (of those that are valid); None
            beside a `SearchedHome`.
        recency: how the age of chunks counts; None: not at all.
        scale: what the logits are multiplied by; default E^-1/2.
        impl: who computes it: one that `recall` names, or "projected", which projects the kept
            chunks once (by the compiled kernel or, on a GPU, by Triton's; not over a
            `ShardedMemory`).

    Returns:
        attended [B, Q, H, E], and [B, Q] bool, whether a query saw any chunk.
    """
    with together(memory):
        check_impl(impl, Impl)
        check(route, memory, k, positions, chunk_mask, recency)
        check_projections(route, queries, projections, memory.dim)
        check_ranks(memory, impl, route)
    if scale is None:
        scale = float(queries.shape[3] ** -0.5)
    check_kind("scale", scale, (int, float, torch.SymFloat), "a number")
    if isinstance(memory, ShardedMemory):
        probe = absorb(queries * scale, projections)
        shared = on_ranks(route, probe, memory, k, positions, chunk_mask, impl, recency)
        return read(shared.context, projections), (shared.chunks >= 0).any(-1)
    call, _ = at_hand(route, memory, k, positions, chunk_mask, impl, recency)
    engine, picks = choose(impl, call), None
    if engine.projects and impl != engine.name:
        engine = cast(Projecting, engine)
        with no_autocast(route.device):
            picks = engine.pick(call)
        if impl == "projected" or projected.is_cheaper(queries, call.memory, picks.chunks):
            attended = engine.attend_projected(call, queries, projections, picks, scale)
            return attended.to(queries.dtype), (picks.chunks >= 0).any(-1)
    probe = absorb(queries * scale, projections)
    with no_autocast(route.device):
        context, chunks = engine.recall(call, probe, picks)
    return read(context, projections), (chunks >= 0).any(-1)
