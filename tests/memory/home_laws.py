"""What holds for every home of a memory: each function is given what makes an empty one.

Homes have batch 1, keep all episodes, and chunks of SIZE steps of width DIM in float32.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, recall
from htm_pytorch.memory import ShardedMemory
from htm_pytorch.memory.home import is_home, is_searched
from htm_pytorch.ops import recall_with_weights
from tests.helpers import assert_near, value_and_gradients

CHUNKS, SIZE, DIM = 24, 4, 6
Make = Callable[[], Any]


def in_ram() -> ChunkedMemory:
    return ChunkedMemory.empty(1, CHUNKS, SIZE, DIM, keep_across_episodes=True)


def history(length: int, episodes: int = 3) -> tuple[Tensor, Tensor]:
    steps = torch.randn(1, length, DIM)
    is_first = torch.zeros(1, length, dtype=torch.bool)
    is_first[:, torch.randperm(length)[:episodes]] = True
    return steps, is_first


def visible(home: Any) -> ChunkedMemory:
    """All chunks that can be recalled, fetched."""
    every = home.fetch(torch.arange(home.chunks))
    return every.fetch(every.valid[0].nonzero()[:, 0])


def assert_same(a: Any, b: Any) -> None:
    a, b = visible(a), visible(b)
    masks = [
        x.valid[..., None].expand(x.contents.shape[:3]) if x.step_mask is None else x.step_mask
        for x in (a, b)
    ]
    assert torch.equal(*masks)
    assert torch.equal(a.contents[masks[0]], b.contents[masks[0]])
    torch.testing.assert_close(a.summaries, b.summaries)


def it_is_a_home(make: Make) -> None:
    home = make()
    assert is_home(home)
    assert (home.batch, home.chunk_size, home.dim, home.dtype) == (1, SIZE, DIM, torch.float32)


def cuts_do_not_matter(make: Make) -> None:
    for episodes in range(7):
        steps, is_first = history(50, episodes)
        whole, pieces = in_ram().append(steps, is_first), make()
        cuts = torch.randint(51, (int(torch.randint(6, ())),)).sort().values.tolist()
        for start, end in zip([0, *cuts], [*cuts, 50], strict=True):
            pieces = pieces.append(steps[:, start:end], is_first[:, start:end])
        assert_same(whole, pieces)


def the_layer_cannot_tell_it_from_ram(make: Make) -> None:
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


def every_implementation_recalls_from_it(make: Make) -> None:
    steps, is_first = history(70)
    ram, home = in_ram().append(steps, is_first), make().append(steps, is_first)
    inputs = torch.randn(2, 5, DIM), torch.randn(2, 5, 3, DIM), torch.randn(SIZE, DIM)

    def run(held: Any, impl: Any) -> Callable[..., Tensor]:
        return lambda r, p, x: recall(r, p, held, 4, positions=x, impl=impl)

    others = [] if isinstance(home, ShardedMemory) else ["blocked"]
    for impl in ("auto", "reference", *others):
        expected, gradients = value_and_gradients(run(ram, "reference"), inputs)
        out, found = value_and_gradients(run(home, impl), inputs)
        assert_near(out, expected, 1e-5, impl)
        for a, b in zip(found, gradients, strict=True):
            assert_near(a, b, 1e-5, impl)


def what_was_recalled_has_its_numbers(make: Make) -> None:
    steps, is_first = history(70)
    ram, home = in_ram().append(steps, is_first), make().append(steps, is_first)
    route, probe = torch.randn(1, 5, DIM), torch.randn(1, 5, 3, DIM)
    mask, full = None, None
    if not is_searched(home):
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
    assert_near(context, expected, 1e-5)
    if mask is not None:
        assert (recalled.chunks[:, 0] == -1).all()
        assert (context[:, 0] == 0).all()


def an_empty_one_gives_zeros(make: Make) -> None:
    layer = HTMAttention(DIM, heads=2, dim_head=4)
    for home in (make(), make().append(torch.randn(1, SIZE - 1, DIM))):
        assert (layer(torch.randn(2, 3, DIM), home) == 0).all()


def it_can_be_reset(make: Make) -> None:
    home = make().append(torch.randn(1, 21, DIM))
    kept = home.reset(torch.tensor([False]))
    assert visible(kept).chunks == 5
    home = kept.reset(torch.tensor([True]))
    assert not visible(home).chunks
    steps, is_first = history(30)
    assert_same(home.append(steps, is_first), in_ram().append(steps, is_first))
    with pytest.raises(ValueError, match="rows: expected shape"):
        home.reset(torch.tensor([True, False]))


def chunks_are_fetched_by_their_numbers(make: Make) -> None:
    home = make().append(torch.randn(1, 30, DIM))
    every, some = home.fetch(torch.arange(7)), home.fetch(torch.tensor([5, 0, 3]))
    assert torch.equal(some.contents, every.contents[:, [5, 0, 3]])
    assert torch.equal(some.summaries, every.summaries[:, [5, 0, 3]])
    assert home.fetch(torch.tensor([], dtype=torch.int64)).chunks == 0


def bad_input_changes_nothing(make: Make) -> None:
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


LAWS: list[Callable[[Make], None]] = [
    it_is_a_home,
    cuts_do_not_matter,
    the_layer_cannot_tell_it_from_ram,
    every_implementation_recalls_from_it,
    what_was_recalled_has_its_numbers,
    an_empty_one_gives_zeros,
    it_can_be_reset,
    chunks_are_fetched_by_their_numbers,
    bad_input_changes_nothing,
]


def holds_shared_out(group: Any, law: Callable[[Make], None]) -> None:
    """A law, over a memory of which every rank of a process group holds a part."""
    law(lambda: ShardedMemory.split(in_ram(), group))
