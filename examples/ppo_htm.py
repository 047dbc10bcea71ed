"""PPO with `HTMTransformer` in one file, to be copied: plain PyTorch, any Gymnasium id.

    python examples/ppo_htm.py CartPole-v1
    python examples/ppo_htm.py htm_pytorch.envs:htm_pytorch/CartPolePositions-v0 --frames 400000

What has to be right for an agent that remembers, and is easily wrong:

* the memory goes on across rollouts: the state at the beginning of a rollout is kept, once;
* `is_first` marks the first observation of an episode, so that its row begins with an empty memory;
* Gymnasium's vector environments reset in the step *after* an end. The final observation is a step
  like any other, but the action chosen at it does nothing: it must not be learned from. Its value
  counts where the episode was only cut;
* minibatches are whole rows: steps of a sequence cannot be shuffled.
"""

import argparse
import importlib
import time
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

from htm_pytorch import HTMTransformer
from htm_pytorch.nn import TransformerState


class Agent(nn.Module):
    """Observations [B, T, ...] -> memory -> logits [B, T, A] and values [B, T]."""

    def __init__(self, observations: gymnasium.Space, actions: int, dim: int):
        super().__init__()
        self.choices = self.start = 0
        if isinstance(observations, gymnasium.spaces.Discrete):
            self.choices, self.start = int(observations.n), int(observations.start)
        size = self.choices or int(np.prod(observations.shape))
        self.encoder = nn.Sequential(nn.Linear(size, dim), nn.GELU(), nn.Linear(dim, dim))
        self.memory = HTMTransformer(
            dim,
            depth=1,
            heads=4,
            dim_head=dim // 4,
            topk_mems=2,
            mem_chunk_size=16,
            mem_chunks=8,
            window=16,
            mlp_ratio=2,
            # Inside a rollout gradients flow through what is recalled; the state carries none.
            detach_memories=False,
        )
        self.policy = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, actions))
        self.value = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def forward(
        self, seen: Tensor, is_first: Tensor, state: TransformerState
    ) -> tuple[Tensor, Tensor, TransformerState]:
        if self.choices:
            flat = nn.functional.one_hot(seen.long() - self.start, self.choices).float()
        else:
            flat = seen.float().flatten(2)
        features, state = self.memory(self.encoder(flat), state, is_first)
        return self.policy(features), self.value(features)[..., 0], state


class Rollout(NamedTuple):
    """[B, T + 1] each: the last step is the first of the next rollout."""

    seen: Tensor
    is_first: Tensor
    counts: Tensor
    """Whether the action at a step does anything."""
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    """Of the step after it."""
    terminated: Tensor
    """Whether the step after it ended the episode for good."""


class Player:
    """The environments, and what goes on from rollout to rollout."""

    def __init__(self, env: SyncVectorEnv, agent: Agent, seed: int):
        self.env, self.agent = env, agent
        self.first_action = int(env.single_action_space.start)
        self.seen, _ = env.reset(seed=seed)
        self.is_first = np.ones(env.num_envs, bool)
        self.ended = np.zeros(env.num_envs, bool)
        self.state = agent.memory.initial_state(env.num_envs)
        self.returns = np.zeros(env.num_envs)
        self.finished: list[float] = []

    @torch.no_grad()
    def play(self, steps: int) -> tuple[Rollout, TransformerState]:
        # `select` copies: acting may write where the state lies.
        start = self.state.select(torch.arange(self.env.num_envs))
        history = []
        for step in range(steps + 1):
            seen = torch.as_tensor(self.seen)
            is_first = torch.as_tensor(self.is_first)
            logits, value, state = self.agent(seen[:, None], is_first[:, None], self.state)
            policy = torch.distributions.Categorical(logits=logits[:, 0])
            action = policy.sample()
            now = [seen, is_first, torch.as_tensor(~self.ended), action]
            now += [policy.log_prob(action), value[:, 0]]
            if step == steps:
                # Only its value is needed here: it is seen again as the first of the next rollout.
                nothing = torch.zeros_like(value[:, 0])
                history.append([*now, nothing, nothing.bool()])
                break
            self.state = state
            done = action.numpy() + self.first_action
            self.seen, reward, terminated, truncated, _ = self.env.step(done)
            self.is_first, self.ended = self.ended, terminated | truncated
            history.append([*now, torch.as_tensor(reward).float(), torch.as_tensor(terminated)])
            self.returns = np.where(self.is_first, 0, self.returns + reward)
            self.finished += self.returns[self.ended].tolist()
        return Rollout(*(torch.stack(part, 1) for part in zip(*history, strict=True))), start


def advantages_of(rollout: Rollout, discount: float, trace: float) -> Tensor:
    """Generalized advantage estimation, [B, T]; 0 where an action does nothing."""
    advantages = torch.zeros_like(rollout.values)
    following = torch.zeros_like(rollout.values[:, 0])
    for t in reversed(range(rollout.values.shape[1] - 1)):
        goes_on = ~rollout.terminated[:, t]
        error = rollout.rewards[:, t] - rollout.values[:, t]
        error = error + discount * goes_on * rollout.values[:, t + 1]
        # `following` is 0 at a final observation: nothing passes from one episode to another.
        following = (error + discount * trace * goes_on * following) * rollout.counts[:, t]
        advantages[:, t] = following
    return advantages[:, :-1]


def update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    state: TransformerState,
    scale: float,
    options: argparse.Namespace,
) -> None:
    rollout = rollout._replace(rewards=rollout.rewards / scale)
    advantages = advantages_of(rollout, options.discount, options.trace)
    targets = advantages + rollout.values[:, :-1]
    counts = rollout.counts[:, :-1]
    known = advantages[counts]
    advantages = (advantages - known.mean()) / (known.std(correction=0) + 1e-6)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(counts)).chunk(options.minibatches):
            logits, values, _ = agent(
                rollout.seen[rows], rollout.is_first[rows], state.select(rows)
            )
            policy = torch.distributions.Categorical(logits=logits[:, :-1])
            here, gain = counts[rows], advantages[rows]
            if not here.any():
                continue
            log_probs = policy.log_prob(rollout.actions[rows, :-1])
            ratio = (log_probs - rollout.log_probs[rows, :-1]).exp()
            clipped = ratio.clamp(1 - options.clip, 1 + options.clip)
            policy_loss = -torch.minimum(ratio * gain, clipped * gain)[here].mean()
            value_loss = 0.5 * (values[:, :-1] - targets[rows])[here].square().mean()
            entropy = policy.entropy()[here].mean()
            loss = policy_loss + 0.5 * value_loss - options.entropy * entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
            optimizer.step()


def positive(text: str) -> int:
    """Return an option's whole number, of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env", help="a Gymnasium id, or module:id")
    parser.add_argument("--frames", type=positive, default=200_000)
    parser.add_argument("--num-envs", type=positive, default=16)
    parser.add_argument("--steps", type=positive, default=128)
    parser.add_argument("--dim", type=positive, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=positive, default=4)
    parser.add_argument("--minibatches", type=positive, default=4)
    parser.add_argument("--discount", type=float, default=0.99)
    parser.add_argument("--trace", type=float, default=0.95)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--entropy", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    module, _, name = options.env.rpartition(":")
    if module:
        importlib.import_module(module)
    env = SyncVectorEnv(
        [lambda: gymnasium.make(name) for _ in range(options.num_envs)],
        autoreset_mode=AutoresetMode.NEXT_STEP,
    )
    if not isinstance(env.single_action_space, gymnasium.spaces.Discrete):
        parser.error(f"expected Discrete actions, got {env.single_action_space}")
    seen = env.single_observation_space
    if not isinstance(seen, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
        parser.error(f"expected observations of Box or Discrete, got {seen}")
    agent = Agent(seen, int(env.single_action_space.n), options.dim)
    optimizer = torch.optim.Adam(agent.parameters(), options.learning_rate, fused=True)
    player = Player(env, agent, options.seed)
    began, frames, scale = time.time(), 0, 1.0
    while frames < options.frames:
        rollout, state = player.play(options.steps)
        # Rewards in units of what an episode earns, so that values of any size can be learned.
        if player.finished:
            scale = max(1.0, float(np.std(player.finished[-100:])))
        update(agent, optimizer, rollout, state, scale, options)
        frames += options.num_envs * options.steps
        recent = np.mean(player.finished[-100:]) if player.finished else float("nan")
        rate = frames / (time.time() - began)
        print(f"{frames:>9,} frames  return {recent:8.2f}  {rate:,.0f} frames/s", flush=True)


if __name__ == "__main__":
    main()
