"""How well an agent plays episodes that it never saw."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from htm_pytorch.memory import MemoryFileError
from htm_pytorch.rl.agent import Agent, Parts, make_agent
from htm_pytorch.rl.checkpoint import checkpoint_of
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.making import make_environments, most_steps
from htm_pytorch.rl.plots import check_film, write_film
from htm_pytorch.rl.run import EVALUATIONS
from htm_pytorch.rl.unseen import begin, most_rows
from htm_pytorch.shapes import check_at_least

PATIENCE = 1_000_000
"""Steps of all rows together, in which an episode has to end."""


class Evaluation(NamedTuple):
    """The judgement on an agent."""

    mean: float
    """Mean return."""
    interval: float
    """Half the width of its 95 % confidence interval."""
    length: float
    """Mean steps of an episode."""
    episodes: int
    greedy: bool
    """Whether the most probable actions were taken; else they were sampled."""

    def __str__(self) -> str:
        """Say it in a line."""
        how = "greedy" if self.greedy else "sampled"
        return (
            f"return {self.mean:.3f} +- {self.interval:.3f} (95 %) in {self.episodes} unseen "
            f"episodes of {self.length:.1f} steps, {how}"
        )


def evaluate(
    run_dir: Path | str,
    episodes: int | None = None,
    seed: int | None = None,
    *,
    greedy: bool = True,
    parts: Parts | None = None,
    render: Path | None = None,
    env_args: Sequence[str] = (),
    mem_chunks: int | None = None,
    patience: int = PATIENCE,
) -> Evaluation:
    """Play unseen episodes with the run's agent, and note the result in its folder.

    They may be harder than those of the training: no parameter depends on how long the past is.

    Args:
        run_dir: of a run that has a checkpoint.
        episodes: how many; default the config's `eval_episodes`.
        seed: of the episodes; default one that no training of this config uses.
        greedy: take the most probable actions; else sample them.
        parts: those that the agent was trained with.
        render: a file for moving pictures of one episode, .gif or .mp4.
        env_args: arguments of the environment that replace the run's, as `htm train` takes them.
        mem_chunks: how many chunks a layer remembers, instead of as many as in the training.
        patience: steps of all rows together in which an episode has to end.

    Raises:
        ValueError: no run there, or a broken one; or an argument that does not fit it.
    """
    if episodes is not None:
        check_at_least("episodes", episodes, 1)
    check_at_least("patience", patience, 1)
    if render is not None:
        render = Path(render)
        check_film("render", render)
    agent, config, stage = load_agent(run_dir, parts, env_args, mem_chunks)
    count = config.budget.eval_episodes if episodes is None else episodes
    if seed is not None:
        config = config.replace(seed=seed)
    # Before the episodes are played, as not every environment draws itself.
    pictures = [] if render is None else film(agent, config, greedy, stage, patience)
    result = judge(agent, config, count, greedy=greedy, stage=stage, patience=patience)
    others = {"env_args": list(env_args), "mem_chunks": mem_chunks}
    about = {"seed": config.seed} | {name: given for name, given in others.items() if given}
    _note(Path(run_dir), about | result._asdict())
    if render is not None:
        write_film(pictures, render)
    return result


def _note(run_dir: Path, result: dict[str, Any]) -> None:
    """Add a line to the run's record of evaluations, if its folder can be written to."""
    line = json.dumps(result)
    with contextlib.suppress(PermissionError), (run_dir / EVALUATIONS).open("a") as file:
        file.write(line + "\n")


def load_agent(
    run_dir: Path | str,
    parts: Parts | None = None,
    env_args: Sequence[str] = (),
    mem_chunks: int | None = None,
) -> tuple[Agent, TrainConfig, int]:
    """Return the run's agent, its config, and the stage of the curriculum that it had reached.

    Args:
        run_dir: of a run that has a checkpoint.
        parts: those that the agent was trained with.
        env_args: arguments of the environment that replace the run's, those of its stage included.
        mem_chunks: how many chunks a layer remembers; default the run's.

    Raises:
        ValueError: no run there, or a broken one; or an argument that does not fit it.
    """
    checkpoint = checkpoint_of(run_dir)
    config, stage = checkpoint.config, int(checkpoint.progress["stage"])
    if env_args:
        options = config.environments
        given = (*options.env_args, *options.curriculum[stage : stage + 1], *env_args)
        config, stage = config.replace(env_args=given, curriculum=()), 0
    if mem_chunks is not None:
        if config.memories.memory != "htm":
            kind = config.memories.memory
            raise ValueError(f"mem_chunks: expected none for a run with {kind}, got {mem_chunks}")
        config = config.replace(mem_chunks=mem_chunks)
    with contextlib.closing(make_environments(config, 1, stage)) as environments:
        shown, does = environments.observation_space, environments.action_space
    agent = make_agent(config, shown, does, parts)
    try:
        checkpoint.restore_agent(agent)
    except MemoryFileError as error:
        if not env_args:
            raise
        raise ValueError(
            f"env_args: expected an environment like that of the training, got {list(env_args)} "
            f"with observations {shown} and actions {does}, which the agent's weights do not fit: "
            f"{error}"
        ) from error
    return agent.eval(), config, stage


@torch.no_grad()
def judge(
    agent: Agent,
    config: TrainConfig,
    episodes: int,
    *,
    greedy: bool = True,
    stage: int = 0,
    patience: int = PATIENCE,
) -> Evaluation:
    """Play so many unseen episodes, as many in each row, so that short ones are not preferred."""
    count = min(episodes, most_rows(config))
    patience = max(patience, 2 * count * most_steps(config))
    quota = episodes // count + (np.arange(count) < episodes % count)
    generator = None if greedy else torch.Generator().manual_seed(config.seed)
    returns: list[float] = []
    lengths: list[int] = []
    waited = 0
    with contextlib.closing(begin(agent, config, count, stage)) as player:
        while len(returns) < episodes:
            waited += count
            player.decide(generator)
            for episode in player.advance():
                if quota[episode.row]:
                    quota[episode.row] -= 1
                    returns.append(episode.total)
                    lengths.append(episode.length)
                    waited = 0
            _check_patience(config, waited, patience)
    deviation = float(np.std(returns, ddof=1)) if episodes > 1 else math.nan
    interval = 1.96 * deviation / math.sqrt(episodes)
    return Evaluation(float(np.mean(returns)), interval, float(np.mean(lengths)), episodes, greedy)


@torch.no_grad()
def film(
    agent: Agent,
    config: TrainConfig,
    greedy: bool = True,
    stage: int = 0,
    patience: int = PATIENCE,
) -> list[Any]:
    """Play one unseen episode and return its pictures.

    Raises:
        ValueError: the environment does not draw itself, or the episode does not end.
    """
    patience = max(patience, most_steps(config))
    generator = None if greedy else torch.Generator().manual_seed(config.seed)
    pictures: list[Any] = []
    player = begin(agent, config, 1, stage, render_mode="rgb_array")
    with contextlib.closing(player):
        while not pictures or not player.seen.ended.all():
            why = ""
            try:
                shown = player.environments.vector.render()
            except Exception as error:
                shown, why = None, f" ({type(error).__name__}: {error})"
            if shown is None or shown[0] is None:
                raise ValueError(
                    f"render: expected an environment that draws itself, got {config.env}{why}"
                )
            pictures.append(np.array(shown[0]))
            _check_patience(config, len(pictures), patience)
            player.decide(generator)
            player.advance()
    return pictures


def _check_patience(config: TrainConfig, waited: int, patience: int) -> None:
    if waited > patience:
        raise ValueError(
            f"env: expected episodes that end, got none that did in {waited:,} steps of "
            f"{config.env}; --time-limit cuts them, --patience waits longer"
        )
