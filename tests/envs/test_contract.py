"""What every environment of ours promises; a new one is tested by being listed."""

import copy
import json
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import htm_pytorch.envs

# Short episodes, so that random actions see many ends. Some tasks have more than one form.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ballet": ("Ballet-v0", {"dance_delay": 2, "max_steps": 60, "observation": "symbols"}),
    "t-maze": ("TMaze-v0", {"length": [1, 6]}),
    "t-maze-free": ("TMaze-v0", {"length": [1, 6], "free": True, "extra_steps": 20}),
    "endless-t-maze": ("EndlessTMaze-v0", {"length": [1, 3], "num_corridors": 3}),
    "proof-of-memory": ("ProofofMemory-v0", {}),
    "visual-match": (
        "VisualMatch-v0",
        {"explore": 2, "distraction": 60, "apple_reward": 0.25},
    ),
    "paired-inference": (
        "PairedAssociativeInference-v0",
        {"num_chains": 3, "length": 4, "symbol_size": 12},
    ),
    "rapid-binding": (
        "RapidBinding-v0",
        {"num_words": 2, "distractions": [0, 2], "rounds": 3, "distraction_questions": 1},
    ),
    "one-shot-navigation": ("OneShotNavigation-v0", {"size": 3, "max_steps": 60}),
}
ALONE: dict[str, tuple[str, dict[str, Any]]] = {"cart-pole": ("CartPolePositions-v0", {})}
HEADINGS = (
    "Action space",
    "Observation space",
    "Rewards",
    "Starting state",
    "Episode end",
    "Information",
    "Arguments",
    "Version history",
)
STEPS = 300

every = pytest.mark.parametrize("case", [*CASES, *ALONE])
batched = pytest.mark.parametrize("case", CASES)


def make(case: str) -> gymnasium.Env[Any, Any]:
    name, arguments = (CASES | ALONE)[case]
    return gymnasium.make(f"htm_pytorch/{name}", disable_env_checker=True, **arguments).unwrapped


def make_vector(case: str, num_envs: int = 5, **more: Any) -> Any:
    name, arguments = CASES[case]
    return gymnasium.make_vec(
        f"htm_pytorch.envs:htm_pytorch/{name}",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        **(arguments | more),
    )


def draw_actions(env: Any, seed: int, steps: int = STEPS) -> np.ndarray:
    size = int(env.single_action_space.n)
    return np.random.default_rng(seed).integers(size, size=(steps, env.num_envs))


def play(env: Any, seed: int, steps: int = STEPS) -> list[Any]:
    return [env.step(actions) for actions in draw_actions(env, seed, steps)]


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), [right[name] for name in left]
    if isinstance(left, list | tuple):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(left, right)


def row(batch: Any, index: int) -> Any:
    if isinstance(batch, dict):
        return {name: value[index] for name, value in batch.items()}
    return batch[index]


def test_every_registered_environment_is_listed() -> None:
    ours = {name for name in gymnasium.registry if name.startswith("htm_pytorch/")}
    assert ours == {f"htm_pytorch/{name}" for name, _ in (CASES | ALONE).values()}
    assert sorted(htm_pytorch.envs.__all__) == sorted(set(htm_pytorch.envs.__all__))


@pytest.mark.filterwarnings("ignore:.*A Box observation space")  # CartPole's own
@every
def test_gymnasium_accepts_it(case: str) -> None:
    check_env(make(case), skip_render_check=True)


@batched
def test_docstrings_have_gymnasiums_headings(case: str) -> None:
    text = type(make(case)).__doc__ or ""
    places = [text.find(f"\n    ## {heading}\n") for heading in HEADINGS]
    assert -1 not in places
    assert places == sorted(places)
    name, _ = CASES[case]
    assert f"htm_pytorch/{name}" in text
    assert f"htm_pytorch/{name}" in (type(make_vector(case)).__doc__ or "")


@every
def test_a_seed_determines_what_is_seen(case: str) -> None:
    first, second, other = make(case), make(case), make(case)
    shown = [env.reset(seed=seed) for env, seed in ((first, 3), (second, 3), (other, 4))]
    assert_same(shown[0], shown[1])
    differs = False
    actions = np.random.default_rng(0)
    for _ in range(STEPS):
        action = int(actions.integers(first.action_space.n))  # type: ignore[attr-defined]
        results = []
        for env in (first, second, other):
            result = env.step(action)
            assert result[0] in env.observation_space
            seen = env.reset()[0] if result[2] or result[3] else result[0]
            results.append((seen, *result[1:4]))
        assert_same(results[0], results[1])
        try:
            assert_same(results[0], results[2])
        except AssertionError:
            differs = True
    assert differs


@batched
def test_a_seed_determines_the_batch(case: str) -> None:
    first, second = make_vector(case), make_vector(case)
    second.reset(seed=8)
    assert_same(first.reset(seed=3), second.reset(seed=3))
    assert_same(play(first, 0), play(second, 0))
    before = first.levels()
    first.reset(seed=4)
    with pytest.raises(AssertionError):
        assert_same(before, first.levels())


@batched
def test_the_batch_equals_single_environments(case: str) -> None:
    vector = make_vector(case)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    singles = [make(case) for _ in range(vector.num_envs)]
    batch, info = vector.reset(seed=1)
    for index, (env, level) in enumerate(zip(singles, vector.levels(), strict=True)):
        alone, told = env.reset(options={"level": level})
        assert_same(row(batch, index), alone)
        assert_same(row(info, index), {name: told[name] for name in info})
    ended = [False] * vector.num_envs
    ends = 0
    for actions in draw_actions(vector, 0):
        batch, *results, info = vector.step(actions)
        assert batch in vector.observation_space
        assert [result.dtype.kind for result in results] == ["f", "b", "b"]
        for index, env in enumerate(singles):
            if ended[index]:
                alone, told = env.reset(options={"level": vector.levels()[index]})
                expected = [0.0, False, False]
            else:
                alone, *expected, told = env.step(int(actions[index]))
                assert type(expected[0]) is float
                assert type(expected[1]) is type(expected[2]) is bool
            assert_same(row(batch, index), alone)
            assert [result[index] for result in results] == expected
            assert_same(row(info, index), {name: told[name] for name in info})
            ended[index] = bool(expected[1] or expected[2])
            assert not (expected[1] and expected[2])
            ends += ended[index]
    assert ends > vector.num_envs


@batched
def test_actions_that_do_not_count_change_nothing(case: str) -> None:
    first, second = make_vector(case), make_vector(case)
    _, info = first.reset(seed=1)
    second.reset(seed=1)
    ended = np.zeros(first.num_envs, bool)
    for ours, others in zip(draw_actions(first, 0), draw_actions(first, 1), strict=True):
        counts = info.get("action_counts", np.ones(first.num_envs, bool)) & ~ended
        result, result_too = first.step(ours), second.step(np.where(counts, ours, others))
        assert_same(result, result_too)
        assert result[4].keys() == info.keys()
        info, ended = result[4], result[2] | result[3]


@batched
def test_given_levels_are_played(case: str) -> None:
    levels = make_vector(case)
    levels.reset(seed=2)
    vector = make_vector(case)
    vector.reset(options={"levels": levels.levels()})
    assert_same(vector.levels(), levels.levels())
    with pytest.raises(ValueError, match="levels must be 5, one an environment, got 1"):
        vector.reset(options={"levels": levels.levels()[:1]})
    with pytest.raises(ValueError, match="level must be a"):
        vector.reset(options={"levels": [(0,)] * 5})


@batched
def test_state_continues_exactly_after_json(case: str) -> None:
    vector, other = make_vector(case), make_vector(case)
    vector.reset(seed=1)
    play(vector, 0, 50)
    state = vector.state_dict()
    state["generator"] = json.loads(json.dumps(state["generator"]))
    saved = copy.deepcopy(state)
    seen, future = vector.observe(), play(vector, 1)
    other.load_state_dict(state)
    assert_same(other.observe(), seen)
    assert_same(play(other, 1), future)
    assert_same(state, saved)


@batched
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    vector = make_vector(case)
    vector.reset(seed=1)
    state, before = vector.state_dict(), vector.state_dict()
    with pytest.raises(ValueError, match="num_envs"):
        make_vector(case, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="entries"):
        vector.load_state_dict({name: state[name] for name in state if name != "ended"})
    with pytest.raises(ValueError, match="shape"):
        vector.load_state_dict(state | {"ended": np.zeros(4, bool)})
    assert_same(vector.state_dict(), before)


@batched
def test_observations_are_not_overwritten_by_later_steps(case: str) -> None:
    vector = make_vector(case)
    observation, info = vector.reset(seed=0)
    kept = copy.deepcopy((observation, info))
    play(vector, 0, 10)
    assert_same((observation, info), kept)


@batched
def test_bad_actions_and_missing_resets_are_refused(case: str) -> None:
    env, vector = make(case), make_vector(case)
    zeros = np.zeros(5, int)
    for call in (lambda: env.step(0), lambda: env.level, lambda: vector.step(zeros)):  # type: ignore[attr-defined]
        with pytest.raises(gymnasium.error.ResetNeeded):
            call()
    for call in (vector.state_dict, vector.observe, vector.levels):
        with pytest.raises(gymnasium.error.ResetNeeded):
            call()
    env.reset(seed=0)
    vector.reset(seed=0)
    for action in (-1, 99):
        with pytest.raises(ValueError, match="action must be"):
            env.step(action)
    for actions in (zeros + 99, zeros - 1, np.zeros(4, int), np.zeros(5)):
        with pytest.raises(ValueError, match="actions must be"):
            vector.step(actions)
    for number in (0, 1.5):
        with pytest.raises(ValueError, match="num_envs must be an integer of at least 1"):
            make_vector(case, number)  # type: ignore[arg-type]


@batched
def test_only_marked_rows_begin_anew(case: str) -> None:
    vector, other = make_vector(case), make_vector(case)
    for env in (vector, other):
        env.reset(seed=3)
        play(env, 0, 7)
    mask = np.array([True, False, True, False, False])
    before, kept = vector.levels(), other.observe()
    levels = make_vector(case)
    levels.reset(seed=4)
    seen, _ = vector.reset(options={"reset_mask": mask, "levels": levels.levels()})
    fresh, _ = levels.reset(options={"levels": levels.levels()})
    for row, is_new in enumerate(mask):
        assert_same(vector.levels()[row], (levels.levels() if is_new else before)[row])
        for part, new, old in zip(*map(leaves, (seen, fresh, kept)), strict=True):
            assert_same(part[row], (new if is_new else old)[row])
    none = {"reset_mask": np.zeros(5, bool)}
    for more in ({}, {"levels": levels.levels()}):
        assert_same(vector.reset(options=none | more)[0], seen)
    assert_same(make_vector(case).reset(seed=3)[0], other.reset(seed=3)[0])


def leaves(observation: Any) -> list[Any]:
    if isinstance(observation, dict):
        return [leaf for part in observation.values() for leaf in leaves(part)]
    return [observation]


@batched
def test_options_that_would_be_ignored_are_refused_and_nothing_begins(case: str) -> None:
    env, vector = make(case), make_vector(case)
    env.reset(seed=0)
    vector.reset(seed=0)
    before = vector.state_dict()
    for wrong in ({"nope": 1}, {"levels": None, 1: 2}, [("level", 1)], "level"):
        with pytest.raises(ValueError, match="options of reset must be"):
            env.reset(options=wrong)  # type: ignore[arg-type]
    for wrong in ({"nope": 1}, {"level": 1}, [1], "levels"):
        with pytest.raises(ValueError, match="options of reset must be"):
            vector.reset(seed=1, options=wrong)
    for mask in ([True], [1, 0, 1, 0, 0], "all", np.ones((5, 1), bool)):
        with pytest.raises(ValueError, match=r"options\['reset_mask'\] must be bool"):
            vector.reset(seed=1, options={"reset_mask": mask})
    for levels in (3, "abcde", [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="levels? must be"):
            vector.reset(seed=1, options={"levels": levels})
    assert_same(vector.state_dict(), before)
    with pytest.raises(gymnasium.error.ResetNeeded, match="all rows first"):
        make_vector(case).reset(options={"reset_mask": np.array([True] * 4 + [False])})
    for action in (0.5, "x", None, np.array([0])):
        with pytest.raises(ValueError, match="action must be"):
            env.step(action)
