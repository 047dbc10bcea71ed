"""One contract for all homes of a memory: in RAM, on disk, in an object store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, memory, recall
from htm_pytorch.memory import Home
from htm_pytorch.ops import recall_with_weights
from tests.helpers import assert_near, value_and_gradients

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

CHUNKS, SIZE, DIM = 24, 4, 6
Make = Callable[[], Any]


def in_ram() -> ChunkedMemory:
    return ChunkedMemory.empty(1, CHUNKS, SIZE, DIM, keep_across_episodes=True)


@pytest.fixture(params=["ram", "disk", "object store"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Make an empty home of the kind; each call another one."""
    made: list[Any] = []

    def make_one() -> Any:
        if request.param == "ram":
            return in_ram()
        place = f"{tmp_path}/{len(made)}"
        uri = place if request.param == "disk" else f"file://{place}"
        made.append(memory.open(uri, dim=DIM, chunk_size=SIZE, cache_bytes=2**10, sync=False))
        return made[-1]

    request.addfinalizer(lambda: [home.close() for home in made])
    return make_one


def history(length: int, episodes: int = 3) -> tuple[Tensor, Tensor]:
    steps = torch.randn(1, length, DIM)
    is_first = torch.zeros(1, length, dtype=torch.bool)
    is_first[:, torch.randperm(length)[:episodes]] = True
    return steps, is_first


def visible(home: Any) -> ChunkedMemory:
    """All chunks that can be recalled, fetched."""
    return home.fetch(home.valid[0].nonzero()[:, 0])


def assert_same(a: Any, b: Any) -> None:
    a, b = visible(a), visible(b)
    masks = [
        x.valid[..., None].expand(x.contents.shape[:3]) if x.step_mask is None else x.step_mask
        for x in (a, b)
    ]
    assert torch.equal(*masks)
    assert torch.equal(a.contents[masks[0]], b.contents[masks[0]])
    torch.testing.assert_close(a.summaries, b.summaries)


def test_each_is_a_home(make: Make) -> None:
    home = make()
    assert isinstance(home, Home)
    assert (home.batch, home.chunk_size, home.dim, home.dtype) == (1, SIZE, DIM, torch.float32)


@given(cuts=st.lists(st.integers(0, 50), max_size=5), episodes=st.integers(0, 6))
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_cuts_do_not_matter(make: Make, cuts: list[int], episodes: int) -> None:
    steps, is_first = history(50, episodes)
    whole, pieces = in_ram().append(steps, is_first), make()
    borders = [0, *sorted(cuts), 50]
    for start, end in zip(borders, borders[1:], strict=False):
        pieces = pieces.append(steps[:, start:end], is_first[:, start:end])
    assert_same(whole, pieces)


def test_the_layer_cannot_tell_them_apart(make: Make) -> None:
    steps, is_first = history(70)
    ram, home = in_ram().append(steps, is_first), make().append(steps, is_first)
    layer = HTMAttention(DIM, heads=2, topk_mems=3, dim_head=4)
    queries = torch.randn(3, 5, DIM)
    parameters = list(layer.parameters())

    def run(held: Any, queries: Tensor) -> tuple[Tensor, list[Tensor]]:
        queries = queries.clone().requires_grad_()
        out = layer(queries, held)
        return out, list(torch.autograd.grad(out.square().sum(), [queries, *parameters]))

    (expected, gradients), (out, found) = run(ram, queries), run(home, queries)
    assert_near(out, expected, 1e-5)
    for a, b in zip(found, gradients, strict=True):
        assert_near(a, b, 1e-5)
    block = HTMBlock(DIM, heads=2, topk_mems=3, dim_head=4)
    assert_near(block(queries, home), block(queries, ram), 1e-5)


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked"])
def test_recall_by_every_implementation(make: Make, impl: Any) -> None:
    steps, is_first = history(70)
    ram, home = in_ram().append(steps, is_first), make().append(steps, is_first)
    inputs = torch.randn(2, 5, DIM), torch.randn(2, 5, 3, DIM), torch.randn(SIZE, DIM)

    def run(held: Any) -> Callable[..., Tensor]:
        return lambda r, p, x: recall(r, p, held, 4, positions=x, impl=impl)

    expected, gradients = value_and_gradients(run(ram), inputs)
    out, found = value_and_gradients(run(home), inputs)
    assert_near(out, expected, 1e-5)
    for a, b in zip(found, gradients, strict=True):
        assert_near(a, b, 1e-5)


def test_what_was_recalled_has_the_numbers_of_the_home(make: Make) -> None:
    steps, is_first = history(70)
    ram, home = in_ram().append(steps, is_first), make().append(steps, is_first)
    route, probe = torch.randn(1, 5, DIM), torch.randn(1, 5, 3, DIM)
    mask = torch.rand(1, 5, home.chunks) < 0.5
    mask[:, 0] = False
    full = torch.zeros(1, 5, CHUNKS, dtype=torch.bool)
    full[..., : home.chunks] = mask
    context, recalled = recall_with_weights(route, probe, home, 9, chunk_mask=mask)
    expected, of_ram = recall_with_weights(route, probe, ram, 9, chunk_mask=full)
    kept = recalled.chunks.shape[2]
    assert kept <= 9
    assert torch.equal(recalled.chunks, of_ram.chunks[..., :kept])
    assert (of_ram.chunks[..., kept:] < 0).all()
    assert (recalled.chunks[:, 0] == -1).all()
    assert_near(context, expected, 1e-5)
    assert (context[:, 0] == 0).all()


def test_an_empty_one_gives_zeros(make: Make) -> None:
    layer = HTMAttention(DIM, heads=2, dim_head=4)
    for home in (make(), make().append(torch.randn(1, SIZE - 1, DIM))):
        assert (layer(torch.randn(2, 3, DIM), home) == 0).all()


def test_reset(make: Make) -> None:
    home = make().append(torch.randn(1, 21, DIM))
    kept = home.reset(torch.tensor([False]))
    assert len(visible(kept).contents[0]) == 5
    home = kept.reset(torch.tensor([True]))
    assert not home.valid.any()
    steps, is_first = history(30)
    assert_same(home.append(steps, is_first), in_ram().append(steps, is_first))


def test_bad_input_changes_nothing(make: Make) -> None:
    home = make().append(torch.randn(1, 9, DIM))
    before = visible(home)
    with pytest.raises(ValueError, match=r"steps: expected shape \[B = 1, T, D = 6\]"):
        home.append(torch.randn(1, 9, DIM + 1))
    with pytest.raises(ValueError, match="steps: expected dtype torch.float32, got torch.float64"):
        home.append(torch.randn(1, 9, DIM).double())
    with pytest.raises(ValueError, match="is_first: expected shape"):
        home.append(torch.randn(1, 9, DIM), torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="memories: expected width 5, got 6"):
        HTMAttention(5)(torch.randn(1, 2, 5), home)
    with pytest.raises(ValueError, match="mask: expected None beside"):
        HTMAttention(DIM)(torch.randn(1, 2, DIM), home, torch.ones(1, 9, dtype=torch.bool))
    after = visible(home)
    assert torch.equal(before.contents, after.contents)
