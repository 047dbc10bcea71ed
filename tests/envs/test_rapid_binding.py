"""Rapid binding: what is named and asked when, and what perfect memory and none earn."""

import numpy as np
import pytest

from htm_pytorch.envs import RapidBindingEnv, RapidBindingVectorEnv
from tests.envs.oracles import assert_chance

NOTHING, OF_DISTRACTION, OF_THIS_ROUND, OF_EARLIER_ROUND = range(4)


def play(env, forgets=False, seed=0):
    """Answer by the names heard; return of every step about, round, and whether it was right."""
    named, told, over, last = {}, [], False, 0
    blind = np.random.default_rng(seed + 1000)
    seen, info = env.reset(seed=seed)
    while not over:
        if forgets and info["round"] != last:
            named, last = {}, info["round"]
        name, objects = seen["name"].tobytes(), [row.tobytes() for row in seen["objects"]]
        action = 0
        if not seen["asks"]:
            named[name] = objects[0]
        elif name in named:
            action = objects.index(named[name])
        else:
            action = int(blind.integers(len(objects)))
        about, round_ = info["about"], info["round"]
        seen, reward, over, truncated, info = env.step(action)
        told.append((about, round_, reward))
        assert not truncated
    assert not any(np.any(part) for part in seen.values())
    return np.array(told)


def test_a_round_names_distracts_and_asks():
    told = play(RapidBindingEnv(num_words=2, distractions=3, distraction_questions=1))
    named = [NOTHING] * 2
    assert told[:, 0].tolist() == named + (named + [OF_DISTRACTION]) * 3 + [OF_THIS_ROUND] * 2


def test_later_rounds_ask_for_earlier_ones_too():
    told = play(RapidBindingEnv(num_words=2, distractions=0, rounds=3))
    first, later = [0, 0, 2, 2], [0, 0, 2, 2, 3, 3]
    assert told[:, 0].tolist() == first + later * 2
    assert told[:, 1].tolist() == [0] * 4 + [1] * 6 + [2] * 6


@pytest.mark.parametrize("distractions", [0, 10, 20, [0, 2]])
@pytest.mark.parametrize("rounds", [1, 4])
def test_perfect_memory_answers_everything(distractions, rounds):
    env = RapidBindingEnv(distractions=distractions, rounds=rounds, distraction_questions=2)
    told = play(env)
    asked = told[told[:, 0] != NOTHING]
    assert len(asked) >= 3 * (2 * rounds - 1)
    assert asked[:, 2].all()
    assert not told[told[:, 0] == NOTHING, 2].any()


def test_who_forgets_at_the_end_of_a_round_guesses_about_earlier_ones():
    env = RapidBindingEnv(distractions=1, rounds=4)
    told = np.concatenate([play(env, forgets=True, seed=seed) for seed in range(150)])
    assert told[told[:, 0] == OF_THIS_ROUND, 2].all()
    assert_chance(told[told[:, 0] == OF_EARLIER_ROUND, 2], 1 / 3)


def test_no_memory_earns_chance():
    vector = RapidBindingVectorEnv(1500, num_words=4, distractions=1)
    vector.reset(seed=0)
    blind = np.random.default_rng(1)
    earned = sum(vector.step(blind.integers(4, size=1500))[1] for _ in range(12))
    assert_chance(earned / 4, 1 / 4)


def test_numbers_of_distractions_and_earlier_rounds_are_drawn_uniformly():
    vector = RapidBindingVectorEnv(1500, distractions=[0, 2], rounds=4)
    vector.reset(seed=0)
    levels = vector.levels()
    for number in range(3):
        assert_chance(np.array([level.distractions == number for level in levels]), 1 / 3)
        assert_chance(np.array([level.earlier[3] == number for level in levels]), 1 / 3)
    assert {int(level.earlier[1]) for level in levels} == {0}
    for word in range(3):
        assert_chance(np.array([level.asked[0, -1, 0] == word for level in levels]), 1 / 3)
        assert_chance(np.array([level.shifts == word for level in levels]), 1 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_words": 1}, "num_words must be an integer of at least 2, got 1"),
        ({"distractions": -1}, "distractions must be at least 0"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"distraction_questions": 4}, "distraction_questions must be an integer from 0 to 3"),
        ({"symbol_size": 0}, "symbol_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for kind in (RapidBindingEnv, RapidBindingVectorEnv):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def test_bad_levels_are_refused():
    env = RapidBindingEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="level.distractions must be from 2 to 2"):
        env.reset(options={"level": env.level._replace(distractions=np.array([3]))})
