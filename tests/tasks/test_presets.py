"""Presets whose stages are of our own environments."""

from pathlib import Path

import pytest

from htm_pytorch import rl, tasks
from htm_pytorch.rl.making import make_environments

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = ["ballet-levels", "rapid-binding", "visual-match"]


@pytest.mark.parametrize("name", OWN)
def test_all_stages_have_the_same_spaces(name: str) -> None:
    config = tasks.find(name).config.replace(num_envs=4)
    assert len(config.environments.curriculum) > 1
    spaces = []
    for stage in range(len(config.environments.curriculum)):
        environments = make_environments(config, 4, stage)
        spaces.append((environments.observation_space, environments.action_space))
        environments.close()
    assert all(space == spaces[0] for space in spaces)


@pytest.mark.parametrize("name", OWN)
def test_a_preset_trains_and_its_agent_can_be_judged(name: str, tmp_path: Path) -> None:
    config = tasks.find(name).config
    few = {"num_envs": 8, "frames": 1, "epochs": 1, "eval_episodes": 2, "average_over": 8}
    rl.train(config.replace(task=name, run_dir=tmp_path / "run", **few), tasks.parts_of(name))
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2
    judged = rl.evaluate(tmp_path / "run", 2, parts=tasks.parts_of(name))
    assert judged.episodes == 2 and judged.mean >= 0
