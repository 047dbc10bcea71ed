"""Paired associative inference: A goes with B, B goes with C; does C or another go with A?"""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from htm_pytorch.envs.levels import LevelEnv, Limits, Rules, check_integer
from htm_pytorch.envs.levels_vector import LevelVectorEnv


class PairedAssociativeInferenceLevel(NamedTuple):
    """The symbols of the chains, and how they are shown and asked."""

    symbols: np.ndarray
    """[chains, length, size], -1 or 1."""
    pairs: np.ndarray
    """[pairs], their order: pair `chain * (length - 1) + link`."""
    swapped: np.ndarray
    """[pairs], 1 where the second of the pair shown at that step is on the left."""
    questions: np.ndarray
    """[questions], their order: question `chain * (questions of a chain) + which`."""
    reversed: np.ndarray
    """[questions], 1 where the later symbol of the chain is the cue of that question."""
    lures: np.ndarray
    """[questions], how many chains further the wrong option is from."""
    answers: np.ndarray
    """[questions], 0 where the right option is on the left, 1 on the right."""


class PairRules(Rules[PairedAssociativeInferenceLevel]):
    """The paired associative inference under its arguments."""

    level = PairedAssociativeInferenceLevel

    def __init__(self, num_chains: int, length: int, symbol_size: int) -> None:
        self.num_chains = check_integer("num_chains", num_chains, 2)
        self.length = check_integer("length", length, 2)
        self.symbol_size = check_integer("symbol_size", symbol_size, 1)

    @property
    def num_pairs(self) -> int:
        """Pairs that are shown, one a step."""
        return self.num_chains * (self.length - 1)

    @property
    def num_questions(self) -> int:
        """Questions, one a step, after the pairs."""
        return self.num_chains * self.length * (self.length - 1) // 2

    def observations(self) -> spaces.Dict:
        """Return whether a question is asked, and three symbols."""
        parts = {
            name: spaces.Box(-1, 1, (self.symbol_size,), np.float32)
            for name in ("cue", "left", "right")
        }
        return spaces.Dict({"asks": spaces.Discrete(2), **parts})

    def actions(self) -> spaces.Discrete:
        """Return left and right."""
        return spaces.Discrete(2)

    def limits(self) -> dict[str, Limits]:
        """Return the range of symbols, orders and sides."""
        pairs, questions = (self.num_pairs,), (self.num_questions,)
        return {
            "symbols": Limits((self.num_chains, self.length, self.symbol_size), -1, 1),
            "pairs": Limits(pairs, 0, self.num_pairs - 1, distinct=True),
            "swapped": Limits(pairs, 0, 1),
            "questions": Limits(questions, 0, self.num_questions - 1, distinct=True),
            "reversed": Limits(questions, 0, 1),
            "lures": Limits(questions, 1, self.num_chains - 1),
            "answers": Limits(questions, 0, 1),
        }

    def draw(self, generator: np.random.Generator, count: int) -> PairedAssociativeInferenceLevel:
        """Draw everything uniformly."""
        pairs, questions = (count, self.num_pairs), (count, self.num_questions)
        shape = (count, self.num_chains, self.length, self.symbol_size)
        return PairedAssociativeInferenceLevel(
            symbols=2 * generator.integers(2, size=shape, dtype=np.int8) - 1,
            pairs=generator.random(pairs).argsort(axis=1),
            swapped=generator.integers(2, size=pairs),
            questions=generator.random(questions).argsort(axis=1),
            reversed=generator.integers(2, size=questions),
            lures=generator.integers(1, self.num_chains, size=questions),
            answers=generator.integers(2, size=questions),
        )


class PairedAssociativeInferenceEnv(LevelEnv[PairedAssociativeInferenceLevel, PairRules]):
    """See pairs of symbols once, then say which of two symbols belongs to a third one.

    ## Description
    The task of MEMO (Banino et al., 2020, arXiv 2001.10913), with vectors in the place of pictures.
    Symbols form chains A-B-C. All neighbours are shown once, two a step, in random order over all
    chains. Then a cue and two options are shown: one is of the cue's chain, the other has its place
    in another chain. Neighbours (A-B) can be remembered; others (A-C) have to be inferred.

    As published, 16 chains give 32 pairs and 48 questions with length 3, 48 and 96 with length 4.
    That every two of a chain are asked once, and the choice of the wrong option, are ours.

    ## Action space
    `Discrete(2)`: 0 the left option, 1 the right one.

    ## Observation space
    A `Dict`. Symbols are float32 [symbol_size] of -1 and 1, and zeros where there is none.

    - `"asks"`: `Discrete(2)`, 1 if a question is asked.
    - `"cue"`: the symbol that is asked for, only in questions.
    - `"left"`, `"right"`: a pair, or the options.

    ## Rewards
    1 for a right answer, 0 for everything else: at best the number of questions.

    ## Starting state
    The first pair is shown. Symbols, orders, sides and wrong options are drawn uniformly.
    `reset(options={"level": PairedAssociativeInferenceLevel(...)})` plays a given level.

    ## Episode end
    - Terminated: the last question was answered, after as many steps as pairs and questions.

    ## Information
    `info["gap"]` tells direct questions from indirect ones: of the question in this observation the
    pairs from the cue to the right option, 1 if they were shown together, 0 if nothing is asked.
    `info["action_counts"]` says whether something is. The attribute `level` shows what is hidden.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/PairedAssociativeInference-v0", length=3)
    ```

    - `num_chains`, `length`: how many chains, and symbols of a chain.
    - `symbol_size`: numbers of a symbol. Below about 16 some of a level may be alike.

    ## Version history
    - v0: First version.
    """

    def __init__(self, num_chains: int = 16, length: int = 3, symbol_size: int = 32) -> None:
        super().__init__(PairRules(num_chains, length, symbol_size))

    def _begin(self) -> None:
        self._time = 0

    def _act(self, action: int) -> tuple[float, bool, bool]:
        asked = self._question()
        right = asked is not None and action == self.level.answers[asked[0]]
        self._time += 1
        over = self._time == self.rules.num_pairs + self.rules.num_questions
        return float(right), over, False

    def _question(self) -> tuple[int, int, int, int] | None:
        """Return number, chain, place of the cue and place of the right option, or None."""
        number = self._time - self.rules.num_pairs
        if not 0 <= number < self.rules.num_questions:
            return None
        ends = list(combinations(range(self.rules.length), 2))
        chain, which = divmod(int(self.level.questions[number]), len(ends))
        cue, answer = ends[which][:: -1 if self.level.reversed[number] else 1]
        return number, chain, cue, answer

    def _observe(self) -> dict[str, Any]:
        level, blank = self.level, np.zeros(self.rules.symbol_size)
        cue, left, right, asked = blank, blank, blank, self._question()
        if asked is not None:
            number, chain, place, answer = asked
            other = (chain + level.lures[number]) % self.rules.num_chains
            options = level.symbols[chain, answer], level.symbols[other, answer]
            cue = level.symbols[chain, place]
            left, right = options[:: -1 if level.answers[number] else 1]
        elif self._time < self.rules.num_pairs:
            chain, link = divmod(int(level.pairs[self._time]), self.rules.length - 1)
            pair = level.symbols[chain, link : link + 2]
            left, right = pair[:: -1 if level.swapped[self._time] else 1]
        seen = {"cue": cue, "left": left, "right": right}
        asks: dict[str, Any] = {"asks": np.int64(asked is not None)}
        return asks | {name: symbol.astype(np.float32) for name, symbol in seen.items()}

    def _info(self) -> dict[str, Any]:
        asked = self._question()
        gap = 0 if asked is None else abs(asked[2] - asked[3])
        return {"gap": gap, "action_counts": asked is not None}


class PairedAssociativeInferenceVectorEnv(
    LevelVectorEnv[PairedAssociativeInferenceLevel, PairRules]
):
    """A batch of paired associative inferences.

    Each plays the task of `PairedAssociativeInferenceEnv`, where spaces, rewards and arguments are
    described; seeds, autoreset and saving are those of `LevelVectorEnv`.

    ## Arguments
    ```python
    gymnasium.make_vec("htm_pytorch.envs:htm_pytorch/PairedAssociativeInference-v0", num_envs=64)
    ```

    `num_envs`, and those of `PairedAssociativeInferenceEnv`.
    """

    single = PairedAssociativeInferenceEnv
    _time: np.ndarray

    def _beginning(self) -> dict[str, Any]:
        return {"time": 0}

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        asks, number, *_ = self._questions()
        right = asks & (self._level.answers[self._rows, number] == actions)
        self._time += 1
        over = self._time >= self.rules.num_pairs + self.rules.num_questions
        return right.astype(np.float64), over, np.zeros_like(over)

    def _questions(self) -> tuple[np.ndarray, ...]:
        """Return who is asked, and number, chain, cue and answer; of others something."""
        rules, level, rows = self.rules, self._level, self._rows
        number = self._time - rules.num_pairs
        asks = (number >= 0) & (number < rules.num_questions)
        number = np.clip(number, 0, rules.num_questions - 1)
        first, second = np.triu_indices(rules.length, 1)
        chain, which = np.divmod(level.questions[rows, number], len(first))
        turned = level.reversed[rows, number] == 1
        cue = np.where(turned, second[which], first[which])
        return asks, number, chain, cue, first[which] + second[which] - cue

    def _observe(self) -> dict[str, np.ndarray]:
        rules, level, rows = self.rules, self._level, self._rows
        asks, number, chain, cue, answer = self._questions()
        other = (chain + level.lures[rows, number]) % rules.num_chains
        turned = level.answers[rows, number] == 1
        lefts, rights = np.where(turned, other, chain), np.where(turned, chain, other)
        shows = self._time < rules.num_pairs
        step = np.where(shows, self._time, 0)
        pair, link = np.divmod(level.pairs[rows, step], rules.length - 1)
        swapped = level.swapped[rows, step]
        left = np.where(shows, link + swapped, answer)
        right = np.where(shows, link + 1 - swapped, answer)
        there, symbols = (shows | asks)[:, None], level.symbols
        seen = {
            "cue": symbols[rows, chain, cue] * asks[:, None],
            "left": symbols[rows, np.where(shows, pair, lefts), left] * there,
            "right": symbols[rows, np.where(shows, pair, rights), right] * there,
        }
        return {"asks": asks.astype(np.int64)} | {n: s.astype(np.float32) for n, s in seen.items()}

    def _info(self) -> dict[str, Any]:
        asks, _, _, cue, answer = self._questions()
        return {"gap": np.abs(cue - answer) * asks, "action_counts": asks}
