"""What enters a memory fits together; a past given whole; rows; steps that do not exist."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from htm_pytorch import ChunkedMemory, HTMAttention, recall
from htm_pytorch.memory import MemoryFileError, Steps
from htm_pytorch.memory.files import load_tensors, save_tensors
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = [torch.float16, torch.bfloat16]


def written(keep: bool = False) -> ChunkedMemory:
    memory = ChunkedMemory.empty(2, 3, 2, 4, keep_across_episodes=keep)
    is_first = torch.zeros(2, 7, dtype=torch.bool)
    is_first[0, 3] = True
    return memory.append(torch.rand(2, 7, 4), is_first)


def assert_same(one: ChunkedMemory, other: ChunkedMemory, rounding: float = 0.0) -> None:
    """All parts are the same; where sums were made anew, up to a rounding."""
    parts, others = one._tensors(), other._tensors()
    assert set(parts) == set(others)
    assert one.keep_across_episodes == other.keep_across_episodes
    for name, part in parts.items():
        torch.testing.assert_close(part, others[name], rtol=rounding, atol=rounding, msg=name)


# Each changes one part of a file so that it cannot have been written.
DAMAGE: dict[str, tuple[Any, str]] = {
    "contents": (lambda m: m.contents[0], r"contents: expected shape \[B, M, C, D\]"),
    "contents-integers": (lambda m: m.contents.long(), "contents: expected dtype floating point"),
    "contents-double": (lambda m: m.contents.double(), "open_steps: expected dtype torch.float64"),
    "summaries": (lambda m: torch.rand(2, 4_000, 4), r"summaries: expected shape \[B = 2, M = 3"),
    "summaries-float8": (
        lambda m: m.summaries.to(torch.float8_e4m3fn),
        "summaries: expected dtype floating point of at least 16 bits",
    ),
    "valid": (lambda m: torch.ones(2, 4_000).bool(), r"valid: expected shape \[B = 2, M = 3\]"),
    "valid-bytes": (lambda m: m.valid.byte(), "valid: expected dtype torch.bool, got torch.uint8"),
    "step_mask": (lambda m: m.step_mask[:, :, :1], r"step_mask: expected shape"),
    "step_mask-bytes": (lambda m: m.step_mask.byte(), "step_mask: expected dtype torch.bool"),
    "step_mask-none": (lambda m: m.step_mask & False, "step_mask: expected a step in each valid"),
    "open_steps": (lambda m: m.open_steps[:, :1], r"open_steps: expected shape \[B = 2, C = 2"),
    "open_steps-half": (lambda m: m.open_steps.half(), "open_steps: expected dtype torch.float32"),
    "open_count": (lambda m: m.open_count + 2, "open_count: expected numbers from 0 to below"),
    "open_count-negative": (lambda m: m.open_count - 9, "open_count: expected numbers from 0"),
    "open_count-floats": (lambda m: m.open_count.float(), "open_count: expected dtype torch.int64"),
    "next_slot": (lambda m: m.next_slot + 3, "next_slot: expected slots that there are"),
    "next_slot-negative": (lambda m: m.next_slot - 9, "next_slot: expected slots that there are"),
    "next_slot-short": (lambda m: m.next_slot.int(), "next_slot: expected dtype torch.int64"),
    "first_steps": (lambda m: m.first_steps + 9, "first_steps: expected steps that the row"),
    "first_steps-negative": (lambda m: m.first_steps - 9, "first_steps: expected steps that"),
    "episodes": (lambda m: m.episodes + 9, "episodes: expected episodes that the row has begun"),
    "episodes-negative": (lambda m: m.episodes - 9, "episodes: expected episodes"),
    "step_count": (lambda m: m.step_count - 9, "step_count: expected at least the steps"),
    "episode": (lambda m: m.episode - 9, "episode: expected numbers of at least -1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    pytest.importorskip("safetensors")
    path, memory = tmp_path / "memory", written(keep=True)
    memory.save(path)
    assert_same(ChunkedMemory.load(path), memory)
    tensors, metadata = load_tensors(path, "ChunkedMemory")
    change, message = DAMAGE[case]
    tensors[case.partition("-")[0]] = change(memory)
    save_tensors(path, "ChunkedMemory", tensors, **metadata)
    with pytest.raises(MemoryFileError, match=message):
        ChunkedMemory.load(path)


@pytest.mark.parametrize("keep", ["2", "", "yes"])
def test_a_file_that_says_nothing_of_episodes_is_refused(tmp_path: Path, keep: str) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "memory"
    written().save(path)
    tensors, _ = load_tensors(path, "ChunkedMemory")
    save_tensors(path, "ChunkedMemory", tensors, keep_across_episodes=keep)
    with pytest.raises(MemoryFileError, match="keep_across_episodes to be 0 or 1"):
        ChunkedMemory.load(path)


def test_every_kind_of_memory_comes_back_from_a_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    steps, mask = torch.rand(2, 11, 4), torch.rand(2, 11) < 0.5
    one = torch.rand(2, 3, 1, 4)
    buffer = torch.rand(2, 3, 3, 4)
    memories = {
        "whole": ChunkedMemory.from_steps(steps, 3),
        "masked": ChunkedMemory.from_steps(steps, 3, mask, borders="newest", eps=0.5),
        "room": ChunkedMemory.from_steps(steps, 3, chunks=7),
        "nothing": ChunkedMemory.from_steps(steps[:, :0], 3),
        "no chunks": ChunkedMemory.from_chunks(torch.rand(2, 0, 3, 4)),
        "no rows": ChunkedMemory.empty(0, 2, 3, 4),
        "chunks": ChunkedMemory.from_chunks(torch.rand(2, 3, 2, 4), torch.rand(2, 3, 2) < 0.5),
        "one storage": ChunkedMemory.from_chunks(one)._replace(
            contents=one, summaries=one[:, :, 0]
        ),
        "one buffer": ChunkedMemory.from_chunks(buffer[:, :, :2])._replace(
            contents=buffer[:, :, :2], summaries=buffer[:, :, 2]
        ),
        "expanded": ChunkedMemory.from_chunks(one[:1].expand(2, -1, -1, -1)),
        "fetched": written().fetch(torch.tensor([2, 0])),
        "bfloat16": written().to(dtype=torch.bfloat16),
        "reset": written().reset(torch.tensor([True, False])),
    }
    for name, memory in memories.items():
        memory.save(tmp_path / name)
        assert_same(ChunkedMemory.load(tmp_path / name), memory)


@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("value", [1000.0, 3000.0])
def test_no_summary_is_summed_in_16_bits(dtype: torch.dtype, value: float) -> None:
    steps = torch.full((1, 64, 8), value).to(dtype)
    steps[:, ::2] += torch.rand(1, 32, 8) * value / 8
    mask = torch.rand(1, 64) < 0.9
    by_step = mask.view(1, 2, 32)
    empty = ChunkedMemory.empty(1, 2, 32, 8, dtype=dtype)
    chunks = steps.view(1, 2, 32, 8)
    exact = chunks.double()
    masked = (exact * by_step[..., None]).sum(2) / by_step.sum(2)[..., None]
    ways = {
        "from_steps": (ChunkedMemory.from_steps(steps, 32).summaries, exact.mean(2)),
        "masked": (ChunkedMemory.from_steps(steps, 32, mask).summaries, masked),
        "from_chunks": (
            ChunkedMemory.from_chunks(steps.view(1, 2, 32, 8)).summaries,
            exact.mean(2),
        ),
        "by_step": (
            ChunkedMemory.from_chunks(chunks, by_step).summaries,
            masked,
        ),
        "append": (empty.append(steps).summaries, exact.mean(2)),
        "unroll": (empty.unroll(steps).read.summaries[:, 2:], exact[:, :1].mean(2)),
        "keep": (
            ChunkedMemory.empty(1, 2, 32, 8, dtype=dtype, keep_across_episodes=True)
            .append(steps, torch.zeros(1, 64).bool())
            .summaries,
            exact.mean(2),
        ),
    }
    # One rounding to 16 bits at the end; sums in float32 err by far less.
    for name, (got, wanted) in ways.items():
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert got.dtype == dtype and error <= torch.finfo(dtype).eps, name
    # Of a past that is given whole they are not held, and not rounded.
    got = Steps(steps, 32, mask).chunked().summaries
    assert got.dtype == torch.float32
    assert_near(got, masked, 1e-6 * value)


@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
def test_gradients_go_through_means_in_float32(dtype: torch.dtype) -> None:
    steps = torch.full((1, 64, 2), 3000.0).to(dtype).requires_grad_()
    ChunkedMemory.empty(1, 2, 32, 2, dtype=dtype).append(steps).summaries.sum().backward()
    assert steps.grad is not None and torch.equal(steps.grad, torch.full_like(steps, 1 / 32))


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChunkedMemory.empty(1, 2, 2, 4, dtype=FLOAT8),
        lambda: ChunkedMemory.from_steps(torch.rand(1, 4, 4).to(FLOAT8), 2),
        lambda: ChunkedMemory.from_steps(torch.rand(1, 4, 4).to(FLOAT8), 2, chunks=2),
        lambda: ChunkedMemory.from_chunks(torch.rand(1, 2, 2, 4).to(FLOAT8)),
        lambda: written().to(dtype=FLOAT8),
        lambda: HTMAttention(4, 1, dim_head=4)(torch.rand(1, 1, 4), torch.rand(1, 4, 4).to(FLOAT8)),
        lambda: recall(
            torch.rand(1, 1, 4), torch.rand(1, 1, 1, 4), Steps(torch.rand(1, 4, 4).to(FLOAT8), 2), 1
        ),
    ],
    ids=["empty", "from_steps", "room", "from_chunks", "to", "layer", "recall"],
)
def test_floating_point_of_8_bits_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="expected dtype .*got torch.float8_e4m3fn"):
        make()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 10, 40])
def test_with_room_a_past_goes_on_as_if_it_had_been_appended(length: int) -> None:
    steps = torch.rand(2, length + 9, 4)
    memory = ChunkedMemory.from_steps(steps[:, :length], 4, chunks=5)
    whole = ChunkedMemory.empty(2, 5, 4, 4).append(steps)
    assert_same(memory.append(steps[:, length:]), whole, 1e-6)
    if length + 9 <= 20:
        # Nothing is forgotten yet: the closed chunks are those of the whole.
        closed = (length + 9) // 4
        given = ChunkedMemory.from_steps(steps, 4)
        for name in ("contents", "summaries", "first_steps"):
            ours = getattr(whole, name)[:, :closed]
            torch.testing.assert_close(ours, getattr(given, name)[:, :closed])


def test_without_room_a_past_refuses_more_and_says_how() -> None:
    steps = torch.rand(1, 20, 4)
    for memory in (
        ChunkedMemory.from_steps(steps[:, :10], 4),
        ChunkedMemory.from_steps(steps[:, :8], 4),
        ChunkedMemory.from_steps(steps[:, :10], 4, borders="newest"),
        written().select_rows(torch.tensor([0])).fetch(torch.tensor([0, 1])),
    ):
        for write in (memory.append, memory.unroll, memory.reach):
            with pytest.raises(ValueError, match=r"given whole.*from_steps\(\.\.\., chunks="):
                write(steps[:, 10:])
    calls: tuple[tuple[dict[str, Any], str], ...] = (
        ({"mask": torch.ones(1, 20).bool()}, "mask: expected None beside `chunks`"),
        ({"borders": "newest"}, "borders: expected 'oldest' beside `chunks`, got 'newest'"),
    )
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            ChunkedMemory.from_steps(steps, 4, chunks=9, **call)
    with pytest.raises(ValueError, match="chunks: expected an integer >= 1, got 0"):
        ChunkedMemory.from_steps(steps, 4, chunks=0)


def test_a_short_chunk_can_come_to_a_memory_without_a_mask_of_steps() -> None:
    memory = ChunkedMemory.from_chunks(torch.rand(1, 2, 3, 4))._replace(keep_across_episodes=True)
    memory = memory.append(torch.rand(1, 2, 4))
    after = memory.append(torch.rand(1, 1, 4), torch.tensor([[True]]))
    assert after.step_mask is not None
    assert after.step_mask.tolist() == [[[False, True, True], [True, True, True]]]
    steps = after.contents[0, 0, 1:]
    torch.testing.assert_close(after.summaries[0, 0], steps.mean(0))
    assert [span.count for span in after.spans(torch.arange(2))] == [2, 3]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (torch.tensor([3]), r"chunks: expected numbers from 0 to 2, got \[3\]"),
        (torch.tensor([0, -1]), r"chunks: expected numbers from 0 to 2, got \[0, -1\]"),
        (torch.tensor([[0]]), r"chunks: expected shape \[U\], got \[1, 1\]"),
        (torch.tensor([0.0]), "chunks: expected whole numbers, got torch.float32"),
        (torch.tensor([True, False, True]), "chunks: expected whole numbers, got torch.bool"),
        ([0], r"chunks: expected a tensor \[U\], got list"),
    ],
)
def test_numbers_of_chunks_are_checked_alike(chunks: Any, message: str) -> None:
    for ask in (written().fetch, written().spans):
        with pytest.raises(ValueError, match=message):
            ask(chunks)


def test_small_integers_number_chunks_too() -> None:
    memory = written()
    for dtype in (torch.uint8, torch.int32):
        numbers = torch.tensor([2, 0, 2], dtype=dtype)
        assert_same(memory.fetch(numbers), memory.fetch(numbers.long()))


def test_a_memory_is_no_sequence() -> None:
    memory = written()
    with pytest.raises(TypeError):
        len(memory)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        iter(memory)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(AttributeError):
        memory.valid = memory.valid  # pyright: ignore[reportAttributeAccessIssue]
    assert memory == memory and memory != written()
    assert repr(memory).startswith("ChunkedMemory(batch=2, chunks=3, chunk_size=2, dim=4, dtype=")


@pytest.mark.parametrize("keep", [False, True])
def test_a_memory_is_a_tree_of_tensors(keep: bool) -> None:
    memory = written(keep)
    leaves, spec = pytree.tree_flatten(memory)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert len(leaves) == (11 if keep else 10)
    assert_same(pytree.tree_unflatten(leaves, spec), memory)
    paths = [str(path[0]) for path, _ in pytree.tree_flatten_with_path(memory)[0]]
    assert ".contents" in paths and (".step_mask" in paths) == keep
    doubled = pytree.tree_map(lambda part: torch.cat([part, part]), memory)
    assert_same(doubled, ChunkedMemory.cat([memory, memory]))


@pytest.mark.parametrize("keep", [False, True])
def test_rows_are_chosen_and_joined(keep: bool) -> None:
    memory = written(keep)
    one, two = (memory.select_rows(torch.tensor([row])) for row in range(2))
    assert_same(ChunkedMemory.cat([one, two]), memory)
    assert_same(memory.select_rows(torch.tensor([True, False])), one)
    steps, is_first = torch.rand(2, 5, 4), torch.rand(2, 5) < 0.3
    after = memory.append(steps, is_first)
    assert_same(two.append(steps[1:], is_first[1:]), after.select_rows(torch.tensor([1])), 1e-6)
    for other, message in (
        (ChunkedMemory.empty(1, 4, 2, 4), r"memories\[1\].contents: expected shape \[B, M = 3"),
        (written(not keep), r"memories\[1\].keep_across_episodes: expected"),
        (memory.to(dtype=torch.float64), r"memories\[1\].contents: expected dtype torch.float32"),
        (memory.fetch(torch.arange(3)), r"memories\[1\]."),
    ):
        with pytest.raises(ValueError, match=message):
            ChunkedMemory.cat([memory, other])
    with pytest.raises(ValueError, match="memories: expected at least one, got none"):
        ChunkedMemory.cat([])


def test_rows_with_and_without_a_mask_of_steps_are_joined() -> None:
    steps = torch.rand(1, 8, 4)
    whole = ChunkedMemory.from_steps(steps, 4)
    masked = ChunkedMemory.from_steps(steps, 4, torch.tensor([[True] * 7 + [False]]))
    joined = ChunkedMemory.cat([whole, masked])
    assert joined.step_mask is not None
    assert joined.step_mask.sum((1, 2)).tolist() == [8, 7]


@pytest.mark.parametrize("keep", [False, True])
def test_steps_that_do_not_exist_are_not_appended(keep: bool) -> None:
    steps, mask = torch.rand(3, 30, 4), torch.rand(3, 30) < 0.6
    mask[1] = False
    is_first = torch.rand(3, 30) < 0.15
    dirty = steps.masked_fill(~mask[..., None], torch.nan)
    memory = ChunkedMemory.empty(3, 4, 3, 4, keep_across_episodes=keep)
    read, visible, after = memory.unroll(dirty, is_first, mask)
    assert_same(memory.append(dirty, is_first, mask), after, 1e-6)
    for row in range(3):
        here, some = slice(row, row + 1), mask[row]
        alone = ChunkedMemory.empty(1, 4, 3, 4, keep_across_episodes=keep)
        given = steps[here, some], is_first[here, some]
        read_alone, visible_alone, after_alone = alone.unroll(*given)
        assert_same(after.select_rows(torch.tensor([row])), after_alone, 1e-6)
        assert not visible[row][~some].any()
        seen, seen_alone = visible[row][some], visible_alone[0]
        assert torch.equal(seen.sum(1), seen_alone.sum(1))
        for ours, wanted in zip(seen, seen_alone, strict=True):
            assert torch.equal(read.contents[row][ours], read_alone.contents[0][wanted])


def test_gradients_do_not_reach_steps_that_do_not_exist() -> None:
    steps = torch.full((1, 6, 2), torch.nan)
    mask = torch.tensor([[False, True, True, False, True, True]])
    steps[mask] = 1.0
    steps.requires_grad_()
    ChunkedMemory.empty(1, 2, 2, 2).append(steps, mask=mask).contents.sum().backward()
    assert steps.grad is not None and steps.grad[0, :, 0].tolist() == [0, 1, 1, 0, 1, 1]
