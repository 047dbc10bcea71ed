"""What holds for every home of a memory: each function is given what makes an empty one.

Homes have batch 1, keep all episodes, and chunks of SIZE steps of width DIM in float32.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, recall
from htm_pytorch.memory import ShardedMemory, Span
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
    for recency in (False, True):
        layer = HTMAttention(DIM, heads=2, topk_mems=3, dim_head=4, recency=recency)
        if recency:
            torch.nn.init.normal_(layer.to_recency.weight, std=0.2)
        _sees_the_same(layer, ram, home)
    block = HTMBlock(DIM, heads=2, topk_mems=3, dim_head=4)
    queries = torch.randn(3, 5, DIM)
    assert_near(block(queries, home), block(queries, ram), 1e-5)


def _sees_the_same(layer: HTMAttention, ram: Any, home: Any) -> None:
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


def closed_by(is_first: list[bool]) -> list[tuple[int, int, int]]:
    """First step, number of steps and episode of each chunk, in plain Python."""
    closed, first, episode = [], 0, 0
    for number, begins in enumerate(is_first):
        if begins and number:
            if first < number:
                closed.append((first, number - first, episode))
            first, episode = number, episode + 1
        if number + 1 - first == SIZE:
            closed.append((first, SIZE, episode))
            first = number + 1
    return closed


def assert_spans(home: Any, is_first: Tensor) -> None:
    closed = closed_by(is_first[0].tolist())
    # Not in order, and one of them twice.
    asked = torch.cat([torch.randperm(len(closed)), torch.arange(1)])
    expected = [(chunk, *closed[chunk]) for chunk in asked.tolist()]
    assert [span[:4] for span in home.spans(asked)] == expected


def it_says_which_steps_a_chunk_holds(make: Make) -> None:
    home = make()
    for episodes in range(7):
        steps, is_first = history(50, episodes)
        is_first[:, 0] = episodes % 2 > 0
        home = home.reset(torch.tensor([True]))
        cuts = torch.randint(51, (int(torch.randint(6, ())),)).sort().values.tolist()
        for start, end in zip([0, *cuts], [*cuts, 50], strict=True):
            home = home.append(steps[:, start:end], is_first[:, start:end])
            if end >= SIZE:
                assert_spans(home, is_first[:, :end])
    home = make().append(torch.randn(1, 2 * SIZE + 1, DIM))
    assert home.spans(torch.tensor([], dtype=torch.int64)) == []
    assert all(isinstance(span, Span) for span in home.spans(torch.tensor([1, 0])))
    for wrong in ([2], [0, 2], [-1], [[0]]):
        with pytest.raises(ValueError, match="^chunks: expected"):
            home.spans(torch.tensor(wrong))
    for row in (1, -1):
        with pytest.raises(ValueError, match="^row: expected"):
            home.spans(torch.tensor([0]), row)


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
    it_says_which_steps_a_chunk_holds,
    bad_input_changes_nothing,
]


def holds_shared_out(group: Any, law: Callable[[Make], None]) -> None:
    """A law, over a memory of which every rank of a process group holds a part."""
    law(lambda: ShardedMemory.split(in_ram(), group))


def spans_of_rows_and_rings(group: Any) -> list[str]:
    """Every rank says of every row what one process says; return the errors that it raised."""
    whole = ChunkedMemory.empty(2, 7, SIZE, DIM)
    shared = ShardedMemory.split(whole, group)
    for _ in range(6):
        steps, is_first = torch.randn(2, 23, DIM), torch.rand(2, 23) < 0.05
        whole, shared = whole.append(steps, is_first), shared.append(steps, is_first)
        for row in range(2):
            valid = whole.valid[row].nonzero()[:, 0]
            for pieces in (shared, ShardedMemory.split(whole, group)):
                assert pieces.spans(valid, row) == whole.spans(valid, row)
    # Nothing of row 0 can be recalled now.
    shared = shared.append(torch.randn(2, 1, DIM), torch.tensor([[True], [False]]))
    errors = []
    different = torch.tensor([group.rank()])
    for asked, row in (([1, 6, 5], 0), ([7], 1), ([0], 2), (different, 1), ([0], group.rank() % 2)):
        with pytest.raises(ValueError) as raised:
            shared.spans(torch.as_tensor(asked), row)
        errors.append(str(raised.value))
    return errors


class Elsewhere:
    """The least home that is no `ChunkedMemory`, though one does its work."""

    def __init__(self, inner: ChunkedMemory):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> "Elsewhere":
        more = ChunkedMemory.from_steps(steps, SIZE).contents
        return Elsewhere(ChunkedMemory.from_chunks(torch.cat([self.inner.contents, more], 1)))

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        spans = self.inner.spans(chunks, row)
        return [
            span._replace(last_time=0.1, keys=(f"{span.first_step} \N{EURO SIGN}", None))
            for span in spans
        ]


def spans_of_parts_elsewhere(group: Any) -> None:
    """Parts that know their own steps alone: together they count like one memory."""
    local: Any = Elsewhere(ChunkedMemory.from_steps(torch.zeros(1, 0, DIM), SIZE))
    shared = ShardedMemory(local, group)
    steps = torch.randn(1, 55, DIM)
    for piece in steps.split(9, 1):
        shared = shared.append(piece)
    asked = torch.tensor([12, 0, 5, 5])
    assert [span[:4] for span in shared.spans(asked)] == [
        (chunk, chunk * SIZE, SIZE, 0) for chunk in asked.tolist()
    ]
    # Each key comes from the rank that has the chunk, by its own count.
    own = [chunk // group.size() * SIZE for chunk in asked.tolist()]
    keys = [(f"{first} \N{EURO SIGN}", None) for first in own]
    assert [span.keys for span in shared.spans(asked)] == keys
    assert {(span.first_time, span.last_time) for span in shared.spans(asked)} == {(None, 0.1)}

    # Any number of chunks a rank, and some of them short.
    counts = [[3], [4, 4, 1, 2], [1, 4]]
    mine = torch.tensor(counts[group.rank()])
    is_step = torch.arange(SIZE) >= SIZE - mine[:, None]
    contents = torch.randn(1, len(mine), SIZE, DIM)
    local = Elsewhere(ChunkedMemory.from_chunks(contents, is_step[None]))
    shared = ShardedMemory(local, group)
    there = [0, 1, 2, 4, 5, 7, 10]
    found = shared.spans(torch.tensor(there))
    assert [span.chunk for span in found] == there
    assert [span.count for span in found] == [3, 4, 1, 4, 4, 1, 2]
    assert [span.first_step for span in found] == [0, 3, 7, 8, 12, 16, 17]
    with pytest.raises(ValueError, match=r"^chunks: expected chunks that can be .*, got \[3, 8\]"):
        shared.spans(torch.tensor([8, 0, 3, 1]))
