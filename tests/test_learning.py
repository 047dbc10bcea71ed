"""Small agents learn to remember. Slow: minutes on one core."""

import csv
from pathlib import Path

import pytest

from htm_pytorch.rl import TrainConfig, evaluate, train
from htm_pytorch.tasks import find

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def test_agent_learns_who_danced_what(tmp_path: Path) -> None:
    """The demo, two dancers: without memory, half of the touches are right."""
    task = find("ballet")
    assert task.parts is not None
    config = task.config.replace(run_dir=tmp_path / "run", frames=5_300_000, stop_at=0.75)
    train(config, task.parts())
    with (config.run_dir / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["return"]) >= 0.75
    # On episodes it never saw, 0.65 is seven standard deviations of luck above a half.
    assert evaluate(config.run_dir, 500, parts=task.parts()).mean >= 0.65


def test_agent_balances_what_it_sees_half_of(tmp_path: Path) -> None:
    config = find("cartpole-positions").config.replace(run_dir=tmp_path / "run")
    train(config)
    assert evaluate(config.run_dir, 50).mean >= 400


@pytest.mark.parametrize("memory", ["htm", "lstm"])
def test_agent_says_what_it_saw_before(memory: str, tmp_path: Path) -> None:
    """Dict observations and Box actions; without memory, 0.5 is the best."""
    config = TrainConfig(env="tests.rl.worlds:Test/Recall-v0", run_dir=tmp_path / "run").replace(
        memory=memory, frames=150_000, steps=32, mem_chunk_size=2, window=2, stop_at=0.85
    )
    train(config)
    assert evaluate(config.run_dir, 50).mean >= 0.75
