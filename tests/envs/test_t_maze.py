"""The T-Maze: what is shown when, who earns what, and how long it takes."""

import numpy as np
import pytest

from htm_pytorch.envs import TMazeEnv, TMazeLevel, TMazeVectorEnv
from tests.envs.oracles import assert_chance, returns

FORWARD, UP, BACK, DOWN = range(4)


def level(hint=1, length=3, noise=0):
    return TMazeLevel(np.array(hint), np.array(length), np.array(noise))


def remember_hint(turns):
    """Return a policy that goes forward, 0, but at the junction turns as the first hint said."""
    hints = []

    def policy(seen, _):
        if not hints:
            hints.append(seen[:, 1])
        return np.where(seen[:, 2] == 1, np.where(hints[0] > 0, *turns), 0)

    return policy


def test_only_the_first_observation_shows_the_hint():
    env = TMazeEnv()
    seen = [env.reset(options={"level": level(hint=-1)})[0]]
    ends = []
    for action in (0, 1, 1, 0):
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append(observation)
        ends.append((reward, terminated, truncated))
    shown = np.array(seen)[:, :3].tolist()
    assert shown == [[0, -1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [-1, 0, 0]]
    assert ends == [(0, False, False)] * 3 + [(1, True, False)]


@pytest.mark.parametrize(("hint", "action", "reward"), [(1, 1, 1), (1, 0, 0), (-1, 1, 0)])
def test_only_the_named_goal_pays(hint, action, reward):
    env = TMazeEnv()
    env.reset(options={"level": level(hint=hint, length=1)})
    env.step(0)
    assert env.step(action)[1:4] == (reward, True, False)


def test_actions_count_at_the_junction_alone():
    env = TMazeEnv()
    counts = [env.reset(options={"level": level()})[1]["action_counts"]]
    counts += [env.step(0)[4]["action_counts"] for _ in range(4)]
    assert counts == [False, False, False, True, False]


def test_who_walks_freely_can_turn_back_and_bump():
    env = TMazeEnv(free=True, extra_steps=6)
    env.reset(options={"level": level(length=2)})
    seen = [env.step(action) for action in (BACK, UP, FORWARD, FORWARD, FORWARD, BACK, FORWARD, UP)]
    flags = [int(observation[2]) for observation, *_ in seen]
    assert flags == [0, 0, 0, 1, 0, 0, 0, 0]
    assert not any(observation[1] for observation, *_ in seen)
    assert [result[1:4] for result in seen] == [(0, False, False)] * 7 + [(1, True, False)]


def test_time_out_truncates():
    env = TMazeEnv(free=True)
    env.reset(options={"level": level(length=2)})
    ends = [env.step(BACK)[1:4] for _ in range(3)]
    assert ends == [(0, False, False)] * 2 + [(0, False, True)]


@pytest.mark.parametrize(("free", "turns"), [(False, (1, 0)), (True, (UP, DOWN))])
def test_memory_earns_everything_and_none_earns_half(free, turns):
    vector = TMazeVectorEnv(2000, length=[1, 12], free=free)
    assert returns(vector, remember_hint(turns)).min() == 1
    blind = np.random.default_rng(1)

    def guess(seen, _):
        return np.where(seen[:, 2] == 1, blind.choice(turns, size=2000), 0)

    assert_chance(returns(vector, guess), 0.5)


def test_noise_is_uniform_and_changes_from_step_to_step():
    vector = TMazeVectorEnv(1000, length=30)
    vector.reset(seed=0)
    noise = np.array([vector.step(np.zeros(1000, int))[0][:, 3] for _ in range(30)])
    for value in (-1, 0, 1):
        assert_chance(noise == value, 1 / 3)
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.03


def test_levels_are_drawn_uniformly():
    vector = TMazeVectorEnv(3000, length=[2, 4])
    vector.reset(seed=0)
    levels = vector.levels()
    assert_chance(np.array([int(level.hint) for level in levels]), 0)
    for length in (2, 3, 4):
        assert_chance(np.array([level.length == length for level in levels]), 1 / 3)


def test_a_long_corridor_needs_no_table():
    vector = TMazeVectorEnv(2, length=1_000_000)
    vector.reset(seed=0)
    state = vector.state_dict()
    assert (
        sum(np.asarray(value).nbytes for name, value in state.items() if name != "generator") < 500
    )
    vector.load_state_dict(state | {"x": np.full(2, 999_999), "time": np.full(2, 999_999)})
    assert vector.step(np.zeros(2, int))[0][:, 2].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be at least 1, the least first, got 0"),
        ({"length": [5, 2]}, "length must be at least 1, the least first"),
        ({"length": [1, 2, 3]}, r"length must be an integer or \[least, greatest\]"),
        ({"length": [1, 2.5]}, r"length must be an integer or \[least, greatest\]"),
        ({"extra_steps": -1}, "extra_steps must be an integer of at least 0"),
        ({"extra_steps": 3}, "extra_steps must be 0 unless free=True, got 3"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for kind in (TMazeEnv, TMazeVectorEnv):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hint": 0}, "hint must be -1 or 1"),
        ({"hint": 2}, "level.hint must be from -1 to 1, got 2"),
        ({"length": 0}, "level.length must be from 1 to"),
        ({"length": [10]}, r"level.length must be integers of shape \(\)"),
    ],
)
def test_bad_levels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TMazeEnv().reset(options={"level": level(**{"length": 10, **change})})


def test_a_state_of_another_corridor_is_refused():
    vector = TMazeVectorEnv(2, length=[2, 4])
    vector.reset(seed=0)
    with pytest.raises(ValueError, match=r"saved with length=\[2.*this has length=\[2, 5\]"):
        TMazeVectorEnv(2, length=[2, 5]).load_state_dict(vector.state_dict())


@pytest.mark.parametrize("free", ["False", 1, None])
def test_free_is_a_flag(free: object) -> None:
    with pytest.raises(ValueError, match="free must be True or False, got"):
        TMazeEnv(free=free)  # type: ignore[arg-type]
