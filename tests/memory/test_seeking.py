"""The k best of chunks whose summaries are not at hand: by their codes, exactly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_pytorch import memory
from htm_pytorch.memory import answers, seeking
from htm_pytorch.memory import codes as coding
from htm_pytorch.memory.best import nearest
from htm_pytorch.memory.codes import Codes
from htm_pytorch.memory.fading import Fading, log_ages
from tests.hard_summaries import KINDS, equal, huge, no_numbers, noise, of_two, walk

FINITE = [kind for kind in KINDS if kind not in (no_numbers, huge)]


def found(
    codes: Codes,
    summaries: Tensor,
    vectors: Tensor,
    k: int,
    allowed: Tensor | None = None,
    fading: Fading | None = None,
    looks: list[int] | None = None,
) -> Tensor:
    """The k best by codes; how many summaries were asked for is added to `looks`."""

    def look(chunks: Tensor) -> Tensor:
        if looks is not None:
            looks.append(len(chunks))
        return summaries[chunks]

    assert codes.digests is not None
    digests = codes.digests[0]
    asked = seeking.as_asked(vectors, fading)
    bounded = seeking.sought(codes, len(summaries), asked, k, allowed, fading)
    return seeking.decided(bounded, asked, k, fading, look, lambda chunks: digests[chunks])


def wanted(
    summaries: Tensor, vectors: Tensor, k: int, allowed: Tensor | None, fading: Fading | None
) -> Tensor:
    fades = None if fading is None else Fading(*(part[None] for part in fading))
    mask = None if allowed is None else allowed[None]
    scores, chunks = nearest(vectors[None], summaries[None], k, mask, fades)
    return chunks[0].masked_fill(scores[0] == -torch.inf, -1)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.sort().values, expected.sort().values)


@pytest.mark.parametrize("encoder", ["kernel", "plain"])
class TestSearch:
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_the_best_are_found(self, data: st.DataObject, encoder: str) -> None:
        torch.manual_seed(data.draw(st.integers(0, 10**6)))
        chunks, dim = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 70))
        queries, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, min(chunks, 40)))
        summaries = data.draw(st.sampled_from(FINITE))(chunks, dim)
        with pytest.MonkeyPatch.context() as patch:
            if encoder == "plain":
                patch.setattr(coding.kernels, "IS_AVAILABLE", False)
            codes, length = Codes.empty(1, 0, dim, with_fine=True), 0
            while length < chunks:
                some = min(data.draw(st.sampled_from([1, 3, 64, 150, 400])), chunks - length)
                codes = codes.appended(length, summaries[length : length + some])
                length += some
            for _ in range(data.draw(st.integers(0, 2))):
                start = data.draw(st.integers(0, chunks))
                order = torch.cat([torch.arange(start), start + torch.randperm(chunks - start)])
                codes, summaries = codes.chosen(order), summaries[order]
            number = data.draw(st.integers(0, chunks - 1))
            summaries = summaries.clone()
            summaries[number] = torch.randn(dim)
            codes.recoded(number, summaries[number])
            vectors = torch.randn(queries, dim)
            if data.draw(st.booleans()):
                vectors = vectors * 1e-3 + summaries[torch.randint(chunks, (queries,))].clamp(
                    -1e9, 1e9
                )
            vectors *= 10.0 ** data.draw(st.sampled_from([-38, -13, 0, 0, 0, 20]))
            allowed, fading = None, None
            if data.draw(st.booleans()):
                allowed = torch.rand(queries, chunks) < 0.5
            if data.draw(st.booleans()):
                ages = log_ages(
                    torch.randint(chunks, (data.draw(st.sampled_from([1, queries])), chunks)),
                    torch.float32,
                )
                fading = Fading(torch.randn(queries) * 10, torch.randn(queries), ages)
            got = found(codes, summaries, vectors, k, allowed, fading)
        # As it was asked: products of the smallest numbers there are tell nothing apart.
        asked = seeking.as_asked(vectors, fading)
        assert_same(got, wanted(summaries, asked, k, allowed, fading))

    @pytest.mark.parametrize("kind", [noise, walk, equal, of_two], ids=lambda kind: kind.__name__)
    def test_few_summaries_are_asked_for(
        self, kind: Callable[[int, int], Tensor], encoder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if encoder == "plain":
            monkeypatch.setattr(coding.kernels, "IS_AVAILABLE", False)
        torch.manual_seed(0)
        summaries = kind(6000, 64)
        codes = Codes.empty(1, 0, 64, with_fine=True).appended(0, summaries)
        vectors, looks = torch.randn(20, 64), list[int]()
        got = found(codes, summaries, vectors, 8, looks=looks)
        assert_same(got, wanted(summaries, vectors, 8, None, None))
        assert sum(looks) <= 32


def kept(held: memory.ExactMemory, route: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    return held.best_chunks(route, k, mask, None)


def best_of(
    held: memory.ExactMemory, route: Tensor, k: int, allowed: Tensor | None = None
) -> Tensor:
    mask = None if allowed is None else allowed.expand(1, route.shape[1], -1)
    _, chunks = nearest(route, held.summaries, k, mask)
    return chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_stored_memory_over_its_life(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is found stays the best when it is flushed, reopened, forgotten from and compacted."""
    torch.manual_seed(0)
    held = memory.open(tmp_path / "m", dim=24, chunk_size=4, dtype=dtype)
    assert isinstance(held, memory.ExactMemory)
    given = torch.float32 if dtype == torch.int8 else dtype
    route = torch.randn(1, 7, 24)

    def check() -> None:
        assert isinstance(held, memory.ExactMemory)
        assert_same(kept(held, route, 5), best_of(held, route, 5))
        near = held.summaries[:, ::9].float()
        assert_same(kept(held, near, 5), best_of(held, near, 5))

    for turn in range(6):
        held.append(torch.randn(1, 4 * 23 + turn, 24).cumsum(1).to(given))
        check()
        if turn % 2:
            held.flush()
            check()
    held.forget(before_step=150)
    check()
    held.compact()
    check()
    held.close()
    held = memory.open(tmp_path / "m")
    check()
    chosen = held.where(episodes=[0])
    assert isinstance(held, memory.ExactMemory)
    assert_same(chosen.moment().best_chunks(route, 5, None, None), best_of(held, route, 5))


def test_equal_chunks_are_not_all_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of one thing, as of a robot that waits."""
    held = memory.open(tmp_path / "m", dim=16, chunk_size=2)
    held.append(torch.randn(1, 1, 16).expand(1, 2000, 16))
    fetched, real = list[int](), answers.fetched

    def count(now: answers.State, chunks: Tensor) -> memory.ChunkedMemory:
        fetched.append(len(chunks))
        return real(now, chunks)

    monkeypatch.setattr(answers, "fetched", count)
    assert isinstance(held, memory.ExactMemory)
    assert kept(held, torch.randn(1, 1, 16), 3).sort().values.tolist() == [[[0, 1, 2]]]
    assert sum(fetched) <= 6
