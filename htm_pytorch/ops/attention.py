"""`recall`: the one operation on the memory's side, its contract and who computes it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.ops import blocked, dense, reference
from htm_pytorch.shapes import (
    check_at_least,
    check_device,
    check_floating,
    check_mask,
    check_tensor,
    is_transformed,
)

Impl = Literal["auto", "reference", "blocked", "dense"]


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
    memory: ChunkedMemory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    impl: Impl = "auto",
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
        memory: of batch B, or 1 to be shared. Its dtype may differ.
        k: how many chunks a query keeps, >= 1; all there are where there are fewer.
        positions: [C, D], added to the steps of every chunk.
        chunk_mask: [B, Q, M] bool, the chunks each query may see (of those that are valid).
        impl: "reference" (plain, gathers all kept steps), "blocked" (a few queries at a time; no
            second derivatives, not under `torch.func`), "dense" (all chunks, two GEMMs; for small
            memories) or "auto". A named one never falls back.

    Returns:
        context [B, Q, H, D] in the dtype of `probe`; scores and softmaxes are at least float32.
        Zeros where a query sees no chunk. Steps that are masked, in invalid chunks or in chunks
        not kept never reach it, whatever they hold. Differentiable by route, probe, positions
        and the memory's contents and summaries.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    check_impl(impl)
    arguments = _prepare(route, probe, memory, k, positions, chunk_mask)
    with _no_autocast(route.device.type):
        match impl:
            case "auto" if _prefers_dense(probe, memory, k):
                engine = dense.recall
            case "auto":
                engine = reference.recall if is_transformed() else blocked.recall
            case "reference":
                engine = reference.recall
            case "blocked":
                if is_transformed():
                    raise ValueError(
                        "impl: expected 'auto', 'reference' or 'dense' under a torch.func "
                        "transform, got 'blocked'"
                    )
                engine = blocked.recall
            case "dense":
                engine = dense.recall
        return engine(*arguments)[0].to(probe.dtype)


def recall_with_weights(
    route: Tensor,
    probe: Tensor,
    memory: ChunkedMemory,
    k: int,
    *,
    positions: Tensor | None = None,
    chunk_mask: Tensor | None = None,
) -> tuple[Tensor, Recall]:
    """Do what `recall` does and also return what was recalled, computed plainly."""
    arguments = _prepare(route, probe, memory, k, positions, chunk_mask)
    with _no_autocast(route.device.type):
        context, picked, weights, step_weights = reference.recall(*arguments)
    chunks = picked.chunks.masked_fill(~picked.kept, -1)
    return context.to(probe.dtype), Recall(chunks, weights, step_weights)


def check_impl(impl: str) -> None:
    """Raise a ValueError unless `impl` names an implementation."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {get_args(Impl)}, got {impl!r}")


def _prepare(
    route: Tensor,
    probe: Tensor,
    memory: ChunkedMemory,
    k: int,
    positions: Tensor | None,
    chunk_mask: Tensor | None,
) -> tuple[Tensor, Tensor, ChunkedMemory, int, Tensor | None, Tensor | None]:
    if not isinstance(memory, ChunkedMemory):
        raise ValueError(f"memory: expected a ChunkedMemory, got {type(memory).__name__}")
    check_tensor("route", route, "B Q D", D=memory.dim)
    check_floating("route", route)
    batch, queries, dim = route.shape
    check_tensor("probe", probe, "B Q H D", B=batch, Q=queries, D=dim)
    check_floating("probe", probe, route.dtype)
    check_at_least("k", k, 1)
    if memory.batch not in (1, batch):
        raise ValueError(f"memory: expected batch 1 or {batch}, got {memory.batch}")
    for name, part in {"probe": probe, "memory": memory.contents}.items():
        check_device(name, part, route.device)
    if positions is not None:
        check_tensor("positions", positions, "C D", C=memory.chunk_size, D=dim)
        check_floating("positions", positions)
        check_device("positions", positions, route.device)
    sizes = {"B": batch, "Q": queries, "M": memory.chunks}
    check_mask("chunk_mask", chunk_mask, "B Q M", route.device, **sizes)
    exact = torch.promote_types(route.dtype, torch.float32)
    exact = torch.promote_types(exact, memory.contents.dtype)
    if positions is not None:
        positions = positions.to(exact)
    return route.to(exact), probe.to(exact), memory, k, positions, chunk_mask


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # The meta device, for one, has no autocast to turn off.
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _prefers_dense(probe: Tensor, memory: ChunkedMemory, k: int) -> bool:
    """Whether reading every chunk once is cheaper than gathering k chunks a query."""
    return memory.chunks * memory.chunk_size <= 1024 and 2 * memory.chunks <= k * probe.shape[1]
