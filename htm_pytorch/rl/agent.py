"""The agent: what it sees -> its memory -> what it does, expects and can reconstruct."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from htm_pytorch.rl.actions import Distribution, Policy, make_policy
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.contract import State
from htm_pytorch.rl.cores import make_core
from htm_pytorch.rl.observations import Nested, Steps, make_decoder, make_encoder
from htm_pytorch.rl.statistics import ReturnStatistics, make_normalizer
from htm_pytorch.shapes import check_kind

PartMaker = Callable[[spaces.Space[Any], int], nn.Module]


class Parts(NamedTuple):
    """Parts of the user's own, made from the space of what is seen and the agent's width."""

    encoder: PartMaker | None = None
    """Of a module from observations [B, T, ...] to [B, T, D]; None: what fits the space."""
    decoder: PartMaker | None = None
    """Of a module with `loss(features [X, D], observation [X, ...])`."""
    core: Callable[[int], nn.Module] | None = None
    """Of a memory of width D, as `contract.Core` says; None: the config's."""


class Outputs(NamedTuple):
    """What the agent makes of the steps it was asked about, P of each row."""

    features: Tensor
    """[B, P, D]."""
    policy: Tensor
    """[B, P, K] parameters of the policy."""
    values: Tensor
    """[B, P]."""


class Agent(nn.Module):
    """Encoder, memory, policy, value and reconstruction (arXiv 2105.14039, figure 1).

    Args:
        encoder: from what is seen, nested [B, T, ...], to [B, T, D].
        core: its memory, as `contract.Core` says.
        policy: what it does.
        dim: D.
        decoder: of the present observation from features; None: nothing is reconstructed.
        normalizer: of observations, before the encoder; None: they stay as they are.
    """

    def __init__(
        self,
        encoder: nn.Module,
        core: nn.Module,
        policy: Policy,
        dim: int,
        decoder: nn.Module | None = None,
        normalizer: nn.Module | None = None,
    ):
        super().__init__()
        self.encoder, self.core, self.policy, self.decoder = encoder, core, policy, decoder
        self.normalizer = normalizer
        self.returns = ReturnStatistics()
        self.value = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def initial_state(self, batch_size: int) -> State:
        """Return the state of rows that have seen nothing."""
        return self.core.initial_state(batch_size)  # pyright: ignore[reportCallIssue]

    def forward(self, seen: Steps, state: State, at: Tensor) -> tuple[Outputs, State]:
        """Return the outputs at the steps `at` [B, P] and the state after all T steps."""
        features, state = self.remember(seen, state, at)
        return self.heads(features), state

    def remember(self, seen: Steps, state: State, at: Tensor | None) -> tuple[Tensor, State]:
        """Return the memory's outputs, [B, P, D] or without `at` [B, T, D], and its state."""
        return self.core(self.encode(seen), state, seen.is_first, seen.exists, at=at)

    def absorb(self, seen: Steps, state: State) -> State:
        """Return the state after all T steps, of which nothing is asked."""
        nothing = torch.zeros(len(seen.is_first), 0, dtype=torch.int64, device=self.device)
        return self.remember(seen, state, nothing)[1]

    def encode(self, seen: Steps) -> Tensor:
        """Return what the memory gets, [B, T, D]."""
        shown = seen.observation
        return self.encoder(shown if self.normalizer is None else self.normalizer(shown))

    def heads(self, features: Tensor) -> Outputs:
        """Return the outputs for features [B, P, D] of the memory."""
        return Outputs(features, self.policy(features), self.value(features)[..., 0])

    def distribution(self, parameters: Tensor) -> Distribution:
        """Return what it may do, of parameters [..., K]."""
        return self.policy.distribution(parameters)

    def reconstruction_loss(self, features: Tensor, observation: Nested) -> Tensor:
        """Return how badly features [X, D] tell the observations [X, ...] they were made from.

        No gradient enters the memory through what is recalled later, and reward alone is too
        sparse to teach what to store; reconstruction does.
        """
        if self.decoder is None:
            return features.new_zeros(())
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        return self.decoder.loss(features, observation)  # pyright: ignore[reportCallIssue]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.value.parameters()).device


def make_agent(
    config: TrainConfig,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    parts: Parts | None = None,
) -> Agent:
    """Return the config's agent for the spaces of one environment, with fresh weights.

    Raises:
        ValueError: a space that cannot be encoded, or has no policy.
    """
    check_kind("config", config, TrainConfig, "a TrainConfig")
    parts = Parts() if parts is None else parts
    check_kind("parts", parts, Parts, "Parts(encoder=..., decoder=..., core=...)")
    for name, part in parts._asdict().items():
        if isinstance(part, nn.Module):
            raise ValueError(
                f"parts.{name}: expected a class or function that makes it, got a module made "
                f"already, {type(part).__name__}; each process and stage makes its own"
            )
    dim = config.memories.dim
    encoder = (parts.encoder or make_encoder)(observation_space, dim)
    core = make_core(config.memories) if parts.core is None else parts.core(dim)
    decoder = None
    if config.learner.reconstruction_weight:
        decoder = (parts.decoder or make_decoder)(observation_space, dim)
    normalizer = None
    if config.environments.normalize_observations:
        normalizer = make_normalizer(observation_space)
    return Agent(encoder, core, make_policy(action_space, dim), dim, decoder, normalizer)
