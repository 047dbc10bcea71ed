"""`Player`: an agent in its environments, and what both carry from step to step."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_pytorch.rl.agent import Agent, Outputs
from htm_pytorch.rl.environments import Environments, Seen
from htm_pytorch.rl.observations import Steps, as_tensor, nested
from htm_pytorch.rl.received import check_finite

MOST_WAITING = 1024
"""Steps that wait to enter the memory together."""


class Episode(NamedTuple):
    """One that ended."""

    row: int
    total: float
    """Sum of its rewards."""
    length: int
    """Steps."""
    step: int = 0
    """Of the rollout, after which it ended."""


class Choice(NamedTuple):
    """What the agent thought and chose at one step; numpy, the rows first."""

    actions: np.ndarray
    """[B, A]."""
    log_probs: np.ndarray
    """[B] of the actions."""
    values: np.ndarray
    """[B]."""


class Player:
    """Plays: asks the agent where an action counts, and holds each decision for some steps.

    What is seen waits until some row has a point; then all of it enters the memory at once, which
    is the same as one by one and costs less.

    Args:
        environments: B rows.
        agent: chooses the actions.
        action_repeat: steps that one decision lasts.
        rows: which of all rows these are; random numbers are drawn for all, so that a row plays
            the same whichever others are in its process.
        total: how many rows there are in all.
    """

    def __init__(
        self,
        environments: Environments,
        agent: Agent,
        action_repeat: int = 1,
        rows: range | None = None,
        total: int | None = None,
    ):
        self.environments, self.agent = environments, agent
        self.action_repeat = action_repeat
        self.rows = range(environments.num_envs) if rows is None else rows
        self.total = len(self.rows) if total is None else total
        self.seen: Seen

    def begin(self, seeds: list[int]) -> None:
        """Begin new episodes in all rows, with nothing remembered."""
        count = self.environments.num_envs
        self.seen = self.environments.reset(seeds)
        self.state = self.agent.initial_state(count)
        self.held = np.zeros(count, np.int64)
        kind = np.float32 if self.agent.policy.dtype.is_floating_point else np.int64
        self.actions = np.zeros((count, self.agent.policy.size), kind)
        self.returns, self.lengths = np.zeros(count), np.zeros(count, np.int64)
        self.waiting: list[Steps] = []

    def close(self) -> None:
        """Give back what the environments hold."""
        self.environments.close()

    def look(self) -> tuple[Steps, np.ndarray]:
        """Take note of what is seen; return it [B, 1, ...], and [B] where a decision is due.

        Raises:
            ValueError: something that is seen is not finite.
        """
        if len(self.waiting) >= MOST_WAITING:
            self.absorb()
        step = self._shown()
        self.waiting.append(step)
        return step, (self.held == 0) & self.seen.acts

    def decide(self, generator: torch.Generator | None) -> tuple[np.ndarray, Choice | None]:
        """Look, and choose where a decision is due; return [B] where, and what was chosen.

        Without a generator the most probable action is taken.
        """
        _, decides = self.look()
        return decides, self.ask(decides, generator) if decides.any() else None

    def ask(self, decides: np.ndarray, generator: torch.Generator | None) -> Choice:
        """Let all that waits enter the memory, and choose for the rows [B] that decide.

        Without a generator the most probable action is taken.
        """
        last = torch.full((len(decides), 1), len(self.waiting) - 1, device="cpu")
        output, self.state = self.agent(self._recent(), self.state, last.to(self.agent.device))
        policy = self.agent.distribution(output.policy[:, 0].cpu())
        if generator is None:
            actions = policy.mode()
        else:
            noise = self.agent.policy.noise(self.total, generator)
            actions = policy.sample(noise[self.rows.start : self.rows.stop])
        choice = Choice(
            actions.numpy(), policy.log_prob(actions).numpy(), output.values[:, 0].cpu().numpy()
        )
        self.actions = np.where(decides[:, None], choice.actions, self.actions)
        self.held = np.where(decides, self.action_repeat, self.held)
        return choice

    def values(self) -> np.ndarray:
        """Return the values [B] of what is seen now, which the memory then has not yet got."""
        self.absorb()
        now = self._shown().map(lambda part: part.to(self.agent.device))
        at = torch.zeros(len(self.held), 1, dtype=torch.int64, device=self.agent.device)
        output: Outputs = self.agent(now, self.state, at)[0]
        return output.values[:, 0].cpu().numpy()

    def absorb(self) -> None:
        """Let all that waits enter the memory."""
        if self.waiting:
            self.state = self.agent.absorb(self._recent(), self.state)

    def advance(self) -> list[Episode]:
        """Do the actions and return the episodes that ended by them.

        Raises:
            ValueError: a reward is not finite.
        """
        self.seen = seen = self.environments.step(self.agent.policy.to_environment(self.actions))
        rewards = torch.from_numpy(seen.reward)
        check_finite(self.environments.name, self.rows.start, "rewards", rewards)
        moved = np.ones_like(seen.is_first) if seen.exists is None else seen.exists
        held = np.where(moved, np.maximum(self.held - 1, 0), self.held)
        self.held = np.where(seen.is_first | seen.ended, 0, held)
        self.returns = np.where(seen.is_first, 0.0, self.returns + seen.reward)
        self.lengths = np.where(seen.is_first, 0, self.lengths + moved)
        return [
            Episode(int(row), float(self.returns[row]), int(self.lengths[row]))
            for row in np.flatnonzero(seen.ended)
        ]

    def _shown(self) -> Steps:
        """Return what is seen now [B, 1, ...]."""
        step = one_step(self.seen)
        name, first = self.environments.name, self.rows.start
        check_finite(name, first, "observations", step.observation)
        return step

    def _recent(self) -> Steps:
        steps, self.waiting = joined(self.waiting), []
        return steps.map(lambda part: part.to(self.agent.device))


def one_step(seen: Seen) -> Steps:
    """Return what is seen as steps [B, 1, ...]."""
    exists = None if seen.exists is None else as_tensor(seen.exists)[:, None]
    observation = nested(lambda part: as_tensor(part)[:, None], seen.observation)
    return Steps(observation, as_tensor(seen.is_first)[:, None], exists)


def joined(steps: list[Steps]) -> Steps:
    """Return steps [B, T, ...] one after another."""
    if len(steps) == 1:
        return steps[0]
    exists = None
    if any(step.exists is not None for step in steps):
        parts = [
            torch.ones_like(step.is_first) if step.exists is None else step.exists for step in steps
        ]
        exists = torch.cat(parts, 1)

    def cat(*parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)

    observation = nested(cat, *(step.observation for step in steps))
    return Steps(observation, torch.cat([step.is_first for step in steps], 1), exists)
