"""Whole training loops, ours and those of others, in frames a second; and what ours takes time for.

One thread, CartPole-v1 (an environment that costs next to nothing), stepped one after another by
all, of the same sizes: 16 environments, rollouts of 128 steps, 4 passes in 4 parts, width 64. Times
are the processor's, so that other work on the machine counts for little; loops take turns. Beside
them Ballet as `htm train ballet` learns it.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agent_peers
import torch
from harness import RESULTS, describe_machine, write

from htm_pytorch import tasks
from htm_pytorch.rl import TrainConfig
from htm_pytorch.rl.learner import Learner
from htm_pytorch.rl.processes import World
from htm_pytorch.rl.rollout import play
from htm_pytorch.rl.training import Training

OURS = "htm_pytorch::"
MEMORIES = ("htm", "window", "transformer", "gru", "lstm", "none")
SIZES = agent_peers.Sizes()
ROLLOUTS = 3


def config_of(memory: str, folder: Path) -> TrainConfig:
    """Return our training at the shared sizes."""
    return TrainConfig(env=SIZES.env, run_dir=folder).replace(
        memory=memory,
        vectorize="sync",
        num_envs=SIZES.num_envs,
        steps=SIZES.steps,
        dim=SIZES.dim,
        epochs=SIZES.epochs,
        minibatches=SIZES.minibatches,
        reconstruction_weight=0.0,
        frames=10**9,
    )


def ours(memory: str) -> float:
    """Train for some rollouts, after one that is not counted; return frames a second."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Training(config_of(memory, Path(folder) / "run"), None, World()) as training,
    ):
        training.batch()
        began = time.process_time()
        for _ in range(ROLLOUTS):
            training.batch()
        return ROLLOUTS * SIZES.num_envs * SIZES.steps / (time.process_time() - began)


def loops() -> dict[str, Callable[[], float]]:
    """Return all loops by name; each returns frames a second."""
    found: dict[str, Callable[[], float]] = {
        f"ours, {memory}": lambda memory=memory: ours(memory) for memory in MEMORIES
    }
    found["LSTM PPO in one file"] = lambda: agent_peers.in_one_file(SIZES, ROLLOUTS)
    if importlib.util.find_spec("sb3_contrib") is None:
        print("sb3-contrib is not installed: left out")
    else:
        found["sb3-contrib RecurrentPPO"] = lambda: agent_peers.stable_baselines(SIZES, 1)
    return found


def compare(turns: int) -> dict[str, Any]:
    """Return the median frames a second of each loop, and what ours is to those of others."""
    rates: dict[str, list[float]] = {}
    for _ in range(turns):
        for name, loop in loops().items():
            rates.setdefault(name, []).append(loop())
    medians = {name: statistics.median(found) for name, found in rates.items()}

    def over(name: str, other: str) -> float:
        pairs = zip(rates[name], rates[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    ratios = {
        f"{name} / {other}": over(name, other)
        for name, other in (
            ("ours, lstm", "sb3-contrib RecurrentPPO"),
            ("ours, htm", "sb3-contrib RecurrentPPO"),
            ("ours, lstm", "LSTM PPO in one file"),
            ("ours, htm", "ours, lstm"),
        )
        if other in rates
    }
    return {"frames a second": {name: round(rate) for name, rate in medians.items()}} | ratios


def ballet(batches: int) -> dict[str, Any]:
    """Return seconds a batch of Ballet by part, and by operator the largest shares."""
    task = tasks.find("ballet")
    with tempfile.TemporaryDirectory() as folder:
        config = task.config.replace(run_dir=Path(folder) / "run")
        parts = None if task.parts is None else task.parts()
        with Training(config, parts, World()) as training:
            return _parts(training, batches)


def _parts(training: Training, batches: int) -> dict[str, Any]:
    config, seconds = training.config, {"playing": 0.0, "learning": 0.0}
    learner: Learner = training.learner
    (player,) = training.stages.players.values()
    frames = 0

    def batch(number: int) -> None:
        nonlocal frames
        generator = torch.Generator().manual_seed(number)
        player.begin(list(range(number, number + config.environments.num_envs)))
        start = time.process_time()
        played = play(player, config.rollouts, generator, config.learner.discount)
        middle = time.process_time()
        learner.learn(played.rollout, generator, 0.0)
        seconds["playing"] += middle - start
        seconds["learning"] += time.process_time() - middle
        frames += played.frames

    batch(0)
    seconds = dict.fromkeys(seconds, 0.0)
    frames = 0
    for number in range(batches):
        batch(number + 1)
    means = {name: value / batches for name, value in seconds.items()}
    rate = frames / sum(seconds.values())
    # Again, watched: shares are of the watched time, since watching costs some.
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        batch(batches + 1)
    watched = time.perf_counter() - start
    times = {e.key: e.self_cpu_time_total / 1e6 for e in profile.key_averages()}
    recall = sum(v for k, v in times.items() if OURS in k or "BackwardFor_htm_pytorch" in k)
    operators = dict(sorted(times.items(), key=lambda item: -item[1])[:12])
    return {
        "frames a second": round(rate),
        "seconds a batch": means,
        "share inside recall": recall / watched,
        "share in no operator": 1 - sum(times.values()) / watched,
        "shares of operators": {name: value / watched for name, value in operators.items()},
    }


def main() -> None:
    """Measure, print and write as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "agent.json")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batches", type=int, default=5, help="of Ballet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"loops": compare(options.turns), "ballet": ballet(options.batches)}
    for part, found in result.items():
        for name, value in found.items():
            print(f"{part}: {name}: {value}")
    write(options.out, {"machine": describe_machine("torch", "gymnasium")} | result)


if __name__ == "__main__":
    main()
