"""A cell of the benchmark: queries to a past of some length, and the rivals that get them.

Nobody gets a mask: every step is valid, and the published package is faster without one.
"""

import functools
from types import ModuleType

import torch
from checks import Expected, expect_dense, expect_layer
from contest import Rival
from peers import DenseProjected, bind, dense_cached, original
from torch import Tensor, nn
from torch.nn.functional import linear

from htm_pytorch import ChunkedMemory, HTMAttention

HEADS, DIM_HEAD, TOPK, CHUNK = 8, 64, 8, 32
INNER = HEADS * DIM_HEAD
OURS = TENSOR, MEMORY = "ours, tensor", "ours, memory"


class Past:
    """Memories, and the keys and values that dense attention caches of them."""

    def __init__(self, batch: int, length: int, dim: int):
        if length % CHUNK:
            raise SystemExit(f"steps: expected a multiple of {CHUNK}, got {length}")
        torch.manual_seed(0)
        self.batch, self.length, self.dim = batch, length, dim
        self.steps = torch.randn(batch, length, dim)
        self.memory = ChunkedMemory.from_steps(self.steps, CHUNK)
        self.dense = DenseProjected(dim, HEADS, DIM_HEAD)

    @functools.cached_property
    def keys_values(self) -> list[Tensor]:
        """[B, H, N, E] each, as `dense` projects them."""
        halves = zip(*(part.chunk(2) for part in self.dense.to_kv.parameters()), strict=True)
        with torch.no_grad():
            return [
                linear(self.steps, *half).unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous()
                for half in halves
            ]


class Cell:
    """Q queries to a past, and the layer that answers them."""

    def __init__(self, past: Past, queries: int):
        torch.manual_seed(1)
        self.past = past
        self.shape = {"B": past.batch, "Q": queries, "N": past.length, "D": past.dim}
        self.name = f"B{past.batch} Q{queries} N{past.length:,} D{past.dim}"
        self.layer = HTMAttention(past.dim, HEADS, TOPK, CHUNK, DIM_HEAD)
        self.queries = torch.randn(past.batch, queries, past.dim)
        self.cotangent = torch.randn_like(self.queries)
        # Dense attention begins and ends with heads; it is spared the projections around that.
        self.by_head, self.cotangent_by_head = torch.randn(2, past.batch, HEADS, queries, DIM_HEAD)

    def expect_layer(self, backward: bool) -> Expected:
        """Return what the layer must give."""
        return expect_layer(
            self.layer, self.queries, self.past.memory, self.cotangent, backward=backward
        )

    def expect_dense(self, backward: bool) -> Expected:
        """Return what dense attention must give."""
        past = self.past
        return expect_dense(
            past.dense, self.by_head, past.steps, self.cotangent_by_head, backward=backward
        )


def bytes_of_inputs(B: int, Q: int, N: int, D: int) -> float:
    """Return what a cell holds, whoever is measured."""
    return 4 * B * (N * D * (1 + 1 / CHUNK) + Q * (2 * D + 2 * INNER))


def flops_of_recall(length: int, dim: int) -> float:
    """Return what `recall` must compute for a query (docs/math.md)."""
    chunks = length // CHUNK
    return 4 * HEADS * dim * min(TOPK, chunks) * CHUNK + 2 * dim * chunks


def flops_of_projections(dim: int) -> float:
    """Return what the layer computes for a query besides."""
    return 4 * dim**2 + 8 * dim * INNER


def rivals(cell: Cell, published: ModuleType, *, with_original: bool) -> dict[str, Rival]:
    """Return all that are measured in the cell, by name."""
    found = {**ours(cell), "published": _published(cell, published), **_dense(cell)}
    if with_original:
        # Last in a turn: whoever comes right after it is slowed down by its threads.
        found["DeepMind's, JAX"] = _original(cell)
    return found


def ours(cell: Cell) -> dict[str, Rival]:
    """Return our layer on the past as a tensor and as a memory."""
    B, Q, N, D = cell.shape.values()
    flops = B * Q * (flops_of_recall(N, D) + flops_of_projections(D))
    probes = 4 * B * Q * HEADS * D
    # Chunks are projected only where that is cheaper, so not where they are many.
    projected = 4 * B * min(N, 8 * Q) * (D + 2 * INNER)
    held = 3 * probes + projected, 8 * probes + 3 * projected

    def rival(past: Tensor | ChunkedMemory) -> Rival:
        return Rival(
            lambda cotangent: bind(cell.layer, cell.queries, past, cotangent=cotangent),
            cell.expect_layer,
            flops,
            held,
        )

    return {TENSOR: rival(cell.past.steps), MEMORY: rival(cell.past.memory)}


def _gathered(cell: Cell) -> tuple[float, float, float]:
    """Return the FLOPs and bytes of gathering each query's steps and projecting them."""
    B, Q, _, D = cell.shape.values()
    steps = B * Q * TOPK * CHUNK
    held = 4 * steps * (2 * D + 4 * INNER)
    return 4 * steps * D * INNER, held, 1.5 * held


def _published(cell: Cell, published: ModuleType) -> Rival:
    layer: nn.Module = published.HTMAttention(
        cell.past.dim, HEADS, topk_mems=TOPK, mem_chunk_size=CHUNK, dim_head=DIM_HEAD
    )
    # Its positions' frequencies are not among ours.
    layer.load_state_dict(cell.layer.state_dict(), strict=False)
    flops, *held = _gathered(cell)
    return Rival(
        lambda cotangent: bind(layer, cell.queries, cell.past.steps, cotangent=cotangent),
        cell.expect_layer,
        flops,
        (held[0], held[1]),
    )


def _original(cell: Cell) -> Rival:
    flops, *held = _gathered(cell)
    return Rival(
        lambda cotangent: original(cell.layer, cell.queries, cell.past.memory, cotangent=cotangent),
        cell.expect_layer,
        flops,
        (held[0], held[1]),
    )


def _dense(cell: Cell) -> dict[str, Rival]:
    B, Q, N, D = cell.shape.values()
    past, queries = cell.past, cell.by_head
    attention, keys_values = 4 * B * Q * N * INNER, 4 * B * N * 2 * INNER
    return {
        "dense, cached": Rival(
            lambda cotangent: bind(dense_cached, queries, *past.keys_values, cotangent=cotangent),
            cell.expect_dense,
            attention,
            (0.0, keys_values),
            kept=keys_values,
        ),
        "dense, projected": Rival(
            lambda cotangent: bind(past.dense, queries, past.steps, cotangent=cotangent),
            cell.expect_dense,
            attention + 4 * B * N * D * INNER,
            (keys_values, 3 * keys_values),
        ),
    }
