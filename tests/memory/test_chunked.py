"""The write path against a plain Python simulation, and the contract of the value."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_pytorch import ChunkedMemory
from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.files import load_tensors, save_tensors

NUMBERS = ("first_steps", "episodes", "step_count", "episode")


class Chunk(NamedTuple):
    """A chunk as the first features of its steps, the number of the first, and their episode."""

    steps: tuple[float, ...]
    first_step: int
    episode: int


class Simulated:
    """One row of a memory as Python lists: what a step sees, in the order it was written."""

    def __init__(self, chunks: int, chunk_size: int, keep: bool):
        self.chunks, self.chunk_size, self.keep = chunks, chunk_size, keep
        self.closed: list[Chunk] = []
        self.open: list[Tensor] = []
        self.written = self.episode = 0

    def begin_episode(self) -> None:
        if self.keep:
            self.close()
        else:
            self.closed = []
        self.open = []
        self.episode += self.written > 0

    def write(self, step: Tensor) -> None:
        self.open.append(step)
        self.written += 1
        if len(self.open) == self.chunk_size:
            self.close()

    def close(self) -> None:
        if self.open:
            steps = tuple(float(step[0]) for step in self.open)
            chunk = Chunk(steps, self.written - len(steps), self.episode)
            self.closed = [*self.closed, chunk][-self.chunks :]
        self.open = []


def chunks_of(memory: ChunkedMemory, row: int, visible: Tensor) -> set[Chunk]:
    """The visible chunks of a row."""
    found = set()
    for span in memory.spans(visible.nonzero()[:, 0], row):
        steps = memory.contents[row, span.chunk]
        if memory.step_mask is not None:
            steps = steps[memory.step_mask[row, span.chunk]]
        torch.testing.assert_close(memory.summaries[row, span.chunk], steps.mean(0))
        assert span.count == len(steps)
        found.add(Chunk(tuple(steps[:, 0].tolist()), span.first_step, span.episode))
    return found


def numbers_of(memory: ChunkedMemory, row: int = 0) -> list[tuple[int, ...]]:
    """First step, number of steps and episode of each valid chunk, slot by slot."""
    spans = memory.spans(memory.valid[row].nonzero()[:, 0], row)
    return [span[1:4] for span in spans]


@st.composite
def streams(draw: Any) -> tuple[Tensor, Tensor, list[int], int, int, bool]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    bounds = [0, *cuts, length]
    sizes = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = torch.rand(batch, length, 3, generator=generator, dtype=torch.float64)
    is_first = torch.rand(batch, length, generator=generator) < draw(
        st.sampled_from([0.0, 0.1, 0.4])
    )
    return (
        steps,
        is_first,
        sizes,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 6)),
        draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(streams())
def test_write_path_equals_a_simulation_however_the_stream_is_cut(stream: Any) -> None:
    steps, is_first, sizes, chunks, chunk_size, keep = stream
    batch = steps.shape[0]
    memory = ChunkedMemory.empty(
        batch, chunks, chunk_size, 3, keep_across_episodes=keep, dtype=torch.float64
    )
    whole = memory.append(steps, is_first)
    rows = [Simulated(chunks, chunk_size, keep) for _ in range(batch)]
    start = 0
    for size in sizes:
        piece = slice(start, start + size)
        read, visible, after = memory.unroll(steps[:, piece], is_first[:, piece])
        for time in range(size):
            for row, simulated in enumerate(rows):
                if is_first[row, start + time]:
                    simulated.begin_episode()
                assert chunks_of(read, row, visible[row, time]) == set(simulated.closed)
                simulated.write(steps[row, start + time])
        memory, start = after, start + size
    for row, simulated in enumerate(rows):
        assert chunks_of(memory, row, memory.valid[row]) == set(simulated.closed)
        assert memory.step_count[row] == simulated.written
        still_open = memory.open_steps[row, : memory.open_count[row], 0].tolist()
        assert still_open == [float(step[0]) for step in simulated.open]
    for name, part in whole._tensors().items():
        torch.testing.assert_close(getattr(memory, name), part, rtol=1e-9, atol=1e-9, msg=name)


def test_appending_leaves_the_old_value_alone() -> None:
    memory = ChunkedMemory.empty(2, 2, 2, 3)
    first = memory.append(torch.rand(2, 5, 3))
    before = {name: part.clone() for name, part in first._tensors().items()}
    first.append(torch.rand(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))
    for name, part in first._tensors().items():
        assert torch.equal(before[name], part), name


def test_another_rows_reset_touches_nothing() -> None:
    memory = ChunkedMemory.empty(2, 3, 2, 4).append(torch.rand(2, 5, 4))
    after = memory.reset(torch.tensor([True, False]))
    assert not after.valid[0].any() and after.open_count[0] == 0
    for name, part in memory._tensors().items():
        assert torch.equal(part[1], after._tensors()[name][1]), name


def test_gradients_flow_from_chunks_to_their_steps_and_no_others() -> None:
    steps = torch.rand(1, 7, 2, dtype=torch.float64, requires_grad=True)
    memory = ChunkedMemory.empty(1, 2, 2, 2, dtype=torch.float64).append(steps)
    memory.contents.sum().backward()
    assert steps.grad is not None
    # Of chunks 0-1, 2-3, 4-5 the ring forgot the first; step 6 is still in the open chunk.
    assert steps.grad[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("borders", ["oldest", "newest"])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8])
def test_from_steps_keeps_every_step_once_and_averages_no_padding(
    borders: Any, length: int
) -> None:
    steps = torch.rand(2, length, 3) + 1
    memory = ChunkedMemory.from_steps(steps, 4, borders=borders)
    assert memory.chunks == -(-length // 4)
    chunks = chunks_of(memory, 0, memory.valid[0])
    lengths = sorted(len(chunk.steps) for chunk in chunks)
    assert sum(lengths) == length and lengths[1:] == [4] * len(lengths[1:])
    flat = steps[0, :, 0].tolist()
    starts = range(0, length, 4) if borders == "oldest" else range(length % 4 - 4, length, 4)
    whole = [Chunk(tuple(flat[max(s, 0) : s + 4]), max(s, 0), 0) for s in starts]
    assert chunks == {chunk for chunk in whole if chunk.steps}


@pytest.mark.parametrize(
    ("borders", "spans"),
    [
        ("oldest", [(1, 2, 0), (4, 4, 0), (9, 1, 0)]),
        ("newest", [(1, 1, 0), (3, 3, 0), (6, 3, 0)]),
    ],
)
def test_masked_steps_have_numbers_like_others(borders: Any, spans: Any) -> None:
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, [0, 2, 8]] = False
    memory = ChunkedMemory.from_steps(torch.rand(2, 10, 3), 4, mask, borders=borders)
    assert numbers_of(memory) == spans
    mask[0, 4:8] = False
    masked = ChunkedMemory.from_steps(torch.rand(2, 10, 3), 4, mask)
    assert numbers_of(masked) == [(1, 2, 0), (9, 1, 0)]
    with pytest.raises(
        ValueError, match=r"^chunks: expected chunks that can be recalled, got \[1\]"
    ):
        masked.spans(torch.tensor([0, 1]))
    assert numbers_of(masked, 1) == [(0, 4, 0), (4, 4, 0), (8, 2, 0)]


def test_steps_are_counted_on_after_a_past_that_was_given_whole() -> None:
    border = torch.tensor([[True, False, False]])
    by_step = torch.tensor([[[1, 1, 1], [0, 1, 1]]]) > 0
    steps = ChunkedMemory.from_steps(torch.rand(1, 5, 2), 3, chunks=2)
    chunks = ChunkedMemory.from_chunks(torch.rand(1, 2, 3, 2), by_step)
    for memory, before in ((steps, [(0, 3, 0)]), (chunks, [(0, 3, 0), (3, 2, 0)])):
        # So that what came before the border stays visible.
        memory = memory._replace(keep_across_episodes=True)
        assert numbers_of(memory) == before
        after = memory.append(torch.rand(1, 3, 2), border)
        assert numbers_of(after) == [(5, 3, 1), (3, 2, 0)]


def test_an_emptied_row_counts_from_0_and_the_other_goes_on() -> None:
    memory = ChunkedMemory.empty(2, 3, 2, 4)
    border = torch.tensor([[True, False], [True, False]])
    for _ in range(3):
        memory = memory.append(torch.rand(2, 2, 4), border)
    assert numbers_of(memory) == numbers_of(memory, 1) == [(4, 2, 2)]
    memory = memory.reset(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="chunks: expected chunks that can be recalled"):
        memory.spans(torch.tensor([2]))
    memory = memory.append(torch.rand(2, 2, 4), border)
    assert numbers_of(memory) == [(0, 2, 0)]
    assert numbers_of(memory, 1) == [(6, 2, 3)]


def test_dropped_and_forgotten_steps_count() -> None:
    is_first = torch.zeros(1, 11, dtype=torch.bool)
    is_first[0, 4] = True
    memory = ChunkedMemory.empty(1, 2, 3, 2).append(torch.rand(1, 11, 2), is_first)
    # Step 3 was dropped: 0-2 are of another episode, 4-6 and 7-9 of this one, 10 is in no chunk.
    assert sorted(numbers_of(memory)) == [(4, 3, 1), (7, 3, 1)]
    memory = memory.append(torch.rand(1, 2, 2))
    assert sorted(numbers_of(memory)) == [(7, 3, 1), (10, 3, 1)]


def test_fetched_chunks_keep_their_numbers() -> None:
    is_first = torch.rand(2, 30) < 0.1
    memory = ChunkedMemory.empty(2, 9, 4, 3, keep_across_episodes=True)
    memory = memory.append(torch.rand(2, 30, 3), is_first)
    for row in range(2):
        chosen = memory.valid[row].nonzero()[:, 0].flip(0)
        fetched = memory.fetch(chosen).spans(torch.arange(len(chosen)), row)
        asked = memory.spans(chosen, row)
        assert [span[1:] for span in fetched] == [span[1:] for span in asked]


def test_from_chunks_takes_chunk_and_step_masks_and_goes_on_after_the_newest() -> None:
    contents = torch.rand(1, 3, 2, 4)
    memory = ChunkedMemory.from_chunks(contents, torch.tensor([[True, True, False]]))
    memory = memory.append(torch.ones(1, 2, 4))
    assert memory.valid.all() and torch.equal(memory.contents[0, :2], contents[0, :2])
    by_step = torch.tensor([[[True, False], [False, False], [True, True]]])
    memory = ChunkedMemory.from_chunks(contents, by_step)
    assert memory.valid.tolist() == [[True, False, True]]
    torch.testing.assert_close(memory.summaries[0, 0], contents[0, 0, 0])


@pytest.fixture
def files() -> None:
    pytest.importorskip("safetensors")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("keep", [False, True])
def test_saved_memory_comes_back_whole(tmp_path: Any, keep: bool) -> None:
    memory = ChunkedMemory.empty(2, 3, 2, 4, keep_across_episodes=keep, dtype=torch.bfloat16)
    memory = memory.append(torch.rand(2, 7, 4).bfloat16())
    memory.save(tmp_path / "memory.safetensors")
    loaded = ChunkedMemory.load(tmp_path / "memory.safetensors")
    assert loaded.keep_across_episodes == keep and (loaded.step_mask is None) == (not keep)
    assert numbers_of(loaded) == [(0, 2, 0), (2, 2, 0), (4, 2, 0)]
    for name, part in memory._tensors().items():
        assert torch.equal(part, loaded._tensors()[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]


@pytest.mark.usefixtures("files")
def test_a_truncated_or_foreign_file_is_refused_and_left_alone(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "memory.safetensors"
    ChunkedMemory.empty(1, 2, 2, 4).save(path)
    whole = path.read_bytes()
    for broken in (b"", b"not tensors", whole[:40], whole[:-8]):
        path.write_bytes(broken)
        with pytest.raises(MemoryFileError, match="truncated or not a safetensors file"):
            ChunkedMemory.load(path)
        assert path.read_bytes() == broken
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(MemoryFileError, match="expected .* to hold a ChunkedMemory"):
        ChunkedMemory.load(path)
    save_file({"contents": torch.ones(1)}, path, {"kind": "ChunkedMemory", "format": "1"})
    with pytest.raises(MemoryFileError, match="lacks a part"):
        ChunkedMemory.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        ChunkedMemory.load(tmp_path / "missing")


def rewrite(path: Path, **changes: Tensor | None) -> None:
    """Save a memory's file again with other parts, or without those that are None."""
    tensors, metadata = load_tensors(path, "ChunkedMemory")
    tensors = {name: changes.get(name, tensor) for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_tensors(path, "ChunkedMemory", kept, **metadata)


@pytest.mark.usefixtures("files")
def test_a_file_from_before_steps_had_numbers_counts_from_its_oldest_chunk(tmp_path: Any) -> None:
    path = tmp_path / "memory.safetensors"
    # Row 0 has forgotten steps 0 to 5; row 1 closed a chunk of one step early; row 2 is empty.
    memory = ChunkedMemory.empty(3, 3, 2, 4, keep_across_episodes=True)
    is_first = torch.zeros(3, 13, dtype=torch.bool)
    is_first[1, 9] = True
    memory = memory.append(torch.rand(3, 13, 4), is_first).reset(torch.tensor([False, False, True]))
    assert numbers_of(memory) == [(6, 2, 0), (8, 2, 0), (10, 2, 0)]
    assert numbers_of(memory, 1) == [(11, 2, 1), (8, 1, 0), (9, 2, 1)]
    memory.save(path)
    rewrite(path, **dict.fromkeys(NUMBERS))
    loaded = ChunkedMemory.load(path)
    assert numbers_of(loaded) == [(0, 2, 0), (2, 2, 0), (4, 2, 0)]
    assert numbers_of(loaded, 1) == [(3, 2, 0), (0, 1, 0), (1, 2, 0)]
    assert loaded.step_count.tolist() == [7, 5, 0]
    border = torch.tensor([[False, False], [True, False], [True, False]])
    loaded = loaded.append(torch.rand(3, 2, 4), border)
    assert numbers_of(loaded) == [(6, 2, 0), (2, 2, 0), (4, 2, 0)]
    assert numbers_of(loaded, 1) == [(3, 2, 0), (5, 2, 1), (1, 2, 0)]
    assert numbers_of(loaded, 2) == [(0, 2, 0)]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("first_steps", torch.zeros(2, 4).long(), r"first_steps: expected shape \[B = 2, M = 3\]"),
        ("episodes", torch.zeros(2, 3, 1).long(), r"episodes: expected shape \[B = 2, M = 3\]"),
        ("step_count", torch.zeros(1).long(), r"step_count: expected shape \[B = 2\], got \[1\]"),
        ("episode", torch.zeros(2), r"episode: expected dtype torch.int64, got torch.float32"),
        ("summaries", torch.zeros(2, 3, 5), r"summaries: expected shape \[B = 2, M = 3, D = 4\]"),
        ("step_count", None, r"lacks a part: expected .*'step_count'.*, got "),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(
    tmp_path: Any, part: str, wrong: Tensor | None, message: str
) -> None:
    path = tmp_path / "memory.safetensors"
    ChunkedMemory.empty(2, 3, 2, 4).append(torch.rand(2, 7, 4)).save(path)
    rewrite(path, **{part: wrong})
    with pytest.raises(MemoryFileError, match=message):
        ChunkedMemory.load(path)


@pytest.mark.usefixtures("files")
def test_a_failed_save_leaves_the_old_file(tmp_path: Any, monkeypatch: Any) -> None:
    path = tmp_path / "memory.safetensors"
    ChunkedMemory.empty(1, 2, 2, 4).save(path)
    whole = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ChunkedMemory.empty(1, 9, 2, 4).save(path)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ChunkedMemory.empty(1, 2, 0, 4), r"chunk_size: expected an integer >= 1, got 0"),
        (lambda m: ChunkedMemory.empty(1, 0, 2, 4), r"chunks: expected an integer >= 1, got 0"),
        (lambda m: ChunkedMemory.empty(1, 2, 2, 4, dtype=torch.int64), r"dtype: expected dtype fl"),
        (
            lambda m: m.append(torch.rand(2, 5, 4)),
            r"steps: expected shape \[B = 1, T, D = 4\], got",
        ),
        (lambda m: m.append(torch.rand(1, 4)), r"steps: expected shape"),
        (lambda m: m.append(torch.rand(1, 5, 4).double()), r"steps: expected dtype torch.float32"),
        (
            lambda m: m.append(torch.rand(1, 5, 4), torch.ones(1, 4).bool()),
            r"is_first: expected sh",
        ),
        (lambda m: m.append(torch.rand(1, 5, 4), torch.ones(1, 5)), r"is_first: expected dtype"),
        (lambda m: m.reset(torch.ones(2).bool()), r"rows: expected shape \[B = 1\], got \[2\]"),
        (lambda m: m.spans(torch.tensor([2])), r"chunks: expected numbers from 0 to 1, got \[2\]"),
        (lambda m: m.spans(torch.tensor([-1])), r"chunks: expected numbers from 0 to 1"),
        (lambda m: m.spans(torch.tensor(1)), r"chunks: expected shape \[U\], got \[\]"),
        (
            lambda m: m.spans(torch.tensor([1, 0])),
            r"chunks: expected chunks that can be recalled, got \[1, 0\]",
        ),
        (lambda m: m.spans(torch.tensor([0]), 1), r"row: expected an integer from 0 to 0, got 1"),
        (
            lambda m: m.spans(torch.tensor([0]), True),
            r"row: expected an integer from 0 to 0, got T",
        ),
        (lambda m: m.from_steps(torch.rand(1, 5, 4), 0), r"chunk_size: expected"),
        (lambda m: m.from_steps(torch.ones(1, 5, 4).long(), 2), r"steps: expected dtype floating"),
        (
            lambda m: m.from_steps(torch.rand(1, 5, 4), 2, torch.ones(5).bool()),
            r"mask: expected sh",
        ),
        (
            lambda m: m.from_steps(torch.rand(1, 5, 4), 2, borders="x"),
            r"borders: expected 'oldest'",
        ),
        (lambda m: m.from_chunks(torch.rand(1, 5, 4)), r"contents: expected shape"),
        (
            lambda m: m.from_chunks(torch.rand(1, 5, 2, 4), torch.ones(1, 4).bool()),
            r"valid: expect",
        ),
        (
            lambda m: m.from_chunks(torch.rand(1, 0, 2, 4)).append(torch.rand(1, 1, 4)),
            r"chunks .*: expected an integer >= 1, got 0",
        ),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(ChunkedMemory.empty(1, 2, 2, 4))
