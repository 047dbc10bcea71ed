"""The Proof of Memory, step by step as the original goes."""

import numpy as np
import pytest

from htm_pytorch.envs import ProofofMemoryEnv, ProofofMemoryLevel, ProofofMemoryVectorEnv
from tests.envs.oracles import assert_chance, returns

LEFT, RIGHT = 0, 1


def level(start=1, goal=-1):
    return ProofofMemoryLevel(np.array(start), np.array(goal))


def test_an_episode_goes_as_in_the_original():
    env = ProofofMemoryEnv()
    seen, info = env.reset(options={"level": level(start=2, goal=1)})
    results = [(seen, None, None, None, info)] + [env.step(RIGHT) for _ in range(5)]
    shown = np.array([observation for observation, *_ in results])
    ends = [-1, 1]
    np.testing.assert_allclose(shown[:, 1], [0.4, 0.4, 0.4, 0.6, 0.8, 1], rtol=1e-6)
    assert shown[:, ::2].tolist() == [ends] * 3 + [[0, 0]] * 3
    assert [reward for _, reward, *_ in results[1:]] == [0, 0, -0.1, -0.1, 1.6]
    assert [terminated for _, _, terminated, *_ in results[1:]] == [False] * 4 + [True]
    assert [info["action_counts"] for *_, info in results] == [False, False] + [True] * 4


def test_the_other_end_costs():
    env = ProofofMemoryEnv()
    env.reset(options={"level": level(start=2, goal=-1)})
    assert [env.step(RIGHT)[1] for _ in range(5)] == [0, 0, -0.1, -0.1, -1.6]


def test_time_out_truncates_after_sixteen_steps():
    env = ProofofMemoryEnv()
    env.reset(seed=0)
    ends = [env.step(step % 2)[2:4] for step in range(16)]
    assert ends == [(False, False)] * 15 + [(False, True)]


def test_memory_earns_the_best_return():
    vector = ProofofMemoryVectorEnv(500)
    goals = []

    def policy(seen, _):
        if not goals:
            goals.append(seen[:, 2])
        return (goals[0] > 0).astype(int)

    earned = returns(vector, policy)
    vector.reset(seed=0)
    levels = vector.levels()
    away = np.array([5 - level.goal * level.start for level in levels])
    np.testing.assert_allclose(earned, 1.6 - 0.1 * (away - 1))


def test_no_memory_wins_as_often_as_it_loses():
    vector = ProofofMemoryVectorEnv(3000)

    def policy(seen, _):
        return (seen[:, 1] > 0).astype(int)

    earned = returns(vector, policy)
    vector.reset(seed=0)
    away = np.array([5 - abs(int(level.start)) for level in vector.levels()])
    assert_chance(earned + 0.1 * (away - 1), 0)


def test_starts_and_goals_are_drawn_uniformly():
    vector = ProofofMemoryVectorEnv(3000)
    vector.reset(seed=0)
    levels = vector.levels()
    for start in range(-2, 3):
        assert_chance(np.array([level.start == start for level in levels]), 1 / 5)
    assert_chance(np.array([int(level.goal) for level in levels]), 0)


@pytest.mark.parametrize("kind", [ProofofMemoryEnv, ProofofMemoryVectorEnv])
def test_bad_arguments_are_refused(kind):
    with pytest.raises(ValueError, match="max_steps must be an integer of at least 1, got 0"):
        kind(max_steps=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"goal": 0}, "level.goal must be -1 or 1"), ({"start": 5}, "level.start must be from -4 to")],
)
def test_bad_levels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ProofofMemoryEnv().reset(options={"level": level(**change)})
