"""Stages of a curriculum: which are played, when the next one begins, and when all are mastered."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch.rl import TrainConfig
from htm_pytorch.rl.player import Episode
from htm_pytorch.rl.preparing import prepare
from htm_pytorch.rl.stages import Recent, Stages

CURRICULUM = ('{"bonus": 1}', '{"bonus": 2}', '{"bonus": 3}')


def made(
    progress: dict[str, Any] | None = None,
    promote_at: tuple[float, ...] = (0.5,),
    **changes: Any,
) -> Stages:
    config = TrainConfig(run_dir=Path("nowhere")).replace(
        env="tests.rl.worlds:Test/Walk-v0",
        curriculum=CURRICULUM,
        promote_at=promote_at,
        average_over=4,
        num_envs=2,
        minibatches=1,
        dim=8,
        heads=2,
        **changes,
    )
    return Stages(config, prepare(config), range(2), progress)


def end(recent: Recent, *returns: float) -> None:
    for total in returns:
        recent.add(Episode(0, total, 7))


def bonus(stages: Stages, stage: int) -> float:
    envs: Any = stages.players[stage].environments.vector
    return envs.envs[0].unwrapped.bonus


def test_the_newest_episodes_decide() -> None:
    recent = Recent(3)
    end(recent, 1, 1)
    assert not recent.reached(0.5), "too few"
    end(recent, 1, 0)
    assert recent.mean() == pytest.approx(2 / 3) and recent.length() == 7
    assert recent.reached(0.6) and not recent.reached(0.7)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_rollouts_plays_each_earlier_stage(share: float) -> None:
    stages = made(rehearse=share)
    generator = torch.Generator().manual_seed(0)
    assert {stages.next(generator) for _ in range(50)} == {0}, "there is no earlier one"
    for newest in (1, 2):
        end(stages.recent[newest - 1], 1, 1, 1, 1)
        assert stages.promote() and stages.newest == newest
        found = Counter(stages.next(generator) for _ in range(2000))
        assert found[newest] / 2000 == pytest.approx(1 - share, abs=0.05)
        for stage in range(newest):
            assert found[stage] / 2000 == pytest.approx(share / newest, abs=0.05)
        assert all(stage in stages.players for stage in found)
    stages.close()


def test_each_stage_has_environments_of_its_own() -> None:
    stages = made(rehearse=0.5)
    end(stages.recent[0], 1, 1, 1, 1)
    stages.promote()
    assert [bonus(stages, stage) for stage in (0, 1)] == [1, 2]
    stages.begin([1, 2])
    stages.close()


def test_only_what_the_newest_stage_reached_promotes() -> None:
    stages = made(rehearse=0.5)
    assert not stages.promote()
    end(stages.recent[0], 1, 1, 1, 1)
    assert stages.promote()
    end(stages.recent[0], 1, 1, 1, 1)
    end(stages.recent[1], 0, 0, 1, 0)
    assert not stages.promote() and stages.newest == 1
    stages.close()


def test_stages_may_have_bars_of_their_own() -> None:
    stages = made(promote_at=(0.5, 2.0))
    end(stages.recent[0], 1, 1, 1, 1)
    assert stages.promote()
    end(stages.recent[1], 1, 1, 1, 1)
    assert not stages.promote()
    end(stages.recent[1], 2, 2, 2, 2)
    assert stages.promote() and stages.newest == 2
    stages.close()


@pytest.mark.parametrize(("share", "enough"), [(0.0, True), (0.5, False)])
def test_training_ends_when_all_that_is_played_is_mastered(share: float, enough: bool) -> None:
    stages = made(rehearse=share)
    for stage in (0, 1):
        end(stages.recent[stage], 1, 1, 1, 1)
        assert not stages.reached(0.0), "not the last stage"
        stages.promote()
    end(stages.recent[2], 1, 1, 1, 1)
    end(stages.recent[0], 0, 0, 0, 0)
    assert stages.reached(0.9) == enough
    end(stages.recent[0], 1, 1, 1, 1)
    assert stages.reached(0.9)
    assert not stages.promote(), "there is no next one"
    stages.close()


def test_progress_is_all_that_goes_on() -> None:
    stages = made(rehearse=0.5)
    end(stages.recent[0], 1, 1, 1, 1)
    stages.promote()
    end(stages.recent[1], 0, 1)
    again = made(stages.progress(), rehearse=0.5)
    assert again.progress() == stages.progress() and sorted(again.players) == [0, 1]
    # As a run from before wrote it: of its stage alone.
    old = made({"stage": 1, "recent": [0.0, 1.0], "lengths": [7, 7]})
    assert sorted(old.players) == [1] and old.recent[1].mean() == 0.5
    for each in (stages, again, old):
        each.close()
