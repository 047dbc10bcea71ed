"""The Endless T-Maze: only the newest hint is worth remembering."""

import numpy as np
import pytest

from htm_pytorch.envs import (
    ENDLESS_SETTINGS,
    EndlessTMazeEnv,
    EndlessTMazeLevel,
    EndlessTMazeVectorEnv,
)
from tests.envs.oracles import assert_chance, returns

LEFT, RIGHT, FORWARD = range(3)


def level(hints=(-1, 1), lengths=(2, 1)):
    return EndlessTMazeLevel(np.array(hints), np.array(lengths))


def walk_and_turn(vector, choose):
    """Return a policy that goes forward until the junction, which it knows, and chooses there."""
    hints = np.zeros(vector.num_envs)
    walked = np.zeros(vector.num_envs, int)
    corridor = np.zeros(vector.num_envs, int)

    def policy(seen, info):
        walked[:] = np.where(info["corridors"] == corridor, walked, 0)
        corridor[:] = info["corridors"]
        hints[:] = np.where(seen[:, 2] != 0, seen[:, 2], hints)
        last = np.minimum(corridor, vector.rules.num_corridors - 1)
        lengths = np.array([level.lengths for level in vector.levels()])
        at_junction = walked == lengths[np.arange(vector.num_envs), last]
        walked[:] += ~at_junction
        return np.where(at_junction, choose(hints), FORWARD)

    return policy


def test_a_right_turn_begins_the_next_corridor_and_its_hint():
    env = EndlessTMazeEnv(2, num_corridors=2)
    seen = [env.reset(options={"level": level()})[0].tolist()]
    actions = (FORWARD, RIGHT, FORWARD, LEFT, FORWARD, RIGHT)
    results = [env.step(action) for action in actions]
    seen += [observation.tolist() for observation, *_ in results]
    assert seen == [
        [0, 0, -1],
        [0.5, 0, 0],
        [0.5, 0, 0],
        [1, 0, 0],
        [0, 0, 1],
        [0.5, 0, 0],
        [0] * 3,
    ]
    assert [reward for _, reward, *_ in results] == [0, 0, 0, 1, 0, 1]
    assert [terminated for _, _, terminated, *_ in results] == [False] * 5 + [True]
    assert [info["corridors"] for *_, info in results] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("action", [RIGHT, FORWARD])
def test_a_wrong_turn_ends(action):
    env = EndlessTMazeEnv(1, 2, wrong_reward=-1, step_reward=-0.01)
    env.reset(options={"level": level(lengths=(1, 1))})
    assert env.step(FORWARD)[1:4] == (-0.01, False, False)
    assert env.step(action)[1:4] == (-1, True, False)


def test_time_out_truncates():
    env = EndlessTMazeEnv(1, 1)
    env.reset(seed=0)
    ends = [env.step(LEFT)[1:4] for _ in range(12)]
    assert ends == [(0, False, False)] * 11 + [(0, False, True)]


@pytest.mark.parametrize("setting", ENDLESS_SETTINGS)
def test_memory_earns_everything_in_every_setting(setting):
    vector = EndlessTMazeVectorEnv(50, **ENDLESS_SETTINGS[setting])
    policy = walk_and_turn(vector, lambda hints: np.where(hints < 0, LEFT, RIGHT))
    assert (returns(vector, policy) == vector.rules.num_corridors).all()


def test_no_memory_and_the_first_hint_earn_chance():
    vector = EndlessTMazeVectorEnv(3000, length=[1, 4], num_corridors=4)
    blind = np.random.default_rng(1)
    guess = walk_and_turn(vector, lambda _: blind.integers(2, size=3000))
    halves = 1 / 2 + 1 / 4 + 1 / 8 + 1 / 16
    assert_chance(returns(vector, guess), halves)

    first = []

    def keep_first(hints):
        first.append(hints.copy())
        return np.where(first[0] < 0, LEFT, RIGHT)

    assert_chance(returns(vector, walk_and_turn(vector, keep_first)) - 1, halves - 1 / 16)


def test_there_are_sixteen_settings():
    assert len(ENDLESS_SETTINGS) == 16
    assert ENDLESS_SETTINGS["uniform-10-3"] == {"length": [1, 10], "num_corridors": 3}
    vector = EndlessTMazeVectorEnv(2000, **ENDLESS_SETTINGS["uniform-5-3"])
    vector.reset(seed=0)
    lengths = np.array([level.lengths for level in vector.levels()])
    for length in range(1, 6):
        assert_chance(lengths == length, 1 / 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"num_corridors": 0}, "num_corridors must be an integer of at least 1, got 0"),
        ({"step_reward": float("nan")}, "step_reward must be a number"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for kind in (EndlessTMazeEnv, EndlessTMazeVectorEnv):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hints": (0, 1)}, "level.hints must be -1 or 1"),
        ({"lengths": (0, 1)}, "level.lengths must be from 1 to 2"),
        ({"hints": (1, 1, 1)}, r"level.hints must be integers of shape \(2,\)"),
    ],
)
def test_bad_levels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EndlessTMazeEnv(2, 2).reset(options={"level": level(**change)})
