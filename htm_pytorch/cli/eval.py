"""`htm eval`: a trained agent on unseen episodes."""

from pathlib import Path
from typing import Literal

import tyro

from htm_pytorch import tasks
from htm_pytorch.cli.report import draw_recall


def evaluate(
    run_dir: tyro.conf.Positional[Path],
    episodes: int | None = None,
    seed: int | None = None,
    actions: Literal["greedy", "sampled"] = "greedy",
    render: Path | None = None,
    env_args: tuple[str, ...] = (),
    mem_chunks: int | None = None,
    patience: int = 1_000_000,
) -> None:
    """Judge a trained agent on unseen episodes.

    Args:
        run_dir: folder of the run.
        episodes: how many; default as the run's config says.
        seed: of the episodes; default one that the training did not use.
        actions: the most probable ones, or sampled as in training.
        render: a file for moving pictures of one episode, .gif or .mp4.
        env_args: arguments of the environment that replace the run's, as name=value or JSON.
        mem_chunks: chunks a layer remembers; default as in the training.
        patience: steps of all episodes together in which one has to end.
    """
    from htm_pytorch.rl import evaluate
    from htm_pytorch.rl.checkpoint import checkpoint_of

    parts = tasks.parts_of(checkpoint_of(run_dir).config.task)
    greedy = actions == "greedy"
    others = {"env_args": env_args, "mem_chunks": mem_chunks, "patience": patience}
    print(evaluate(run_dir, episodes, seed, greedy=greedy, parts=parts, render=render, **others))
    if picture := draw_recall(run_dir):
        print(f"what it recalled: {picture}")


COMMAND = evaluate


def main(arguments: list[str]) -> None:
    """Parse and judge."""
    tyro.cli(evaluate, args=arguments, prog="htm eval")
