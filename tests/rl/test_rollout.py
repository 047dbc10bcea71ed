"""A rollout against a plain simulation, one frame and one row at a time."""

import collections
import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from htm_pytorch.rl.agent import Agent, Observations
from htm_pytorch.rl.rollout import Rollout, observation_tensors, play

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 12
DISCOUNT, TRACE = 0.9, 0.8
# Values and log probabilities are kept in float32.
TOLERANCE = 1e-6


def make_env(num_envs: int, seed: int = 0, **arguments: Any) -> Any:
    env = gymnasium.make_vec(
        "htm_pytorch.envs:htm_pytorch/Ballet-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        **{"num_dancers": 1, "dance_delay": 1, "observation": "symbols", **arguments},
    )
    env.reset(seed=seed)
    return env


def make_agent(observation: str = "symbols") -> Agent:
    torch.manual_seed(1)
    agent = Agent(
        observation,
        actions=8,
        dim=8,
        depth=2,
        heads=2,
        topk_mems=2,
        mem_chunk_size=3,
        mem_chunks=4,
        window=3,
        detach_memories=False,
    ).double()
    with torch.no_grad():
        # Values far from 0, so that a mistake with them shows.
        agent.value[-1].weight *= 4
    return agent


def play_here(env: Any, agent: Agent, steps: int, repeat: int, seed: int | None = 0) -> Any:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return play(
        env,
        agent,
        steps,
        action_repeat=repeat,
        discount=DISCOUNT,
        trace=TRACE,
        generator=generator,
    )


@dataclasses.dataclass
class Point:
    step: int
    decides: bool
    value: float
    log_prob: float
    action: int
    reward: float = 0.0
    terminated: bool = False


def simulate(env: Any, agent: Agent, steps: int, repeat: int, seed: int) -> Any:
    """The points of each row and the returns of first episodes; the agent sees every frame alone.

    One draw for all rows where some row has a point: the generator's only convention.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = range(env.num_envs)
    points: list[list[Point]] = [[] for _ in rows]
    total, first_return = [0.0 for _ in rows], [float("nan") for _ in rows]
    hold, action = [0 for _ in rows], [0 for _ in rows]
    over, timed_out, is_first = ([False] * env.num_envs for _ in range(3))
    is_first = [True for _ in rows]
    state = agent.initial_state(env.num_envs)
    observed, _ = env.reset()
    for step in range(steps):
        frame, word = observation_tensors(observed)
        seen = Observations(frame[:, None], word[:, None], torch.tensor(is_first)[:, None])
        with torch.no_grad():
            output, state = agent(seen, state, torch.zeros(env.num_envs, 1, dtype=torch.int64))
        policy = output.logits[:, 0].log_softmax(-1)
        asked = [word[row] > 0 and not over[row] and hold[row] == 0 for row in rows]
        if any(asked) or any(timed_out):
            drawn = torch.multinomial(policy.exp(), 1, generator=generator)[:, 0].tolist()
            for row in rows:
                if asked[row] or timed_out[row]:
                    value = float(output.values[row, 0])
                    log_prob = float(policy[row, drawn[row]])
                    points[row].append(Point(step, asked[row], value, log_prob, drawn[row]))
                if asked[row]:
                    action[row], hold[row] = drawn[row], repeat
        if not any(np.isnan(first_return)):
            break
        observed, reward, terminated, truncated, _ = env.step(np.array(action))
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


def assert_holds(rollout: Rollout, points: list[list[Point]]) -> None:
    """The rollout's decisions of known outcome are the points', in order, with all they carry."""
    for row, expected in enumerate(points):
        known = [i for i in range(len(expected)) if advantage(expected, i) is not None]
        where = rollout.counts[row].nonzero()[:, 0]
        assert rollout.at[row, where].tolist() == [expected[i].step for i in known]
        assert rollout.actions[row, where].tolist() == [expected[i].action for i in known]
        gains = np.array([advantage(expected, i) for i in known])
        values = np.array([expected[i].value for i in known])
        log_probs = [expected[i].log_prob for i in known]
        for name, wanted in (
            ("log_probs", log_probs),
            ("advantages", gains),
            ("returns", gains + values),
        ):
            got = getattr(rollout, name)[row, where].numpy()
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
    rollout, returns = play_here(make_env(ROWS, **arguments), agent, steps, repeat)
    points, expected_returns = simulate(make_env(ROWS, **arguments), agent, steps, repeat, 0)
    np.testing.assert_array_equal(returns, expected_returns)
    assert rollout.advantages.isfinite().all()
    assert_holds(rollout, points)


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
    rollout, returns = play_here(env, agent, 40, 3)
    assert rollout.counts.sum(1).tolist() == [1] * 32
    # One decision at step 16; three steps later some have touched the dancer, the others are out
    # of time.
    assert rollout.seen.frames.shape[1] == 20
    last = torch.full((32, 1), 19)
    values = agent(rollout.seen, agent.initial_state(32), last)[0].values[:, 0]
    touched = torch.from_numpy(returns > 0)
    assert 0 < touched.sum() < 32
    expected = torch.where(touched, 1.0, DISCOUNT * values)
    got = rollout.returns[rollout.counts]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE)


def test_an_episode_cut_by_the_rollout_bootstraps() -> None:
    """From its last decision, whose own outcome is not known and does not count."""
    env, agent = make_env(4), make_agent()
    rollout, returns = play_here(env, agent, 16 + 3, 1)
    assert np.isnan(returns).all()
    assert rollout.counts.tolist() == [[True, True, False]] * 4
    value = agent(rollout.seen, agent.initial_state(4), rollout.at)[0].values.detach()
    expected = DISCOUNT * value[:, 2]
    torch.testing.assert_close(rollout.returns[:, 1].double(), expected, rtol=0, atol=TOLERANCE)
    first = DISCOUNT * ((1 - TRACE) * value[:, 1] + TRACE * expected)
    torch.testing.assert_close(rollout.returns[:, 0].double(), first, rtol=0, atol=TOLERANCE)


def test_outputs_of_the_whole_rollout_are_those_it_was_played_with() -> None:
    """What learning starts from: the ratio of probabilities is 1 before the first update."""
    agent = make_agent()
    rollout, _ = play_here(make_env(ROWS, max_steps=60), agent, 61, 3)
    output, _ = agent(rollout.seen, agent.initial_state(ROWS), rollout.at)
    log_probs = output.logits.log_softmax(-1).gather(-1, rollout.actions[..., None])[..., 0]
    counts = rollout.counts
    got, expected = log_probs[counts], rollout.log_probs[counts].double()
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_frames_after_an_episode_do_not_matter_to_its_points_nor_before_to_the_next() -> None:
    agent = make_agent()
    rollout, _ = play_here(make_env(ROWS, max_steps=60), agent, 61, 3)
    starts = rollout.seen.is_first.int().cumsum(1)
    row = int((starts.gather(1, rollout.at) * rollout.counts).amax(1).argmax())
    begins = int((starts[row] == 2).nonzero()[0])
    at = rollout.at[row : row + 1][rollout.counts[row : row + 1]][None]
    assert (at < begins).any() and (at > begins).any()
    seen = rollout.rows(torch.tensor([row])).seen
    expected = agent(seen, agent.initial_state(1), at)[0].features
    for changed, kept in (
        (slice(begins, None), at < begins),
        (slice(None, begins), at > begins),
    ):
        frames = seen.frames.clone()
        frames[:, changed] = frames[:, changed].flip(-1)
        got = agent(seen._replace(frames=frames), agent.initial_state(1), at)[0].features
        torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=1e-12)
        assert not torch.allclose(got[~kept], expected[~kept])


def test_without_a_generator_the_most_probable_action_is_taken() -> None:
    agent = make_agent()
    first, returns = play_here(make_env(ROWS, max_steps=40), agent, 41, 2, seed=None)
    again, returns_again = play_here(make_env(ROWS, max_steps=40), agent, 41, 2, seed=None)
    np.testing.assert_array_equal(returns, returns_again)
    for got, expected in zip(first[1:], again[1:], strict=True):
        assert torch.equal(got, expected)
    output, _ = agent(first.seen, agent.initial_state(ROWS), first.at)
    assert torch.equal(output.logits.argmax(-1)[first.counts], first.actions[first.counts])


def test_each_play_begins_new_episodes() -> None:
    env, agent = make_env(6), make_agent()
    one, _ = play_here(env, agent, 20, 3)
    other, _ = play_here(env, agent, 20, 3)
    for rollout in (one, other):
        assert rollout.seen.is_first[:, 0].all()
    assert not torch.equal(one.seen.frames[:, 0], other.seen.frames[:, 0])
