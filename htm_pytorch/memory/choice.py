"""Which chunks of a stored memory are to be recalled from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.catalog import Catalog
from htm_pytorch.memory.formats import CPU


class Chosen(NamedTuple):
    """Which chunks are to be recalled from."""

    episodes: tuple[int, ...] | None
    """Which episodes they are of; None: any."""
    since: float | None
    """When their first steps happened, or later."""
    until: float | None
    """When their last steps happened, or earlier."""

    def mask(self, catalog: Catalog) -> Tensor:
        """Return which chunks [M] bool they are."""
        mask = torch.ones(catalog.length, dtype=torch.bool, device=CPU)
        if self.episodes is not None:
            wanted = torch.tensor(self.episodes, dtype=torch.int64, device=CPU)
            mask &= torch.isin(catalog.episodes, wanted)
        if self.since is not None:
            mask &= catalog.times[:, 0] >= self.since
        if self.until is not None:
            mask &= catalog.times[:, 1] <= self.until
        return mask

    def conditions(self) -> list[str]:
        """Return the same as conditions of SQL on the rows of a table."""
        found = []
        if self.episodes is not None:
            numbers = ", ".join(map(str, self.episodes)) or "-1"
            found.append(f"episode IN ({numbers})")
        bounds = (("first_time", ">=", self.since), ("last_time", "<=", self.until))
        for name, sign, bound in bounds:
            if bound is None:
                continue
            # In SQL, what is no number is larger than all numbers.
            found.append(f"NOT isnan({name})")
            if math.isfinite(bound):
                found.append(f"{name} {sign} {bound!r}")
            elif (bound > 0) == (sign == ">="):
                found.append("episode < 0")
        return found
