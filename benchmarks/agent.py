"""Where the time of training the agent goes: playing and learning, inside recall and outside it."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, describe_machine, write

from htm_pytorch.rl import TrainConfig
from htm_pytorch.rl.rollout import play
from htm_pytorch.rl.task import make_agent, make_env
from htm_pytorch.rl.train import update

OURS = "htm_pytorch::"


def measure(config: TrainConfig, batches: int) -> dict[str, Any]:
    """Train for some batches; return seconds by part, and by operator the largest."""
    torch.manual_seed(config.seed)
    agent = make_agent(config)
    optimizer = torch.optim.Adam(agent.parameters(), config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    env = make_env(config, config.num_envs)
    env.reset(seed=config.seed)
    steps = env.unwrapped.choice_step + 1 + config.decisions * config.action_repeat
    options = {
        "action_repeat": config.action_repeat,
        "discount": config.discount,
        "trace": config.trace,
        "generator": generator,
    }
    parts = {"playing": 0.0, "learning": 0.0}

    def batch() -> None:
        start = time.perf_counter()
        rollout, _ = play(env, agent, steps, **options)
        middle = time.perf_counter()
        update(agent, optimizer, rollout, config, generator)
        parts["playing"] += middle - start
        parts["learning"] += time.perf_counter() - middle

    batch()
    parts = dict.fromkeys(parts, 0.0)
    for _ in range(batches):
        batch()
    seconds = dict(parts)
    # Again, watched: shares are of the watched time, since watching costs some.
    activities = [torch.profiler.ProfilerActivity.CPU]
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        batch()
    watched = time.perf_counter() - start
    times = {e.key: e.self_cpu_time_total / 1e6 for e in profile.key_averages()}
    recall = sum(
        value for key, value in times.items() if OURS in key or "BackwardFor_htm_pytorch" in key
    )
    operators = dict(sorted(times.items(), key=lambda item: -item[1])[:12])
    return {
        "seconds a batch": {name: value / batches for name, value in seconds.items()},
        "share inside recall": recall / watched,
        "share in no operator": 1 - sum(times.values()) / watched,
        "shares of operators": {name: value / watched for name, value in operators.items()},
    }


def main() -> None:
    """Measure the default agent, print the shares and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "agent.json")
    parser.add_argument("--batches", type=int, default=5)
    options = parser.parse_args()
    machine = describe_machine("torch")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(TrainConfig(run_dir=Path(folder)), options.batches)
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, share in value.items():
                print(f"  {share:7.3f} {key}")
        else:
            print(f"{name}: {value:.3f}")
    write(options.out, {"machine": machine, "config": "defaults", **result})


if __name__ == "__main__":
    main()
