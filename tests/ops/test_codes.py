"""Codes of summaries: the bounds hold, and what is picked by them is what is picked without."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_pytorch import ChunkedMemory, kernels
from htm_pytorch.memory import codes as coding
from htm_pytorch.memory import ring
from htm_pytorch.memory.codes import STRETCH, Codes
from htm_pytorch.memory.fading import Fading, log_ages
from htm_pytorch.ops import compiled, native
from tests.hard_summaries import KINDS, huge, no_numbers, noise, of_all_scales, one_outlier, tiny

pytestmark = pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="codes are read by the kernel")


by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def coded(summaries: Tensor, *, with_fine: bool = False, begin: int = 0) -> Codes:
    """Codes of summaries [B, M, D], in one piece or in two."""
    batch, chunks, dim = summaries.shape
    codes = Codes.empty(batch, chunks, dim, with_fine=with_fine)
    for start, end in ((0, begin), (begin, chunks)):
        stretches = range(start // STRETCH, -(-end // STRETCH))
        which = [
            [row, s, max(s * STRETCH, start), int(s * STRETCH >= start)]
            for row in range(batch)
            for s in stretches
            if end > start
        ]
        if which:
            codes.encode(summaries[:, start:end], torch.tensor(which), start)
    return codes


def decoded(codes: Codes, chunks: int) -> tuple[Tensor, Tensor]:
    """What codes stand for [B, M, D], in float64: of the coarse parts, and of both."""
    batch, _, dim = codes.centres.shape
    scale = codes.terms[:, 0, :, None].double()
    centre = codes.centres.double().repeat_interleave(STRETCH, 1)
    coarse = centre + scale * (codes.coarse[..., :dim].double() - 128)
    assert codes.fine is not None
    fine = coarse + scale * (codes.fine[..., :dim].double() - 128) / 254
    return coarse[:, :chunks], fine[:, :chunks]


@pytest.fixture(params=["kernel", "plain"])
def encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(coding.kernels, "IS_AVAILABLE", False)
    return request.param


class TestBounds:
    @by_kind
    @pytest.mark.parametrize(
        ("chunks", "dim", "begin"), [(130, 67, 0), (200, 16, 70), (1, 1, 0), (140, 64, 128)]
    )
    def test_no_summary_is_farther_from_its_code(
        self, kind: Callable[[int, int], Tensor], chunks: int, dim: int, begin: int, encoder: str
    ) -> None:
        torch.manual_seed(chunks)
        summaries = torch.stack([kind(chunks, dim) for _ in range(2)])
        codes = coded(summaries, with_fine=True, begin=begin)
        exact = summaries.double()
        for code, errors in zip(
            decoded(codes, chunks), codes.terms[:, 2:, :chunks].unbind(1), strict=True
        ):
            off = (exact - code).norm(dim=-1)
            assert (off <= errors).logical_or(errors.isinf()).all()
        is_number = exact.abs().amax(-1) < 1e30
        assert is_number.logical_or(codes.terms[:, 2, :chunks].isinf()).all()
        centre = codes.centres.double().repeat_interleave(STRETCH, 1)[:, :chunks]
        radii = codes.radii.repeat_interleave(STRETCH, 1)[:, :chunks]
        assert ((exact - centre).norm(dim=-1) <= radii).logical_or(radii.isinf()).all()

    @by_kind
    def test_what_is_left_is_small(self, kind: Callable[[int, int], Tensor], encoder: str) -> None:
        """A bound of infinity would hold, too."""
        if kind in (of_all_scales, one_outlier, no_numbers, huge, tiny):
            return
        torch.manual_seed(0)
        summaries = kind(256, 64)[None]
        codes = coded(summaries, with_fine=True)
        rest = summaries[0] - codes.centres[0].repeat_interleave(STRETCH, 0)
        most = rest.double().abs().amax(-1)
        floor = 1e-29 + 1e-4 * summaries[0].double().norm(dim=-1)
        assert (codes.terms[0, 2] <= most / 127 * 0.51 * 8 + floor).all()
        assert (codes.terms[0, 3] <= most / 127 / 254 * 0.51 * 8 + floor).all()

    def test_a_stretch_that_begins_has_the_centre_of_the_one_before(self, encoder: str) -> None:
        summaries = noise(STRETCH + 3, 32)[None] + 100
        codes = coded(summaries)
        apart = (codes.centres[0, 1] - summaries[0, :STRETCH].mean(0)).norm()
        assert apart < 0.1


def picks(
    route: Tensor, summaries: Tensor, k: int, codes: Codes | None, **others: Tensor | None
) -> tuple[Tensor, Tensor]:
    names = "valid", "step_mask", "chunk_mask", "ceiling", "decay", "ages"
    arguments = [others.get(name) for name in names]
    return compiled.pick(route, summaries, *arguments, k, 1, 0.0, codes)  # pyright: ignore[reportArgumentType]


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class TestPicks:
    @by_kind
    @pytest.mark.parametrize("queries", [1, 3, 70])
    def test_to_the_last_bit(self, kind: Callable[[int, int], Tensor], queries: int) -> None:
        torch.manual_seed(queries)
        for chunks, dim, k in ((300, 40, 8), (64, 64, 64), (77, 130, 1), (5000, 32, 5)):
            summaries = kind(chunks, dim)[None]
            route = torch.randn(1, queries, dim)
            near = summaries[:, torch.randint(chunks, (queries,))].nan_to_num(0, 0, 0)
            for asked in (route, route + near, near, route * 0):
                assert_same(
                    picks(asked, summaries, k, coded(summaries)), picks(asked, summaries, k, None)
                )

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_whatever_is_asked(self, data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 10**6)))
        batch, rows = data.draw(st.sampled_from([(1, 1), (2, 2)]))
        chunks, dim = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 140))
        queries, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, chunks))
        kinds = st.sampled_from(KINDS)
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        summaries = torch.stack([data.draw(kinds)(chunks, dim) for _ in range(rows)]).to(dtype)
        scale = 10.0 ** data.draw(st.sampled_from([-40, -37, -30, -13, -6, -3, 0, 0, 3, 30, 37]))
        route = torch.randn(batch, queries, dim) * scale
        if data.draw(st.booleans()):
            route[0, 0, 0] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        others: dict[str, Tensor | None] = {}
        if data.draw(st.booleans()):
            others["valid"] = torch.rand(rows, chunks) < 0.5
        if data.draw(st.booleans()):
            others["chunk_mask"] = torch.rand(batch, queries, chunks) < 0.5
        if data.draw(st.booleans()):
            others["ceiling"] = torch.randn(batch, queries) * data.draw(
                st.sampled_from([0.1, 10, 1e4])
            )
            others["decay"] = torch.randn(batch, queries)
            others["ages"] = log_ages(torch.randint(chunks, (batch, 1, chunks)), torch.float32)
        begin = data.draw(st.integers(0, chunks))
        codes = coded(summaries, begin=begin)
        assert_same(
            picks(route, summaries, k, codes, **others), picks(route, summaries, k, None, **others)
        )

    def test_most_summaries_are_spared_a_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        summaries = noise(4096, 256)[None]
        codes, route = coded(summaries), torch.randn(1, 1, 256)
        best, _ = picks(route, summaries, 8, codes)
        # Of what is not read, whatever it holds, nothing is told.
        products = (route[0] @ summaries[0].T)[0]
        far = products.argsort()[: 4096 - 400]
        far = far[far >= 1024]
        spoiled = summaries.clone()
        spoiled[0, far] = math.nan
        assert torch.equal(picks(route, spoiled, 8, codes)[0], best)

    def test_what_becomes_no_number_is_seen(self) -> None:
        """Of finite numbers whose products overflow one score is infinite, and one is none."""
        summaries = torch.randn(1, 5000, 16)
        summaries[0, 10, :2] = 3e38
        summaries[0, 4000, :8], summaries[0, 4000, 8:] = 3e38, -3e38
        route = 2 * torch.ones(1, 1, 16)
        assert_same(picks(route, summaries, 1, coded(summaries)), picks(route, summaries, 1, None))

    def test_bad_parts_are_refused(self) -> None:
        summaries = noise(100, 32)[None]
        codes, route = coded(summaries), torch.randn(1, 1, 32)
        nothing = (None,) * 5
        parts = {
            "coarse": codes.coarse,
            "centres": codes.centres,
            "radii": codes.radii,
            "terms": codes.terms,
        }
        for name, part in parts.items():
            wrong = {**parts, name: part[:, :1].clone()}
            with pytest.raises(ValueError, match=f"{name}: expected|coarse: expected"):
                torch.ops.htm_pytorch.pick_coded(route, summaries, *nothing, 3, *wrong.values())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are made and taken wherever they can be."""
    monkeypatch.setattr(ring, "CODED_NUMBERS", 0)
    monkeypatch.setattr(ring, "CODED_KEPT", 0)
    for name in ("CODED_WRITTEN", "CODED_STEPS"):
        monkeypatch.setattr(ring, name, 0)
    monkeypatch.setattr(ring, "CODED_AFTER", 2)


@pytest.mark.usefixtures("always")
class TestRings:
    @given(st.data())
    @settings(max_examples=40, deadline=None)
    def test_picks_of_a_memory_that_is_written(self, data: st.DataObject) -> None:
        """Appended to, scored, read as it was, forked, emptied and shared, in any order."""
        torch.manual_seed(data.draw(st.integers(0, 10**6)))
        batch, chunks, size, dim = 2, data.draw(st.integers(1, 150)), 2, 24
        keep = data.draw(st.booleans())
        memory = ChunkedMemory.empty(batch, chunks, size, dim, keep_across_episodes=keep)
        held = [memory]
        for _ in range(data.draw(st.integers(1, 25))):
            deed = data.draw(
                st.sampled_from(["append", "append", "score", "score", "old", "share", "reset"])
            )
            if deed == "append":
                steps = torch.randn(batch, data.draw(st.sampled_from([1, 2, 7, 150])), dim)
                first = torch.rand(steps.shape[:2]) < 0.05 if data.draw(st.booleans()) else None
                memory = memory.append(steps, first)
                held.append(memory)
            elif deed == "old":
                memory = held[data.draw(st.integers(0, len(held) - 1))]
            elif deed == "share":
                memory.contents.sum()
            elif deed == "reset":
                memory = memory.reset(torch.tensor([True, False]))
            else:
                route, k = torch.randn(batch, 3, dim), min(4, chunks)
                with torch.inference_mode(data.draw(st.booleans())), torch.no_grad():
                    got = native.pick(route, memory.reading(), k, None)
                ring_of = memory._ring.read()
                wanted = picks(route, ring_of.summaries, k, None, valid=memory.valid)
                assert_same(got, wanted)

    def test_gradients_pass(self) -> None:
        torch.manual_seed(0)
        steps = torch.randn(1, 512, 16)
        found: list[list[Tensor]] = []
        for times in (1, 3):
            memory = ChunkedMemory.from_steps(steps, 2)
            contents = memory.contents.clone().requires_grad_()
            memory = ChunkedMemory.from_chunks(contents, copy=False)
            route = torch.randn(
                1, 4, 16, generator=torch.Generator().manual_seed(1), requires_grad=True
            )
            fading = Fading(
                torch.ones(1, 4, requires_grad=True),
                torch.ones(1, 4, requires_grad=True),
                log_ages(memory.ages[:, None], torch.float32),
            )
            for _ in range(times):
                weights = native.pick(route, memory, 3, None, fading)[1]
            (weights * torch.arange(3.0)).sum().backward()
            parts = contents, route, fading.ceiling, fading.decay
            found.append([part.grad for part in parts if part.grad is not None])
        assert len(found[0]) == 4
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        assert memory._ring._codes is not None

    def test_summaries_that_are_learned(self) -> None:
        """Others hold them, and write to them where they lie."""
        torch.manual_seed(0)
        summaries = torch.nn.Parameter(torch.randn(1, 200, 8))
        contents = torch.randn(1, 200, 1, 8)
        memory = ChunkedMemory.from_chunks(contents, summaries=summaries, copy=False)
        route = torch.randn(1, 3, 8)
        for _ in range(4):
            assert_same(
                native.pick(route, memory, 4, None), picks(route, summaries.detach(), 4, None)
            )
            with torch.no_grad():
                summaries.copy_(torch.randn(1, 200, 8))
        assert memory._ring._codes is not None
        with torch.inference_mode():
            summaries = torch.randn(1, 200, 8)
            memory = ChunkedMemory.from_chunks(contents, summaries=summaries, copy=False)
            for _ in range(3):
                got = native.pick(route, memory.reading(), 4, None)
                assert_same(got, picks(route, summaries, 4, None))
                summaries.normal_()

    def test_summaries_that_are_scored_once_are_not_coded(self) -> None:
        memory = ChunkedMemory.from_steps(torch.randn(1, 64, 8), 2)
        route = torch.randn(1, 1, 8)
        native.pick(route, memory, 2, None)
        assert memory._ring._codes is None
        native.pick(route, memory, 2, None)
        assert memory._ring._codes is not None
