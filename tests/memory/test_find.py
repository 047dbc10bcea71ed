"""Of chunks whose summaries fit a query equally well, a stored memory finds the older ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lance", reason="the extra `store` is not installed")

from htm_pytorch import memory

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, CHUNKS, FLUSHED = 33, 300, 200


def steps_of(kinds: int) -> Tensor:
    """Chunks of one step each, all of few kinds, of numbers that rounding would spoil."""
    return torch.randn(1, kinds, DIM)[:, torch.randint(kinds, (CHUNKS,))]


def filled(path: Path, steps: Tensor, **how: Any) -> Any:
    """A memory of which some chunks are in the table, and the others are in the log."""
    with memory.open(path, dim=DIM, chunk_size=1) as held:
        held.append(steps[:, :FLUSHED]).flush().append(steps[:, FLUSHED:])
    return memory.open(path, read_only=True, **how)


def sorted_by_hand(query: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Every product summed alone, all of them sorted by a stable sort."""
    return (query[:, None] * steps).sum(-1).sort(dim=1, descending=True, stable=True)


@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("k", [1, 4, CHUNKS, 2 * CHUNKS])
def test_find(tmp_path: Path, kinds: int, k: int) -> None:
    steps = steps_of(kinds)
    held = filled(tmp_path / "life", steps)
    query = torch.randn(7, DIM)
    scores, expected = sorted_by_hand(query, steps)
    found = held.find(query, k)
    assert torch.equal(found.chunks, expected[:, :k])
    torch.testing.assert_close(found.scores, scores[:, :k], rtol=0.0, atol=1e-4)
    # Equal ones are equal to the last bit.
    kind = steps[0, found.chunks[:, :, None], 0][..., 0]
    same = kind[:, 1:] == kind[:, :-1]
    assert torch.equal(found.scores[:, 1:][same], found.scores[:, :-1][same])


@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("k", [4, FLUSHED, CHUNKS])
def test_find_beside_a_table_that_is_searched(tmp_path: Path, kinds: int, k: int) -> None:
    """Those that are in the log, and those that the engine returns; it may choose others."""
    steps = steps_of(kinds)
    held = filled(tmp_path / "life", steps, search="index")
    query = torch.randn(7, DIM)
    found = held.find(query, k)
    scores, expected = sorted_by_hand(query, steps)
    torch.testing.assert_close(found.scores, scores[:, :k], rtol=0.0, atol=1e-4)
    if k == CHUNKS:
        assert torch.equal(found.chunks, expected)
    for score, chunks in zip(found.scores, found.chunks, strict=True):
        # In order of their age, where they are equal; of those in the log the oldest.
        for value in score.unique():
            group = chunks[score == value]
            assert torch.equal(group, group.sort().values)
            in_log = group[group >= FLUSHED]
            kind = steps[0, int(group[0]), 0]
            oldest = FLUSHED + (steps[0, FLUSHED:, 0] == kind).nonzero()[:, 0]
            assert torch.equal(in_log, oldest[: len(in_log)])


def test_search_keeps_the_older_of_what_is_in_the_log(tmp_path: Path) -> None:
    steps = steps_of(1)
    with memory.open(tmp_path / "life", dim=DIM, chunk_size=1, search="index") as held:
        held.append(steps)
        found: Any = held
        assert torch.equal(found.search(torch.randn(1, 5, DIM), 3), torch.arange(3).expand(1, 5, 3))
