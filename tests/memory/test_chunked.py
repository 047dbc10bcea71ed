"""The write path against a plain Python simulation, and the contract of the value."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_pytorch import ChunkedMemory
from htm_pytorch.memory import MemoryFileError


class Simulated:
    """One row of a memory as Python lists: what a step sees, in the order it was written."""

    def __init__(self, chunks: int, chunk_size: int, keep: bool):
        self.chunks, self.chunk_size, self.keep = chunks, chunk_size, keep
        self.closed: list[list[Tensor]] = []
        self.open: list[Tensor] = []

    def begin_episode(self) -> None:
        if self.keep:
            self.close()
        else:
            self.closed = []
        self.open = []

    def write(self, step: Tensor) -> None:
        self.open.append(step)
        if len(self.open) == self.chunk_size:
            self.close()

    def close(self) -> None:
        if self.open:
            self.closed = [*self.closed, self.open][-self.chunks :]
        self.open = []


def chunks_of(memory: ChunkedMemory, row: int, visible: Tensor) -> set[tuple[float, ...]]:
    """The visible chunks of a row, each as the first features of its steps."""
    found = set()
    for chunk in visible.nonzero().flatten().tolist():
        steps = memory.contents[row, chunk]
        if memory.step_mask is not None:
            steps = steps[memory.step_mask[row, chunk]]
        torch.testing.assert_close(memory.summaries[row, chunk], steps.mean(0))
        found.add(tuple(steps[:, 0].tolist()))
    return found


def expected(simulated: Simulated) -> set[tuple[float, ...]]:
    return {tuple(float(step[0]) for step in chunk) for chunk in simulated.closed}


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
                assert chunks_of(read, row, visible[row, time]) == expected(simulated)
                simulated.write(steps[row, start + time])
        memory, start = after, start + size
    for row, simulated in enumerate(rows):
        assert chunks_of(memory, row, memory.valid[row]) == expected(simulated)
        still_open = memory.open_steps[row, : memory.open_count[row], 0].tolist()
        assert still_open == [float(step[0]) for step in simulated.open]
    for name, part in whole._asdict().items():
        if isinstance(part, Tensor):
            torch.testing.assert_close(getattr(memory, name), part, rtol=1e-9, atol=1e-9, msg=name)


def test_appending_leaves_the_old_value_alone() -> None:
    memory = ChunkedMemory.empty(2, 2, 2, 3)
    first = memory.append(torch.rand(2, 5, 3))
    before = [part.clone() for part in first if isinstance(part, Tensor)]
    first.append(torch.rand(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))
    for old, new in zip(before, (p for p in first if isinstance(p, Tensor)), strict=True):
        assert torch.equal(old, new)


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
    chunks = [chunks_of(memory, 0, memory.valid[0])]
    lengths = sorted(len(chunk) for chunk in chunks[0])
    assert sum(lengths) == length and lengths[1:] == [4] * len(lengths[1:])
    flat = steps[0, :, 0].tolist()
    starts = range(0, length, 4) if borders == "oldest" else range(length % 4 - 4, length, 4)
    assert chunks[0] == {tuple(flat[max(s, 0) : s + 4]) for s in starts if flat[max(s, 0) : s + 4]}


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
