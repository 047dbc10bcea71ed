"""A rollout against a plain simulation, one frame and one row at a time."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from htm_pytorch.rl.agent import Agent
from htm_pytorch.rl.agent import make_agent as make_agent_of
from htm_pytorch.rl.config import RolloutConfig, TrainConfig
from htm_pytorch.rl.environments import Environments
from htm_pytorch.rl.learner import Learner
from htm_pytorch.rl.making import make_environments
from htm_pytorch.rl.observations import Steps, as_tensor, nested
from htm_pytorch.rl.player import Player
from htm_pytorch.rl.processes import World
from htm_pytorch.rl.rollout import Rollout, play
from htm_pytorch.tasks import find

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 12
LEVELS = 1
DISCOUNT, TRACE = 0.9, 0.8
# Values and log probabilities are kept in float32.
TOLERANCE = 1e-6


def make_config(**arguments: Any) -> TrainConfig:
    given = {"num_dancers": 1, "dance_delay": 1, "observation": "symbols"} | arguments
    return TrainConfig(env="htm_pytorch.envs:htm_pytorch/Ballet-v0").replace(
        env_args=tuple(f"{name}={value}" for name, value in given.items()),
        dim=8,
        depth=2,
        heads=2,
        topk_mems=2,
        mem_chunk_size=3,
        mem_chunks=4,
        window=3,
        discount=DISCOUNT,
        trace=TRACE,
        normalize_advantages=False,
    )


def make_env(num_envs: int, **arguments: Any) -> Environments:
    return make_environments(make_config(**arguments), num_envs)


def make_agent(observation: str = "symbols") -> Agent:
    torch.manual_seed(1)
    config = make_config(observation=observation)
    env = make_environments(config, 1)
    parts = find("ballet").parts
    assert parts is not None
    agent = make_agent_of(config, env.observation_space, env.action_space, parts()).double()
    with torch.no_grad():
        # Values far from 0, so that a mistake with them shows.
        list(agent.value.parameters())[-2].mul_(4)
    return agent


class Judged:
    """A rollout, and the advantages that learning makes of it."""

    def __init__(self, rollout: Rollout, agent: Agent):
        self.rollout = rollout
        config = make_config().replace(num_envs=len(rollout.at), minibatches=1)
        learner = Learner(agent, config, World())
        self.advantages, self.returns = learner._advantages(rollout)


def play_here(
    env: Environments, agent: Agent, steps: int, repeat: int, seed: int | None = 0
) -> Any:
    """Of the first episodes, the returns; NaN for those that were cut."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    player = Player(env, agent, repeat)
    player.begin([LEVELS])
    played = play(player, RolloutConfig(rollout="episodes", steps=steps), generator)
    returns = np.full(env.num_envs, np.nan)
    for episode in played.episodes:
        if episode.step:
            returns[episode.row] = episode.total
    return Judged(played.rollout, agent), returns


@dataclasses.dataclass
class Point:
    step: int
    decides: bool
    value: float
    log_prob: float
    action: int
    reward: float = 0.0
    terminated: bool = False


def simulate(env: Environments, agent: Agent, steps: int, repeat: int, seed: int) -> Any:
    """The points of each row and the returns of first episodes; the agent sees every frame alone.

    One draw for all rows at every step: the generator's only convention.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = range(env.num_envs)
    points: list[list[Point]] = [[] for _ in rows]
    total, first_return = [0.0 for _ in rows], [float("nan") for _ in rows]
    hold, action = [0 for _ in rows], [0 for _ in rows]
    over, timed_out, is_first = ([False] * env.num_envs for _ in range(3))
    is_first = [True for _ in rows]
    state = agent.initial_state(env.num_envs)
    observed, _ = env.vector.reset(seed=LEVELS)
    for step in range(steps):
        word = observed["instruction"]
        shown = nested(lambda part: as_tensor(part)[:, None], observed)
        seen = Steps(shown, torch.tensor(is_first)[:, None])
        with torch.no_grad():
            output, state = agent(seen, state, torch.zeros(env.num_envs, 1, dtype=torch.int64))
        policy = output.policy[:, 0].log_softmax(-1)
        noise = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
        drawn = (policy.exp().cumsum(-1) < noise).sum(-1).clamp(max=7).tolist()
        asked = [word[row] > 0 and not over[row] and hold[row] == 0 for row in rows]
        if any(asked) or any(timed_out):
            for row in rows:
                if asked[row] or timed_out[row]:
                    value = float(output.values[row, 0])
                    log_prob = float(policy[row, drawn[row]])
                    points[row].append(Point(step, asked[row], value, log_prob, drawn[row]))
                if asked[row]:
                    action[row], hold[row] = drawn[row], repeat
        if not any(np.isnan(first_return)):
            break
        if step == steps - 1:
            break
        observed, reward, terminated, truncated, _ = env.vector.step(np.array(action))
        for row in rows:
            is_first[row] = over[row]
            over[row], timed_out[row] = bool(terminated[row] | truncated[row]), truncated[row]
            hold[row] = 0 if over[row] else max(hold[row] - 1, 0)
            total[row] += reward[row]
            if points[row]:
                points[row][-1].reward += reward[row]
                points[row][-1].terminated |= bool(terminated[row])
            if over[row] and np.isnan(first_return[row]):
                first_return[row] = total[row]
    return points, np.array(first_return)


def advantage(points: list[Point], index: int) -> float | None:
    """Generalized advantage estimation as a recursion; None where the outcome is not known."""
    here, later = points[index], points[index + 1 :]
    if not here.decides or not (here.terminated or later):
        return None
    if here.terminated:
        return here.reward - here.value
    following = advantage(points, index + 1)
    error = here.reward + DISCOUNT * later[0].value - here.value
    return error + DISCOUNT * TRACE * (0.0 if following is None else following)


def assert_holds(judged: Judged, points: list[list[Point]]) -> None:
    """The rollout's decisions of known outcome are the points', in order, with all they carry."""
    rollout = judged.rollout
    for row, expected in enumerate(points):
        known = [i for i in range(len(expected)) if advantage(expected, i) is not None]
        where = rollout.counts[row].nonzero()[:, 0]
        assert rollout.at[row, where].tolist() == [expected[i].step for i in known]
        assert rollout.actions[row, where, 0].tolist() == [expected[i].action for i in known]
        gains = np.array([advantage(expected, i) for i in known])
        values = np.array([expected[i].value for i in known])
        log_probs = [expected[i].log_prob for i in known]
        for name, part, wanted in (
            ("log_probs", rollout.log_probs, log_probs),
            ("values", rollout.values, values),
            ("advantages", judged.advantages, gains),
            ("returns", judged.returns, gains + values),
        ):
            got = part[row, where].numpy()
            np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE, err_msg=name)


CASES = {
    # Choices from step 16 on, and second episodes that also get to choose.
    "second episodes": ({"max_steps": 60}, 61, 3),
    "cut while going on": ({"max_steps": 60}, 27, 3),
    "out of time at a decision": ({"max_steps": 22}, 23, 3),
    "out of time between decisions": ({"max_steps": 23}, 40, 3),
    "a decision every step": ({"max_steps": 30}, 31, 1),
    "touches of the wrong dancer": ({"max_steps": 45, "num_dancers": 2}, 46, 3),
    "an action that outlasts its episode": ({"max_steps": 60}, 61, 25),
    "nobody may choose yet": ({"max_steps": 60}, 5, 2),
    "pictures": ({"max_steps": 24, "observation": "image"}, 25, 3),
}


@pytest.mark.parametrize(("arguments", "steps", "repeat"), CASES.values(), ids=CASES)
def test_rollout_is_that_of_a_plain_simulation(
    arguments: dict[str, Any], steps: int, repeat: int
) -> None:
    agent = make_agent(arguments.get("observation", "symbols"))
    judged, returns = play_here(make_env(ROWS, **arguments), agent, steps, repeat)
    points, expected_returns = simulate(make_env(ROWS, **arguments), agent, steps, repeat, 0)
    np.testing.assert_array_equal(returns, expected_returns)
    assert judged.advantages.isfinite().all()
    assert_holds(judged, points)


def test_the_cases_hold_every_kind_of_end() -> None:
    """Or the comparison above would compare too little."""
    found = collections.Counter[str]()
    for name, (arguments, steps, repeat) in CASES.items():
        if name == "pictures":
            continue
        rows, returns = simulate(make_env(ROWS, **arguments), make_agent(), steps, repeat, 0)
        for row in rows:
            found["right"] += sum(point.reward > 0 for point in row)
            found["wrong"] += sum(point.terminated and not point.reward for point in row)
            found["out of time"] += sum(not point.decides for point in row)
            found["point after an end"] += any(point.terminated for point in row[:-1])
        found["cut"] += int(np.isnan(returns).sum())
    assert len(found) == 5 and min(found.values()) >= 3, found


def test_an_end_by_time_bootstraps_and_an_end_by_touch_does_not() -> None:
    env, agent = make_env(32, max_steps=19), make_agent()
    judged, returns = play_here(env, agent, 40, 3)
    rollout = judged.rollout
    assert rollout.counts.sum(1).tolist() == [1] * 32
    # One decision at step 16; three steps later some have touched the dancer, the others are out
    # of time.
    assert rollout.seen.is_first.shape[1] == 20
    last = torch.full((32, 1), 19)
    values = agent(rollout.seen, agent.initial_state(32), last)[0].values[:, 0]
    touched = torch.from_numpy(returns > 0)
    assert 0 < touched.sum() < 32
    expected = torch.where(touched, 1.0, DISCOUNT * values)
    got = judged.returns[rollout.counts]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE)


def test_an_episode_cut_by_the_rollout_bootstraps() -> None:
    """From its last decision, whose own outcome is not known and does not count."""
    env, agent = make_env(4), make_agent()
    judged, returns = play_here(env, agent, 16 + 3, 1)
    rollout = judged.rollout
    assert np.isnan(returns).all()
    assert rollout.counts.tolist() == [[True, True, False]] * 4
    value = agent(rollout.seen, agent.initial_state(4), rollout.at)[0].values.detach()
    expected = DISCOUNT * value[:, 2]
    torch.testing.assert_close(judged.returns[:, 1].double(), expected, rtol=0, atol=TOLERANCE)
    first = DISCOUNT * ((1 - TRACE) * value[:, 1] + TRACE * expected)
    torch.testing.assert_close(judged.returns[:, 0].double(), first, rtol=0, atol=TOLERANCE)


def test_outputs_of_the_whole_rollout_are_those_it_was_played_with() -> None:
    """What learning starts from: the ratio of probabilities is 1 before the first update."""
    agent = make_agent()
    rollout = play_here(make_env(ROWS, max_steps=60), agent, 61, 3)[0].rollout
    output, _ = agent(rollout.seen, agent.initial_state(ROWS), rollout.at)
    log_probs = agent.distribution(output.policy).log_prob(rollout.actions)
    counts = rollout.counts
    got, expected = log_probs[counts], rollout.log_probs[counts].double()
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_episodes_end_when_all_had_their_decisions() -> None:
    env, agent = make_env(ROWS), make_agent()
    player = Player(env, agent, 3)
    player.begin([LEVELS])
    config = RolloutConfig(rollout="episodes", steps=1000, decisions=2)
    played = play(player, config, torch.Generator().manual_seed(0))
    # Two decisions of three steps each, and the third, whose value stands for what follows.
    assert played.rollout.seen.is_first.shape[1] == 16 + 1 + 2 * 3
    assert played.rollout.counts.sum(1).max() == 2
    assert len(played.episodes) == ROWS


def test_without_a_generator_the_most_probable_action_is_taken() -> None:
    agent = make_agent()
    first, returns = play_here(make_env(ROWS, max_steps=40), agent, 41, 2, seed=None)
    again, returns_again = play_here(make_env(ROWS, max_steps=40), agent, 41, 2, seed=None)
    np.testing.assert_array_equal(returns, returns_again)
    rollout = first.rollout
    for got, expected in zip(rollout[2:], again.rollout[2:], strict=True):
        assert torch.equal(got, expected)
    output, _ = agent(rollout.seen, agent.initial_state(ROWS), rollout.at)
    best = agent.distribution(output.policy).mode()
    assert torch.equal(best[rollout.counts], rollout.actions[rollout.counts])
