"""`htm train`: one training, several seeds, or several processes that learn as one."""

import dataclasses
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

import tyro

from htm_pytorch import tasks
from htm_pytorch.cli import status_of
from htm_pytorch.cli.report import draw_recall
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.launching import follow_launcher, launch, note_end, restarted

if TYPE_CHECKING:
    from htm_pytorch.rl import Evaluation

DESCRIPTION = f"""Train an agent that remembers: htm train ENV [options]

ENV is a task of ours, whose options are set, or the id of any environment of
Gymnasium; module:id imports a module before. The tasks are
{textwrap.fill(", ".join(tasks.TASKS), 76, break_on_hyphens=False)}.
`htm train ENV --help` shows the values it begins with.

  htm train ballet --run-dir runs/demo
  htm train CartPole-v1 --memory lstm --frames 200000 --seeds 3
  htm train popgym:popgym-RepeatPreviousEasy-v0 --processes 2 --resume
"""


def taken(
    env: tyro.conf.Positional[str],
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
) -> None:
    """Take what `htm train ENV` takes, so that it can be completed."""


COMMAND, WORDS = taken, tasks.TASKS


def main(arguments: list[str]) -> None:
    """Train, then judge on unseen episodes."""
    # On a busy machine, threads that wait by spinning make each other 10 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    follow_launcher()
    config = parse(arguments)
    if restarted():
        config = config.replace(resume=True)
    if config.processes > 1:
        _launch(config, arguments)
    elif config.seeds > 1:
        _train_seeds(config)
    else:
        try:
            _train(config)
        except (Exception, KeyboardInterrupt) as error:
            note_end(error, status_of(error))
            raise


def parse(arguments: list[str]) -> TrainConfig:
    """Return the config that the arguments say; prints and exits if they ask for help.

    Raises:
        ValueError: no environment is named, or an option cannot work.
    """
    name, rest = "", arguments
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
    if not name and not {"-h", "--help"} & set(rest):
        raise ValueError(
            f"env: expected `htm train ENV [options]`, ENV one of {tasks.TASKS} or the id of an "
            f"environment, got {' '.join(arguments) or 'nothing'}"
        )
    if name in tasks.TASKS:
        default = dataclasses.replace(tasks.find(name).config, task=name)
    else:
        default = TrainConfig(env=name)

    # As a function's argument: errors of a class would be drawn in a box of many lines.
    def chosen(config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default) -> TrainConfig:
        return config

    found = tyro.cli(
        chosen,
        args=rest,
        prog=f"htm train {name or 'ENV'}",
        description=DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    given = found.environments.env_args
    if given == default.environments.env_args:
        return found
    # Arguments of a task stay, but for those that are given.
    return found.replace(env_args=(*default.environments.env_args, *given))


def _train(config: TrainConfig) -> "Evaluation | None":
    from htm_pytorch.rl import evaluate, train
    from htm_pytorch.rl.launching import is_first
    from htm_pytorch.rl.preparing import (
        describe_beginning,
        describe_sizes,
        describe_source,
        prepare,
    )

    parts = tasks.parts_of(config.task)
    if is_first():
        fresh = prepare(config, parts)
        print(describe_sizes(config))
        for told in (describe_source(config, fresh), describe_beginning(config)):
            if told:
                print(told)
    train(config, parts)
    if not is_first():
        return None
    print(_ended(config))
    result = evaluate(config.run_dir, parts=parts)
    picture = draw_recall(config.run_dir)
    left = f"what it recalled: {picture}" if picture else f"the run is in {config.run_dir}"
    print(f"{result}; {left}")
    return result


def _train_seeds(config: TrainConfig) -> None:
    import numpy as np

    from htm_pytorch.rl.run import check_free

    means: list[float] = []
    configs = [
        config.replace(seed=seed, seeds=1, run_dir=config.run_dir / f"seed-{seed}")
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    for one in configs:
        check_free(one)
    for one in configs:
        result = _train(one)
        if result is not None:
            means.append(result.mean)
    spread = np.std(means, ddof=1)
    print(f"return {np.mean(means):.3f} +- {spread:.3f}, mean and deviation of {len(means)} seeds")


def _launch(config: TrainConfig, arguments: list[str]) -> None:
    """Run the same command in several processes, if it can be run at all."""
    from htm_pytorch.rl.preparing import prepare

    if config.seeds > 1:
        raise ValueError(f"seeds: expected 1 with several processes, got {config.seeds}")
    prepare(config, tasks.parts_of(config.task))
    code = launch(config.processes, ["train", *arguments, "--processes", "1"])
    if code:
        print(f"htm: a process ended with {code}; see above", file=sys.stderr)
        sys.exit(code)


def _ended(config: TrainConfig) -> str:
    """Return how long the agent was trained, in all."""
    from htm_pytorch.rl.checkpoint import checkpoint_of

    progress, asked = checkpoint_of(config.run_dir).progress, config.budget.frames
    told = f"trained on {progress['frames']:,} frames in {progress['batches']:,} rollouts"
    more = f"; --frames {asked:,} ends with a whole one"
    return told + more * (progress["frames"] > asked)
