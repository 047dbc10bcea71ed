"""Running means and deviations, of observations and of returns, as buffers of the agent."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from htm_pytorch.rl.observations import Nested, Steps

Sum = Callable[[Tensor], Tensor]
"""Over all processes."""


class Moments(nn.Module):
    """Mean and deviation of all vectors [N] seen so far."""

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))

    def add(self, vectors: Tensor, over_processes: Sum) -> None:
        """Add vectors [X, N] of this process to what is known."""
        vectors = vectors.double()
        new = torch.cat([vectors.new_tensor([len(vectors)]), vectors.sum(0), (vectors**2).sum(0)])
        count, total, squares = over_processes(new).tensor_split((1, 1 + vectors.shape[1]))
        self.count += count[0].to(self.count.device)
        self.total += total.to(self.total.device)
        self.squares += squares.to(self.squares.device)

    def mean(self) -> Tensor:
        """[N]; 0 before anything was seen."""
        return self.total / self.count.clamp(min=1)

    def deviation(self) -> Tensor:
        """[N]; 1 before anything was seen."""
        variance = self.squares / self.count.clamp(min=1) - self.mean() ** 2
        return variance.clamp(min=1e-8).sqrt().where(self.count > 1, 1.0)


class Normalizer(nn.Module):
    """Vectors less their mean, over their deviation, clipped to 10; other leaves as they are."""

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        self.names = list(sizes)
        self.moments = nn.ModuleList(Moments(size) for size in sizes.values())

    def forward(self, observation: Nested) -> Nested:
        """Return the observation [..., N] in units of its deviation."""
        return self._map(observation, self._normalized)

    def observe(self, seen: Steps, over_processes: Sum) -> None:
        """Add the steps that exist to the statistics."""

        def add(leaf: Tensor, moments: Moments) -> Tensor:
            flat = leaf.reshape(-1, len(moments.total))
            moments.add(flat if exists is None else flat[exists], over_processes)
            return leaf

        exists = None if seen.exists is None else seen.exists.flatten()
        self._map(seen.observation, add)

    @staticmethod
    def _normalized(leaf: Tensor, moments: Moments) -> Tensor:
        size = leaf.shape
        flat = leaf.reshape(-1, len(moments.total)).double()
        scaled = ((flat - moments.mean()) / moments.deviation()).clamp(-10, 10)
        return scaled.float().view(size)

    def _map(self, observation: Nested, function: Callable[[Tensor, Any], Tensor]) -> Nested:
        moments = dict(zip(self.names, self.moments, strict=True))

        def walk(value: Nested, place: str) -> Nested:
            if isinstance(value, dict):
                return {key: walk(part, f"{place}.{key}") for key, part in value.items()}
            if isinstance(value, tuple):
                return tuple(walk(part, f"{place}.{n}") for n, part in enumerate(value))
            return function(value, moments[place]) if place in moments else value

        return walk(observation, "")


class ReturnStatistics(nn.Module):
    """Deviation of discounted returns, by which rewards can be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.moments = Moments(1)

    def scale(self) -> Tensor:
        """Return what to divide rewards by."""
        return self.moments.deviation()[0]


def make_normalizer(space: spaces.Space[Any]) -> Normalizer | None:
    """Return a normalizer of the vectors of floats that a space holds; None: there are none."""
    found: dict[str, int] = {}

    def walk(space: spaces.Space[Any], place: str) -> None:
        if isinstance(space, spaces.Dict):
            for name, part in space.items():
                walk(part, f"{place}.{name}")
        elif isinstance(space, spaces.Tuple):
            for number, part in enumerate(space):
                walk(part, f"{place}.{number}")
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            found[place] = int(np.prod(space.shape))

    walk(space, "")
    return Normalizer(found) if found else None
