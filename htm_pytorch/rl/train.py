"""Training on Ballet: one loop, read from top to bottom."""

import collections
import csv
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_pytorch.rl.agent import Agent
from htm_pytorch.rl.checkpoint import Checkpoint, save_checkpoint
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.losses import clipped_policy_losses, masked_mean
from htm_pytorch.rl.plots import plot_curve
from htm_pytorch.rl.rollout import Rollout, play
from htm_pytorch.rl.task import make_agent, make_env

CHECKPOINT, CONFIG, METRICS, CURVE = (
    "checkpoint.safetensors",
    "config.json",
    "metrics.csv",
    "curve.png",
)
RECENT = 2_000
"""Episodes that the success rate of the training is taken over."""


class Metrics(NamedTuple):
    """One batch of episodes; the columns of metrics.csv."""

    episodes: int
    frames: int
    success: float
    decisions: float
    policy_loss: float
    value_loss: float
    entropy: float
    reconstruction_loss: float
    seconds: float


def train(config: TrainConfig) -> Agent:
    """Train an agent, leave the run in `config.run_dir`, and return it.

    Raises:
        ValueError: `run_dir` holds a run and `resume` is not set, or a run of another config.
    """
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    torch.manual_seed(config.seed)
    agent = make_agent(config)
    optimizer = torch.optim.Adam(agent.parameters(), config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    env = make_env(config, config.num_envs)
    env.reset(seed=config.seed)
    checkpoint = _begin(config)
    batch, frames, seconds = 0, 0, 0.0
    recent: collections.deque[float] = collections.deque(maxlen=RECENT)
    if checkpoint is not None:
        checkpoint.restore_agent(agent)
        checkpoint.restore_training(optimizer, generator)
        batch, frames = checkpoint.progress["batch"], checkpoint.progress["frames"]
        seconds = checkpoint.progress["seconds"]
        recent.extend(checkpoint.progress["recent"])
        env.np_random.bit_generator.state = checkpoint.progress["environment"]
    history = _History(config.run_dir / METRICS, keep=batch)
    steps = env.unwrapped.choice_step + 1 + config.decisions * config.action_repeat
    progress = tqdm(
        total=config.episodes,
        initial=batch * config.num_envs,
        unit=" episodes",
        desc="training",
        smoothing=0.05,
    )
    with (
        SummaryWriter(config.run_dir, purge_step=batch * config.num_envs + 1) as board,
        history,
        progress,
    ):
        while batch * config.num_envs < config.episodes and not _done(recent, config.stop_at):
            began = time.perf_counter()
            rollout, returns = play(
                env,
                agent,
                steps,
                action_repeat=config.action_repeat,
                discount=config.discount,
                trace=config.trace,
                generator=generator,
            )
            losses = update(agent, optimizer, rollout, config, generator)
            recent.extend(np.nan_to_num(returns).tolist())
            batch += 1
            frames += rollout.seen.instructions.numel()
            seconds += time.perf_counter() - began
            metrics = Metrics(
                episodes=batch * config.num_envs,
                frames=frames,
                success=float(np.mean(recent)),
                decisions=rollout.counts.sum(1).float().mean().item(),
                **losses,
                seconds=round(seconds, 3),
            )
            history.add(metrics)
            for name, value in metrics._asdict().items():
                board.add_scalar(name, value, metrics.episodes)
            rate = rollout.seen.instructions.numel() / (time.perf_counter() - began)
            progress.set_postfix_str(f"success {metrics.success:.3f}, {rate:,.0f} frames/s")
            progress.update(config.num_envs)
            finished = metrics.episodes >= config.episodes or _done(recent, config.stop_at)
            if finished or batch % config.checkpoint_every == 0:
                save_checkpoint(
                    config.run_dir / CHECKPOINT,
                    agent,
                    optimizer,
                    generator,
                    config=config.to_json(),
                    progress={
                        "batch": batch,
                        "frames": frames,
                        "seconds": seconds,
                        "recent": list(recent),
                        "environment": env.np_random.bit_generator.state,
                    },
                )
    plot_curve(config.run_dir / METRICS, config.run_dir / CURVE, chance=1 / config.num_dancers)
    return agent


def update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: TrainConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Learn from one rollout and return the losses of its last minibatch."""
    advantages = rollout.advantages - masked_mean(rollout.advantages, rollout.counts)
    advantages = advantages / (masked_mean(advantages**2, rollout.counts).sqrt() + 1e-6)
    rollout = rollout._replace(advantages=advantages)
    last: dict[str, Tensor] = {}
    for _ in range(config.epochs):
        order = torch.randperm(config.num_envs, generator=generator)
        for index in order.chunk(config.minibatches):
            last = _losses(agent, rollout.rows(index), config, generator)
            loss = (
                last["policy_loss"]
                + config.value_weight * last["value_loss"]
                - config.entropy_weight * last["entropy"]
                + config.reconstruction_weight * last["reconstruction_loss"]
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
    return {name: loss.item() for name, loss in last.items()}


def _losses(
    agent: Agent, rows: Rollout, config: TrainConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    batch, points = rows.at.shape
    length = rows.seen.instructions.shape[1]
    retold = torch.randint(length, (batch, 1), generator=generator)
    output, _ = agent(rows.seen, agent.initial_state(batch), torch.cat([rows.at, retold], 1))
    policy = clipped_policy_losses(
        output.logits[:, :points].transpose(0, 1),
        output.values[:, :points].T,
        rows.actions.T,
        rows.log_probs.T,
        rows.advantages.T,
        rows.returns.T,
        rows.counts.T,
        config.clip,
    )
    row = torch.arange(batch)
    shown = [part[row, retold[:, 0]] for part in (rows.seen.frames, rows.seen.instructions)]
    return {
        "policy_loss": policy.policy,
        "value_loss": policy.value,
        "entropy": policy.entropy,
        "reconstruction_loss": agent.reconstruction_loss(output.features[:, points], *shown),
    }


def _done(recent: collections.deque[float], stop_at: float) -> bool:
    return len(recent) == RECENT and float(np.mean(recent)) >= stop_at


def _begin(config: TrainConfig) -> Checkpoint | None:
    """Make the run's folder, or find the checkpoint to go on from."""
    path = config.run_dir / CHECKPOINT
    record = config.run_dir / CONFIG
    if (record.exists() or path.exists()) and not config.resume:
        raise ValueError(
            f"run_dir: {str(config.run_dir)!r} already holds a run; "
            "pass --resume to go on with it, or another --run-dir"
        )
    checkpoint = Checkpoint(path) if path.exists() else None
    if checkpoint is not None:
        differing = config.differs_in(TrainConfig.from_json(checkpoint.config))
        if differing:
            raise ValueError(
                f"run_dir: {str(config.run_dir)!r} holds a run of another config, "
                f"different in {differing}; see its {CONFIG}, or pass another --run-dir"
            )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(config.to_json() + "\n")
    return checkpoint


class _History:
    """metrics.csv, one row a batch; rows after the checkpoint are played again, so they go."""

    def __init__(self, path: Path, keep: int):
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))[1 : keep + 1]
        kept = path.with_suffix(".tmp")
        with kept.open("w", newline="") as file:
            csv.writer(file).writerows([Metrics._fields, *rows])
        kept.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def add(self, metrics: Metrics) -> None:
        self._writer.writerow(metrics)
        self._file.flush()

    def __enter__(self) -> "_History":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
