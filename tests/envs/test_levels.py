"""What environments of levels share, beyond the contract of all."""

import gymnasium
import numpy as np
import pytest

from htm_pytorch.envs import LevelEnv, LevelVectorEnv, TMazeEnv, TMazeVectorEnv
from htm_pytorch.envs.levels import check_integer, check_number, check_range
from tests.envs.test_contract import CASES, assert_same, make, make_vector

OF_LEVELS = [case for case in CASES if case != "ballet"]


@pytest.mark.parametrize("case", OF_LEVELS)
def test_an_environment_alone_draws_the_levels_of_a_batch_of_one(case):
    env, vector = make(case), make_vector(case, 1)
    assert isinstance(env, LevelEnv)
    assert isinstance(vector, LevelVectorEnv)
    env.reset(seed=5)
    vector.reset(seed=5)
    assert_same(env.level, vector.levels()[0])
    env.reset()
    vector.reset()
    assert_same(env.level, vector.levels()[0])


@pytest.mark.parametrize("case", OF_LEVELS)
def test_drawn_levels_are_levels_that_may_be_given(case):
    vector = make_vector(case, 20)
    vector.reset(seed=0)
    limits = vector.rules.limits()
    assert list(limits) == list(vector.rules.level._fields)
    for level in vector.levels():
        assert_same(vector.rules.check_level(level), level)


@pytest.mark.parametrize("case", OF_LEVELS)
def test_levels_are_copies(case):
    env, vector = make(case), make_vector(case)
    vector.reset(seed=0)
    levels = vector.levels()
    vector.reset(options={"levels": levels})
    env.reset(options={"level": levels[0]})
    for field in levels[0]:
        field[...] = 77
    with pytest.raises(AssertionError):
        assert_same(vector.levels()[0], levels[0])
    with pytest.raises(AssertionError):
        assert_same(env.level, levels[0])


def test_plain_numbers_make_a_level():
    level = TMazeEnv().rules.level(1, 3, 0)
    env = TMazeEnv()
    assert env.reset(options={"level": level})[0][1] == 1
    with pytest.raises(
        ValueError, match=r"level.length must be integers of shape \(\), got float64"
    ):
        env.reset(options={"level": level._replace(length=3.5)})


def test_what_ended_has_to_be_reset():
    env, vector = TMazeEnv(length=1), TMazeVectorEnv(1, length=1)
    env.reset(seed=0)
    vector.reset(seed=0)
    env.step(0)
    assert env.step(0)[2]
    with pytest.raises(gymnasium.error.ResetNeeded, match="ended"):
        env.step(0)
    ends = [bool(vector.step(np.zeros(1, int))[2][0]) for _ in range(6)]
    assert ends == [False, True, False, False, True, False]


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 5])
def test_integers_are_integers_in_their_range(value):
    with pytest.raises(ValueError, match="number must be an integer from 1 to 4, got"):
        check_integer("number", value, 1, 4)
    assert check_integer("number", np.int32(4), 1, 4) == 4


@pytest.mark.parametrize("value", [[True, 2], ["1", 2], [2], [3, 2], [0, 2], 0, True, 1.5])
def test_ranges_are_two_integers_in_order(value):
    with pytest.raises(ValueError, match="length must be"):
        check_range("length", value, 1)
    assert check_range("length", (2, np.int64(3)), 1) == (2, 3)
    assert check_range("length", 2, 1) == (2, 2)


@pytest.mark.parametrize("value", [float("nan"), -1, 2, "a", None])
def test_numbers_are_numbers_in_their_range(value):
    with pytest.raises(ValueError, match="share must be a number from 0 to 1, got"):
        check_number("share", value, 0, 1)
