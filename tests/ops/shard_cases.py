"""What each rank does in the tests of sharded memories, and what it asserts."""

import os
import signal
import time
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, recall
from htm_pytorch.memory import ShardedMemory, ShardError, Span
from htm_pytorch.memory import open as open_memory
from htm_pytorch.ops import attend, attend_with_weights, recall_with_weights
from htm_pytorch.ops.sharded import exchanged_bytes
from tests.helpers import assert_near, memory_of, value_and_gradients
from tests.ops.test_recall import NAMES, Problem, Sizes

EXACT = 1e-10
TIMEOUT = 2.0


def part(whole: ChunkedMemory, group: Any, chunks: int | None = None) -> ChunkedMemory:
    """The chunks of `whole` that belong to this rank; the first ones only where `chunks` says."""
    own = slice(group.rank(), None, group.size())

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, own][:, :chunks]

    step_mask = None if whole.step_mask is None else cut(whole.step_mask)
    return memory_of(cut(whole.contents), cut(whole.summaries), cut(whole.valid), step_mask)


def summed(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.detach().clone()
    if total.numel():
        dist.all_reduce(total, group=group)
    return total


def assert_same_gradients(
    got: list[Tensor], expected: list[Tensor], group: Any, tolerance: float = EXACT
) -> None:
    for name, mine, wanted in zip(NAMES, got, expected, strict=True):
        # What every rank holds has its whole gradient there; chunks have theirs on one rank.
        whole = summed(mine, group) if name in ("contents", "summaries") else mine
        assert_near(whole, wanted, tolerance, name)


def equals_one_process(group: Any, sizes: Sizes, impl: Any, counts: list[int] | None) -> None:
    """Outputs and gradients; `counts` are the chunks of the ranks where they are not even."""
    problem = Problem(sizes)
    chunks = None
    if counts is not None:
        # The whole memory has holes where a rank has no chunk.
        chunks = counts[group.rank()]
        there = torch.tensor([g // group.size() < counts[g % group.size()] for g in range(sizes.M)])
        rows = 1 if sizes.shared else sizes.B
        exists = torch.ones(rows, sizes.M, dtype=torch.bool)
        problem.valid = (exists if problem.valid is None else problem.valid) & there
    expected, expected_gradients = problem.run("reference")

    def function(
        route: Tensor, probe: Tensor, positions: Tensor, contents: Tensor, summaries: Tensor
    ) -> Tensor:
        memory = ShardedMemory(part(problem.memory(contents, summaries), group, chunks), group)
        assert memory.chunks == sizes.M
        return recall(
            route,
            probe,
            memory,
            problem.k,
            positions=problem.positions(positions),
            chunk_mask=problem.chunk_mask,
            recency=problem.recency(route),
            impl=impl,
        )

    value, gradients = value_and_gradients(function, problem.inputs)
    assert value.dtype == expected.dtype
    assert_near(value, expected, EXACT, "context")
    assert_same_gradients(gradients, expected_gradients, group)
    blind = ~problem.allowed().any(-1)
    assert not value[blind].any()


def weights_equal(group: Any, sizes: Sizes) -> None:
    problem = Problem(sizes)
    expected_context, expected = problem.recalled()
    kinds = expected._fields[1:]

    def function(of: Any, kind: str) -> Any:
        def run(
            route: Tensor, probe: Tensor, positions: Tensor, contents: Tensor, summaries: Tensor
        ) -> Tensor:
            memory = of(problem.memory(contents, summaries))
            _, recalled = recall_with_weights(
                route,
                probe,
                memory,
                problem.k,
                positions=problem.positions(positions),
                chunk_mask=problem.chunk_mask,
                recency=problem.recency(route),
            )
            return getattr(recalled, kind)

        return run

    route, probe, positions, contents, summaries = problem.inputs
    memory = ShardedMemory(part(problem.memory(contents, summaries), group), group)
    arguments = {
        "positions": problem.positions(positions),
        "chunk_mask": problem.chunk_mask,
    }
    context, recalled = recall_with_weights(route, probe, memory, problem.k, **arguments)
    assert_near(context, expected_context, EXACT, "context")
    assert torch.equal(recalled.chunks, expected.chunks)
    for kind in kinds:
        assert_near(getattr(recalled, kind), getattr(expected, kind), EXACT, kind)
        value, got = value_and_gradients(
            function(lambda whole: ShardedMemory(part(whole, group), group), kind), problem.inputs
        )
        _, wanted = value_and_gradients(function(lambda whole: whole, kind), problem.inputs)
        assert value.shape == getattr(expected, kind).shape
        assert_same_gradients(got, wanted, group)


def attend_equals(group: Any, impl: Any) -> None:
    problem = Problem(Sizes(M=9, seen=0.7, steps=0.8))
    route, _, positions, contents, summaries = problem.inputs
    queries, projections = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 3, 4, 6).double()
    whole = problem.memory(contents, summaries)
    memory = ShardedMemory(part(whole, group), group)
    keywords = {"positions": positions, "chunk_mask": problem.chunk_mask, "scale": 0.3}
    got, seen = attend(route, queries, projections, memory, 3, impl=impl, **keywords)
    expected, expected_seen = attend(
        route, queries, projections, whole, 3, impl="reference", **keywords
    )
    assert_near(got, expected, EXACT)
    assert torch.equal(seen, expected_seen)
    got, recalled = attend_with_weights(route, queries, projections, memory, 3, **keywords)
    assert_near(got, expected, EXACT)
    assert torch.equal((recalled.chunks >= 0).any(-1), expected_seen)


def ties_go_to_the_older(group: Any) -> None:
    # Whole numbers, so that equal scores are equal exactly; few of them, so that many are.
    generator = torch.Generator().manual_seed(3)
    summaries = torch.randint(-1, 2, (2, 23, 3), generator=generator).double()
    route = torch.randint(-2, 3, (2, 40, 3), generator=generator).double()
    contents = torch.randn(2, 23, 4, 3, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, 23, generator=generator) < 0.9
    probe = torch.randn(2, 40, 2, 3, generator=generator, dtype=torch.float64)
    whole = memory_of(contents, summaries, valid)
    memory = ShardedMemory(part(whole, group), group)
    scores = torch.einsum("bqd,bmd->bqm", route, summaries).masked_fill(~valid[:, None], -torch.inf)
    for k in (1, 4, 9):
        expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        context = recall(route, probe, memory, k, impl="native")
        assert_near(context, recall(route, probe, whole, k, impl="native"), EXACT)
        # By hand: the contexts of chunks that differ would differ.
        row = torch.arange(2)[:, None, None]
        mixture = scores.gather(2, expected).softmax(-1)
        steps = contents[row, expected]
        inside = torch.einsum("bqhd,bqkcd->bqhkc", probe, steps).softmax(-1)
        assert_near(context, torch.einsum("bqk,bqhkc,bqkcd->bqhd", mixture, inside, steps), EXACT)


def other_dtypes(group: Any, dtype: torch.dtype, memory_dtype: torch.dtype) -> None:
    problem = Problem(Sizes(M=11, seen=0.8))
    dtypes = [dtype, dtype, dtype, memory_dtype, memory_dtype]
    problem.inputs = [p.to(d) for p, d in zip(problem.inputs, dtypes, strict=True)]
    expected, expected_gradients = problem.run("reference")

    def function(
        route: Tensor, probe: Tensor, positions: Tensor, contents: Tensor, summaries: Tensor
    ) -> Tensor:
        memory = ShardedMemory(part(problem.memory(contents, summaries), group), group)
        return recall(route, probe, memory, 3, positions=positions, chunk_mask=problem.chunk_mask)

    value, gradients = value_and_gradients(function, problem.inputs)
    assert value.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == dtypes
    unit = 8 * max(torch.finfo(dtype).eps, torch.finfo(memory_dtype).eps)
    assert_near(value, expected, unit)
    gradients = [gradient.double() for gradient in gradients]
    assert_same_gradients(gradients, expected_gradients, group, unit)


def nan_reaches_only_its_query(group: Any) -> None:
    problem = Problem(Sizes(M=9))
    route, probe, _, contents, summaries = problem.inputs
    whole = problem.memory(contents, summaries)
    memory = ShardedMemory(part(whole, group), group)
    expected = recall(route, probe, whole, 3)
    route = route.clone()
    route[1, 2] = torch.nan
    got = recall(route, probe, memory, 3)
    sound = torch.ones(2, 5, dtype=torch.bool)
    sound[1, 2] = False
    assert_near(got[sound], expected[sound], EXACT)
    assert got[1, 2].isnan().all()


class Writing(NamedTuple):
    B: int = 2
    chunks: int = 12
    C: int = 3
    T: int = 60
    keep: bool = False
    border: float = 0.0


def append_equals(group: Any, writing: Writing) -> None:
    """In pieces, at once, and in one process: the same chunks in the same places."""
    batch, chunks, size, length, keep, border = writing
    generator = torch.Generator().manual_seed(5)
    steps = torch.randn(batch, length, 6, generator=generator, dtype=torch.float64)
    is_first = None
    if border:
        is_first = torch.rand(batch, length, generator=generator) < border
    empty = ChunkedMemory.empty(
        batch, chunks, size, 6, keep_across_episodes=keep, dtype=torch.float64
    )
    whole, pieces = empty, ShardedMemory.split(empty, group)
    assert pieces.local.chunks == len(range(group.rank(), chunks, group.size()))
    own = slice(group.rank(), None, group.size())
    start = 0
    while start < length:
        end = start + int(torch.randint(1, 14, (), generator=generator))
        first = None if is_first is None else is_first[:, start:end]
        whole = whole.append(steps[:, start:end], first)
        before = pieces.local
        pieces = pieces.append(steps[:, start:end], first)
        assert before is not pieces.local
        assert_holds(pieces.local, whole, own)
        start = end
    assert int(whole.valid.sum()), "the case writes no chunk"
    once = ShardedMemory.split(empty, group).append(steps, is_first)
    assert_holds(once.local, whole, own)

    # Dealt out later, or made anew around what a rank holds, it goes on where the other stopped.
    longer = whole.append(steps[:, :20])
    assert_holds(ShardedMemory.split(whole, group).append(steps[:, :20]).local, longer, own)
    if chunks >= 2 * group.size():
        again = ShardedMemory(pieces.local, group).append(steps[:, :20])
        assert_holds(again.local, longer, own)
    route = torch.randn(batch, 4, 6, generator=generator, dtype=torch.float64)
    probe = route[:, :, None]
    assert_near(recall(route, probe, pieces, 3), recall(route, probe, whole, 3), EXACT)


def assert_holds(local: Any, whole: ChunkedMemory, own: slice) -> None:
    valid = whole.valid[:, own]
    assert torch.equal(local.valid, valid)
    assert torch.equal(local.contents[valid], whole.contents[:, own][valid])
    assert torch.equal(local.summaries[valid], whole.summaries[:, own][valid])
    if whole.step_mask is not None:
        assert torch.equal(local.step_mask[valid], whole.step_mask[:, own][valid])
    assert torch.equal(local.open_steps, whole.open_steps)
    assert torch.equal(local.open_count, whole.open_count)


def gradients_of_appended_steps(group: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    empty = ChunkedMemory.empty(1, 8, 2, 5, dtype=torch.float64)
    inputs = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 3, 5), (1, 13, 5))
    ]

    def function(of: Any) -> Any:
        def run(route: Tensor, steps: Tensor) -> Tensor:
            return recall(route, route[:, :, None], of(empty).append(steps), 3)

        return run

    expected, wanted = value_and_gradients(function(lambda memory: memory), inputs)
    value, got = value_and_gradients(
        function(lambda memory: ShardedMemory.split(memory, group)), inputs
    )
    assert_near(value, expected, EXACT)
    assert_near(got[0], wanted[0], EXACT, "route")
    assert_near(summed(got[1], group), wanted[1], EXACT, "steps")


def one_rank_needs_gradients(group: Any) -> None:
    """All ranks take part in a backward that only one of them asks for."""
    problem = Problem(Sizes(M=8, k=4))
    route, probe, positions, contents, summaries = problem.inputs
    whole = problem.memory(contents, summaries)
    local = part(whole, group)
    local = local._replace(contents=local.contents.clone())
    if group.rank() == 0:
        local.contents.requires_grad_()
    memory = ShardedMemory(local, group)
    context = recall(route, probe, memory, 4, positions=positions)
    assert context.requires_grad
    context.square().sum().backward()

    contents.requires_grad_()
    memory = problem.memory(contents, summaries)
    recall(route, probe, memory, 4, positions=positions).square().sum().backward()
    if group.rank() == 0:
        assert contents.grad is not None
        assert_near(local.contents.grad, contents.grad[:, :: group.size()], EXACT)
    with torch.no_grad():
        assert not recall(route, probe, ShardedMemory(local, group), 4).requires_grad


def layers_equal(group: Any, detach: bool) -> None:
    """Two layers over one memory and a block over another, forward and backward."""
    width, steps = 12, torch.randn(2, 50, 12).double()
    kinds: dict[str, Any] = {"heads": 2, "dim_head": 4, "detach_memories": detach}
    first = HTMAttention(width, topk_mems=3, inner_bias=True, **kinds).double()
    second = HTMBlock(width, topk_mems=2, **kinds).double()
    queries = torch.randn(2, 7, 12).double()
    mask = torch.rand(2, 7, 16) < 0.6
    mask[0, 3] = False
    ring = ChunkedMemory.empty(2, 16, 3, width, dtype=torch.float64)

    def run(of: Any) -> tuple[Tensor, list[Tensor]]:
        asked, written = queries.clone().requires_grad_(), steps.clone().requires_grad_()
        memory, other = of(ring).append(written), of(ring).append(2 * written)
        hidden = first(asked, memory, chunk_attn_mask=mask)
        assert not hidden[0, 3].any()
        hidden = second(second(hidden, other), memory)
        hidden, recalled = second.recall(hidden, memory)
        assert (recalled.chunks >= 0).all()
        leaves = [*first.parameters(), *second.parameters(), asked, written]
        gradients = torch.autograd.grad(hidden.square().sum(), leaves, allow_unused=True)
        filled = zip(gradients, leaves, strict=True)
        return hidden, [torch.zeros_like(x) if g is None else g for g, x in filled]

    expected, wanted = run(lambda memory: memory)
    value, got = run(lambda memory: ShardedMemory.split(memory, group))
    assert_near(value, expected, EXACT)
    for mine, theirs in zip(got[:-1], wanted[:-1], strict=True):
        assert_near(mine, theirs, EXACT)
    assert_near(summed(got[-1], group), wanted[-1], EXACT, "steps")
    assert bool(wanted[-1].any()) is not detach


class Counting:
    """A process group that counts the bytes it is handed."""

    def __init__(self, group: Any):
        self.group = group
        self.handed: list[int] = []

    def allgather(self, parts: list[Tensor], own: Tensor, timeout: Any) -> Any:
        self.handed.append(own.nbytes)
        return self.group.allgather(parts, own, timeout=timeout)

    def allreduce(self, tensor: Tensor, timeout: Any) -> Any:
        self.handed.append(tensor.nbytes)
        return self.group.allreduce(tensor, timeout=timeout)


def bytes_are_the_formula(group: Any, chunk_size: int) -> list[list[int]]:
    """The messages of a recall, forward and backward, in float32 and float64."""
    found = []
    for dtype, word in ((torch.float32, 4), (torch.float64, 8)):
        problem = Problem(Sizes(B=2, Q=5, H=3, M=40, C=chunk_size, D=16, k=4), dtype=dtype)
        route, probe, positions, contents, summaries = problem.inputs
        memory = ShardedMemory(part(problem.memory(contents, summaries), group), group)
        counting = Counting(group)
        memory.ranks._group = lambda counting=counting: counting
        sizes: dict[str, int] = {"queries": 10, "heads": 3, "dim": 16, "k": 4, "word": word}
        recall(route, probe, memory, 4, positions=positions)
        expected = exchanged_bytes(**sizes)
        assert counting.handed == [expected.header, expected.scores, expected.contexts]
        per_query = (expected.scores + expected.contexts) / 10
        assert per_query == word * (2 * 4 + 3 * 16)

        counting.handed.clear()
        for tensor in (route, probe, positions):
            tensor.requires_grad_()
        recall(route, probe, memory, 4, positions=positions).sum().backward()
        expected = exchanged_bytes(**sizes, gradients=True, positions=chunk_size)
        forward = [expected.header, expected.scores, expected.contexts]
        assert counting.handed[:3] == forward
        assert sum(counting.handed[3:]) == expected.gradients
        found.append(list(counting.handed))
    return found


class Kept:
    """The least that a rank's part must be which is not a ChunkedMemory, on a shelf."""

    def __init__(self, shelf: ChunkedMemory, fetched: list[int] | None = None):
        self._shelf = shelf
        self.fetched = [] if fetched is None else fetched
        self.batch, self.chunks = shelf.batch, shelf.chunks
        self.chunk_size, self.dim = shelf.chunk_size, shelf.dim
        self.dtype, self.device = shelf.dtype, shelf.device
        self.summaries, self.valid = shelf.summaries, shelf.valid

    def append(self, steps: Tensor, is_first: Tensor | None = None) -> "Kept":
        new = ChunkedMemory.from_steps(steps, self.chunk_size)
        assert new.step_mask is None
        contents = torch.cat([self._shelf.contents, new.contents], 1)
        return Kept(ChunkedMemory.from_chunks(contents), self.fetched)

    def fetch(self, chunks: Tensor) -> ChunkedMemory:
        self.fetched.append(len(chunks))
        return self._shelf.fetch(chunks)

    def spans(self, chunks: Tensor, row: int = 0) -> list[Span]:
        return self._shelf.spans(chunks, row)

    def reset(self, rows: Tensor) -> "Kept":
        assert rows.all()
        none = self._shelf.fetch(torch.tensor([], dtype=torch.int64))
        return Kept(none, self.fetched)

    def save(self, path: Any) -> None:
        raise NotImplementedError


def on_disk(group: Any, folder: str) -> None:
    """Every rank has its part in a folder; opened again, it goes on."""
    generator = torch.Generator().manual_seed(9)
    steps = torch.randn(1, 95, 6, generator=generator)
    route = torch.randn(2, 3, 6, generator=generator)
    place = f"{folder}/{group.size()}-{group.rank()}"
    with open_memory(place, dim=6, chunk_size=4, sync=False) as local:
        memory = ShardedMemory(local, group)
        for piece in steps[:, :48].split(7, 1):
            memory = memory.append(piece)
        assert memory.chunks == 12
    with open_memory(place) as local:
        memory = ShardedMemory(local, group).append(steps[:, 48:])
        assert memory.chunks == 23
        whole = ChunkedMemory.from_steps(steps[:, :92], 4)
        inputs = [route, route[:, :, None].repeat(1, 1, 2, 1)]

        def run(of: Any) -> Any:
            return lambda route, probe: recall(route, probe, of, 3)

        expected, wanted = value_and_gradients(run(whole), inputs)
        value, got = value_and_gradients(run(memory), inputs)
        assert_near(value, expected, 1e-5)
        for mine, theirs in zip(got, wanted, strict=True):
            assert_near(mine, theirs, 1e-5)
        # What another has written to the folder since is not half seen.
        if group.rank() == 0:
            local.append(steps[:, :4])
        with pytest.raises(ValueError, match=r"^memory: expected \d+ chunks on rank 0, as when"):
            run(memory)(*inputs)


def saved_and_loaded(group: Any, folder: str, disk: bool) -> None:
    """What ranks have saved goes on as if nothing had happened, the open chunk too."""
    generator = torch.Generator().manual_seed(9)
    steps = torch.randn(1, 95, 6, generator=generator)
    route = torch.randn(2, 3, 6, generator=generator)
    probe = route[:, :, None]
    if disk:
        place = f"{folder}/{group.size()}-{group.rank()}"
        local: Any = open_memory(place, dim=6, chunk_size=4, sync=False)
        memory = ShardedMemory(local, group)
    else:
        # A ring of one chunk a rank: which is the oldest, the parts alone do not say.
        memory = ShardedMemory.split(ChunkedMemory.empty(1, group.size(), 4, 6), group)
    memory = memory.append(steps[:, :55])
    memory.save(f"{folder}/saved")
    with pytest.raises(FileExistsError, match="^path: .* exists"):
        memory.save(f"{folder}/saved")
    again = ShardedMemory.load(f"{folder}/saved", group)
    memory, again = memory.append(steps[:, 55:]), again.append(steps[:, 55:])
    assert again.chunks == memory.chunks
    assert_near(recall(route, probe, again, 3), recall(route, probe, memory, 3), 1e-6)
    if disk:
        for held in (memory.local, again.local):
            held.close()
    # One rank's part is not there: all hear of it.
    refused = "^(path: no part of|path: .* as when it|arguments: refused)"
    with pytest.raises((FileNotFoundError, ValueError), match=refused):
        where = "nowhere" if group.rank() == 0 else "saved"
        ShardedMemory.load(f"{folder}/{where}", group)


def fetched_chunks(group: Any) -> None:
    """Chunks of all ranks come whole, to the last bit, in any dtype."""
    for dtype in (torch.float64, torch.bfloat16):
        problem = Problem(Sizes(M=11, steps=0.7, valid=0.7))
        contents, summaries = (x.to(dtype) for x in problem.inputs[3:])
        contents[:, 3] = -0.0
        whole = problem.memory(contents, summaries)
        memory = ShardedMemory(part(whole, group), group)
        numbers = torch.tensor([10, 3, 3, 0, 7])
        got, expected = memory.fetch(numbers), whole.fetch(numbers)
        assert got.step_mask is not None and expected.step_mask is not None
        assert torch.equal(got.step_mask, expected.step_mask & expected.valid[..., None])
        assert torch.equal(got.summaries, expected.summaries)
        assert torch.equal(got.contents.view(torch.int16), expected.contents.view(torch.int16))
    with pytest.raises(ValueError, match="^chunks: expected numbers from 0 to 10, got"):
        memory.fetch(torch.tensor([11]))
    with pytest.raises(ValueError, match="^chunks .a checksum.: expected the same on all"):
        memory.fetch(torch.tensor([group.rank()]))


def other_parts(group: Any, impl: Any) -> None:
    """Parts that are fetched from elsewhere: the same results, and only what is kept is fetched."""
    generator = torch.Generator().manual_seed(8)
    steps = torch.randn(2, 95, 6, generator=generator, dtype=torch.float64)
    route = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    probe = route[:, :, None].repeat(1, 1, 2, 1)
    empty = ChunkedMemory.from_steps(steps[:, :0], 4)
    shelf = Kept(empty)
    memory: Any = ShardedMemory(shelf, group)
    for piece in steps.split([1, 30, 7, 50, 7], 1):
        memory = memory.append(piece)
    whole = ChunkedMemory.from_steps(steps[:, :92], 4)
    assert memory.chunks == 23
    inputs = [route, probe]

    def run(of: Any, name: Any) -> Any:
        return lambda route, probe: recall(route, probe, of, 2, impl=name)

    expected, wanted = value_and_gradients(run(whole, "reference"), inputs)
    value, got = value_and_gradients(run(memory, impl), inputs)
    assert_near(value, expected, EXACT)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_near(mine, theirs, EXACT)
    assert len(shelf.fetched) == 1 and shelf.fetched[0] <= 12
    with pytest.raises(ValueError, match="is_first: expected None for parts that are a Kept"):
        memory.append(steps, torch.zeros(2, 95, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows: expected all of them or none for parts that are"):
        memory.reset(torch.tensor([True, False]))
    empty = memory.reset(torch.tensor([True, True]))
    assert empty.chunks == 0 and not recall(route, probe, empty, 2).any()
    again = empty.append(steps)
    assert_near(recall(route, probe, again, 2), recall(route, probe, memory, 2), EXACT)


def mismatches_are_named(group: Any) -> None:
    problem = Problem(Sizes(M=9))
    route, probe, positions, contents, summaries = problem.inputs
    memory = ShardedMemory(part(problem.memory(contents, summaries), group), group, timeout=30)
    last = group.rank() == group.size() - 1
    allowed = torch.ones(2, 5, 9, dtype=torch.bool)
    usual = {"route": route, "probe": probe, "memory": memory, "k": 3, "positions": positions}
    others: dict[str, tuple[dict[str, Any], str]] = {
        "k": ({"k": 2}, r"^k: expected the same on all ranks, got 3 on rank 0 and 2 on rank "),
        "queries": ({"route": route[:, :4], "probe": probe[:, :4]}, "^route: Q: .* got 5 on"),
        "batch": (
            {"route": route[:1], "probe": probe[:1]},
            "^(memory: expected batch|arguments: refused)",
        ),
        "heads": ({"probe": probe[:, :, :2]}, "^probe: H: expected the same on all ranks, got 3 "),
        "dtype": (
            {"route": route.float(), "probe": probe.float()},
            r"^route: dtype: .* got torch.float64 on rank 0 and torch.float32 on rank",
        ),
        "positions": ({"positions": None}, "^positions: .* got torch.float64 on rank 0 and None "),
        "mask": (
            {"chunk_mask": allowed},
            r"^chunk_mask \(a checksum\): .* got None on rank 0 and \d+ on rank",
        ),
        "values": (
            {"route": route + 1},
            "^route: expected the same values on all ranks, got",
        ),
        "probes": ({"probe": -probe}, "^probe: expected the same values on all ranks, got others"),
        "shape": (
            {"route": route[..., :5]},
            r"^(route: expected shape|arguments: refused on rank)",
        ),
        "impl": ({"impl": "blocked"}, "^(impl: expected 'auto'|arguments: refused on rank)"),
        "written": (
            {"memory": memory.append(contents[:, 0, :1])},
            "^memory: steps appended: .* got 0 on rank 0 and 1 on rank",
        ),
    }
    for changes, message in others.values():
        arguments: dict[str, Any] = usual | (changes if last else {})
        with pytest.raises(ValueError, match=message):
            recall(**arguments)
    with pytest.raises(ValueError, match="^operation: .* got recall on rank 0 and recall_with_w"):
        (recall_with_weights if last else recall)(route, probe, memory, 3)
    with torch.set_grad_enabled(not last), pytest.raises(ValueError, match="^torch.is_grad_en"):
        recall(route, probe, memory, 3)
    for changes in ({"chunk_size": 5}, {"dim": 7}, {"dtype": torch.float32}, {"batch": 3}):
        kinds: dict[str, Any] = {"batch": 2, "chunks": 4, "chunk_size": 4, "dim": 6}
        kinds |= {"dtype": torch.float64} | (changes if last else {})
        with pytest.raises(ValueError, match=f"^local.{next(iter(changes))}: expected the same on"):
            ShardedMemory(ChunkedMemory.empty(**kinds), group)
    with pytest.raises(ValueError, match="^append: expected chunks dealt out in turn"):
        chunks = 2 if group.rank() == 0 else 4
        uneven = ChunkedMemory.empty(2, chunks, 4, 6, dtype=torch.float64)
        ShardedMemory(uneven, group).append(contents[:, 0])
    # And after all that:
    assert_near(
        recall(**usual), recall(**(usual | {"memory": problem.memory(contents, summaries)})), EXACT
    )


def drifting_apart_is_noticed(group: Any) -> None:
    """What one rank does otherwise, and goes on, is an error on all at their next exchange."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(2, 23, 6, generator=generator)
    queries = torch.randn(6, 2, 1, 6, generator=generator)
    last = group.rank() == group.size() - 1
    layer = HTMAttention(6, 2, 2, 4, 2).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    empty = ChunkedMemory.empty(2, 8, 4, 6)
    begins = torch.zeros(2, 23, dtype=torch.bool)
    begins[1, 9] = True
    rows = torch.tensor([True, False])

    def made() -> ShardedMemory:
        return ShardedMemory(empty, group, timeout=30)

    memory = made().append(steps, begins)
    alone = ChunkedMemory.empty(2, 8 * group.size(), 4, 6).append(steps, begins)
    # An argument that one rank refuses.
    with pytest.raises(ValueError, match="^(q|arguments: refused on rank)"):
        layer(queries[0].double() if last else queries[0], memory)
    assert_near(layer(queries[1], memory), layer(queries[1], alone), 1e-5)
    # A call that one rank leaves out, in code of its own.
    if not last:
        with pytest.raises(ValueError, match="expected the same values on all ranks"):
            layer(queries[2], memory)
    with pytest.raises(ValueError, match="expected the same values on all ranks"):
        layer(queries[3], memory)
    if last:
        with pytest.raises(ValueError, match="expected the same values on all ranks"):
            layer(queries[4], memory)
    assert_near(layer(queries[5], memory), layer(queries[5], alone), 1e-5)
    other = made().append(steps, begins)
    for differently in (
        lambda: other if last else memory,
        lambda: made().append(steps, None if last else begins),
        lambda: memory.reset(rows if last else ~rows),
        lambda: memory.reset(rows) if last else memory,
        lambda: (
            memory.append(steps[:, :2]).append(steps[:, :1])
            if last
            else memory.append(steps[:, :1]).append(steps[:, :2])
        ),
    ):
        with pytest.raises(ValueError, match=r"^memory( \(by|: what was done).*expected the same"):
            layer(queries[0], differently())
    seen = torch.ones(2, 1, memory.chunks, dtype=torch.bool)
    seen[0, 0, 3] = not last
    with pytest.raises(ValueError, match=r"^chunk_mask \(a checksum\): expected the same on all"):
        layer(queries[0], memory, chunk_attn_mask=seen)
    with pytest.raises(ValueError, match="^(local: expected a Chunked|arguments: refused on rank)"):
        bad: Any = "nothing" if last else empty
        ShardedMemory(bad, group)
    # The last bits of what each computed may differ.
    rounded = queries[0] * (1 + 1e-6 * group.rank())
    assert_near(layer(rounded, memory), layer(queries[0], alone), 1e-4)


def an_error_between_exchanges(group: Any) -> None:
    """All later calls say that ranks are at different places, or end in time."""
    generator = torch.Generator().manual_seed(3)
    shelf = ChunkedMemory.from_steps(torch.randn(2, 16, 6, generator=generator), 4)
    kept = Kept(shelf)
    memory = ShardedMemory(kept, group, timeout=TIMEOUT)
    route = torch.randn(2, 1, 6, generator=generator)
    last = group.rank() == group.size() - 1
    if last:

        def fails(chunks: Tensor) -> ChunkedMemory:
            raise OSError("a disk that fails")

        kept.fetch = fails
    with pytest.raises(OSError if last else ShardError):
        recall(route, route[:, :, None], memory, 2)
    with pytest.raises(ShardError, match="at different places since an earlier error"):
        recall(route, route[:, :, None], memory, 2)


def parts_of_different_moments(group: Any, folder: str) -> None:
    steps = torch.randn(1, 48, 6, generator=torch.Generator().manual_seed(9))
    last = group.rank() == group.size() - 1
    memory = ShardedMemory(ChunkedMemory.empty(1, 8, 4, 6), group).append(steps[:, :20])
    if last:
        memory.save(f"{folder}/saved")
    memory = memory.append(steps[:, 20:])
    if not last:
        memory.save(f"{folder}/saved")
    with pytest.raises(ValueError, match="^path: steps appended: expected the same on all ranks"):
        ShardedMemory.load(f"{folder}/saved", group)


def loaded_by_others(group: Any, folder: str, ranks: int) -> None:
    """The first `ranks` of them have saved it, by `saved_by_some`."""
    steps = torch.randn(2, 60, 6, generator=torch.Generator().manual_seed(9))
    queries = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(8))
    alone = ChunkedMemory.empty(2, 4 * ranks, 4, 6).append(steps)
    memory = ShardedMemory.load(folder, group).append(steps[:, 45:])
    assert_near(
        recall(queries, queries[:, :, None], memory, 3),
        recall(queries, queries[:, :, None], alone, 3),
        1e-5,
    )


def saved_by_some(group: Any, folder: str) -> None:
    steps = torch.randn(2, 60, 6, generator=torch.Generator().manual_seed(9))
    ShardedMemory(ChunkedMemory.empty(2, 4, 4, 6), group).append(steps[:, :45]).save(folder)


def parts_that_moved_on(group: Any, folder: str) -> None:
    steps = torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(9))
    place = f"{folder}/{group.size()}-{group.rank()}"
    with open_memory(place, dim=6, chunk_size=4, sync=False) as local:
        ShardedMemory(local, group).append(steps).save(f"{folder}/saved")
    again = ShardedMemory.load(f"{folder}/saved", group)
    again.append(steps).local.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="as when it was saved|^arguments: refused"):
        ShardedMemory.load(f"{folder}/saved", group)


def a_rank_is_lost(group: Any, how: str, timeout: float) -> tuple[float, str]:
    """The last rank dies or hangs between two calls; return after how long, and the error."""
    problem = Problem(Sizes(M=9))
    route, probe, _, contents, summaries = problem.inputs
    memory = ShardedMemory(part(problem.memory(contents, summaries), group), group, timeout=timeout)
    recall(route, probe, memory, 3)
    if group.rank() == group.size() - 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2 * timeout)
        return 0.0, ""
    start = time.monotonic()
    with pytest.raises(ShardError) as caught:
        recall(route, probe, memory, 3)
    return time.monotonic() - start, str(caught.value)


def a_rank_does_not_go_back(group: Any, timeout: float) -> str:
    """The last rank leaves out the backward."""
    problem = Problem(Sizes(M=9))
    route, probe, _, contents, summaries = problem.inputs
    memory = ShardedMemory(part(problem.memory(contents, summaries), group), group, timeout=timeout)
    context = recall(route.requires_grad_(), probe, memory, 3)
    if group.rank() == group.size() - 1:
        time.sleep(2 * timeout)
        return ""
    with pytest.raises(ShardError) as caught:
        context.sum().backward()
    return str(caught.value)
