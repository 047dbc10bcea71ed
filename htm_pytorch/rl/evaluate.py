"""How often a trained agent succeeds on episodes it never saw, and what it recalled in one."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from htm_pytorch.envs import ballet_tables as tables
from htm_pytorch.rl.agent import Agent
from htm_pytorch.rl.checkpoint import Checkpoint
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.plots import Moment, plot_recall
from htm_pytorch.rl.rollout import Rollout, play
from htm_pytorch.rl.task import make_agent, make_env
from htm_pytorch.rl.train import CHECKPOINT

PICTURE = "recall.png"
UNSEEN = 1_000_003
"""Added to the seed of the training: other levels, drawn from some 10^9 even with two dancers."""


class Evaluation(NamedTuple):
    """The judgement on a run."""

    success: float
    """Share of the episodes that ended at the right dancer."""
    episodes: int
    chance: float
    """The same share for an agent that walks to any dancer."""
    picture: Path
    """What was recalled in one of the episodes."""


def evaluate(run_dir: Path, episodes: int | None = None, seed: int | None = None) -> Evaluation:
    """Play unseen episodes with the run's agent, always taking its most probable action.

    Args:
        run_dir: of a run that has a checkpoint.
        episodes: how many; default the config's `eval_episodes`.
        seed: of the episodes; default one that no training of this config uses.

    Raises:
        ValueError: no run there, or a broken one.
    """
    if episodes is not None and episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    path = Path(run_dir) / CHECKPOINT
    if not path.exists():
        raise ValueError(f"run_dir: expected a run with a {CHECKPOINT}, found none in {run_dir}")
    checkpoint = Checkpoint(path)
    config = TrainConfig.from_json(checkpoint.config, run_dir=Path(run_dir))
    agent = make_agent(config)
    checkpoint.restore_agent(agent)
    count = config.eval_episodes if episodes is None else episodes
    seed = config.seed + UNSEEN if seed is None else seed
    returns = [play_unseen(agent, config, size, seed + n)[1] for n, size in _batches(count)]
    picture = config.run_dir / PICTURE
    plot_recall(watch(agent, config, seed), picture)
    success = float(np.mean(np.concatenate(returns) > 0))
    return Evaluation(success, count, 1 / config.num_dancers, picture)


def play_unseen(
    agent: Agent, config: TrainConfig, episodes: int, seed: int
) -> tuple[Rollout, np.ndarray]:
    """Play whole episodes by the agent's most probable actions; return them and their returns."""
    env = make_env(config, episodes)
    env.reset(seed=seed)
    return play(
        env,
        agent,
        env.unwrapped.max_steps + 1,
        action_repeat=config.action_repeat,
        discount=config.discount,
        trace=config.trace,
        generator=None,
    )


def watch(agent: Agent, config: TrainConfig, seed: int) -> Moment:
    """Play one episode and return what the agent saw, chose and recalled at its first choice."""
    rollout, returns = play_unseen(agent, config, 1, seed)
    at = rollout.at[:, :1]
    with torch.no_grad():
        output, recalls = agent.recall(rollout.seen, agent.initial_state(1), at)
    recall = recalls[-1]
    # Chunks of this one call are counted behind the ring's empty slots.
    chunks = recall.chunks[0, 0] - config.mem_chunks
    weights = np.zeros(int(at) + 1)
    for rank, chunk in enumerate(chunks.tolist()):
        if chunk >= 0:
            steps = slice(chunk * config.mem_chunk_size, (chunk + 1) * config.mem_chunk_size)
            inside = recall.step_weights[0, 0, :, rank].mean(0)
            weights[steps] += (recall.chunk_weights[0, 0, rank] * inside).numpy()
    frames = rollout.seen.frames[0].numpy()
    symbolic = config.observation == "symbols"
    pictures = np.stack([tables.draw(frame) for frame in frames]) if symbolic else frames
    return Moment(
        pictures=pictures[: int(at) + 1],
        weights=weights,
        chunk_size=config.mem_chunk_size,
        instruction=tables.INSTRUCTIONS[int(rollout.seen.instructions[0, int(at)])],
        action=list(tables.DIRECTIONS)[int(output.logits[0, 0].argmax())],
        success=bool(returns[0] > 0),
    )


def _batches(count: int, most: int = 500) -> list[tuple[int, int]]:
    return [(start, min(most, count - start)) for start in range(0, count, most)]
