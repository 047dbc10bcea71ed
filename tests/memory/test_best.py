"""`where_best` against sorting by hand, with many ties, infinities and what is no number."""

import math

import torch

from htm_pytorch.memory.best import where_best


def key(score: float, number: int) -> tuple[bool, float, int]:
    """What comes first is the least: a chunk, of a high score, of a low number."""
    # No number counts as more than infinity.
    rank = -math.inf if math.isnan(score) else -min(score, 1e300)
    return number < 0, rank, number


def test_against_sorting_by_hand() -> None:
    values = torch.tensor([-math.inf, -1.0, 0.0, 1.0, math.inf, math.nan], dtype=torch.float64)
    for _ in range(300):
        length = int(torch.randint(0, 20, ()))
        k = int(torch.randint(0, length + 1, ()))
        scores = values[torch.randint(0, len(values), (3, length))]
        numbers = torch.stack([torch.randperm(50)[:length] for _ in range(3)])
        numbers[torch.rand(3, length) < 0.2] = -1
        found = where_best(scores, k, numbers)
        rows = zip(scores.tolist(), numbers.tolist(), found.tolist(), strict=True)
        for score, number, got in rows:
            best = sorted(range(length), key=lambda i: key(score[i], number[i]))[:k]  # noqa: B023
            assert [number[i] for i in got] == [number[i] for i in best]
            assert len(set(got)) == k


def test_without_numbers_the_first_is_kept() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]])
    for k in range(7):
        assert where_best(scores, k).tolist() == [[1, 2, 4, 3, 5, 0][:k]]
