"""Any environment as rows in lockstep: the same episodes in all three autoreset modes."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TransformObservation

from htm_pytorch.rl.agent import Agent, make_agent
from htm_pytorch.rl.config import RolloutConfig, TrainConfig
from htm_pytorch.rl.environments import Environments
from htm_pytorch.rl.learner import Learner
from htm_pytorch.rl.making import make_environments, parse_arguments, seeds_of
from htm_pytorch.rl.observations import leaves, nested
from htm_pytorch.rl.player import Player
from htm_pytorch.rl.processes import World
from htm_pytorch.rl.rollout import Rollout, play
from tests.helpers import assert_near
from tests.rl.worlds import Walk

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, STEPS = 5, 60
MODES = tuple(AutoresetMode)


def make(mode: Any, watch: bool = False, **more: Any) -> Environments:
    vector = SyncVectorEnv([lambda: Walk(watch) for _ in range(ROWS)], autoreset_mode=mode)
    return Environments(vector, **more)


def small(**options: Any) -> TrainConfig:
    sizes: dict[str, Any] = {
        "dim": 8,
        "heads": 2,
        "mem_chunk_size": 3,
        "mem_chunks": 3,
        "window": 3,
        "num_envs": ROWS,
        "minibatches": 1,
    }
    return TrainConfig(env="tests.rl.worlds:Test/Walk-v0").replace(**sizes | options)


def make_walker(environments: Environments, **options: Any) -> Agent:
    torch.manual_seed(1)
    config = small(**options)
    return make_agent(config, environments.observation_space, environments.action_space).double()


def episodes_of(environments: Environments, steps: int) -> list[list[tuple[Any, ...]]]:
    """For each row what it saw, did and earned; actions follow from what is seen."""
    seen = environments.reset(list(range(ROWS)))
    rows: list[list[tuple[Any, ...]]] = [[] for _ in range(ROWS)]
    for _ in range(steps):
        numbers = seen.observation["numbers"]
        for row in range(ROWS):
            if seen.exists is None or seen.exists[row]:
                shown = tuple(
                    float(x) for leaf in leaves(seen.observation) for x in np.ravel(leaf[row])
                )
                flags = (seen.is_first, seen.acts, seen.terminated, seen.truncated)
                rows[row].append(
                    (shown, *(bool(flag[row]) for flag in flags), float(seen.reward[row]))
                )
        seen = environments.step(np.stack([numbers[:, 1], np.sin(numbers[:, 0] * 9)], 1))
    return rows


@pytest.mark.parametrize("watch", [False, True])
def test_episodes_are_the_same_in_all_modes(watch: bool) -> None:
    expected, *others = [episodes_of(make(mode, watch), STEPS) for mode in MODES]
    for found in others:
        for got, wanted in zip(found, expected, strict=True):
            shorter = min(len(got), len(wanted))
            assert shorter > STEPS / 2
            assert got[:shorter] == wanted[:shorter]
    for row in expected:
        firsts = [step[1] for step in row]
        ends = [step[3] or step[4] for step in row]
        # Each final observation is followed by a first one; no action counts at it.
        assert firsts[1:] == ends[:-1] and firsts[0]
        assert all(not step[2] for step in row if step[3] or step[4])
    acts = [step[2] for row in expected for step in row if not (step[3] or step[4])]
    assert all(acts) != watch
    assert any(step[3] for row in expected for step in row)
    assert any(step[4] for row in expected for step in row)


def rollout_in(mode: Any, memory: str, watch: bool, previous: bool) -> tuple[Rollout, Any, Any]:
    environments = make(mode, watch, see_previous=previous)
    agent = make_walker(environments, memory=memory)
    player = Player(environments, agent)
    player.begin(list(range(ROWS)))
    played = play(player, RolloutConfig(steps=STEPS), None)
    learner = Learner(agent, small(normalize_advantages=False), World())
    return played.rollout, learner._advantages(played.rollout), played


@pytest.mark.parametrize("memory", ["htm", "lstm"])
@pytest.mark.parametrize(("watch", "previous"), [(False, False), (True, False), (False, True)])
def test_rollouts_are_the_same_in_all_modes(memory: str, watch: bool, previous: bool) -> None:
    """Actions, values, rewards, advantages of every decision, episode by episode."""
    found = []
    for mode in MODES:
        rollout, (advantages, targets), played = rollout_in(mode, memory, watch, previous)
        decisions = []
        for row in range(ROWS):
            counts = rollout.counts[row]
            parts = (
                *(rollout.actions[row, counts].unbind(1)),
                rollout.log_probs[row, counts],
                rollout.values[row, counts],
                rollout.rewards[row, counts],
                rollout.goes_on[row, counts],
                rollout.is_followed[row, counts],
                advantages[row, counts],
                targets[row, counts],
            )
            decisions.append(torch.stack([part.double() for part in parts], 1))
        found.append((decisions, [e._replace(step=0) for e in played.episodes]))
    (expected, ended), *others = found
    assert len(ended) > ROWS
    for got, episodes in others:
        for row in range(ROWS):
            # Advantages look ahead up to the end of a rollout, which comes elsewhere: the
            # decisions of episodes that all of them finished.
            whole = min(
                int((part[:, -4] == 0).nonzero().max()) for part in (got[row], expected[row])
            )
            assert whole > 5
            assert_near(got[row][:whole], expected[row][:whole], 1e-5)
            mine, theirs = ([e for e in part if e.row == row] for part in (episodes, ended))
            shorter = min(len(mine), len(theirs))
            assert mine[:shorter] == theirs[:shorter]


@pytest.mark.parametrize("mode", MODES)
def test_every_decision_counts_once(mode: Any) -> None:
    """Rollouts that follow each other hold what one long rollout holds."""

    def decisions(lengths: list[int]) -> list[list[tuple[float, ...]]]:
        environments = make(mode)
        player = Player(environments, make_walker(environments))
        player.begin(list(range(ROWS)))
        rows: list[list[tuple[float, ...]]] = [[] for _ in range(ROWS)]
        for length in lengths:
            rollout = play(player, RolloutConfig(steps=length), None).rollout
            for row in range(ROWS):
                for point in rollout.counts[row].nonzero()[:, 0].tolist():
                    seen = (rollout.actions, rollout.values[..., None], rollout.rewards[..., None])
                    rows[row].append(tuple(float(x) for p in seen for x in p[row, point]))
        return rows

    whole, parts = decisions([48]), decisions([7, 1, 16, 24])
    for row, other in zip(whole, parts, strict=True):
        shorter = min(len(row), len(other))
        assert shorter > 30
        np.testing.assert_allclose(row[:shorter], other[:shorter], atol=1e-5)


def test_learning_starts_from_what_acting_had() -> None:
    """The ratio of probabilities is 1 before the first update, from any state of any mode."""
    for mode in MODES:
        environments = make(mode)
        agent = make_walker(environments)
        player = Player(environments, agent)
        player.begin(list(range(ROWS)))
        for _ in range(3):
            rollout = play(player, RolloutConfig(steps=17), torch.Generator()).rollout
            output, _ = agent(rollout.seen, rollout.state, rollout.at)
            policy = agent.distribution(output.policy)
            counts = rollout.counts
            got = policy.log_prob(rollout.actions)[counts]
            assert_near(got, rollout.log_probs[counts], 1e-5)
            assert_near(output.values[counts], rollout.values[counts], 1e-5)


class Batched(gymnasium.vector.VectorWrapper):
    """Gives final observations nested as the batch is, not as rows of objects."""

    def step(self, actions: Any) -> Any:
        observed, *rest, info = super().step(actions)
        if "final_obs" in info:
            rows = [
                r if r is not None else row_of(observed, n) for n, r in enumerate(info["final_obs"])
            ]
            info["final_obs"] = nested(lambda *parts: np.stack(parts), *rows)
        return observed, *rest, info


def row_of(observed: Any, row: int) -> Any:
    return nested(lambda part: part[row], observed)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_final_observations_may_be_rows_or_a_batch(as_tuple: bool) -> None:
    found = []
    for wrap in (Batched, lambda vector: vector):

        def walk() -> Any:
            if not as_tuple:
                return Walk()
            names = ("numbers", "kind")
            parts = spaces.Tuple(Walk().observation_space[n] for n in names)  # pyright: ignore[reportIndexIssue]
            return TransformObservation(Walk(), lambda s: tuple(s[n] for n in names), parts)

        vector = SyncVectorEnv([walk] * ROWS, autoreset_mode=AutoresetMode.SAME_STEP)
        environments = Environments(wrap(vector))
        seen = environments.reset(list(range(ROWS)))
        shown, ends = [], 0
        for _ in range(STEPS):
            shown += [np.array(leaf, float).ravel() for leaf in leaves(seen.observation)]
            seen = environments.step(np.full((ROWS, 2), 0.25))
            ends += int(seen.ended.sum())
        assert ends > ROWS
        found.append(np.concatenate(shown))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_the_environments(reward: float) -> None:
    environments = make(AutoresetMode.NEXT_STEP)
    player = Player(environments, make_walker(environments), 1, range(5, 10), 10)
    player.begin(list(range(ROWS)))
    environments.vector.envs[2].unwrapped.bonus = reward  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=rf"env: .* got {reward} from the environment .* row 7"):
        player.advance()


def test_an_unknown_mode_is_refused() -> None:
    vector = SyncVectorEnv([Walk])
    vector.metadata = {}
    with pytest.raises(ValueError, match=r"autoreset modes \['NEXT_STEP'.* got None"):
        Environments(vector)


def test_parts_and_what_was_before_can_be_seen() -> None:
    environments = make(AutoresetMode.NEXT_STEP, observe=("kind",), see_previous=True)
    seen = environments.reset([0] * ROWS)
    assert set(environments.observation_space["observation"]) == {"kind"}  # pyright: ignore[reportIndexIssue]
    assert not seen.observation["previous_action"].any()
    actions = np.full((ROWS, 2), 0.25, np.float32)
    for _ in range(30):
        seen = environments.step(actions)
        shown = seen.observation
        assert isinstance(environments.observation_space["observation"], spaces.Dict)  # pyright: ignore[reportIndexIssue]
        expected = np.where(seen.is_first[:, None], 0, actions)
        np.testing.assert_array_equal(shown["previous_action"], expected)
        wanted = np.where(seen.is_first, 0, seen.reward)[:, None].astype(np.float32)
        np.testing.assert_array_equal(shown["previous_reward"], wanted)
    with pytest.raises(ValueError, match=r"observe: expected some of \['kind', 'numbers'\]"):
        make(AutoresetMode.NEXT_STEP, observe=("colour",))


@pytest.mark.parametrize("mode", MODES)
def test_the_clock_counts_the_steps_of_each_episode(mode: Any) -> None:
    environments = make(mode, see_time=True)
    seen = environments.reset(list(range(ROWS)))
    count = np.full(ROWS, -1)
    for _ in range(30):
        exists = np.ones(ROWS, bool) if seen.exists is None else seen.exists
        count = np.where(seen.is_first, 0, count + exists)
        clock = seen.observation["time"]
        assert clock.shape[1:] == environments.observation_space["time"].shape  # pyright: ignore[reportIndexIssue]
        sines, cosines = clock[:, : clock.shape[1] // 2], clock[:, clock.shape[1] // 2 :]
        # Of the slowest hand.
        angle = np.arctan2(sines[:, -1], cosines[:, -1])
        np.testing.assert_allclose(angle * 8192 / (2 * np.pi), count, atol=1e-2)
        np.testing.assert_allclose(np.round(cosines[:, 0]), [1, 0, -1, 0] @ _one_hot(count % 4))
        seen = environments.step(np.zeros((ROWS, 2), np.float32))


def _one_hot(which: np.ndarray) -> np.ndarray:
    return np.eye(4)[which].T


def test_previous_choices_are_one_hot() -> None:
    config = small(env_args=("discrete=true",), see_previous=True)
    environments = make_environments(config, 2)
    environments.reset([0, 1])
    seen = environments.step(np.array([2, 0]))
    assert seen.observation["previous_action"].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_wrappers_are_made_by_option() -> None:
    config = TrainConfig(env="CartPole-v1").replace(frame_stack=3, time_limit=7)
    environments = make_environments(config, 2)
    assert environments.observation_space.shape == (3, 4)
    seen = environments.reset([0, 1])
    for _ in range(7):
        seen = environments.step(np.array([0, 1]))
    assert seen.truncated.all() or seen.terminated.any()
    environments.close()


def test_processes_play_what_one_after_another_do() -> None:
    found = []
    for way in ("sync", "async"):
        config = small(vectorize=way, env="CartPole-v1")
        environments = make_environments(config, 3)
        seen = environments.reset(seeds_of(config, 0, range(3)))
        shown = [seen.observation]
        shown += [environments.step(np.array([0, 1, 0])).observation for _ in range(12)]
        found.append(np.stack(shown))
        environments.close()
    np.testing.assert_array_equal(*found)


WRONG = {
    "no such environment": ({"env": "Nothing-v0"}, "env: expected the id .* got 'Nothing-v0'"),
    "no such module": ({"env": "nothing:Nothing-v0"}, "env: expected module:id .* No module"),
    "another argument": (
        {"env": "CartPole-v1", "env_args": ("colour=3",)},
        "env_args: CartPole-v1 is not made with {'colour': 3}",
    ),
    "no argument": ({"env_args": ("colour",)}, "env_args: expected name=value or a JSON"),
    "half a JSON object": ({"env_args": ('{"a": ',)}, "env_args: expected a JSON object"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        make_environments(TrainConfig(env=options.pop("env", "CartPole-v1")).replace(**options), 1)


def test_a_module_that_fails_is_not_a_module_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "world_that_lacks.py").write_text("import nothing_like_it\n")
    with pytest.raises(ValueError, match="env: importing the module 'world_that_lacks' failed"):
        make_environments(TrainConfig(env="world_that_lacks:Any-v0"), 1)


def test_arguments_are_names_or_json() -> None:
    given = ["a=1", "b=word", 'c="1"', '{"d": [1, 2], "a": 2}', "e=true", "f=x=y"]
    expected = {"a": 2, "b": "word", "c": "1", "d": [1, 2], "e": True, "f": "x=y"}
    assert parse_arguments("env_args", given) == expected
