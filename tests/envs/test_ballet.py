"""The Ballet against recordings of the original, and the batched environment against the single."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from htm_pytorch.envs import (
    COLOURS,
    DANCER_SQUARES,
    DANCES,
    INSTRUCTIONS,
    SHAPES,
    STAY,
    TILES,
    BalletEnv,
    BalletVectorEnv,
    Level,
    ballet_tables,
)

DATA = Path(__file__).parent / "data"
EPISODES = json.loads((DATA / "index.json").read_text())["episodes"]
LEVEL = Level(((2, 2), (8, 5)), (0, 10), (3, 18), (0, 14), target=1)
NORTH, NORTH_WEST = 0, 7


def sha256(image):
    return np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8)


def as_picture(symbols):
    return TILES[symbols].swapaxes(1, 2).reshape(99, 99, 3)


def make_vector(num_envs=5, **arguments):
    return BalletVectorEnv(num_envs, **{"dance_delay": 2, "max_steps": 60, **arguments})


def play(env, seed, steps):
    """Take random actions; collect everything that comes back."""
    actions = np.random.default_rng(seed).integers(8, size=(steps, env.num_envs))
    return [env.step(row)[:4] for row in actions]


def assert_same(left, right):
    for (seen, *results), (seen_too, *results_too) in zip(left, right, strict=True):
        assert seen.keys() == seen_too.keys()
        for name in seen:
            np.testing.assert_array_equal(seen[name], seen_too[name])
        for result, result_too in zip(results, results_too, strict=True):
            np.testing.assert_array_equal(result, result_too)


def test_tables_are_the_originals_in_its_order():
    original = json.loads((DATA / "tables.json").read_text())
    assert list(DANCES) == list(original["dances"])
    assert list(COLOURS) == list(original["colors"])
    assert list(SHAPES) == list(original["shapes"])
    for name, moves in original["dances"].items():
        assert DANCES[name].split() == moves
    for name, colour in original["colors"].items():
        assert list(COLOURS[name]) == colour
    for name, rows in original["shapes"].items():
        drawn = ["".join(".#"[pixel] for pixel in row) for row in SHAPES[name].astype(int)]
        assert drawn == rows


def test_dances_return_and_stay_beside_their_square():
    offsets = ballet_tables.DANCE_OFFSETS
    assert offsets.shape == (13, 17, 2)
    assert not offsets[:, [0, -1]].any()
    assert np.abs(offsets).max() == 1


@pytest.mark.parametrize("episode", EPISODES, ids=lambda episode: episode["name"])
def test_recorded_episode_replays(episode):
    recorded = np.load(DATA / f"{episode['name']}.npz")
    num_dancers, delay = map(int, episode["level"].split("_delay"))
    env = BalletEnv(num_dancers, delay)
    observation, info = env.reset(seed=int(recorded["seed"]))

    dancers = episode["dancers"]
    assert [list(DANCES)[index] for index in env.level.dances] == [d["motion"] for d in dancers]
    assert [list(COLOURS)[index] for index in env.level.colours] == [d["color"] for d in dancers]
    assert [list(SHAPES)[index] for index in env.level.shapes] == [d["shape"] for d in dancers]
    assert dancers[env.level.target]["value"] == 1

    frames = [observation["image"]]
    for step, action in enumerate(recorded["actions"], start=1):
        assert info["instruction"] == recorded["language"][step - 1]
        observation, reward, terminated, truncated, info = env.step(action)
        frames.append(observation["image"])
        assert INSTRUCTIONS[observation["instruction"]] == info["instruction"]
        assert info["action_counts"] is (info["instruction"] != "watch")
        assert reward == recorded["rewards"][step]
        assert 1 - terminated == recorded["discounts"][step]
        assert (terminated or truncated) == (recorded["step_types"][step] == 2)
        assert not (terminated and truncated)
    assert info["instruction"] == recorded["language"][-1]
    np.testing.assert_array_equal([sha256(frame) for frame in frames], recorded["frame_sha256"])
    for index, frame in zip(recorded["frame_idx"], recorded["frames"], strict=True):
        np.testing.assert_array_equal(frames[index], frame)

    observation, info = env.reset()
    np.testing.assert_array_equal(sha256(observation["image"]), recorded["ep2_frame_sha256"])
    assert info["instruction"] == recorded["ep2_language"]


@pytest.mark.parametrize("observation", ["image", "symbols"])
def test_gymnasium_accepts_the_environment(observation):
    env = gymnasium.make("htm_pytorch/Ballet-v0", observation=observation, render_mode="rgb_array")
    check_env(env.unwrapped)


def test_registered_names_make_both_environments():
    arguments: Any = {"num_dancers": 4, "dance_delay": 48}
    for name in ("htm_pytorch/Ballet-v0", "htm_pytorch.envs:htm_pytorch/Ballet-v0"):
        env = gymnasium.make(name, **arguments).unwrapped
        assert isinstance(env, BalletEnv)
        assert (env.num_dancers, env.dance_delay, env.max_steps) == (4, 48, 1024)
        vector = gymnasium.make_vec(
            name, num_envs=3, vectorization_mode="vector_entry_point", **arguments
        )
        assert isinstance(vector, BalletVectorEnv)
        assert (vector.num_envs, vector.max_steps) == (3, 1024)
        assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


def test_first_move_is_the_action_chosen_on_seeing_the_dance():
    env = BalletEnv(2, 2, observation="symbols")
    env.reset(options={"level": LEVEL})
    words = [env.step(NORTH)[4]["instruction"] for _ in range(34)]
    assert words == ["watch"] * 33 + ["zee"]
    observation, *_ = env.step(STAY)
    np.testing.assert_array_equal(observation["symbols"] == 1, ballet_tables.ROOMS[5, 5] == 1)
    observation, *_ = env.step(NORTH)
    np.testing.assert_array_equal(observation["symbols"] == 1, ballet_tables.ROOMS[4, 5] == 1)


@pytest.mark.parametrize(("target", "reward"), [(0, 1.0), (1, 0.0)])
def test_any_touch_terminates_and_only_the_target_pays(target, reward):
    env = BalletEnv(2, 2)
    env.reset(options={"level": LEVEL._replace(target=target)})
    for _ in range(34):
        env.step(NORTH_WEST)
    ends = [env.step(NORTH_WEST)[1:4] for _ in range(3)]
    assert ends == [(0, False, False), (0, False, False), (reward, True, False)]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(NORTH)


def test_batched_touches_pay_each_environment_its_own():
    vector = make_vector(2)
    vector.reset(options={"levels": [LEVEL, LEVEL._replace(target=0)]})
    results = [vector.step(np.full(2, NORTH_WEST))[1:4] for _ in range(38)]
    assert [reward.tolist() for reward, *_ in results] == [[0, 0]] * 36 + [[0, 1], [0, 0]]
    assert [end.tolist() for _, end, _ in results] == [[False] * 2] * 36 + [[True] * 2, [False] * 2]


def test_touch_on_the_last_step_terminates_without_truncation():
    env = BalletEnv(2, 2, max_steps=37)
    env.reset(options={"level": LEVEL})
    for _ in range(36):
        _, _, terminated, truncated, _ = env.step(NORTH_WEST)
        assert not (terminated or truncated)
    assert env.step(NORTH_WEST)[2:4] == (True, False)


def test_walls_stop_the_agent():
    env = BalletEnv(2, 2, observation="symbols")
    env.reset(options={"level": LEVEL})
    for action in [STAY] * 34 + [NORTH] * 7:
        env.step(action)
    observation, *_ = env.step(NORTH_WEST)
    np.testing.assert_array_equal(observation["symbols"] == 1, ballet_tables.ROOMS[1, 5] == 1)


def test_time_out_truncates_and_does_not_terminate():
    env, vector = BalletEnv(2, 2, max_steps=40), make_vector(max_steps=40)
    env.reset(seed=0)
    vector.reset(seed=0)
    for step in range(1, 41):
        _, reward, terminated, truncated, _ = env.step(STAY)
        assert (reward, terminated, truncated) == (0, False, step == 40)
        _, rewards, terminations, truncations, _ = vector.step(np.full(5, STAY))
        assert not rewards.any()
        assert not terminations.any()
        assert (truncations == (step == 40)).all()


def test_delay_zero_never_reaches_the_choice():
    with pytest.warns(UserWarning, match="dance_delay=0"):
        env = BalletEnv(2, 0, max_steps=50)
    env.reset(options={"level": LEVEL})
    seen = [env.step(NORTH_WEST) for _ in range(50)]
    assert {info["instruction"] for *_, info in seen} == {"watch"}
    assert seen[-1][3]
    assert len({observation["image"].tobytes() for observation, *_ in seen[15:]}) == 1


@pytest.mark.parametrize("observation", ["image", "symbols"])
@pytest.mark.parametrize(("num_dancers", "max_steps"), [(1, 77), (2, 80), (8, 150)])
def test_batched_equals_single(num_dancers, max_steps, observation):
    num_envs = 6
    arguments = {
        "num_dancers": num_dancers,
        "dance_delay": 2,
        "max_steps": max_steps,
        "observation": observation,
    }
    vector = BalletVectorEnv(num_envs, **arguments)
    singles = [BalletEnv(**arguments) for _ in range(num_envs)]
    batch, _ = vector.reset(seed=num_dancers)
    for index, (env, level) in enumerate(zip(singles, vector.levels(), strict=True)):
        alone, _ = env.reset(options={"level": level})
        for name, value in alone.items():
            np.testing.assert_array_equal(batch[name][index], value)
    ended = [False] * num_envs
    endings = set()
    for actions in np.random.default_rng(0).integers(9, size=(4 * max_steps, num_envs)):
        batch, *results, info = vector.step(actions)
        assert info.keys() == {"action_counts"}
        np.testing.assert_array_equal(info["action_counts"], batch["instruction"] > 0)
        for index, env in enumerate(singles):
            if ended[index]:
                alone, _ = env.reset(options={"level": vector.levels()[index]})
                expected = (0.0, False, False)
            else:
                alone, *expected, _ = env.step(actions[index])
            assert tuple(result[index] for result in results) == tuple(expected)
            for name, value in alone.items():
                np.testing.assert_array_equal(batch[name][index], value)
            ended[index] = bool(expected[1] or expected[2])
            endings.add(tuple(expected[1:]))
        assert batch in vector.observation_space
    assert endings == {(False, False), (False, True), (True, False)}


def test_given_levels_are_played():
    levels = [LEVEL, LEVEL._replace(target=0), LEVEL._replace(colours=(3, 3))]
    vector = make_vector(3)
    vector.reset(options={"levels": levels})
    assert vector.levels() == levels


def test_drawn_levels_are_legal_distinct_and_cover_everything():
    vector = make_vector(2000, num_dancers=8, observation="symbols")
    vector.reset(seed=0)
    levels = vector.levels()
    for level in levels[:100]:
        assert set(level.positions) == set(DANCER_SQUARES)
        for indices in (level.dances, level.colours, level.shapes):
            assert len(set(indices)) == 8
    for pick, size in (("dances", 13), ("colours", 19), ("shapes", 15)):
        counts = np.bincount([getattr(level, pick)[3] for level in levels], minlength=size)
        expected = 2000 / size
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    counts = np.bincount([level.target for level in levels], minlength=8)
    assert np.abs(counts - 250).max() < 5 * np.sqrt(250)


@pytest.mark.parametrize("observation", ["image", "symbols"])
def test_same_seed_same_future(observation):
    first, second = (make_vector(observation=observation) for _ in range(2))
    first.reset(seed=3)
    second.reset(seed=8)
    second.reset(seed=3)
    assert_same(play(first, 0, 200), play(second, 0, 200))
    before = first.levels()
    first.reset(seed=4)
    assert first.levels() != before


def test_state_continues_exactly_after_json():
    vector, other = make_vector(), make_vector()
    vector.reset(seed=1)
    play(vector, 0, 75)
    state = vector.state_dict()
    state["generator"] = json.loads(json.dumps(state["generator"]))
    saved = copy.deepcopy(state)
    future = play(vector, 1, 200)
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.observe()["image"].shape, (5, 99, 99, 3))
    assert_same(play(other, 1, 200), future)
    for name, value in saved.items():
        np.testing.assert_array_equal(state[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 4}, "num_envs=5, this has num_envs=4"),
        ({"num_dancers": 3}, "num_dancers=2, this has num_dancers=3"),
        ({"dance_delay": 3}, "dance_delay=2, this has dance_delay=3"),
        ({"max_steps": 61}, "max_steps=60, this has max_steps=61"),
    ],
)
def test_state_of_other_arguments_is_refused(arguments, message):
    vector = make_vector()
    vector.reset(seed=1)
    with pytest.raises(ValueError, match=message):
        make_vector(**arguments).load_state_dict(vector.state_dict())


def test_incomplete_state_is_refused_and_changes_nothing():
    vector = make_vector()
    vector.reset(seed=1)
    state, levels = vector.state_dict(), vector.levels()
    with pytest.raises(ValueError, match="entries"):
        vector.load_state_dict({name: value for name, value in state.items() if name != "frame"})
    with pytest.raises(ValueError, match="shape"):
        vector.load_state_dict(state | {"frame": state["frame"] + 1, "ended": np.zeros(4, bool)})
    assert vector.levels() == levels
    np.testing.assert_array_equal(vector.state_dict()["frame"], state["frame"])


def test_pictures_are_the_tiles_of_the_symbols():
    pictures, symbols = (make_vector(observation=kind) for kind in ("image", "symbols"))
    pictures.reset(seed=5)
    symbols.reset(seed=5)
    for (drawn, *_), (named, *_) in zip(play(pictures, 2, 200), play(symbols, 2, 200), strict=True):
        for picture, view in zip(drawn["image"], named["symbols"], strict=True):
            np.testing.assert_array_equal(picture, as_picture(view))


def test_observations_are_not_overwritten_by_later_steps():
    vector = make_vector(observation="symbols")
    observation, _ = vector.reset(seed=0)
    kept = observation["symbols"].copy()
    play(vector, 0, 3)
    np.testing.assert_array_equal(observation["symbols"], kept)


def test_rendering_is_the_picture():
    env = BalletEnv(2, 2, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), observation["image"])
    vector = make_vector(render_mode="rgb_array")
    observation, _ = vector.reset(seed=0)
    np.testing.assert_array_equal(vector.render(), observation["image"])
    assert BalletEnv().render() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_dancers": 0}, "num_dancers must be an integer from 1 to 8, got 0"),
        ({"num_dancers": 9}, "num_dancers must be an integer from 1 to 8, got 9"),
        ({"num_dancers": 2.0}, "num_dancers must be an integer from 1 to 8, got 2.0"),
        ({"dance_delay": -1}, "dance_delay must be an integer of at least 0, got -1"),
        ({"max_steps": 0}, "max_steps must be None or an integer of at least 1, got 0"),
        ({"observation": "rgb"}, "observation must be 'image' or 'symbols', got 'rgb'"),
        ({"render_mode": "human"}, "render_mode must be None or 'rgb_array', got 'human'"),
    ],
)
@pytest.mark.parametrize("kind", [BalletEnv, BalletVectorEnv])
def test_bad_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_bad_number_of_environments_is_refused():
    with pytest.raises(ValueError, match="num_envs must be an integer of at least 1, got 0"):
        BalletVectorEnv(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": ((2, 2), (5, 5))}, "positions must lie in DANCER_SQUARES"),
        ({"positions": ((2, 2), (2, 2))}, "positions must be distinct"),
        ({"dances": (0, 0)}, "dances must be distinct"),
        ({"dances": (0, 13)}, "dances must be indices from 0 to 12"),
        ({"colours": (0, 19)}, "colours must be indices from 0 to 18"),
        ({"shapes": (-1, 2)}, "shapes must be indices from 0 to 14"),
        ({"shapes": (1, 2, 3)}, "num_dancers=2"),
        ({"target": 2}, "target must be from 0 to 1, got 2"),
    ],
)
def test_bad_levels_are_refused(change, message):
    level = LEVEL._replace(**change)
    with pytest.raises(ValueError, match=message):
        BalletEnv(2, 2).reset(options={"level": level})
    with pytest.raises(ValueError, match=message):
        make_vector(1).reset(options={"levels": [level]})


def test_bad_actions_and_missing_resets_are_refused():
    env, vector = BalletEnv(2, 2), make_vector()
    for call in (lambda: env.step(0), lambda: env.level, lambda: vector.step(np.zeros(5, int))):
        with pytest.raises(gymnasium.error.ResetNeeded):
            call()
    with pytest.raises(gymnasium.error.ResetNeeded):
        vector.state_dict()
    env.reset(seed=0)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="action must be 0 to 8, got 9"):
        env.step(9)
    for actions in (np.full(5, 9), np.full(5, -1), np.zeros(4, int), np.zeros(5)):
        with pytest.raises(ValueError, match="actions must be"):
            vector.step(actions)
    with pytest.raises(ValueError, match="levels must be 5"):
        vector.reset(options={"levels": [LEVEL]})


def test_some_rows_of_a_batch_begin_anew():
    env = BalletVectorEnv(4, num_dancers=1, dance_delay=1, observation="symbols", max_steps=30)
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.zeros(4, int))
    before, levels = env.observe(), env.levels()
    mask = np.array([True, False, True, False])
    seen, info = env.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(seen["symbols"][~mask], before["symbols"][~mask])
    np.testing.assert_array_equal(info["action_counts"], seen["instruction"] > 0)
    assert not seen["instruction"][mask].any()
    assert [a == b for a, b in zip(env.levels(), levels, strict=True)] == (~mask).tolist()
    given = env.levels()[::-1]
    env.reset(options={"levels": given, "reset_mask": mask})
    assert env.levels()[0] == given[0] and env.levels()[2] == given[2]
    for wrong in (np.ones(3, bool), np.ones(4, int)):
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": wrong})
