"""From an action space to a policy: its parameters from features, and what they mean.

Actions are tensors [..., A]: one number a choice of Discrete, MultiDiscrete and MultiBinary, one a
dimension of Box.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from htm_pytorch.rl.space import ACTION_BOUND, check_size, units_of


class Distribution(Protocol):
    """What a policy may do at some steps [...], each of which has parameters of its own."""

    def sample(self, noise: Tensor) -> Tensor:
        """Return actions [..., A] from `noise` [..., A] that the policy's `noise` made."""
        ...

    def mode(self) -> Tensor:
        """Return the most probable actions [..., A]."""
        ...

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log probabilities [...] of actions [..., A]."""
        ...

    def entropy(self) -> Tensor:
        """Return the entropies [...]."""
        ...


class Policy(nn.Module, ABC):
    """Features [..., D] -> parameters [..., K] -> a `Distribution`; subclasses say which."""

    size: int
    """A."""
    parameters_count: int
    """K."""
    dtype: torch.dtype
    """Of actions."""

    def __init__(self, dim: int, size: int, parameters_count: int, dtype: torch.dtype):
        super().__init__()
        self.size, self.parameters_count, self.dtype = size, parameters_count, dtype
        self.net = _mlp(dim, parameters_count)

    def forward(self, features: Tensor) -> Tensor:
        """Return the parameters [..., K] for features [..., D]."""
        return self.net(features)

    @abstractmethod
    def distribution(self, parameters: Tensor) -> Distribution:
        """Return what parameters [..., K] mean."""

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return what `Distribution.sample` needs, [rows, A]."""
        return torch.rand(rows, self.size, generator=generator, dtype=torch.float64, device="cpu")

    @abstractmethod
    def to_environment(self, actions: np.ndarray) -> Any:
        """Return actions [B, A] as a vector environment takes them."""


class ChoicePolicy(Policy):
    """Independent choices of nvec[a] possibilities each."""

    def __init__(self, dim: int, space: spaces.Space[Any], nvec: Sequence[int]):
        super().__init__(dim, len(nvec), sum(nvec), torch.int64)
        self.nvec = tuple(nvec)
        start = getattr(space, "start", 0)
        self.shape, self.kind = space.shape or (), space.dtype
        self.start = np.broadcast_to(np.asarray(start), self.shape)

    def distribution(self, parameters: Tensor) -> "Choices":
        """Return the choices whose logits are the parameters."""
        return Choices(parameters, self.nvec)

    def to_environment(self, actions: np.ndarray) -> Any:
        """Return actions [B, A] as integers of the space, [B, ...]."""
        return (actions.reshape(len(actions), *self.shape) + self.start).astype(self.kind)


class GaussianPolicy(Policy):
    """Independent normal distributions, whose deviations do not depend on the features.

    In units of half the range where a dimension is bounded on both sides, about its middle; what
    lies outside the bounds is clipped when it is done.
    """

    def __init__(self, dim: int, space: spaces.Box):
        size = int(np.prod(space.shape))
        super().__init__(dim, size, 2 * size, torch.float32)
        self.net = _mlp(dim, size)
        self.log_deviation = nn.Parameter(torch.full((size,), -0.5))
        self.low, self.high = (bound.astype(np.float64) for bound in (space.low, space.high))
        self.middle, self.scale = units_of(space, ACTION_BOUND)
        self.kind = space.dtype

    def forward(self, features: Tensor) -> Tensor:
        """Return means and logarithms of deviations, [..., 2 A]."""
        means = self.net(features)
        return torch.cat([means, self.log_deviation.expand_as(means)], -1)

    def distribution(self, parameters: Tensor) -> "Gaussian":
        """Return the normal distributions of the parameters."""
        return Gaussian(*parameters.chunk(2, -1))

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return normal noise [rows, A]."""
        return torch.randn(rows, self.size, generator=generator, dtype=torch.float64, device="cpu")

    def to_environment(self, actions: np.ndarray) -> Any:
        """Return actions [B, A] within the bounds of the space, [B, ...]."""
        scaled = actions.reshape(len(actions), *self.low.shape) * self.scale + self.middle
        clipped = np.clip(scaled, self.low, self.high)
        return clipped.astype(self.kind)


class Choices:
    """Independent choices, of logits [..., sum(nvec)]."""

    def __init__(self, logits: Tensor, nvec: Sequence[int]):
        self.log_probs = [part.log_softmax(-1) for part in logits.split(list(nvec), -1)]

    def sample(self, noise: Tensor) -> Tensor:
        """Return for each choice the possibility at which `noise`, of [0, 1), is passed."""
        chosen = []
        for place, log_probs in enumerate(self.log_probs):
            total = log_probs.double().exp().cumsum(-1)
            passed = (total < noise[..., place, None] * total[..., -1:]).sum(-1)
            chosen.append(passed.clamp(max=log_probs.shape[-1] - 1))
        return torch.stack(chosen, -1)

    def mode(self) -> Tensor:
        """Return the most probable choices."""
        return torch.stack([log_probs.argmax(-1) for log_probs in self.log_probs], -1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the sums of the choices' log probabilities."""
        parts = zip(self.log_probs, actions.unbind(-1), strict=True)
        found = [log_probs.gather(-1, action[..., None])[..., 0] for log_probs, action in parts]
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]

    def entropy(self) -> Tensor:
        """Return the sums of the choices' entropies."""
        parts = [-(log_probs.exp() * log_probs).sum(-1) for log_probs in self.log_probs]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class Gaussian:
    """Independent normal distributions, of means and logarithms of deviations [..., A]."""

    def __init__(self, mean: Tensor, log_deviation: Tensor):
        self.mean, self.log_deviation = mean, log_deviation

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + deviation * noise."""
        return self.mean + self.log_deviation.exp() * noise.to(self.mean.dtype)

    def mode(self) -> Tensor:
        """Return the means."""
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the sums of the logarithms of the densities."""
        distance = (actions - self.mean) * (-self.log_deviation).exp()
        return (-0.5 * (distance**2 + _LOG_TWO_PI) - self.log_deviation).sum(-1)

    def entropy(self) -> Tensor:
        """Return the sums of the entropies."""
        return (self.log_deviation + 0.5 * (1 + _LOG_TWO_PI)).sum(-1)


_LOG_TWO_PI = float(np.log(2 * np.pi))


def make_policy(space: spaces.Space[Any], dim: int) -> Policy:
    """Return a policy for the space of one environment's actions.

    Raises:
        ValueError: a space without a policy.
    """
    check_size(space, "actions")
    match space:
        case spaces.Discrete():
            return ChoicePolicy(dim, space, [int(space.n)])
        case spaces.MultiDiscrete():
            return ChoicePolicy(dim, space, [int(n) for n in space.nvec.ravel()])
        case spaces.MultiBinary():
            return ChoicePolicy(dim, space, [2] * int(np.prod(space.shape)))
        case spaces.Box() if np.issubdtype(space.dtype, np.floating) and space.shape:
            return GaussianPolicy(dim, space)
    raise ValueError(
        f"env: expected actions that are Discrete, MultiDiscrete, MultiBinary or a Box of floats "
        f"of one dimension or more, as (1,), got {space}; a wrapper of the environment can "
        "offer such"
    )


def _mlp(dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs))
