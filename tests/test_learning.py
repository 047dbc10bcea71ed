"""A small agent learns to remember. Slow: minutes on one core."""

import csv
from pathlib import Path

import pytest

from htm_pytorch.rl import TrainConfig, evaluate, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_agent_learns_who_danced_what(tmp_path: Path) -> None:
    """The default task, two dancers: without memory, half of the touches are right."""
    config = TrainConfig(run_dir=tmp_path / "run", episodes=120_000, stop_at=0.75)
    train(config)
    with (config.run_dir / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["success"]) >= 0.75
    # On episodes it never saw, 0.65 is seven standard deviations of luck above a half.
    assert evaluate(config.run_dir, episodes=500).success >= 0.65
