"""Training loops of others, to hold ours against: PPO with an LSTM, as people write and run it.

`in_one_file` is the loop that a single-file implementation has (as CleanRL's `ppo_atari_lstm.py`,
v1.0: the LSTM is called once a step, in acting and in learning, since episodes end inside). Its
sentences are ours. `stable_baselines` runs `RecurrentPPO` of sb3-contrib.
"""

import time
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class Sizes(NamedTuple):
    """What all loops share."""

    env: str = "CartPole-v1"
    num_envs: int = 16
    steps: int = 128
    dim: int = 64
    epochs: int = 4
    minibatches: int = 4


class _Agent(nn.Module):
    """Encoder -> LSTM -> policy and value."""

    def __init__(self, inputs: int, actions: int, dim: int):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(inputs, dim), nn.Tanh(), nn.Linear(dim, dim), nn.Tanh()
        )
        self.lstm = nn.LSTM(dim, dim)
        self.actor, self.critic = nn.Linear(dim, actions), nn.Linear(dim, 1)

    def features(self, x: Tensor, state: State, done: Tensor) -> tuple[Tensor, State]:
        """Return the features [T * B, D] of x [T * B, I] with `done` [T, B] before each step."""
        hidden = self.encoder(x).unflatten(0, done.shape)
        parts: list[Tensor] = []
        for one, ended in zip(hidden, done, strict=True):
            keep = (1.0 - ended)[None, :, None]
            part, state = self.lstm(one[None], (keep * state[0], keep * state[1]))
            parts.append(part)
        return torch.cat(parts).flatten(0, 1), state

    def judge(
        self, x: Tensor, state: State, done: Tensor, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, State]:
        """Return action, its log probability, the entropy, the value, and the state after."""
        features, state = self.features(x, state, done)
        policy = torch.distributions.Categorical(logits=self.actor(features))
        action = policy.sample() if action is None else action
        value = self.critic(features)[:, 0]
        return action, policy.log_prob(action), policy.entropy(), value, state


def in_one_file(sizes: Sizes, rollouts: int) -> float:
    """Train for so many rollouts, after one that is not counted; return frames a second."""
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(sizes.env)] * sizes.num_envs)
    inputs = int(np.prod(envs.single_observation_space.shape or ()))
    agent = _Agent(inputs, int(envs.single_action_space.n), sizes.dim)  # pyright: ignore
    optimizer = torch.optim.Adam(agent.parameters(), 2.5e-4, eps=1e-5)
    T, B = sizes.steps, sizes.num_envs
    seen, actions = torch.zeros(T, B, inputs), torch.zeros(T, B, dtype=torch.int64)
    log_probs, rewards, dones, values = (torch.zeros(T, B) for _ in range(4))
    observed, done = torch.as_tensor(envs.reset(seed=0)[0]), torch.zeros(B)
    state = (torch.zeros(1, B, sizes.dim), torch.zeros(1, B, sizes.dim))
    began = time.process_time()
    for rollout in range(rollouts + 1):
        if rollout == 1:
            began = time.process_time()
        start = (state[0].clone(), state[1].clone())
        for t in range(T):
            seen[t], dones[t] = observed, done
            with torch.no_grad():
                action, log_prob, _, value, state = agent.judge(observed, state, done[None])
            actions[t], log_probs[t], values[t] = action, log_prob, value
            new, reward, terminated, truncated, _ = envs.step(action.numpy())
            observed, rewards[t] = torch.as_tensor(new), torch.as_tensor(reward)
            done = torch.as_tensor(terminated | truncated).float()
        with torch.no_grad():
            *_, last, _ = agent.judge(observed, state, done[None])
        advantages, following = torch.zeros(T, B), torch.zeros(B)
        for t in reversed(range(T)):
            goes_on = 1.0 - (done if t == T - 1 else dones[t + 1])
            after = last if t == T - 1 else values[t + 1]
            error = rewards[t] + 0.99 * after * goes_on - values[t]
            following = error + 0.99 * 0.95 * goes_on * following
            advantages[t] = following
        returns = advantages + values
        _learn(agent, optimizer, sizes, start, seen, actions, log_probs, dones, advantages, returns)
    return rollouts * T * B / (time.process_time() - began)


def _learn(
    agent: _Agent,
    optimizer: torch.optim.Optimizer,
    sizes: Sizes,
    start: State,
    seen: Tensor,
    actions: Tensor,
    log_probs: Tensor,
    dones: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    for _ in range(sizes.epochs):
        for rows in torch.randperm(sizes.num_envs).chunk(sizes.minibatches):
            state = (start[0][:, rows], start[1][:, rows])
            _, log_prob, entropy, value, _ = agent.judge(
                seen[:, rows].flatten(0, 1), state, dones[:, rows], actions[:, rows].flatten()
            )
            ratio = (log_prob - log_probs[:, rows].flatten()).exp()
            gain = advantages[:, rows].flatten()
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            policy = torch.max(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)).mean()
            error = 0.5 * ((value - returns[:, rows].flatten()) ** 2).mean()
            loss = policy + 0.5 * error - 0.01 * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def stable_baselines(sizes: Sizes, rollouts: int) -> float:
    """Train `RecurrentPPO` as long; return frames a second. Needs sb3-contrib."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    frames = sizes.num_envs * sizes.steps
    model = RecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env(sizes.env, sizes.num_envs, seed=0),
        n_steps=sizes.steps,
        batch_size=frames // sizes.minibatches,
        n_epochs=sizes.epochs,
        policy_kwargs={
            "lstm_hidden_size": sizes.dim,
            "n_lstm_layers": 1,
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "net_arch": [],
        },
        seed=0,
        device="cpu",
    )
    model.learn(frames)
    began = time.process_time()
    model.learn(rollouts * frames, reset_num_timesteps=False)
    return rollouts * frames / (time.process_time() - began)
