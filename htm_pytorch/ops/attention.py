"""`recall` and `attend`: the operations on a memory, their contracts and who computes them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory, Home, ShardedMemory, Steps
from htm_pytorch.memory.home import is_home
from htm_pytorch.ops import (
    blocked,
    fused_triton,
    homes,
    kernels,
    native,
    projected,
    reference,
    sharded,
)
from htm_pytorch.shapes import (
    check_at_least,
    check_device,
    check_floating,
    check_mask,
    check_tensor,
    is_transformed,
)

RecallImpl = Literal["auto", "reference", "blocked", "native", "triton"]
Impl = Literal["auto", "reference", "blocked", "native", "projected", "triton"]
Memory = ChunkedMemory | Steps | Home
"""What can be recalled from."""


class Recall(NamedTuple):
    """What was recalled, for every query."""

    chunks: Tensor
    """[B, Q, K] int64, the chunks kept, best first; -1 where there were fewer than K."""
    chunk_weights: Tensor
    """[B, Q, K], the softmax over the kept chunks; they sum to 1, or to 0 where there is none."""
    step_weights: Tensor
    """[B, Q, H, K, C], the softmax inside each kept chunk; 0 at masked steps."""


def recall(
    route: Tensor,
    probe: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    impl: RecallImpl = "auto",
) -> Tensor:
    """Look up the past in two steps: keep the k best chunks, then attend inside each of them.

        l_j  = route . s_j                       for every chunk j with summary s_j
        w    = softmax of l over the k best chunks the query may see
        a_hc = softmax over c of probe_h . (m_jc + p_c)     inside each kept chunk, for each head
        context_h = sum_j w_j sum_c a_hjc (m_jc + p_c)

    There are no parameters: scales and projections are the caller's (arXiv 2105.14039, section 3,
    with the projections of the memory moved to the query's side; see `docs/math.md`).

    Args:
        route: [B, Q, D].
        probe: [B, Q, H, D], of the dtype of `route`.
        memory: of batch B, or 1 to be shared. Its dtype may differ. From one that lies elsewhere
            only the chunks that are kept are fetched; no gradient reaches it. A `ShardedMemory` is
            given on all ranks, beside arguments that are the same on all. A `SearchedHome` may miss
            some of the k best.
        k: how many chunks a query keeps, >= 1; all there are where there are fewer.
        positions: [C, D], added to the steps of every chunk.
        chunk_mask: [B, Q, M] bool, the chunks each query may see (of those that are valid); None
            beside a `SearchedHome`.
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
    with _together(memory):
        check_impl(impl, RecallImpl)
        _check(route, memory, k, positions, chunk_mask)
        _check_beside(route, "probe", probe, "B Q H D", D=memory.dim)
        _check_sharded(memory, impl, route)
    if isinstance(memory, ShardedMemory):
        return _recall_sharded(route, probe, memory, k, positions, chunk_mask, impl).context
    at_hand, chunk_mask, _ = _at_hand(route, memory, k, chunk_mask)
    return _recall(route, probe, at_hand, k, positions, chunk_mask, impl)[0]


def recall_with_weights(
    route: Tensor,
    probe: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
) -> tuple[Tensor, Recall]:
    """Do what `recall` does and also return what was recalled, computed plainly."""
    with _together(memory):
        _check(route, memory, k, positions, chunk_mask)
        _check_beside(route, "probe", probe, "B Q H D", D=memory.dim)
        _check_sharded(memory, "reference", route)
    if isinstance(memory, ShardedMemory):
        shared = _recall_sharded(
            route, probe, memory, k, positions, chunk_mask, "reference", with_weights=True
        )
        assert shared.step_weights is not None
        return shared.context, Recall(shared.chunks, shared.chunk_weights, shared.step_weights)
    at_hand, chunk_mask, numbers = _at_hand(route, memory, k, chunk_mask)
    chunked = at_hand.chunked() if isinstance(at_hand, Steps) else at_hand
    with _no_autocast(route.device.type):
        exact_route, exact_probe, places = _exact(chunked, route, probe, positions)
        context, picked, weights, step_weights = reference.recall(
            exact_route, exact_probe, chunked, k, places, chunk_mask
        )
    chunks = picked.chunks if numbers is None else numbers[picked.chunks]
    chunks = chunks.masked_fill(~picked.kept, -1)
    return context.to(probe.dtype), Recall(chunks, weights, step_weights)


def attend(
    route: Tensor,
    queries: Tensor,
    projections: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
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
        route: [B, Q, D], as for `recall`.
        queries: [B, Q, H, E].
        projections: [2, H, E, D], W_k and W_v.
        memory: as for `recall`, like `k`, `positions` and `chunk_mask`.
        k: see above.
        positions: see above.
        chunk_mask: see above.
        scale: of the logits; default E^-1/2.
        impl: as for `recall`, or "projected" (the kept chunks once, by the compiled kernel or, on
            a GPU, by Triton's; not over a `ShardedMemory`).

    Returns:
        attended [B, Q, H, E], and [B, Q] bool, whether a query saw any chunk.
    """
    with _together(memory):
        check_impl(impl, Impl)
        factor = _check_attend(route, queries, projections, memory, k, positions, chunk_mask, scale)
        _check_sharded(memory, impl, route)
    if isinstance(memory, ShardedMemory):
        probe = _absorb(queries * factor, projections)
        shared = _recall_sharded(route, probe, memory, k, positions, chunk_mask, impl)
        return _read(shared.context, projections), (shared.chunks >= 0).any(-1)
    memory, chunk_mask, _ = _at_hand(route, memory, k, chunk_mask)
    on_gpu = route.device.type == "cuda"
    uses = _uses_triton if on_gpu else _uses_kernel
    if impl in ("auto", "projected") and uses(impl, route, memory, k, positions):
        with _no_autocast(route.device.type):
            if on_gpu:
                picked, weights = fused_triton.pick(route, memory, k, chunk_mask)
            else:
                picked, weights = native.pick(_exact(memory, route)[0], memory, k, chunk_mask)
        seen = (picked >= 0).any(-1)
        if impl == "projected" or projected.is_cheaper(queries, memory, picked):
            prefix = fused_triton.PREFIX if on_gpu else ""
            attended = projected.attend(
                queries, projections, memory, positions, picked, weights, factor, prefix
            )
            return attended.to(queries.dtype), seen
        probe = _absorb(queries * factor, projections)
        with _no_autocast(route.device.type):
            if on_gpu:
                context = fused_triton.attend(probe, memory, positions, picked, weights)
            else:
                exact, places = _exact(memory, probe, positions)
                context = native.attend(exact, memory, places, picked, weights)
        return _read(context.to(probe.dtype), projections), seen
    probe = _absorb(queries * factor, projections)
    context, picked = _recall(route, probe, memory, k, positions, chunk_mask, impl)
    return _read(context, projections), picked.kept.any(-1)


def attend_with_weights(
    route: Tensor,
    queries: Tensor,
    projections: Tensor,
    memory: Memory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Recall]:
    """Do what `attend` does and return what was recalled, computed plainly."""
    with _together(memory):
        factor = _check_attend(route, queries, projections, memory, k, positions, chunk_mask, scale)
    probe = _absorb(queries * factor, projections)
    context, recalled = recall_with_weights(
        route, probe, memory, k, positions=positions, chunk_mask=chunk_mask
    )
    return _read(context, projections), recalled


def _at_hand(
    route: Tensor, memory: ChunkedMemory | Steps | Home, k: int, chunk_mask: Tensor | None
) -> tuple[ChunkedMemory | Steps, Tensor | None, Tensor | None]:
    """Return a memory in RAM, the mask of its chunks, and their numbers if they are others."""
    if isinstance(memory, ChunkedMemory | Steps):
        return memory, chunk_mask, None
    fetched = homes.fetch(route, memory, k, chunk_mask)
    return fetched.memory, fetched.chunk_mask, fetched.numbers


def _absorb(queries: Tensor, projections: Tensor) -> Tensor:
    """u_h = W_k^h^T queries_h: [B, Q, H, D]."""
    return torch.einsum("bqhe,hed->bqhd", queries, projections[0])


def _read(context: Tensor, projections: Tensor) -> Tensor:
    """W_v^h context_h: [B, Q, H, E]."""
    return torch.einsum("bqhd,hed->bqhe", context, projections[1])


def check_impl(impl: str, known: Any = Impl) -> None:
    """Raise a ValueError unless `impl` names an implementation."""
    if impl not in get_args(known):
        raise ValueError(f"impl: expected one of {get_args(known)}, got {impl!r}")


def _recall(
    route: Tensor,
    probe: Tensor,
    memory: ChunkedMemory | Steps,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    impl: Impl,
) -> tuple[Tensor, reference.Selection]:
    with _no_autocast(route.device.type):
        exact_route, exact_probe, places = _exact(memory, route, probe, positions)
        if impl in ("auto", "native") and _uses_kernel(impl, route):
            picked, weights = native.pick(exact_route, memory, k, chunk_mask)
            context = native.attend(exact_probe, memory, places, picked, weights)
            return context.to(probe.dtype), reference.Selection(picked, picked >= 0)
        if impl in ("auto", "triton") and _uses_triton(impl, route, memory, k, positions):
            picked, weights = fused_triton.pick(route, memory, k, chunk_mask)
            context = fused_triton.attend(probe, memory, positions, picked, weights)
            return context, reference.Selection(picked, picked >= 0)
        if impl == "blocked":
            _refuse_transforms(impl)
        plain = impl == "reference" or is_transformed()
        engine = reference.recall if plain else blocked.recall
        chunked = memory.chunked() if isinstance(memory, Steps) else memory
        context, picked, *_ = engine(exact_route, exact_probe, chunked, k, places, chunk_mask)
        return context.to(probe.dtype), picked


def _recall_sharded(
    route: Tensor,
    probe: Tensor,
    memory: ShardedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    impl: str,
    with_weights: bool = False,
) -> sharded.Recalled:
    with_kernel = impl != "reference" and _uses_kernel(impl, route)
    with _no_autocast(route.device.type):
        recalled = sharded.recall(
            route,
            probe,
            memory,
            k,
            positions,
            chunk_mask,
            with_kernel=with_kernel,
            with_weights=with_weights,
        )
    return recalled._replace(context=recalled.context.to(probe.dtype))


def _uses_kernel(impl: str, route: Tensor, *others: Any) -> bool:
    """Whether the compiled kernel can serve; a named implementation that cannot says so."""
    if impl == "auto":
        return route.device.type == "cpu" and not is_transformed() and kernels.IS_AVAILABLE
    _refuse_transforms(impl)
    if route.device.type != "cpu":
        raise ValueError(f"impl: {impl!r} expects tensors on the CPU, got {route.device}")
    if not kernels.IS_AVAILABLE:
        raise RuntimeError(f"impl: {impl!r} has {kernels.MISSING}; use impl='auto'")
    return True


def _uses_triton(
    impl: str, route: Tensor, memory: ChunkedMemory | Steps, k: int, positions: Tensor | None
) -> bool:
    """Whether the Triton kernels can serve; if they are named and cannot, it says so."""
    if impl == "auto" and (is_transformed() or not fused_triton.is_proven(route.device)):
        return False
    if isinstance(memory, ChunkedMemory):
        stored = [memory.contents, memory.summaries]
    else:
        stored = [memory.steps]
    kept, steps = min(k, memory.chunks), memory.chunks * memory.chunk_size
    error = fused_triton.refusal(impl, route.device, kept, steps, route, positions, *stored)
    if impl == "auto":
        return error is None
    _refuse_transforms(impl)
    if error is not None:
        raise error
    return True


def _refuse_transforms(impl: str) -> None:
    if is_transformed():
        raise ValueError(
            f"impl: expected 'auto' or 'reference' under a torch.func transform, got {impl!r}"
        )


def _check_attend(
    route: Tensor,
    queries: Tensor,
    projections: Tensor,
    memory: Memory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
    scale: float | None,
) -> float:
    """Return the scale; E^-1/2 where none is given."""
    _check(route, memory, k, positions, chunk_mask)
    _check_beside(route, "queries", queries, "B Q H E")
    heads, width = queries.shape[2:]
    check_tensor("projections", projections, "P H E D", P=2, H=heads, E=width, D=memory.dim)
    check_device("projections", projections, route.device)
    return float(width**-0.5) if scale is None else scale


def _together(memory: Memory) -> AbstractContextManager[object]:
    """Where the ranks of a memory tell each other of arguments that they refuse."""
    if isinstance(memory, ShardedMemory):
        return memory.peers.refusing(memory.device)
    return nullcontext()


def _check_sharded(memory: Memory, impl: str, route: Tensor) -> None:
    if not isinstance(memory, ShardedMemory):
        return
    if impl not in ("auto", "native", "reference"):
        raise ValueError(
            f"impl: expected 'auto', 'native' or 'reference' over a ShardedMemory, got {impl!r}"
        )
    if is_transformed():
        raise ValueError("memory: expected no ShardedMemory under a torch.func transform, got one")
    if impl == "native":
        _uses_kernel(impl, route)


def _check(
    route: Tensor,
    memory: Memory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
) -> None:
    if not (isinstance(memory, ChunkedMemory | Steps) or is_home(memory)):
        raise ValueError(
            f"memory: expected a ChunkedMemory, Steps or another Home, got {type(memory).__name__}"
        )
    if isinstance(memory, Steps):
        memory.check()
    check_tensor("route", route, "B Q D", D=memory.dim)
    check_floating("route", route)
    batch, queries, dim = route.shape
    check_at_least("k", k, 1)
    if memory.batch not in (1, batch):
        raise ValueError(f"memory: expected batch 1 or {batch}, got {memory.batch}")
    is_elsewhere = not isinstance(memory, ChunkedMemory | ShardedMemory | Steps)
    if not is_elsewhere and memory.device != route.device:
        raise ValueError(f"memory: expected device {route.device}, got {memory.device}")
    if positions is not None:
        check_tensor("positions", positions, "C D", C=memory.chunk_size, D=dim)
        check_floating("positions", positions)
        check_device("positions", positions, route.device)
    sizes = {"B": batch, "Q": queries, "M": memory.chunks}
    check_mask("chunk_mask", chunk_mask, "B Q M", route.device, **sizes)


def _check_beside(route: Tensor, name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    check_tensor(name, tensor, axes, B=route.shape[0], Q=route.shape[1], **sizes)
    check_floating(name, tensor, route.dtype)
    check_device(name, tensor, route.device)


def _exact(memory: ChunkedMemory | Steps, first: Tensor, *others: Tensor | None) -> list[Any]:
    """Return the tensors in the dtype of sums: at least float32, `first`'s and the memory's."""
    dtype = torch.promote_types(torch.promote_types(torch.float32, memory.dtype), first.dtype)
    if isinstance(memory, ChunkedMemory):
        dtype = torch.promote_types(dtype, memory.summaries.dtype)
    return [None if tensor is None else tensor.to(dtype) for tensor in (first, *others)]


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # The meta device, for one, has no autocast to turn off.
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
