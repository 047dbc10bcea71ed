"""The targets that the package has set itself, each a ratio with its bar.

512 wide, 8 heads of 64, 8 chunks of 32 a query, float32, where a target does not say otherwise.
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from cells import (
    CHUNK,
    DIM_HEAD,
    HEADS,
    MEMORY,
    OURS,
    TENSOR,
    TOPK,
    Cell,
    Past,
    bytes_of_inputs,
    flops_of_projections,
    flops_of_recall,
    ours,
    rivals,
)
from checks import expect_causal, expect_layer, expect_recall
from contest import BOTH, FORWARD, Limits, Rival, contest
from harness import Rates
from peers import CausalSelfAttention, bind
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import recall

DIM = 512


class Target(NamedTuple):
    """A ratio, and the bar that it should reach: at least, or at most."""

    name: str
    ratio: float
    bar: float
    at_least: bool
    details: dict[str, float]

    @property
    def is_reached(self) -> bool:
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar

    def __str__(self) -> str:
        verdict = "reached" if self.is_reached else "NOT REACHED"
        sign = ">=" if self.at_least else "<="
        details = ", ".join(f"{name} {value:,.4g}" for name, value in self.details.items())
        return (
            f"{verdict:13}{self.name}: {self.ratio:.3g}, bar {sign} {self.bar:g}\n{'':13}{details}"
        )

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "reached": self.is_reached}


def targets(
    published: ModuleType, rates: Rates, limits: Limits, shrink: int = 1
) -> Iterator[Target]:
    """Measure all; every length is divided by `shrink`, to try this out."""
    limits = limits._replace(seconds=math.inf)
    short, long, slots = (_whole_chunks(n // shrink) for n in (20_000, 2_000_000, 32_768))
    cell = Cell(Past(1, short, DIM), 128)
    runs = rivals(cell, published, with_original=False) | {"recall": _recall_alone(cell)}
    del runs["dense, projected"]
    result = _contest(cell, runs, rates, limits)
    yield from _many_queries(result, cell)
    past = Past(1, long, DIM)
    cell = Cell(past, 128)
    yield from _peaks(result, _contest(cell, ours(cell), rates, limits))
    yield _one_query(Cell(past, 1), rates, limits)
    del past, cell
    yield _acting(Cell(Past(32, slots, DIM), 1), published, rates, limits)
    for length, bar in (1024, 1.0), (4096, 2.0), (16_384, 5.0):
        yield _causal(length // shrink, bar, rates, limits)


def _whole_chunks(length: int) -> int:
    return max(1, length // CHUNK) * CHUNK


class _Result:
    """What a contest in a cell found."""

    def __init__(self, found: dict[str, Any]):
        self._entries, self._rates = found["rivals"], found["rates"]

    def get(self, name: str, measure: str, what: str = "ms") -> float:
        entry = self._entries[name][measure]
        if "skipped" in entry:
            raise SystemExit(f"targets: {name}, {measure} {entry['skipped']}")
        return entry[what]

    def gflops(self, measure: str) -> float:
        """Return the rate of the matrix product then: a low one means that others were at work."""
        return self._rates[measure]["gemm_flops"] / 1e9

    def limit(self, flops: float) -> float:
        """Return the milliseconds that these FLOPs take, in a matrix product, in a forward."""
        return 1e3 * flops / self._rates[FORWARD]["gemm_flops"]

    def reading(self, size: float) -> float:
        """Return the milliseconds that reading this many bytes takes, in a forward."""
        return 1e3 * size / self._rates[FORWARD]["read_bandwidth"]


def _contest(cell: Cell, runs: dict[str, Rival], rates: Rates, limits: Limits) -> _Result:
    return _Result(contest(runs, rates, limits, bytes_of_inputs(**cell.shape)))


def _against(
    result: _Result, cell: Cell, other: str, name: str, measure: str, bar: float
) -> Target:
    theirs, mine = result.get(other, measure), result.get(name, measure)
    details = {f"{other} ms": theirs, f"{name} ms": mine, "GFLOP/s": result.gflops(measure)}
    title = f"{cell.name} {measure}, {other} / {name}"
    return Target(title, theirs / mine, bar, True, details)


def _many_queries(result: _Result, cell: Cell) -> Iterator[Target]:
    yield _against(result, cell, "published", TENSOR, FORWARD, 30)
    yield _against(result, cell, "dense, cached", TENSOR, FORWARD, 5)
    yield from _limits(result, cell)
    for name in OURS:
        yield _against(result, cell, "published", name, BOTH, 25)


def _limits(result: _Result, cell: Cell) -> Iterator[Target]:
    """What the formula of docs/math.md costs as one large matrix product."""
    _, queries, length, dim = cell.shape.values()
    inside, around = flops_of_recall(length, dim), flops_of_projections(dim)
    with torch.no_grad():
        _, recalled = cell.layer.recall(cell.queries, cell.past.memory)
    picked = recalled.chunks.unique().numel()
    size = 4 * dim * (picked * CHUNK + length // CHUNK)
    for name, flops in ("recall", inside), (MEMORY, inside + around):
        ms, limit = result.get(name, FORWARD), result.limit(queries * flops)
        details = {f"{name} ms": ms, "limit ms": limit, "GFLOP": queries * flops / 1e9}
        details["GFLOP/s"] = result.gflops(FORWARD)
        details["reading summaries and picked rows once, ms"] = result.reading(size)
        yield Target(f"{cell.name} {FORWARD}, {name} / limit", ms / limit, 1.5, False, details)


def _recall_alone(cell: Cell) -> Rival:
    """`recall` on a memory that is held, without the layer's projections."""
    layer, memory = cell.layer, cell.past.memory
    with torch.no_grad():
        route = layer.to_summary_queries(cell.queries) @ layer.to_summary_keys.weight
        keys = layer.attn.by_head(layer.attn.to_kv.weight)[0]
        probe = torch.einsum("bqhe,hed->bqhd", layer.attn.queries(cell.queries), keys)
    route, probe = route * cell.past.dim**-0.5, probe * DIM_HEAD**-0.5
    positions = sinusoid(CHUNK, cell.past.dim, route.dtype, route.device)
    cotangent = torch.randn_like(probe)

    def run(probe: Tensor) -> Tensor:
        return recall(route, probe, memory, TOPK, positions=positions)

    return Rival(
        lambda cotangent: bind(run, probe, cotangent=cotangent),
        lambda backward: expect_recall(route, probe, memory, TOPK, positions, cotangent),
    )


def _peaks(result: _Result, beside_long: _Result) -> Iterator[Target]:
    """What 128 queries hold beside the past, against others and against a longer past."""
    published = result.get("published", FORWARD, "peak_bytes")
    for name in OURS:
        short, long = (of.get(name, FORWARD, "peak_bytes") for of in (result, beside_long))
        details = {"published MiB": published / 2**20, f"{name} MiB": short / 2**20}
        title = f"peak memory of 128 queries, published / {name}"
        yield Target(title, published / short, 50, True, details)
        details = {"short MiB": short / 2**20, "long MiB": long / 2**20}
        title = f"peak memory of 128 queries, long / short past, {name}"
        yield Target(title, long / short, 1.01, False, details)


def _one_query(cell: Cell, rates: Rates, limits: Limits) -> Target:
    """One query to a long past: what reading every summary takes."""
    result = _contest(cell, {MEMORY: ours(cell)[MEMORY]}, rates, limits)
    size = cell.past.memory.summaries.nbytes
    ms, limit = result.get(MEMORY, FORWARD), result.reading(size)
    details = {f"{MEMORY} ms": ms, "limit ms": limit, "MB": size / 1e6}
    details["GB/s"] = size / limit / 1e6
    name = f"{cell.name} {FORWARD}, {MEMORY} / limit"
    return Target(name, ms / limit, 1.5, False, details)


def _acting(cell: Cell, published: ModuleType, rates: Rates, limits: Limits) -> Target:
    """One query a row, each to a past of its own."""
    runs = rivals(cell, published, with_original=False)
    runs = {name: runs[name] for name in ("published", MEMORY)}
    result = _contest(cell, runs, rates, limits)
    return _against(result, cell, "published", MEMORY, FORWARD, 100)


class _OnItsOwnPast(HTMAttention):
    """Each step recalls chunks that closed before it."""

    def forward(self, steps: Tensor, chunk_mask: Tensor) -> Tensor:
        memory = ChunkedMemory.from_steps(steps, self.mem_chunk_size)
        return super().forward(steps, memory, None, chunk_mask)


def _causal(length: int, bar: float, rates: Rates, limits: Limits) -> Target:
    """A sequence on its own past, against attention to all of it."""
    batch, dim, chunk = 8, 256, 16
    torch.manual_seed(1)
    layer = _OnItsOwnPast(dim, HEADS, TOPK, chunk, DIM_HEAD)
    dense = CausalSelfAttention(dim, HEADS, DIM_HEAD)
    steps, cotangent = torch.randn(2, batch, length, dim)
    memory = ChunkedMemory.from_steps(steps, chunk)
    last_step = torch.arange(1, memory.chunks + 1) * chunk - 1
    is_closed = last_step < torch.arange(length)[:, None]
    mask = is_closed.expand(batch, -1, -1)
    runs = {
        "ours": Rival(
            lambda cotangent: bind(layer, steps, mask, cotangent=cotangent),
            lambda backward: expect_layer(layer, steps, memory, cotangent, mask),
        ),
        "dense": Rival(
            lambda cotangent: bind(dense, steps, cotangent=cotangent),
            lambda backward: expect_causal(dense, steps, cotangent),
        ),
    }
    result = _Result(contest(runs, rates, limits))
    theirs, mine = result.get("dense", BOTH), result.get("ours", BOTH)
    details = {"dense ms": theirs, "ours ms": mine, "GFLOP/s": result.gflops(BOTH)}
    details["repeats of dense"] = result.get("dense", BOTH, "repeats")
    name = f"B{batch} Q = T {length:,} D{dim} C{chunk} {BOTH}, dense / ours"
    return Target(name, theirs / mine, bar, True, details)
