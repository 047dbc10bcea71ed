"""Of equal scores the older chunk is kept, whoever computes it, wherever the chunks lie."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, kernels
from htm_pytorch.memory import best
from htm_pytorch.ops import Impl, attend, blocked, recall, recall_with_weights, topk
from tests.helpers import assert_near, normal, on_cpu

IMPLS = [i for i in on_cpu(Impl) if kernels.IS_AVAILABLE or i not in ("native", "projected")]
KINDS = ("equal", "few", "numbers", "masked", "no-numbers")


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    pass


def summaries_of(kind: str, rows: int, chunks: int, dim: int) -> Tensor:
    """All equal, of few kinds, or all different; always of numbers that rounding would spoil."""
    if kind == "equal":
        return normal(rows, 1, dim).expand(rows, chunks, dim).contiguous()
    if kind == "few":
        return normal(rows, 3, dim)[:, torch.randint(0, 3, (chunks,))]
    summaries = normal(rows, chunks, dim)
    if kind == "no-numbers":
        summaries[:, torch.randint(0, chunks, (3,))] = float("nan")
        summaries[:, torch.randint(0, chunks, (3,))] = float("inf")
    return summaries


def sorted_by_hand(
    route: Tensor, summaries: Tensor, allowed: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Every score summed alone, all of them sorted by a stable sort."""
    scores = (route[:, :, None] * summaries[:, None]).sum(-1)
    scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~allowed, -torch.inf)
    best, chunks = scores.sort(dim=-1, descending=True, stable=True)
    return best[..., :k], chunks[..., :k]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("looks", [True, False], ids=["looks", "does-not-look"])
def test_the_best_chunks_are_those_of_a_stable_sort(
    looks: bool, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "may_look_at", lambda tensor: looks)
    sizes = itertools.product((1, 3, 64), (1, 5, 129), (0, 1, 5, 16), ((1, 1), (2, 2), (3, 1)))
    for number, (dim, chunks, queries, (batch, rows)) in enumerate(sizes):
        # Whole, and in the smallest blocks.
        for module in (best, topk):
            monkeypatch.setattr(module, "BLOCK_BYTES", 2**22 if number % 2 else 1)
        summaries = summaries_of(kind, rows, chunks, dim).to(dtype)
        route = normal(batch, queries, dim).to(dtype)
        allowed = torch.ones(rows, 1, chunks, dtype=torch.bool)
        if kind == "masked":
            allowed = torch.rand(batch, queries, chunks) < 0.3
        for k in (1, 4, 200):
            scores, found = topk.best_chunks(route, summaries, allowed, k)
            highest, expected = sorted_by_hand(route, summaries, allowed, k)
            there = highest != -torch.inf
            assert torch.equal(scores == -torch.inf, ~there)
            # Both are sums of `dim` products, of order one.
            near = torch.isclose(scores, highest, 0.0, 64 * dim * torch.finfo(dtype).eps, True)
            assert near.all()
            assert torch.equal(found[there], expected[there])


def test_nothing_at_all() -> None:
    for batch, queries, total in ((2, 0, 0), (2, 3, 0), (0, 3, 7), (0, 3, 1), (2, 0, 7)):
        scores, chunks = topk.best_chunks(
            normal(batch, queries, 4),
            normal(1, total, 4),
            torch.ones(1, 1, total, dtype=torch.bool),
            2,
        )
        assert scores.shape == chunks.shape == (batch, queries, min(total, 2))


class Home:
    """A memory elsewhere, whose summaries are at hand."""

    def __init__(self, memory: ChunkedMemory):
        self.held = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)


def read(impl: Any, memory: Any, route: Tensor, chunk_mask: Tensor | None, k: int) -> Tensor:
    """What is attended to, through projections that leave every step as it is."""
    dim = memory.dim
    eye = torch.eye(dim, dtype=route.dtype)[None]
    queries = torch.linspace(-1, 1, dim, dtype=route.dtype).expand(*route.shape[:2], 1, dim)
    projections = torch.stack([eye, eye])
    arguments = (route, queries, projections, memory, k)
    return attend(*arguments, chunk_mask=chunk_mask, impl=impl)[0]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in-RAM", "elsewhere"])
@pytest.mark.parametrize("kind", ["equal", "few", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_keeps_the_older(
    impl: Any, dtype: torch.dtype, kind: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if elsewhere and impl in ("native", "blocked"):
        # What scores them, where there is no kernel.
        monkeypatch.setattr("htm_pytorch.ops.homes.kernels.IS_AVAILABLE", impl == "native")
    for chunks, queries, dim, k in (
        (6, 7, 16, 3),
        (40, 5, 16, 3),
        (300, 1, 33, 5),
        (129, 64, 3, 2),
    ):
        summaries = summaries_of("equal" if kind == "masked" else kind, 1, chunks, dim).to(dtype)
        held = ChunkedMemory.from_chunks(normal(1, chunks, 2, dim).to(dtype), summaries=summaries)
        memory = Home(held) if elsewhere else held
        route = normal(1, queries, dim).to(dtype)
        mask = torch.rand(1, queries, chunks) < 0.4 if kind == "masked" else None
        allowed = held.valid[:, None].expand(1, queries, -1) if mask is None else mask
        _, expected = sorted_by_hand(route, summaries, allowed, k)
        only = torch.zeros(1, queries, chunks, dtype=torch.bool).scatter(2, expected, True)
        wanted = read("reference", held, route, only & allowed, k)
        got = read(impl, memory, route, mask, k)
        # Another chunk would be a difference of order one; 2 steps of `dim` numbers are rounded.
        tolerance = 64 * dim * torch.finfo(dtype).eps
        assert_near(got, wanted, tolerance, f"{chunks} chunks, {queries} queries")


def test_kept_chunks_come_in_the_order_of_their_age() -> None:
    memory = ChunkedMemory.from_chunks(
        normal(1, 40, 2, 16), summaries=summaries_of("equal", 1, 40, 16)
    )
    route = normal(1, 7, 16)
    _, recalled = recall_with_weights(route, route[:, :, None], memory, 5)
    assert torch.equal(recalled.chunks, torch.arange(5).expand(1, 7, 5))


def test_blocked_in_pieces_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("equal", "few"):
        summaries = summaries_of(kind, 2, 40, 16)
        memory = ChunkedMemory.from_chunks(normal(2, 40, 2, 16), summaries=summaries)
        route, probe = normal(2, 7, 16), normal(2, 7, 1, 16)
        monkeypatch.setattr(blocked, "SCORE_BYTES", 2**24)
        whole = recall(route, probe, memory, 3, impl="blocked")
        monkeypatch.setattr(blocked, "SCORE_BYTES", 1)
        assert torch.equal(recall(route, probe, memory, 3, impl="blocked"), whole)


def test_mapped_as_one_by_one() -> None:
    summaries = summaries_of("equal", 1, 40, 16)
    memory = ChunkedMemory.from_chunks(normal(1, 40, 2, 16), summaries=summaries)
    routes, probe = normal(3, 1, 7, 16), normal(1, 7, 1, 16)

    def run(route: Tensor) -> Tensor:
        return recall(route, probe, memory, 3)

    assert_near(torch.vmap(run)(routes), torch.stack([run(route) for route in routes]), 1e-13)
