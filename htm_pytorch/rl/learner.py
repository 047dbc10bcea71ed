"""Learning from a rollout: PPO or V-trace, and reconstruction."""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.rl.agent import Agent, Outputs
from htm_pytorch.rl.checkpoint import CHECKPOINT
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.contract import State, detach
from htm_pytorch.rl.losses import (
    PolicyLosses,
    clipped_policy_losses,
    divergence,
    generalized_advantages,
    policy_gradient_losses,
    vtrace,
)
from htm_pytorch.rl.observations import Steps, nested
from htm_pytorch.rl.processes import World
from htm_pytorch.rl.rollout import Rollout


class NotFiniteError(ValueError):
    """A loss or gradient is infinite or not a number; the weights are those before it."""


class Losses(NamedTuple):
    """Means over all updates of a rollout."""

    policy_loss: float
    value_loss: float
    entropy: float
    reconstruction_loss: float
    divergence: float
    gradient_norm: float


class Learner:
    """An agent, its optimizer, and how they change by a rollout.

    Args:
        agent: that learns.
        config: how.
        world: the processes that learn as one; `rows` of the environments are here.
    """

    def __init__(self, agent: Agent, config: TrainConfig, world: World):
        self.agent, self.config, self.world = agent, config, world
        self.optimizer = torch.optim.Adam(
            agent.parameters(), config.learner.learning_rate, fused=True
        )
        self.rows = world.rows(config.environments.num_envs)
        self.before: tuple[Steps, State] | None = None

    def learn(self, rollout: Rollout, generator: torch.Generator, progress: float) -> Losses:
        """Learn from a rollout, `progress` of the way from 0 to 1 through the training.

        Raises:
            NotFiniteError: before the optimizer has taken a step by it.
        """
        options, total = self.config.learner, self.config.environments.num_envs
        share = 1 - (1 - options.final_learning_rate) * progress
        for group in self.optimizer.param_groups:
            group["lr"] = share * options.learning_rate
        entropy_weight = options.entropy_weight * (1 - (1 - options.final_entropy) * progress)
        advantages, targets = self._advantages(rollout)
        found: list[Tensor] = []
        for _ in range(options.epochs):
            rollout = self._restarted(rollout)
            # Drawn for all rows, wherever they are.
            order = torch.randperm(total, generator=generator, device="cpu")
            where = torch.rand(total, generator=generator, device="cpu")[
                self.rows.start : self.rows.stop
            ]
            for chosen in order.chunk(options.minibatches):
                local = chosen[(chosen >= self.rows.start) & (chosen < self.rows.stop)]
                local = local - self.rows.start
                share_of_rows = len(local) / len(chosen)
                parts = (rollout.rows(local), advantages[local], targets[local], where[local])
                if self._is_far(found):
                    break
                found.append(self._update(*parts, share_of_rows, entropy_weight))
        self._remember(rollout)
        return Losses(*torch.stack(found).mean(0).tolist())

    def _is_far(self, found: list[Tensor]) -> bool:
        """Whether the policy has moved so far from the one that played that it is time to stop."""
        limit = self.config.learner.target_kl
        return bool(limit and found and found[-1][Losses._fields.index("divergence")] > limit)

    def _update(
        self,
        rollout: Rollout,
        advantages: Tensor,
        targets: Tensor,
        where: Tensor,
        share_of_rows: float,
        entropy_weight: float,
    ) -> Tensor:
        """Take one step by some rows; return the losses and the length of the gradient."""
        options = self.config.learner
        total = self.world.sum(rollout.counts.sum().float())
        self.optimizer.zero_grad()
        losses = torch.zeros(5, dtype=torch.float64, device="cpu")
        if len(rollout.at):
            policy, retold, moved = self._losses(rollout, advantages, targets, where, total)
            # Of means over all rows, this is the part of those that are here.
            retold = retold * share_of_rows
            loss = (
                policy.policy
                + options.value_weight * policy.value
                - entropy_weight * policy.entropy
                + options.reconstruction_weight * retold
            )
            loss.backward()
            losses += torch.stack([*policy, retold, moved]).detach().double().cpu()
        losses = self.world.sum(losses)
        self.world.sum_gradients(self.agent.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.agent.parameters(), options.max_grad_norm)
        if not (losses.isfinite().all() and norm.isfinite()):
            named = zip(Losses._fields[:5], losses.tolist(), strict=True)
            told = ", ".join(f"{name} {value:.3g}" for name, value in named)
            saved = (self.config.run_dir / CHECKPOINT).exists()
            good = "the last checkpoint is good" if saved else "there is no checkpoint yet"
            raise NotFiniteError(
                f"learning_rate: expected finite losses and gradients, got {told}, a gradient of "
                f"length {float(norm):.3g}; {good}. A smaller "
                "--learning-rate, --max-grad-norm or --normalize-observations may help"
            )
        self.optimizer.step()
        return torch.cat([losses, norm.double().cpu()[None]])

    def _losses(
        self, rollout: Rollout, advantages: Tensor, targets: Tensor, where: Tensor, total: Tensor
    ) -> tuple[PolicyLosses, Tensor, Tensor]:
        options, device = self.config.learner, self.agent.device
        points = rollout.at.shape[1]
        retold = _steps_at(rollout.seen, where)
        output = self._outputs(rollout, torch.cat([rollout.at, retold], 1).to(device))
        policy = self.agent.distribution(output.policy[:, :points])
        actions, counts = rollout.actions.to(device), rollout.counts.T.to(device)
        log_probs, entropies = policy.log_prob(actions).T, policy.entropy().T
        values, old_log_probs = output.values[:, :points].T, rollout.log_probs.T.to(device)
        total = total.to(device)
        if options.algorithm == "ppo":
            losses = clipped_policy_losses(
                log_probs,
                entropies,
                values,
                old_log_probs,
                rollout.values.T.to(device),
                advantages.T.to(device),
                targets.T.to(device),
                counts,
                options.clip,
                options.value_clip,
                total,
            )
        else:
            with torch.no_grad():
                corrected = vtrace(
                    self._rewards(rollout).T.to(device),
                    options.discount * rollout.goes_on.T.float().to(device),
                    options.trace * rollout.is_followed.T.float().to(device),
                    values.detach(),
                    torch.cat([values[1:], torch.zeros_like(values[:1])]).detach(),
                    (log_probs.detach() - old_log_probs).where(counts, 0.0),
                )
            losses = policy_gradient_losses(log_probs, entropies, values, corrected, counts, total)
        moved = divergence(log_probs.detach(), old_log_probs, counts, total)
        if not options.reconstruction_weight:
            return losses, output.features.new_zeros(()), moved
        row = torch.arange(len(where), device="cpu")
        shown = nested(lambda p: p[row, retold[:, 0]].to(device), rollout.seen.observation)
        return losses, self.agent.reconstruction_loss(output.features[:, points], shown), moved

    def _outputs(self, rollout: Rollout, at: Tensor) -> Outputs:
        """Return the outputs at the steps `at` [B, P]; gradients reach back `bptt` steps."""
        agent, reach = self.agent, self.config.rollouts.bptt
        seen = rollout.seen.map(lambda part: part.to(agent.device))
        state = agent.initial_state(len(at)) if rollout.state is None else rollout.state
        length = seen.is_first.shape[1]
        if not 0 < reach < length:
            return agent(seen, state, at)[0]
        pieces: list[Tensor] = []
        for start in range(0, length, reach):
            piece = seen.map(lambda part, s=start: part[:, s : s + reach])
            features, state = agent.remember(piece, state, None)
            state = detach(state)
            pieces.append(features)
        features = torch.cat(pieces, 1)
        return agent.heads(features.gather(1, at[..., None].expand(-1, -1, features.shape[2])))

    def _advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the advantages of PPO and what values should be, [B, P] each."""
        options, values = self.config.learner, rollout.values.T
        advantages = generalized_advantages(
            self._rewards(rollout).T,
            options.discount * rollout.goes_on.T.float(),
            options.trace * rollout.is_followed.T.float(),
            values,
            torch.cat([values[1:], torch.zeros_like(values[:1])]),
        ).T.contiguous()
        targets = advantages + rollout.values
        if options.normalize_advantages:
            known = advantages.double().where(rollout.counts, 0.0)
            sums = torch.stack([rollout.counts.sum().double(), known.sum(), (known**2).sum()])
            count, total, squares = self.world.sum(sums)
            mean = total / count.clamp(min=1)
            deviation = (squares / count.clamp(min=1) - mean**2).clamp(min=0).sqrt()
            advantages = ((advantages - mean) / (deviation + 1e-6)).float()
        return advantages, targets

    def _rewards(self, rollout: Rollout) -> Tensor:
        if self.config.environments.normalize_rewards:
            return rollout.rewards / self.agent.returns.scale().float().cpu()
        return rollout.rewards

    def _restarted(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the state that learning starts from."""
        start = self.config.rollouts.start
        if rollout.state is None or start == "stored":
            return rollout
        if start == "zeros" or self.before is None:
            return rollout._replace(state=None if start == "zeros" else rollout.state)
        steps, state = self.before
        with torch.no_grad():
            seen = steps.map(lambda part: part.to(self.agent.device))
            state = self.agent.initial_state(len(rollout.at)) if state is None else state
            return rollout._replace(state=self.agent.absorb(seen, state))

    def _remember(self, rollout: Rollout) -> None:
        """Keep what the state at the beginning of the next rollout is computed from."""
        if self.config.rollouts.start == "refreshed":
            last = rollout.seen.is_first.shape[1] - 1
            self.before = rollout.seen.map(lambda part: part[:, :last]), rollout.state


def _steps_at(seen: Steps, where: Tensor) -> Tensor:
    """Return for each row the step [B, 1] that lies `where` [B], 0 to 1, among those that exist."""
    length = seen.is_first.shape[1]
    if seen.exists is None:
        return (where * length).long().clamp(max=length - 1)[:, None]
    order = (~seen.exists).to(torch.int8).argsort(dim=1, stable=True)
    count = seen.exists.sum(1)
    place = torch.minimum((where * count).long(), (count - 1).clamp(min=0))
    return order.gather(1, place[:, None])
