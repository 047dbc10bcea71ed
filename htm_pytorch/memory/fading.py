"""`Fading`: how the age of a chunk counts in its score.

    l_j = limited(r . s_j, ceiling) - decay log(1 + age_j)
    limited(a, c) = a - (1 - LEAK) log(1 + exp(a - c))

Above its ceiling a chunk is about as relevant as it can be: one that has what is looked for twice
is hardly better than one that has it once, so that the newest of many is found, however many there
are. That holds at any length of the past, since the logarithm grows so slowly. What leaks through
the ceiling keeps the order of products, which would all be rounded to one score without it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAK = 2.0**-10
"""How much of what is above the ceiling counts."""


class Fading(NamedTuple):
    """What the scores of each query fade by; X are any axes, those of queries, such as B and Q."""

    ceiling: Tensor
    """[X], infinite where there is none."""
    decay: Tensor
    """[X], of the log of an age; 0 where all are alike, below 0 where old chunks are sought."""
    ages: Tensor
    """[X, M], log(1 + age), the age being how many chunks closed after one; X may be 1."""

    def scores(self, products: Tensor, ages: Tensor | None = None) -> Tensor:
        """Return the scores of chunks from the products [X, M] of route and summaries.

        Args:
            products: [X, M] of all chunks, or of those whose log ages are given.
            ages: as many as products; None: all.
        """
        ages = self.ages if ages is None else ages
        return limited(products, self.ceiling[..., None]) - self.decay[..., None] * ages

    def of(self, chunks: Tensor) -> Tensor:
        """Return the log ages of chunks [B, Q, K] by their numbers; of -1 those of any."""
        ages = self.ages.expand(*chunks.shape[:-1], -1)
        return ages.gather(-1, chunks.clamp(min=0)) if ages.shape[-1] else ages[..., :0]

    def part(self, start: int, end: int) -> "Fading":
        """Return what the scores of some chunks fade by."""
        return self._replace(ages=self.ages[..., start:end])


def limited(products: Tensor, ceiling: Tensor) -> Tensor:
    """Return products that hardly rise above a ceiling; as they are where it is far above them."""
    above = products - ceiling
    bend = torch.log1p(torch.exp(-above.abs()))
    return torch.minimum(products, ceiling) - bend + LEAK * (above.clamp(min=0) + bend)


def log_ages(ages: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log(1 + age) of ages in whole chunks; of what is not yet there, 0."""
    return ages.clamp(min=0).to(dtype).log1p()
