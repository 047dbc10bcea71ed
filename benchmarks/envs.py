"""Steps per second of the batched Ballet, on one process.

Before anything is timed the batch is compared with single environments, step by step.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, describe_machine, write

from htm_pytorch.envs import BalletEnv, BalletVectorEnv

LEVELS = {"2_delay16": (2, 16), "8_delay48": (8, 48)}

# Steps per second reported for others, on other machines and not run here: the original on pycolab
# and gym-balletenv, whose figures name no level.
QUOTED = {
    ("original", "2_delay16"): 9_200,
    ("original", "8_delay48"): 4_400,
    ("gym-balletenv", "symbols"): 1_800_000,
    ("gym-balletenv", "image"): 48_000,
}


def check(num_dancers: int, dance_delay: int, observation: str) -> None:
    """Stop unless the batch equals single environments from the first frame into the choice."""
    arguments: dict[str, Any] = {
        "num_dancers": num_dancers,
        "dance_delay": dance_delay,
        "observation": observation,
    }
    vector = BalletVectorEnv(4, **arguments)
    batch, _ = vector.reset(seed=0)
    singles = [BalletEnv(**arguments) for _ in range(4)]
    alone = [
        env.reset(options={"level": level})[0]
        for env, level in zip(singles, vector.levels(), strict=True)
    ]
    draw = np.random.default_rng(0)
    for _ in range(vector.choice_step + 3):
        for index, seen in enumerate(alone):
            for name, value in seen.items():
                np.testing.assert_array_equal(batch[name][index], value)
        actions = draw.integers(8, size=4)
        batch, *results, _ = vector.step(actions)
        stepped = [env.step(action) for env, action in zip(singles, actions, strict=True)]
        alone = [step[0] for step in stepped]
        np.testing.assert_array_equal(np.transpose(results), [step[1:4] for step in stepped])


def measure(
    num_dancers: int, dance_delay: int, observation: Any, num_envs: int, seconds: float
) -> float:
    """Return environment steps per second under random actions, resets included."""
    env = BalletVectorEnv(num_envs, num_dancers, dance_delay, observation=observation)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(8, size=(64, num_envs))
    for step in range(env.choice_step + 20):
        env.step(actions[step % 64])
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        env.step(actions[steps % 64])
        steps += 1
    return steps * num_envs / elapsed


def main() -> None:
    """Check, measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "envs.json", help="JSON file to write"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one repeat")
    parser.add_argument("--symbol-envs", type=int, default=4096)
    parser.add_argument("--image-envs", type=int, default=128)
    options = parser.parse_args()
    batch = {"symbols": options.symbol_envs, "image": options.image_envs}

    cases = [(observation, name) for observation in batch for name in LEVELS]
    for observation, name in cases:
        check(*LEVELS[name], observation)
    print("checked: the batch equals single environments", file=sys.stderr)

    print(
        f"{'observation':12}{'level':12}{'envs':>6}{'steps/s':>13}{'low':>13}{'high':>13}", end=""
    )
    print(f"{'/ original':>12}{'/ gym-balletenv':>17}")
    rows = []
    for observation, name in cases:
        speeds = [
            measure(*LEVELS[name], observation, batch[observation], options.seconds)
            for _ in range(options.repeats)
        ]
        median = statistics.median(speeds)
        # The original only draws pictures.
        original = QUOTED["original", name] if observation == "image" else None
        other = QUOTED["gym-balletenv", observation]
        rows.append(
            {
                "observation": observation,
                "level": name,
                "num_envs": batch[observation],
                "steps_per_second": median,
                "repeats": speeds,
                "original_quoted": original,
                "gym_balletenv_quoted": other,
            }
        )
        ratio = f"{median / original:.1f}" if original else "-"
        print(f"{observation:12}{name:12}{batch[observation]:6}{median:13,.0f}", end="")
        print(f"{min(speeds):13,.0f}{max(speeds):13,.0f}{ratio:>12}{median / other:17.1f}")
    machine = describe_machine("numpy", "gymnasium")
    write(options.out, {"machine": machine, "seconds": options.seconds, "rows": rows})


if __name__ == "__main__":
    main()
