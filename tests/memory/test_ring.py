"""Writing in place: values stay values, whoever holds them, and a step costs a step."""

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from htm_pytorch import ChunkedMemory, HTMAttention, kernels, recall

pytestmark = pytest.mark.usefixtures("one_thread")


def written(memory: ChunkedMemory) -> int:
    """Where the contents lie, without taking them out."""
    return memory._ring.read().contents.data_ptr()


def steps(batch: int = 2, length: int = 4) -> Tensor:
    return torch.rand(batch, length, 3)


def parts_of(memory: ChunkedMemory) -> dict[str, Tensor]:
    """Copies, which do not count as taken out."""
    held = memory._tensors(memory._ring.read())
    return {name: part.clone() for name, part in held.items()}


def assert_is(memory: ChunkedMemory, parts: dict[str, Tensor]) -> None:
    for name, part in memory._tensors(memory._ring.read()).items():
        assert torch.equal(part, parts[name]), name


@pytest.mark.parametrize("keep", [False, True])
def test_every_earlier_value_stays_what_it_was(keep: bool) -> None:
    memory = ChunkedMemory.empty(2, 5, 2, 3, keep_across_episodes=keep)
    values, parts = [memory], [parts_of(memory)]
    for _ in range(40):
        is_first = torch.rand(2, 3) < 0.1
        values.append(values[-1].append(steps(2, 3), is_first))
        parts.append(parts_of(values[-1]))
    for number in torch.randperm(len(values)).tolist():
        assert_is(values[number], parts[number])


def test_a_chunk_takes_the_place_of_the_oldest_without_a_copy() -> None:
    memory = ChunkedMemory.empty(1, 7, 4, 3)
    place = written(memory)
    for _ in range(30):
        memory = memory.append(steps(1))
        assert written(memory) == place
    assert memory.valid.all()


def test_what_was_replaced_goes_with_the_last_value_that_could_read_it() -> None:
    memory = ChunkedMemory.empty(1, 100, 4, 3)
    rings = []
    for _ in range(50):
        rings.append(weakref.ref(memory._ring))
        memory = memory.append(steps(1))
    gc.collect()
    assert not any(ring() for ring in rings)


def test_a_value_held_for_long_costs_no_more_than_a_ring() -> None:
    first = memory = ChunkedMemory.empty(1, 5, 4, 3).append(steps(1))
    parts, place = parts_of(first), written(first)
    for _ in range(30):
        memory = memory.append(steps(1))
    # Somebody could read it, so after a ring's worth of chunks the memory moved on.
    assert written(memory) != place
    assert_is(first, parts)
    held, ring = 0, first._ring
    while ring._newer is not None:
        ring, held = ring._newer[0], held + 1
    assert held <= 5


@pytest.mark.parametrize(
    "take",
    [
        lambda memory: memory.contents,
        lambda memory: memory.summaries,
        lambda memory: memory.first_steps,
        lambda memory: memory.contents[0, 1:],
        lambda memory: memory._replace(episode=memory.episode + 1).contents,
        lambda memory: pytree.tree_leaves(memory),
        lambda memory: pytree.tree_leaves(copy.copy(memory)),
        lambda memory: pytree.tree_leaves(memory.to("cpu")),
        lambda memory: pytree.tree_leaves(memory.detach()),
        lambda memory: memory.unroll(steps()).read.contents,
    ],
    ids=[
        "contents",
        "summaries",
        "numbers",
        "view",
        "replaced",
        "tree",
        "copy",
        "to",
        "detach",
        "unrolled",
    ],
)
def test_a_tensor_that_somebody_took_out_is_not_written(take: Any) -> None:
    memory = ChunkedMemory.empty(2, 3, 4, 3).append(steps(2, 12))
    leaves = pytree.tree_leaves(take(memory))
    before = [leaf.clone() for leaf in leaves]
    after = memory.append(steps(2, 8))
    place = written(after)
    again = after.append(steps(2, 8))
    for leaf, was in zip(leaves, before, strict=True):
        assert torch.equal(leaf, was)
    # Copied once, it is the memory's own again.
    assert written(again) == place


def test_a_memory_of_given_tensors_does_not_write_to_them() -> None:
    contents = torch.rand(1, 3, 4, 3)
    valid, summaries = torch.ones(1, 3, dtype=torch.bool), torch.rand(1, 3, 3)
    given = contents, valid, summaries
    before = [part.clone() for part in given]
    memory = ChunkedMemory.from_chunks(contents, valid, summaries=summaries)
    parts = parts_of(memory)
    memory.append(steps(1)).append(steps(1))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    for part in given:
        part.zero_()
    assert_is(memory, parts)


def test_a_memory_may_lie_in_tensors_that_were_given_up() -> None:
    contents, given = torch.rand(1, 3, 4, 3), steps(1, 12)
    chunks = ChunkedMemory.from_chunks(contents, copy=False)
    assert written(chunks) == contents.data_ptr()
    assert written(ChunkedMemory.from_steps(given, 4, copy=False)) == given.data_ptr()
    before = contents.clone()
    # Even so it does not write to them.
    chunks.append(steps(1))
    assert torch.equal(contents, before)


@pytest.mark.parametrize("length", [8, 10])
@pytest.mark.parametrize("masked", [False, True])
def test_from_steps_copies(length: int, masked: bool) -> None:
    given, mask = steps(2, length), torch.rand(2, length) < 0.7
    memory = ChunkedMemory.from_steps(given, 4, mask if masked else None)
    parts = parts_of(memory)
    given.zero_()
    mask.zero_()
    assert_is(memory, parts)


def test_fetched_chunks_are_a_copy() -> None:
    memory = ChunkedMemory.empty(2, 3, 4, 3).append(steps(2, 12))
    fetched = memory.fetch(torch.arange(3))
    parts = parts_of(memory)
    for part in fetched._tensors().values():
        part.zero_()
    assert_is(memory, parts)


def test_gradients_are_exact_where_values_are_written_over() -> None:
    def loss(written_in_place: bool) -> Tensor:
        torch.manual_seed(3)
        memory = ChunkedMemory.empty(1, 2, 2, 3, dtype=torch.float64)
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(4):
            memory = memory.append(torch.rand(1, 2, 3, dtype=torch.float64))
            if not written_in_place:
                memory = memory._replace(contents=memory.contents.clone())
            probe = (torch.rand(1, 1, 3, dtype=torch.float64) * weight)[:, :, None]
            total = total + recall(probe[:, :, 0], probe, memory, 2).square().sum()
        (grad,) = torch.autograd.grad(total, weight)
        return grad

    torch.testing.assert_close(loss(True), loss(False), rtol=1e-12, atol=1e-12)


def test_a_graph_that_waits_for_its_backward_is_not_written_over() -> None:
    layer = HTMAttention(3, heads=1, dim_head=3)
    memory = ChunkedMemory.empty(2, 3, 4, 3).append(steps(2, 12))
    out = layer(steps(), memory)
    with torch.no_grad():
        memory.append(steps(2, 8))
    out.sum().backward()


def test_a_memory_made_in_inference_mode_goes_on_outside_it() -> None:
    with torch.inference_mode():
        inside = ChunkedMemory.empty(1, 3, 4, 3).append(steps(1, 12))
    outside = inside.append(steps(1)).append(steps(1))
    with torch.inference_mode():
        again = outside.append(steps(1))
    layer = HTMAttention(3, heads=1, dim_head=3)
    layer(steps(1), again.append(steps(1))).sum().backward()
    assert_is(inside.append(steps(1, 0)), parts_of(inside))


@pytest.mark.parametrize("keep", [False, True])
def test_no_two_parts_share_storage(keep: bool) -> None:
    empty = ChunkedMemory.empty(2, 3, 4, 3, keep_across_episodes=keep)
    is_first = torch.rand(2, 30) < 0.2
    memory = empty.append(steps(2, 30), is_first)
    made = {
        "empty": empty,
        "appended": memory,
        "a step": memory.append(steps(2, 1)),
        "a chunk": memory.append(steps(2, 4)),
        "rows": memory.select_rows(torch.tensor([1])),
        "joined": ChunkedMemory.cat([memory, memory]),
        "fetched": memory.fetch(torch.tensor([1, 2])),
        "reset": memory.reset(torch.tensor([True, False])),
        "given": ChunkedMemory.from_chunks(
            (chunks := torch.rand(2, 3, 1, 3)), summaries=chunks[:, :, 0]
        ),
        "by step": ChunkedMemory.from_chunks(chunks, torch.ones(2, 3, 1, dtype=torch.bool)),
        "whole": ChunkedMemory.from_steps(steps(2, 12), 4),
        "short": ChunkedMemory.from_steps(steps(2, 11), 4),
        "room": ChunkedMemory.from_steps(steps(2, 11), 4, chunks=5),
        "read": memory.unroll(steps(2, 9), is_first[:, :9]).read,
    }
    for name, value in made.items():
        parts = [part for part in value._tensors().values() if part.numel()]
        places = [part.untyped_storage().data_ptr() for part in parts]
        assert len(set(places)) == len(places), name


@pytest.mark.parametrize("impl", ["auto", "native", "blocked", "reference", "projected"])
@pytest.mark.parametrize("graded", [False, True], ids=["no-grad", "grad"])
def test_a_layer_that_only_reads_does_not_make_the_next_step_copy(impl: Any, graded: bool) -> None:
    if impl in ("native", "projected") and not kernels.IS_AVAILABLE:
        pytest.skip("needs the compiled kernel")
    layer = HTMAttention(6, 2, 2, 2, 3, impl=impl)
    memory = ChunkedMemory.empty(1, 8, 2, 6)
    queries = torch.randn(1, 3, 6)
    for _ in range(40):
        kept = memory
        with torch.set_grad_enabled(graded):
            expected = layer(queries, memory).detach()
        place = written(memory)
        memory = memory.append(torch.randn(1, 1, 6))
        assert graded or written(memory) == place
        with torch.set_grad_enabled(graded):
            torch.testing.assert_close(layer(queries, kept).detach(), expected)
        del kept


@torch.no_grad()
def test_a_reader_in_another_thread_is_not_written_over() -> None:
    layer, queries = HTMAttention(6, 2, 2, 2, 3), torch.randn(1, 200, 6)
    memory = ChunkedMemory.empty(1, 300, 2, 6).append(torch.randn(1, 640, 6))
    for _ in range(20):
        expected, found = layer(queries, memory), []

        def read(memory: ChunkedMemory = memory, found: list[Tensor] = found) -> None:
            with torch.no_grad():
                found.append(layer(queries, memory))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(6):
            memory = memory.append(torch.randn(1, 2, 6))
        reader.join()
        torch.testing.assert_close(found[0], expected)


class TestDonated:
    """Who gives a memory up lets it be written where it lies, whoever holds its tensors."""

    @pytest.mark.parametrize("keep", [False, True])
    def test_it_goes_on_as_any_other_in_the_same_tensors(self, keep: bool) -> None:
        # Short chunks would need a mask of their steps, which a memory has only once they come.
        contents = torch.rand(2, 5, 2, 3)
        given = ChunkedMemory.from_steps(contents.flatten(1, 2), 2, chunks=5)
        given = given._replace(
            keep_across_episodes=keep, step_mask=torch.ones(2, 5, 2, dtype=torch.bool)
        )
        plain = given.select_rows(torch.arange(2))
        donated = given.donate()
        held = donated.contents, donated.summaries, donated.step_mask
        for _ in range(40):
            new, is_first = steps(2, 3), torch.rand(2, 3) < 0.1
            plain = plain.append(new, is_first)
            with torch.no_grad():
                donated = donated.append(new, is_first)
            assert_is(donated, parts_of(plain))
            assert written(donated) == held[0].data_ptr()
        assert torch.equal(held[0], plain.contents)
        assert torch.equal(held[1], plain.summaries)

    @pytest.mark.parametrize("coded", [False, True])
    def test_recall_sees_what_was_written(
        self, coded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if coded:
            for name in ("CODED_NUMBERS", "CODED_KEPT", "CODED_WRITTEN", "CODED_STEPS"):
                monkeypatch.setattr(f"htm_pytorch.memory.ring.{name}", 0)
        plain = ChunkedMemory.empty(2, 9, 2, 3)
        donated = ChunkedMemory.empty(2, 9, 2, 3).donate()
        route, probe = torch.randn(2, 1, 3), torch.randn(2, 1, 2, 3)
        with torch.no_grad():
            for _ in range(40):
                new = steps(2, 2)
                plain, donated = plain.append(new), donated.append(new)
                expected, got = (recall(route, probe, m, 2) for m in (plain, donated))
                torch.testing.assert_close(got, expected)

    @torch.no_grad()
    def test_what_was_given_up_cannot_be_read(self) -> None:
        first = ChunkedMemory.empty(2, 5, 2, 3).append(steps())
        second = first.append(steps())
        third = second.donate()
        kept = third.select_rows(torch.arange(2))
        parts = parts_of(kept)
        fourth = third.append(steps())
        for gone in (first, second, third):
            with pytest.raises(RuntimeError, match="^this memory was donated, or one that was "):
                gone.contents  # noqa: B018
        assert fourth.contents.shape == (2, 5, 2, 3)
        kept.append(steps(2, 9))
        assert_is(kept, parts)

    def test_it_is_copied_where_gradients_may_flow(self) -> None:
        donated = ChunkedMemory.empty(2, 5, 2, 3).donate()
        held = donated.contents
        before = held.clone()
        after = donated.append(steps().requires_grad_())
        assert torch.equal(held, before)
        assert after.contents.requires_grad
        with torch.no_grad():
            # The graph that holds them is waiting still: a copy more.
            first = after.detach().append(steps())
            assert written(first) != written(after)
            place = written(first)
            assert written(first.append(steps())) == place
        after.contents.sum().backward()

    @torch.no_grad()
    @pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
    @pytest.mark.parametrize(
        "alias",
        [
            lambda memory: memory.to("cpu"),
            copy.copy,
            copy.deepcopy,
            lambda memory: memory.unroll(steps())[0],
            lambda memory: memory.reading(),
        ],
        ids=["to", "copy", "deepcopy", "unroll", "reading"],
    )
    def test_nobody_else_sees_what_is_written(self, alias: Any, first: bool) -> None:
        memory = ChunkedMemory.empty(2, 5, 2, 3).append(steps(2, 11))
        if first:
            other = alias(memory)
            donated = memory.donate()
        else:
            donated = memory.donate()
            other = alias(donated)
        try:
            before = parts_of(other)
            for _ in range(5):
                donated = donated.append(steps(2, 3))
            after = parts_of(other)
        except RuntimeError as error:
            assert "donated" in str(error)
            return
        for name, part in before.items():
            assert torch.equal(part, after[name]), name

    @pytest.mark.parametrize("impl", ["auto", "blocked"])
    def test_a_graph_that_waits_for_its_backward_is_not_written_over(self, impl: Any) -> None:
        layer = HTMAttention(3, 1, 2, 2, 4, impl=impl)
        gradients = []
        for donate in (False, True):
            torch.manual_seed(0)
            memory = ChunkedMemory.empty(2, 5, 2, 3).append(steps(2, 11))
            memory = memory.donate() if donate else memory
            out = layer(steps(2, 4), memory)
            with torch.no_grad():
                for _ in range(5):
                    memory = memory.append(steps(2, 3))
            gradients.append(torch.autograd.grad(out.sum(), list(layer.parameters())))
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)

    def test_what_inference_made_is_written_outside_it(self) -> None:
        with torch.inference_mode():
            memory = ChunkedMemory.empty(2, 5, 2, 3).append(steps())
            inside = memory.select_rows(torch.arange(2)).donate().append(steps())
        with torch.no_grad():
            memory.donate().append(steps())
            after = inside.append(steps())
            place = written(after)
            assert written(after.append(steps())) == place

    def test_a_tree_of_tensors_keeps_it(self) -> None:
        leaves, spec = pytree.tree_flatten(ChunkedMemory.empty(2, 5, 2, 3).donate())
        place = leaves[0].data_ptr()
        spec = pytree.treespec_loads(pytree.treespec_dumps(spec))
        with torch.no_grad():
            after = pytree.tree_unflatten(leaves, spec).append(steps())
        assert written(after) == place
        # A file of programs from before says nothing of it.
        from htm_pytorch.memory import chunked

        assert chunked._from_dumpable([True, ["contents"]]) == (True, ("contents",), False)
