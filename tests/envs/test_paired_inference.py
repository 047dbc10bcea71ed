"""Paired associative inference: what is shown, and what remembering and inferring earn."""

import numpy as np
import pytest

from htm_pytorch.envs import (
    PairedAssociativeInferenceEnv,
    PairedAssociativeInferenceVectorEnv,
)
from tests.envs.oracles import assert_chance


class Reader:
    """Remembers which symbols were shown together, and follows up to `reach` pairs."""

    def __init__(self, reach):
        self.reach, self.friends = reach, {}

    def answer(self, seen):
        cue, left, right = (seen[name].tobytes() for name in ("cue", "left", "right"))
        if not seen["asks"]:
            self.friends.setdefault(left, set()).add(right)
            self.friends.setdefault(right, set()).add(left)
            return 0
        reached = {cue}
        for _ in range(self.reach):
            reached |= {friend for one in reached for friend in self.friends[one]}
        return 0 if left in reached else 1


def answers(env, reach, seed=0):
    """Play an episode; return the gap of each question, and whether the answer was right."""
    reader = Reader(reach)
    seen, info = env.reset(seed=seed)
    gaps, rights, over = [], [], False
    while not over:
        asks, gap = seen["asks"], info["gap"]
        seen, reward, over, _, info = env.step(reader.answer(seen))
        if asks:
            gaps.append(gap)
            rights.append(reward)
    return np.array(gaps), np.array(rights)


@pytest.mark.parametrize(
    ("length", "pairs", "direct", "indirect"), [(3, 32, 32, 16), (4, 48, 48, 48), (2, 16, 16, 0)]
)
def test_as_many_pairs_and_questions_as_published(length, pairs, direct, indirect):
    env = PairedAssociativeInferenceEnv(length=length)
    gaps, rights = answers(env, reach=length - 1)
    assert env.rules.num_pairs == pairs
    assert ((gaps == 1).sum(), (gaps > 1).sum()) == (direct, indirect)
    assert gaps.max() == length - 1
    assert rights.all()


def test_who_remembers_pairs_alone_answers_direct_questions_alone():
    env = PairedAssociativeInferenceEnv(length=4)
    episodes = [answers(env, reach=1, seed=seed) for seed in range(30)]
    gaps, rights = (np.concatenate(parts) for parts in zip(*episodes, strict=True))
    assert rights[gaps == 1].all()
    assert_chance(rights[gaps > 1], 0.5)


def test_no_memory_earns_half():
    vector = PairedAssociativeInferenceVectorEnv(200)
    vector.reset(seed=0)
    blind = np.random.default_rng(1)
    earned = sum(vector.step(blind.integers(2, size=200))[1] for _ in range(80))
    assert_chance(earned / 48, 0.5)


def test_every_pair_is_shown_once_and_every_two_of_a_chain_are_asked_once():
    env = PairedAssociativeInferenceEnv(num_chains=3, length=4)
    seen, _ = env.reset(seed=0)
    symbols = env.level.symbols.reshape(12, 32).astype(np.float32)
    number = {symbol.tobytes(): index for index, symbol in enumerate(symbols)}
    shown, asked = [], []
    for _ in range(9 + 18):
        cue, left, right = (number.get(seen[name].tobytes()) for name in ("cue", "left", "right"))
        if seen["asks"]:
            same = [option for option in (left, right) if option // 4 == cue // 4]
            other = left + right - same[0]
            assert (len(same), other % 4) == (1, same[0] % 4)
            asked.append(tuple(sorted((cue, same[0]))))
        else:
            assert cue is None
            shown.append(tuple(sorted((left, right))))
        seen, *_ = env.step(0)
    assert not any(part.any() for part in seen.values())
    chains = [range(start, start + 4) for start in (0, 4, 8)]
    assert sorted(shown) == [(a, a + 1) for chain in chains for a in chain[:-1]]
    assert sorted(asked) == [(a, b) for chain in chains for a in chain for b in chain if a < b]


def test_sides_and_cues_are_drawn_evenly():
    vector = PairedAssociativeInferenceVectorEnv(300)
    vector.reset(seed=0)
    for name in ("swapped", "reversed", "answers"):
        assert_chance(np.array([getattr(level, name) for level in vector.levels()]), 0.5)
    lures = np.array([level.lures for level in vector.levels()])
    for further in range(1, 16):
        assert_chance(lures == further, 1 / 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_chains": 1}, "num_chains must be an integer of at least 2, got 1"),
        ({"length": 1}, "length must be an integer of at least 2, got 1"),
        ({"symbol_size": 0}, "symbol_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for kind in (PairedAssociativeInferenceEnv, PairedAssociativeInferenceVectorEnv):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def test_bad_levels_are_refused():
    env = PairedAssociativeInferenceEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="level.lures must be from 1 to 15"):
        env.reset(options={"level": env.level._replace(lures=0 * env.level.lures)})
    with pytest.raises(ValueError, match="level.pairs must be distinct"):
        env.reset(options={"level": env.level._replace(pairs=0 * env.level.pairs)})
