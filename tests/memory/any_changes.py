"""Changes of a stored memory for hypothesis to draw, and what each must leave in a plain list."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from htm_pytorch.memory import StoredMemory
from htm_pytorch.memory.formats import Format
from tests.memory.faults import SEAMS, Fault
from tests.memory.plain_memory import Plain

SIZE, DIM = 4, 3

shares = st.integers(0, 8).map(lambda eighths: eighths / 8)
appended = st.fixed_dictionaries(
    {
        "length": st.integers(0, 11),
        "borders": st.sets(st.integers(0, 10), max_size=2),
        "keys": st.sampled_from(["none", "none", "one", "each", "some"]),
        "times": st.sampled_from(["none", "one", "each", "pairs"]),
    }
)
forgotten = st.fixed_dictionaries(
    {},
    optional={
        "episodes": st.sets(shares, max_size=2),
        "before": shares,
        "before_step": shares,
    },
)
changes = st.one_of(
    *[st.tuples(st.just("append"), appended)] * 4,
    st.tuples(st.just("forget"), forgotten),
    st.tuples(st.sampled_from(["flush", "compact", "build_index", "compact"]), st.just({})),
    st.tuples(st.sampled_from(["flush", "reset"]), st.just({})),
)
faults = st.builds(
    Fault,
    seam=st.sampled_from(SEAMS),
    after=st.booleans(),
    call=st.integers(0, 3),
    stays=st.booleans(),
    error=st.sampled_from([OSError, KeyboardInterrupt, MemoryError]),
)
searches = st.sampled_from(["exact", "index"])
chosen = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {}, optional={"episodes": st.sets(shares, max_size=3), "since": shares, "until": shares}
    ),
)


class Call(NamedTuple):
    """A change, and what is there after it."""

    do: Callable[[StoredMemory], Any]
    after: Plain


class Changes:
    """Makes calls of what was drawn, which says of most numbers only how large a share they are."""

    def __init__(self, dtype: torch.dtype):
        self.form = Format(DIM, SIZE, dtype)
        self.clock = 1000.0
        self._serial = itertools.count()

    def now(self) -> float:
        self.clock += 0.5
        return self.clock

    def seeded(self) -> torch.Generator:
        return torch.Generator().manual_seed(next(self._serial))

    def call(self, name: str, arguments: dict[str, Any], before: Plain) -> Call:
        if name == "append":
            return self.append(before, **arguments)
        if name == "forget":
            return self.forget(before, **arguments)
        if name == "reset":
            return Call(lambda m: m.reset(torch.tensor([True])), Plain(SIZE))
        return Call(lambda m: getattr(m, name)(), before)

    def append(self, before: Plain, length: int, borders: set[int], keys: str, times: str) -> Call:
        steps = torch.randn(1, length, DIM, generator=self.seeded()).to(self.form.given)
        # As they are stored, which may be less precise.
        values = self.form.decode(self.form.encode(steps[0])).tolist() if length else []
        begins = [number in borders for number in range(length)]
        is_first = torch.tensor([begins], dtype=torch.bool) if borders else None
        key_of_each: list[str | None] = [f"{before.next_step + n} é" for n in range(length)]
        given_keys: Any = key_of_each
        if keys == "none":
            given_keys, key_of_each = None, [None] * length
        elif keys == "one":
            given_keys, key_of_each = "a key", ["a key"] * length
        elif keys == "some":
            given_keys = key_of_each = [k if n % 3 else None for n, k in enumerate(key_of_each)]
        first = max(before.time, self.now())
        rising = [first + (n if times == "each" else n // 2) for n in range(length)]
        given_times: Any = torch.tensor(rising, dtype=torch.float64)
        if times in ("none", "one"):
            given_times, rising = first if times == "one" else None, [first] * length
        self.clock = max(self.clock, first, *rising)
        if times == "none":
            rising = [max(before.time, self.clock + 0.5)] * length

        def do(held: StoredMemory) -> None:
            # A caller that uses one buffer again and again.
            buffer = steps.clone()
            try:
                held.append(buffer, is_first, keys=given_keys, times=given_times)
            finally:
                buffer.fill_(torch.nan)

        return Call(do, before.append(values, begins, rising, key_of_each))

    def forget(self, plain: Plain, **shares: Any) -> Call:
        arguments: dict[str, Any] = {}
        held = plain.held
        if "episodes" in shares:
            arguments["episodes"] = {round(s * (plain.episode + 1)) for s in shares["episodes"]}
        if "before_step" in shares:
            arguments["before_step"] = round(shares["before_step"] * (plain.next_step + 1))
        if "before" in shares and held:
            arguments["before"] = held[round(shares["before"] * (len(held) - 1))].time
        after = plain.without(
            lambda step: (
                step.episode in arguments.get("episodes", ())
                or step.number < arguments.get("before_step", 0)
                or step.time < arguments.get("before", -torch.inf)
            )
        )
        return Call(lambda m: m.forget(**arguments), after)

    def chosen(self, plain: Plain, some: dict[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if "episodes" in some:
            arguments["episodes"] = {round(s * (plain.episode + 1)) for s in some["episodes"]}
        times = [step.time for step in plain.held] or [0.0]
        for name in ("since", "until"):
            if name in some:
                place = round(some[name] * len(times))
                edge = torch.inf if name == "since" else -torch.inf
                arguments[name] = times[place] if place < len(times) else edge
        return arguments
