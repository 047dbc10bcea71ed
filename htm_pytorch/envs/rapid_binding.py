"""Rapid binding: things get names that nobody heard before, and are asked for after others did."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from htm_pytorch.envs.levels import LevelEnv, Limits, Rules, check_integer, check_range

NOTHING, OF_DISTRACTION, OF_THIS_ROUND, OF_EARLIER_ROUND = range(4)
"""What a question is about."""


class RapidBindingLevel(NamedTuple):
    """What is named how, and asked when.

    A round has as many phases as there can be: the first one, distractions, and the test.
    """

    distractions: np.ndarray
    """[rounds], how many distractions there are."""
    names: np.ndarray
    """[rounds, phases - 1, words, size], -1 or 1."""
    objects: np.ndarray
    """[rounds, phases - 1, words, size], -1 or 1."""
    asked: np.ndarray
    """[rounds, phases, 2 * words], the words by the step of the phase, where it asks."""
    shifts: np.ndarray
    """[rounds, phases, 2 * words], which object a question shows first; the others follow."""
    earlier: np.ndarray
    """[rounds], the earlier round that is asked for."""


class RapidBindingRules(Rules[RapidBindingLevel]):
    """The rapid binding under its arguments."""

    level = RapidBindingLevel

    def __init__(
        self,
        num_words: int,
        distractions: int | Sequence[int],
        rounds: int,
        distraction_questions: int,
        symbol_size: int,
    ) -> None:
        self.num_words = check_integer("num_words", num_words, 2)
        self.distractions = check_range("distractions", distractions, 0)
        self.rounds = check_integer("rounds", rounds, 1)
        self.distraction_questions = check_integer(
            "distraction_questions", distraction_questions, 0, num_words
        )
        self.symbol_size = check_integer("symbol_size", symbol_size, 1)

    def observations(self) -> spaces.Dict:
        """Return whether a question is asked, a name and objects."""
        size = self.symbol_size
        return spaces.Dict(
            {
                "asks": spaces.Discrete(2),
                "name": spaces.Box(-1, 1, (size,), np.float32),
                "objects": spaces.Box(-1, 1, (self.num_words, size), np.float32),
            }
        )

    def actions(self) -> spaces.Discrete:
        """Return a choice of an object."""
        return spaces.Discrete(self.num_words)

    def limits(self) -> dict[str, Limits]:
        """Return the range of everything."""
        rounds, phases, words = self.rounds, self.distractions[1] + 2, self.num_words
        symbols = Limits((rounds, phases - 1, words, self.symbol_size), -1, 1)
        steps = Limits((rounds, phases, 2 * words), 0, words - 1)
        return {
            "distractions": Limits((rounds,), *self.distractions),
            "names": symbols,
            "objects": symbols,
            "asked": steps,
            "shifts": steps,
            "earlier": Limits((rounds,), 0, max(rounds - 2, 0)),
        }

    def draw(self, generator: np.random.Generator, count: int) -> RapidBindingLevel:
        """Draw everything uniformly."""
        shapes = {name: (count, *limits.shape) for name, limits in self.limits().items()}
        order = generator.random((*shapes["asked"][:-1], 2, self.num_words)).argsort(axis=-1)
        symbols = (2, *shapes["names"])
        names, objects = 2 * generator.integers(2, size=symbols, dtype=np.int8) - 1
        return RapidBindingLevel(
            generator.integers(*self.distractions, shapes["distractions"], endpoint=True),
            names,
            objects,
            order.reshape(shapes["asked"]),
            generator.integers(self.num_words, size=shapes["shifts"]),
            generator.integers(np.maximum(np.arange(self.rounds), 1), size=shapes["earlier"]),
        )


class RapidBindingEnv(LevelEnv[RapidBindingLevel, RapidBindingRules]):
    """Hear the names of objects once, and choose the objects when the names are said.

    ## Description
    The structure of the rapid word learning in "Towards mental time travel", 2021 (arXiv
    2105.14039), without its rooms. First `num_words` objects are named, one a step. Then come
    phases of distraction, each of which names others. Then the first names are asked for in
    random order: a name is said, the objects stand in a row, and one is chosen.

    With `rounds` above 1 all of this happens again, with other names. Then each round but the first
    asks, after its own names, for those of an earlier round: one round, drawn, all its names.

    What the paper leaves to its rooms is ours: names and objects are random vectors, never seen
    before, distractions bind without being asked, and the rounds are one episode, so that a memory
    that ends with the episode can answer.

    ## Action space
    `Discrete(num_words)`: the place of the chosen object in the row.

    ## Observation space
    A `Dict`. Symbols are -1 and 1, and zeros where there is none.

    - `"asks"`: `Discrete(2)`, 1 if a question is asked.
    - `"name"`: float32 [symbol_size].
    - `"objects"`: float32 [num_words, symbol_size]: the object that is named in the first place, or
      all those that were named with the one that is asked for.

    ## Rewards
    1 for a right choice, 0 for everything else: at best the number of questions.

    ## Starting state
    The first object is named. Names, objects, orders and numbers of distractions are drawn
    uniformly. `reset(options={"level": RapidBindingLevel(...)})` plays a given level.

    ## Episode end
    - Terminated: the last question was answered.

    ## Information
    `info["about"]` says what the question in this observation is about: 0 none is asked, 1 the
    distraction just seen, 2 the first names of this round, 3 those of an earlier round.
    `info["round"]` counts rounds, and `info["action_counts"]` says whether something is asked. The
    attribute `level` shows what is hidden.

    ## Arguments
    ```python
    gymnasium.make("htm_pytorch.envs:htm_pytorch/RapidBinding-v0", distractions=[0, 2])
    ```

    - `num_words`: objects named in a phase.
    - `distractions`: phases of distraction, or `[least, greatest]` to draw them for each round.
    - `rounds`: above 1, earlier rounds are asked for.
    - `distraction_questions`: how many of its own names a distraction asks for at its end.
    - `symbol_size`: numbers of a name or an object. Below about 16 some may be alike.

    ## Version history
    - v0: First version.
    """

    def __init__(
        self,
        num_words: int = 3,
        distractions: int | Sequence[int] = 2,
        rounds: int = 1,
        distraction_questions: int = 0,
        symbol_size: int = 32,
    ) -> None:
        super().__init__(
            RapidBindingRules(num_words, distractions, rounds, distraction_questions, symbol_size)
        )

    def _begin(self) -> None:
        self._moments = list(self._script())
        self._time = 0

    def _script(self) -> Any:
        """Yield of each step what it is about, and round, phase, word and place of the objects."""
        rules, level, words = self.rules, self.level, self.rules.num_words
        for round_, distractions in enumerate(level.distractions.tolist()):
            for phase in range(1 + distractions):
                for word in range(words):
                    yield NOTHING, round_, round_, phase, word, 0
                for step in range(words, words + (phase > 0) * rules.distraction_questions):
                    where = round_, phase, step
                    asked, shift = level.asked[where], level.shifts[where]
                    yield OF_DISTRACTION, round_, round_, phase, asked, shift
            for step in range(words if round_ == 0 else 2 * words):
                asked, shift = level.asked[round_, -1, step], level.shifts[round_, -1, step]
                if step < words:
                    yield OF_THIS_ROUND, round_, round_, 0, asked, shift
                else:
                    yield OF_EARLIER_ROUND, round_, level.earlier[round_], 0, asked, shift

    def _act(self, action: int) -> tuple[float, bool, bool]:
        about, *_, word, shift = self._moments[self._time]
        self._time += 1
        right = about != NOTHING and (action + shift) % self.rules.num_words == word
        return float(right), self._time == len(self._moments), False

    def _observe(self) -> dict[str, Any]:
        name = np.zeros(self.rules.symbol_size, np.float32)
        objects = np.zeros((self.rules.num_words, self.rules.symbol_size), np.float32)
        about = NOTHING
        if self._time < len(self._moments):
            about, _, of_round, phase, word, shift = self._moments[self._time]
            name[:] = self.level.names[of_round, phase, word]
            there = self.level.objects[of_round, phase]
            if about == NOTHING:
                objects[0] = there[word]
            else:
                objects[:] = np.roll(there, -shift, axis=0)
        return {"asks": np.int64(about != NOTHING), "name": name, "objects": objects}

    def _info(self) -> dict[str, Any]:
        over = self._time == len(self._moments)
        about, round_, *_ = (NOTHING, self.rules.rounds) if over else self._moments[self._time]
        return {"about": about, "round": round_, "action_counts": about != NOTHING}
