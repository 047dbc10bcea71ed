"""One-shot navigation: maps that hang together, and what knowing, learning and chance earn."""

import numpy as np
import pytest

from htm_pytorch.envs import OneShotNavigationEnv, OneShotNavigationVectorEnv
from tests.envs.oracles import assert_chance, returns

NORTH, EAST, SOUTH, WEST = range(4)


class Explorer:
    """Goes to what is known by the shortest known way, and else to the nearest unknown move."""

    def __init__(self):
        self.leads, self.last = {}, None

    def act(self, seen):
        place, goal = int(seen["place"]), int(seen["goal"])
        if self.last is not None:
            self.leads[self.last] = place
        self.last = place, self.choose(place, goal)
        return self.last[1]

    def choose(self, place, goal):
        unknown, firsts, queue = None, {place: None}, [place]
        for here in queue:
            for action in range(4):
                first = action if firsts[here] is None else firsts[here]
                there = self.leads.get((here, action))
                if there is None and unknown is None:
                    unknown = first
                if there is not None and there not in firsts:
                    firsts[there] = first
                    queue.append(there)
        return firsts.get(goal, unknown)


def expected_by_chance(level, max_steps):
    """Return how many goals a walk of random moves reaches on average."""
    chance = np.zeros((len(level.moves), max_steps + 1))
    chance[int(level.start), 0] = 1
    goals = 0.0
    for _ in range(max_steps):
        moved = np.zeros_like(chance)
        for action in range(4):
            np.add.at(moved, level.moves[:, action], chance / 4)
        numbers = np.arange(max_steps)
        reached = moved[level.goals[:-1], numbers]
        moved[level.goals[:-1], numbers] -= reached
        moved[level.goals[:-1], numbers + 1] += reached
        goals += reached.sum()
        chance = moved
    return goals


def test_an_episode_goes_by_its_level():
    env = OneShotNavigationEnv(size=2, loops=1, max_steps=4)
    env.reset(seed=0)
    level = env.level._replace(
        codes=np.array([7, 50, 3, 21]), start=np.array(0), goals=np.array([3, 0, 1, 0, 1])
    )
    seen, info = env.reset(options={"level": level})
    assert (seen, info) == ({"place": 7, "goal": 21}, {"goals": 0})
    results = [env.step(action) for action in (NORTH, EAST, SOUTH, WEST)]
    places = [(int(seen["place"]), int(seen["goal"])) for seen, *_ in results]
    assert places == [(7, 21), (50, 21), (21, 7), (3, 7)]
    assert [reward for _, reward, *_ in results] == [0, 0, 1, 0]
    assert [result[2:4] for result in results] == [(False, False)] * 3 + [(False, True)]
    assert [info["goals"] for *_, info in results] == [0, 0, 1, 1]


@pytest.mark.parametrize("loops", [0, 0.3, 1])
def test_maps_hang_together(loops):
    vector = OneShotNavigationVectorEnv(200, size=4, loops=loops)
    vector.reset(seed=0)
    back = np.array([SOUTH, WEST, NORTH, EAST])
    passages = []
    for level in vector.levels():
        assert np.isfinite(vector.rules.distances(level)).all()
        assert len(set(level.codes.tolist())) == 16
        assert (np.diff(level.goals) != 0).all()
        assert level.goals[0] != level.start
        here, action = np.nonzero(level.moves != np.arange(16)[:, None])
        assert (level.moves[level.moves[here, action], back[action]] == here).all()
        steps = level.moves[here, action] - here
        np.testing.assert_array_equal(steps, np.array([-4, 1, 4, -1])[action])
        passages.append(len(here) / 2)
    assert_chance(np.array(passages), 15 + loops * (24 - 15))


def test_who_knows_the_map_reaches_all_that_can_be_reached():
    vector = OneShotNavigationVectorEnv(100)
    vector.reset(seed=0)
    levels = vector.levels()
    away = np.array([vector.rules.distances(level) for level in levels])
    codes = np.array([level.codes for level in levels])
    moves = np.array([level.moves for level in levels])
    rows = np.arange(100)

    def policy(seen, _):
        place = (codes == seen["place"][:, None]).argmax(axis=1)
        goal = (codes == seen["goal"][:, None]).argmax(axis=1)
        return away[rows[:, None], moves[rows, place], goal[:, None]].argmin(axis=1)

    earned = returns(vector, policy)
    for level, ways, goals in zip(levels, away, earned, strict=True):
        stops = np.concatenate([[level.start], level.goals])
        times = ways[stops[:-1], stops[1:]].cumsum()
        assert goals == (times <= 200).sum()


def test_random_moves_earn_what_chance_gives():
    vector = OneShotNavigationVectorEnv(400, size=3, max_steps=40)
    blind = np.random.default_rng(1)
    earned = returns(vector, lambda *_: blind.integers(4, size=400))
    vector.reset(seed=0)
    expected = np.array([expected_by_chance(level, 40) for level in vector.levels()])
    assert_chance(earned - expected, 0)


def test_who_remembers_ways_gets_faster_within_the_episode():
    env, halves = OneShotNavigationEnv(), []
    for seed in range(30):
        explorer, rewards = Explorer(), []
        seen, _ = env.reset(seed=seed)
        for _ in range(200):
            seen, reward, *_ = env.step(explorer.act(seen))
            rewards.append(reward)
        halves.append([sum(rewards[:100]), sum(rewards[100:])])
    first, second = np.mean(halves, axis=0)
    assert second > 1.5 * first
    chance = np.mean([expected_by_chance(env.level, 200)])
    assert first + second > 3 * chance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, "size must be an integer of at least 2, got 1"),
        ({"size": 8}, "num_codes must be an integer of at least 64, got 60"),
        ({"loops": 1.5}, "loops must be a number from 0 to 1, got 1.5"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for kind in (OneShotNavigationEnv, OneShotNavigationVectorEnv):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def test_bad_levels_are_refused():
    env = OneShotNavigationEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="level.start must be from 0 to 24, got 25"):
        env.reset(options={"level": env.level._replace(start=np.array(25))})
    with pytest.raises(ValueError, match="level.codes must be distinct"):
        env.reset(options={"level": env.level._replace(codes=np.zeros(25, int))})
