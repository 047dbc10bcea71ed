"""A contest: which rivals fit, whether they are right, then the time and memory they take."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from checks import Expected
from harness import Rates, peak_memory
from peers import Peer
from torch import Tensor

FORWARD, BOTH = MEASURES = "forward", "forward + backward"

# Enough to tell whether a call takes seconds or hours.
ROUGH_FLOPS = 1e11


class Limits(NamedTuple):
    """What a contest may take."""

    repeats: int
    patience: float
    """Seconds after which a run gets no further repeat."""
    seconds: float
    """Estimated for a call; who needs more is left out."""
    bytes: float
    """Of memory; who needs more is left out."""


class Rival(NamedTuple):
    """Who is measured, and roughly what that takes."""

    bind: Callable[[Tensor], Peer]
    """Return it with its inputs bound, given the gradient of its output."""
    expect: Callable[[bool], Expected]
    """Return what it must give; the argument is whether backward as well."""
    flops: float = 0.0
    """Of a forward; forward + backward takes some three times as many."""
    bytes: tuple[float, float] = (0.0, 0.0)
    """Held in a call: forward, forward + backward."""
    kept: float = 0.0
    """Bytes held all the time."""


def contest(
    rivals: dict[str, Rival], rates: Rates, limits: Limits, held: float = 0.0
) -> dict[str, Any]:
    """Leave out who does not fit, stop if anyone is wrong, and return what each takes.

    Args:
        rivals: by name.
        rates: to be measured in the same turns.
        limits: see there.
        held: bytes that the inputs take.
    """
    entries: dict[str, dict[str, Any]] = {name: {} for name in rivals}
    for name, measure, reason in _left_out(rivals, limits, held):
        entries[name][measure] = {"skipped": reason}
    runs = {name: rival for name, rival in rivals.items() if FORWARD not in entries[name]}
    both = {name: rival for name, rival in runs.items() if BOTH not in entries[name]}
    # Those who must give the same share the reference's work.
    expected = {
        expect: expect(any(rival.expect == expect for rival in both.values()))
        for expect in dict.fromkeys(rival.expect for rival in runs.values())
    }
    peers = {
        name: _checked(name, rival, expected[rival.expect], name in both, entries[name])
        for name, rival in runs.items()
    }
    speeds = {}
    for measure, names in zip(MEASURES, (runs, both), strict=True):
        calls = {name: _call(peers[name], measure) for name in names}
        timings = rates.in_turn(calls, limits.repeats, limits.patience)
        speeds[measure] = rates.latest._asdict()
        for name, timing in timings.items():
            entries[name][measure] |= timing._asdict()
    return {"rivals": entries, "rates": speeds}


def _left_out(
    rivals: dict[str, Rival], limits: Limits, held: float
) -> Iterator[tuple[str, str, str]]:
    """Yield name, measure and reason of what would take too much memory or too long."""
    fits = {
        name: held + rival.kept + rival.bytes[0] <= limits.bytes
        and rival.flops / ROUGH_FLOPS <= limits.seconds
        for name, rival in rivals.items()
    }
    for name, rival in rivals.items():
        others = sum(rivals[other].kept for other in rivals if fits[other] and other != name)
        for measure, extra, times in zip(MEASURES, rival.bytes, (1.0, 3.5), strict=True):
            needed = held + others + rival.kept + extra
            seconds = times * rival.flops / ROUGH_FLOPS
            if needed > limits.bytes:
                yield name, measure, f"would need about {needed / 1e9:.2g} GB"
            elif seconds > limits.seconds:
                yield name, measure, f"would take about {seconds:.2g} s a call"


def _checked(
    name: str, rival: Rival, expected: Expected, both: bool, entry: dict[str, Any]
) -> Peer:
    """Return the peer if it is right; its first calls also show what memory it needs."""
    peer = rival.bind(expected.cotangent)
    peak, output = peak_memory(peer.forward)
    # JAX has memory of its own.
    by_torch = peer.peak_bytes is None
    entry[FORWARD] = {"peak_bytes": peak if by_torch else peer.peak_bytes}
    error = expected.compare(name, {"output": output})
    entry["checked_queries"] = int(expected.checked.sum())
    if both:
        peak, (output, gradients) = peak_memory(peer.forward_backward)
        entry[BOTH] = {"peak_bytes": peak if by_torch else None}
        error = max(error, expected.compare(name, {"output": output, **gradients}))
    entry["error_over_float32"] = error
    return peer if expected.checked.all() else rival.bind(expected.full_cotangent)


def _call(peer: Peer, measure: str) -> Callable[[], Any]:
    return peer.forward if measure == FORWARD else peer.forward_backward
