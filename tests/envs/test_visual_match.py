"""Passive visual match: what the three rooms show, and what is earned in them."""

import numpy as np
import pytest

from htm_pytorch.envs import VisualMatchEnv, VisualMatchLevel, VisualMatchVectorEnv
from tests.envs.oracles import assert_chance, returns

NORTH, SOUTH, WEST, EAST = range(4)
PATHS = np.array(
    [
        [NORTH, NORTH, WEST, WEST, WEST, NORTH, NORTH],
        [NORTH] * 7,
        [NORTH, NORTH, EAST, EAST, EAST, NORTH, NORTH],
    ]
)


def level(colour=2, place=1, doors=(1, 0, 2)):
    apples = np.zeros(22, int)
    apples[[16, 20]] = 1
    return VisualMatchLevel(np.array(colour), np.array(place), apples, np.array(doors))


def go_through(vector, choose):
    """Return a policy that walks straight to a door of the colour that `choose` makes of `seen`."""
    chosen = []
    steps = np.zeros(vector.num_envs, int)

    def policy(seen, info):
        if not chosen:
            chosen.append(choose(seen))
        doors = np.array([level.doors for level in vector.levels()])
        door = (doors == chosen[0][:, None]).argmax(axis=1)
        action = PATHS[door, np.minimum(steps, 6)]
        steps[:] += info["phase"] == 2
        return action

    return policy


def seen_colour(seen):
    return seen.reshape(len(seen), -1).max(axis=1) - 4


def test_the_first_room_shows_the_colour_and_nobody_moves():
    env = VisualMatchEnv(explore=3)
    observation, info = env.reset(options={"level": level(colour=2, place=1)})
    expected = [[0] * 5, [0, 1, 6, 1, 0], [0, 1, 2, 1, 0], [0, 1, 1, 1, 0], [0] * 5]
    assert observation.tolist() == expected
    assert info == {"phase": 0, "success": False, "action_counts": False}
    for _ in range(2):
        observation, reward, *_, info = env.step(NORTH)
        assert observation.tolist() == expected
        assert (reward, info["phase"]) == (0, 0)
    assert env.step(NORTH)[4]["phase"] == 1


def test_apples_pay_and_come_back():
    env = VisualMatchEnv(explore=1, apple_reward=0.5)
    env.reset(options={"level": level()})
    observation = env.step(0)[0]
    assert observation.tolist() == [[0] * 5, [0, 0, 0, 3, 0], [0, 0, 2, 0, 3], [1] * 5, [0] * 5]
    rewards = [env.step(action)[1] for action in (NORTH, EAST, *(WEST, EAST) * 11)]
    assert [step for step, reward in enumerate(rewards) if reward] == [1, 23]


@pytest.mark.parametrize(("door", "reward"), [(0, 0), (1, 0), (2, 1)])
def test_the_door_of_the_colour_pays_and_every_door_ends(door, reward):
    env = VisualMatchEnv(distraction=1, explore=1)
    env.reset(options={"level": level()})
    env.step(0)
    env.step(0)
    results = []
    for action in PATHS[door]:
        results.append(env.step(action))
        if results[-1][2]:
            break
    assert [result[1:4] for result in results[:-1]] == [(0, False, False)] * (len(results) - 1)
    assert results[-1][1:4] == (reward, True, False)
    assert len(results) == (4 if door == 1 else 7)
    assert results[-1][4]["success"] is bool(reward)


def test_the_doors_are_seen_from_two_squares_away():
    env = VisualMatchEnv(distraction=0, explore=1)
    env.reset(options={"level": level()})
    env.step(0)
    assert env.step(NORTH)[0].max() == 2
    assert env.step(NORTH)[0].tolist()[0] == [0, 0, 4, 0, 0]
    assert env.step(WEST)[0].tolist()[0] == [5, 0, 0, 4, 0]


def test_who_does_not_choose_runs_out_of_time():
    env = VisualMatchEnv(distraction=4, explore=2, choice=3)
    env.reset(seed=0)
    ends = [env.step(SOUTH)[2:4] for _ in range(9)]
    assert ends == [(False, False)] * 8 + [(False, True)]


def test_memory_finds_the_door_and_none_finds_a_third():
    vector = VisualMatchVectorEnv(1500, distraction=30)
    assert returns(vector, go_through(vector, seen_colour)).min() == 1
    blind = np.random.default_rng(1)
    guess = go_through(vector, lambda _: blind.integers(3, size=1500))
    assert_chance(returns(vector, guess), 1 / 3)


def test_levels_are_drawn_uniformly():
    vector = VisualMatchVectorEnv(2000)
    vector.reset(seed=0)
    levels = vector.levels()
    assert {int(level.apples.sum()) for level in levels} == {10}
    assert {tuple(sorted(level.doors.tolist())) for level in levels} == {(0, 1, 2)}
    for colour in range(3):
        assert_chance(np.array([level.colour == colour for level in levels]), 1 / 3)
        assert_chance(np.array([level.doors[1] == colour for level in levels]), 1 / 3)
    for spot in range(22):
        assert_chance(np.array([level.apples[spot] for level in levels]), 10 / 22)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distraction": -1}, "distraction must be an integer of at least 0, got -1"),
        ({"explore": 0}, "explore must be an integer of at least 1, got 0"),
        ({"apple_reward": -1}, "apple_reward must be a number of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for kind in (VisualMatchEnv, VisualMatchVectorEnv):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def test_bad_levels_are_refused():
    with pytest.raises(ValueError, match="level.colour must be from 0 to 2, got 3"):
        VisualMatchEnv().reset(options={"level": level(colour=3)})
    with pytest.raises(ValueError, match="level.doors must be from 0 to 2"):
        VisualMatchEnv().reset(options={"level": level(doors=(0, 1, 3))})
    with pytest.raises(ValueError, match="level.doors must be distinct"):
        VisualMatchEnv().reset(options={"level": level(doors=(0, 1, 1))})
