"""Every width and dtype, numbers that are none or tiny, and ties, in the compiled kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch.ops import attend, recall
from tests.helpers import memory_of, normal, relative_error
from tests.ops.native_cases import (
    OPERATORS,
    Sizes,
    assert_all_near,
    assert_as_accurate,
    cast,
    clear_cut,
    inputs_of,
    masks_of,
    run,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")


WIDTHS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127]
STORED = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class TestPrecision:
    @pytest.mark.parametrize("stored", STORED, ids=str)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_tails_of_vectors(
        self, width: int, stored: torch.dtype, fences: Callable[[], None]
    ) -> None:
        number = WIDTHS.index(width)
        exact = torch.promote_types(torch.float32, stored)
        for turn in range(3):
            chunk_size = WIDTHS[(number + 5 * turn) % len(WIDTHS)]
            heads, chunks = (number + 4 * turn) % 9 + 1, (3, 17, 6)[turn]
            sizes = Sizes(2, 3 + turn, heads, chunks, chunk_size, width)
            parts = clear_cut(sizes, stored, exact)
            masked = masks_of(sizes) if turn == 1 else {}
            if turn == 2:
                del parts["positions"]
            parts |= masked
            double = cast(parts, torch.float64)
            cotangent = normal(*parts["probe"].shape).to(torch.bfloat16)
            truth = with_gradients("reference", 2, double, cotangent)
            got = with_gradients("native", 2, parts, cotangent)
            fences()
            if exact == torch.float64:
                assert_all_near(got, truth, 1e-12, str(sizes))
            else:
                plain = with_gradients("reference", 2, parts, cotangent)
                assert_as_accurate(got, plain, truth, str(sizes))

    @pytest.mark.parametrize("kind", ["chunks", "steps"])
    @pytest.mark.parametrize("stored", STORED, ids=str)
    @pytest.mark.parametrize("route", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_dtypes_of_queries_and_memory(
        self, route: torch.dtype, stored: torch.dtype, kind: str
    ) -> None:
        sizes = Sizes(2, 6, 3, 8, 4, 24)
        parts = clear_cut(sizes, stored, route)
        if kind == "steps":
            # Chunks whose means are far apart, too; the oldest lacks a step.
            contents = parts["contents"].double()
            contents[..., 0] = parts["summaries"][..., None, 0].double()
            parts = {name: parts[name] for name in ("route", "probe", "positions")}
            parts["steps"] = contents.flatten(1, 2)[:, 1:].to(stored)
            parts["mask"] = torch.rand(2, 31) < 0.9
        double = cast(parts, torch.float64)
        cotangent = normal(*parts["probe"].shape).to(torch.bfloat16)
        truth = with_gradients("reference", 3, double, cotangent)
        plain = with_gradients("reference", 3, parts, cotangent)
        got = with_gradients("native", 3, parts, cotangent)
        for name, part in got.items():
            assert part.dtype == plain[name].dtype, name
        assert_as_accurate(got, plain, truth)

    @pytest.mark.parametrize("stored", STORED, ids=str)
    def test_summaries_of_another_dtype_than_the_steps(self, stored: torch.dtype) -> None:
        # As the keys of DeepMind's layer may be (`from_haiku`).
        for keys in STORED:
            parts = clear_cut(Sizes(D=24), stored, torch.float32)
            parts["summaries"] = parts["summaries"].to(keys)
            truth = with_gradients("reference", 3, cast(parts, torch.float64))
            plain = with_gradients("reference", 3, parts)
            got = with_gradients("native", 3, parts)
            assert_as_accurate(got, plain, truth, str(keys))

    def test_small_numbers_of_float16_are_not_lost(self) -> None:
        # Not normal in half precision, but in the precision of the sums.
        contents = (4e-6 * torch.randn(2, 5, 4, 9)).half()
        assert contents.abs().max() < torch.finfo(torch.float16).tiny
        route, probe = 1e5 * torch.randn(2, 3, 9), 1e5 * torch.randn(2, 3, 2, 9)
        summaries = torch.randn(2, 5, 9).half()
        memory = memory_of(contents, summaries)
        truth = recall(
            route.double(), probe.double(), memory.to(dtype=torch.float64), 2, impl="reference"
        )
        plain = recall(route, probe, memory, 2, impl="reference")
        allowed = 4 * relative_error(plain, truth)
        assert relative_error(recall(route, probe, memory, 2, impl="native"), truth) <= allowed
        assert allowed < 1e-3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_huge_logits(self, dtype: torch.dtype) -> None:
        parts = inputs_of(Sizes(M=9, C=17, D=19))
        parts |= {"route": 1e4 * parts["route"], "probe": 1e4 * parts["probe"]}
        parts = cast(parts, dtype)
        double = cast(parts, torch.float64)
        truth, plain = (with_gradients("reference", 3, p) for p in (double, parts))
        got = with_gradients("native", 3, parts)
        for name in ("context", "contents"):
            allowed = max(4 * relative_error(plain[name], truth[name]), 1e-9)
            assert relative_error(got[name], truth[name]) <= allowed, name
        for part in got.values():
            assert part.isfinite().all()

    def test_exponentials_over_their_whole_range(self) -> None:
        # Two steps each, logits 0 and -x, values 0 and 1: the context is the second's weight.
        for dtype, tiny in ((torch.float32, 87.0), (torch.float64, 708.0)):
            x = torch.cat([torch.linspace(0, tiny, 1001), torch.tensor([tiny + 50, 1e4, 1e30])])
            x = x.to(dtype)
            contents = torch.zeros(1, len(x), 2, 2, dtype=dtype)
            contents[0, :, 1] = torch.stack([-x, torch.ones_like(x)], -1)
            memory = memory_of(contents)
            # Each query sees a chunk of its own.
            only = torch.eye(len(x), dtype=torch.bool)[None]
            route = torch.zeros(1, len(x), 2, dtype=dtype)
            probe = torch.tensor([1.0, 0.0], dtype=dtype).expand(1, len(x), 1, 2)
            got = recall(route, probe, memory, 1, chunk_mask=only, impl="native")[0, :, 0, 1]
            expected = torch.sigmoid(-x.double())
            error = (got.double() - expected).abs() / expected.clamp(min=torch.finfo(dtype).tiny)
            normal_ones = expected > 2 * torch.finfo(dtype).tiny
            assert error[normal_ones].max() < 8 * torch.finfo(dtype).eps
            assert got[~normal_ones].abs().max() <= 2 * torch.finfo(dtype).tiny


class TestNotANumber:
    NAN, INF = float("nan"), float("inf")

    @pytest.mark.parametrize("width", [1, 6, 33])
    @pytest.mark.parametrize("which", ["route", "probe"])
    def test_in_a_query_is_in_its_context_and_in_no_other(self, which: str, width: int) -> None:
        for dtype in (torch.float32, torch.float64):
            sizes = Sizes(Q=9, C=5, D=width)
            parts = cast(inputs_of(sizes) | masks_of(sizes), dtype)
            parts["valid"][:] = parts["step_mask"][:, :, 0] = True
            parts["chunk_mask"][0, 4, 2] = True
            value = run("native", 3, parts)
            parts[which][0, 4, ..., width // 2] = self.NAN
            dirty = run("native", 3, parts)
            assert dirty[0, 4].isnan().all()
            others = torch.ones(2, 9, dtype=torch.bool)
            others[0, 4] = False
            assert torch.equal(dirty[others], value[others])

    def test_in_one_head_is_not_in_the_others(self) -> None:
        parts = inputs_of(Sizes(H=9))
        value = run("native", 3, parts)
        parts["probe"][0, 2, 5, 3] = self.NAN
        dirty = run("native", 3, parts)
        assert dirty[0, 2, 5].isnan().all()
        dirty[0, 2, 5] = value[0, 2, 5]
        assert torch.equal(dirty, value)

    @pytest.mark.parametrize(
        "scores",
        {
            "inf-once": [1.0, INF, 2.0, 0.0],
            "inf-twice": [INF, 1.0, INF, 0.0],
            "minus-inf-once": [1.0, -INF, 2.0, 0.0],
            "minus-inf-kept": [-INF, -INF, 2.0, -INF],
            "minus-inf-everywhere": [-INF, -INF, -INF, -INF],
            "nan": [0.0, 1.0, NAN, 2.0],
            "nan-and-inf": [INF, 1.0, NAN, 2.0],
            "nan-twice": [NAN, 1.0, 0.0, NAN],
        }.items(),
        ids=lambda item: item[0],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_scores_that_are_no_numbers(
        self, dtype: torch.dtype, scores: tuple[str, list[float]]
    ) -> None:
        summaries = torch.tensor(scores[1], dtype=dtype)[None, :, None]
        contents = torch.randn(1, 4, 3, 1, dtype=dtype)
        route = torch.ones(1, 5, 1, dtype=dtype)
        probe = torch.randn(1, 5, 2, 1, dtype=dtype)
        for k in (1, 2, 3, 4):
            memory = memory_of(contents, summaries)
            got, expected = (
                recall(route, probe, memory, k, impl=impl) for impl in ("native", "reference")
            )
            torch.testing.assert_close(got, expected, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("count", [2, 9, 16, 17])
    def test_logits_that_are_no_numbers(self, count: int, dtype: torch.dtype) -> None:
        # Products beyond the largest number, of contents that are finite.
        big = 1e30 if dtype == torch.float32 else 1e300
        for values in ([big], [-big], [big, big], [-big, -big], [big, -big], [-big] * count):
            for sign in (1.0, -1.0):
                contents = torch.randn(1, 1, count, 1, dtype=dtype)
                contents[0, 0, : len(values), 0] = torch.tensor(values, dtype=dtype)
                memory = memory_of(contents, torch.zeros(1, 1, 1, dtype=dtype))
                route = torch.ones(1, 1, 1, dtype=dtype)
                probe = torch.full((1, 1, 1, 1), sign * big, dtype=dtype)
                got, expected = (
                    recall(route, probe, memory, 1, impl=impl) for impl in ("native", "reference")
                )
                torch.testing.assert_close(got, expected, equal_nan=True)

    @pytest.mark.parametrize("where", ["probe", "cotangent"])
    @pytest.mark.parametrize("kind", ["chunks", "steps"])
    def test_in_a_query_gives_masked_steps_no_gradient(self, kind: str, where: str) -> None:
        parts = inputs_of(Sizes())
        mask = torch.rand(2, 28) < 0.6
        if kind == "steps":
            parts["steps"] = parts.pop("contents").flatten(1, 2)
            parts["mask"] = mask
            del parts["summaries"]
        else:
            parts["step_mask"] = mask.unflatten(1, (7, 4))
        cotangent = normal(2, 5, 3, 6)
        (cotangent if where == "cotangent" else parts["probe"])[0, 1, 2, 3] = self.NAN
        for impl in ("reference", "blocked", "native"):
            gradients = with_gradients(impl, 3, parts, cotangent)
            of_steps = (
                gradients["steps"] if kind == "steps" else gradients["contents"].flatten(1, 2)
            )
            assert of_steps[mask].isnan().any(), impl
            assert torch.equal(of_steps[~mask], torch.zeros_like(of_steps[~mask])), impl


class TestDenormals:
    """The kernel counts them as zero; nobody else shall."""

    TINY = 1e-40

    def halved(self) -> Tensor:
        """Of so many numbers that every thread of torch gets some."""
        return torch.full((2**20,), self.TINY) * 0.5

    @pytest.mark.parametrize("count", [1, 4])
    def test_the_callers_arithmetic_is_as_before(
        self, count: int, threads: Callable[[int], None]
    ) -> None:
        threads(count)
        expected = torch.tensor(self.TINY, dtype=torch.float64).float() * 0.5
        assert expected > 0
        parts = cast(inputs_of(Sizes(Q=70, M=300)), torch.float32)
        memory = memory_of(parts["contents"], parts["summaries"])
        projections = torch.randn(2, 3, 6, 6)
        with_gradients("native", 3, parts)
        attend(parts["route"], parts["probe"], projections, memory, 3, impl="projected")
        assert (self.halved() == expected).all()

    def test_the_callers_own_choice_stays(self, threads: Callable[[int], None]) -> None:
        threads(1)
        parts = cast(inputs_of(Sizes()), torch.float32)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormal numbers")
        try:
            with_gradients("native", 3, parts)
            assert not self.halved().any()
        finally:
            torch.set_flush_denormal(False)
        with_gradients("native", 3, parts)
        assert self.halved().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_inside_they_are_nothing(self, dtype: torch.dtype) -> None:
        tiny = torch.finfo(dtype).tiny
        parts = cast(inputs_of(Sizes()), dtype)
        clean = dict(parts)
        for name in ("contents", "probe", "route"):
            parts[name] = parts[name].clone()
            parts[name][..., 0] = tiny / 4
            clean[name] = parts[name].clone()
            clean[name][..., 0] = 0
        got, expected = with_gradients("native", 3, parts), with_gradients("native", 3, clean)
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


NOTHING = (None, None, None)
"""What nothing fades by."""


class TestTies:
    """Of equal chunks the older slots are kept, in order."""

    @staticmethod
    def picked(route: Tensor, summaries: Tensor, k: int, chunk_mask: Any = None) -> Tensor:
        return OPERATORS.pick(route, summaries, None, None, chunk_mask, *NOTHING, k, 1, 0.0)[0]

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    @pytest.mark.parametrize("k", [1, 4, 100, 300])
    def test_the_lower_index_is_kept(
        self, k: int, count: int, threads: Callable[[int], None]
    ) -> None:
        # Few different scores for many chunks. Threads divide them, into segments of 64 and more.
        threads(count)
        for batch, queries in ((1, 1), (1, 3), (2, 67), (1, 130)):
            route = torch.ones(batch, queries, 1)
            route[:, 1::2] = -1.0
            for values in (1, 3):
                summaries = torch.randint(values, (batch, 300, 1)).float()
                scores = torch.einsum("bqd,bmd->bqm", route, summaries)
                order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
                assert torch.equal(self.picked(route, summaries, k), order)
                # Chunks as means of their steps, here of two equal ones.
                steps = summaries.repeat_interleave(2, 1)
                got, _ = OPERATORS.pick(route, steps, None, None, None, *NOTHING, k, 2, 0.0)
                assert torch.equal(got, order)

    def test_among_those_that_may_be_seen(self) -> None:
        seen = torch.rand(2, 9, 300) < 0.3
        got = self.picked(torch.ones(2, 9, 1), torch.zeros(2, 300, 1), 120, seen)
        for row, allowed in zip(got.flatten(0, 1), seen.flatten(0, 1), strict=True):
            expected = allowed.nonzero()[:120, 0]
            assert torch.equal(row[: len(expected)], expected)
            assert (row[len(expected) :] == -1).all()
