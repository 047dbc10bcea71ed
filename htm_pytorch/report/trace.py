"""`Trace`: one episode or sequence, and what was recalled at which of its steps, as plain data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from htm_pytorch.memory import Span
from htm_pytorch.report.plain import number, several, text, whole
from htm_pytorch.shapes import check_kind


class Seen(NamedTuple):
    """One step of the sequence."""

    label: str = ""
    """What it was, in a few words: a token, numbers."""
    reward: float | None = None
    """What came with it; None: there are no rewards."""


class Recalled(NamedTuple):
    """One chunk that was recalled."""

    chunk: int
    """Its place in `Trace.chunks`."""
    weight: float
    """Its weight among the chunks recalled."""
    step_weights: tuple[float, ...]
    """The weight of each of its steps inside it, oldest first, the mean over heads."""


class Moment(NamedTuple):
    """One step at which something was asked of the memory."""

    step: int | None
    """The number of the step; None: after all that is remembered."""
    layers: tuple[tuple[Recalled, ...], ...]
    """What each layer recalled, the best chunk first."""
    action: str | None = None
    """What was done then."""
    value: float | None = None
    """What was expected of it."""
    asked: int | None = None
    """The place in `Trace.chunks` of the chunk that had to be recalled, where that is known."""
    label: str = ""
    """What was asked, in a few words."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One episode or sequence, as `write_report` shows it.

    Args:
        title: of the page.
        chunks: those that are shown, by their first steps. Steps have the numbers that the memory
            gave them.
        moments: when the memory was asked, in order of time.
        steps: what was seen, oldest first; none for a memory of which only chunks are shown.
        first_step: the number of the first of `steps`.
        frames: [T, H, W, 3] uint8, a picture of each of the steps.
        facts: what else is said at the top of the page, by name.

    Numbers may be of any library, as scalars of NumPy and torch; the trace holds plain ones.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """

    title: str
    chunks: tuple[Span, ...]
    moments: tuple[Moment, ...]
    steps: tuple[Seen, ...] = ()
    first_step: int = 0
    frames: Tensor | None = None
    facts: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Refuse what cannot be shown."""
        check_kind("title", self.title, str, "a str")
        check_kind("facts", self.facts, Mapping, "texts by name")
        made: dict[str, Any] = {
            "title": text("title", self.title),
            "first_step": whole("first_step", self.first_step),
            "facts": {text("facts", k): text(f"facts[{k!r}]", v) for k, v in self.facts.items()},
            "chunks": _all("chunks", self.chunks, Span, _span),
            "moments": _all("moments", self.moments, Moment, _moment),
            "steps": _all("steps", self.steps, Seen, _seen),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        if not self.moments:
            raise ValueError(
                "moments: expected at least one, got none: nothing was asked of the memory; "
                "a longer sequence or another seed has some"
            )
        firsts = [span.first_step for span in self.chunks]
        if firsts != sorted(firsts):
            raise ValueError(f"chunks: expected them by their first steps, got {firsts}")
        layers = len(self.moments[0].layers)
        for place, moment in enumerate(self.moments):
            if len(moment.layers) != layers:
                raise ValueError(
                    f"moments[{place}].layers: expected {layers} as in the first moment, "
                    f"got {len(moment.layers)}"
                )
            if moment.asked is not None:
                self._check_place(f"moments[{place}].asked", moment.asked)
            for recalled in (one for layer in moment.layers for one in layer):
                self._check_recalled(f"moments[{place}].layers", recalled)
        self._check_frames()

    def _check_place(self, name: str, place: int) -> None:
        if not 0 <= place < len(self.chunks):
            raise ValueError(
                f"{name}: expected a place in the {len(self.chunks)} chunks of the trace, "
                f"got {place}"
            )

    def _check_recalled(self, name: str, recalled: Recalled) -> None:
        self._check_place(name, recalled.chunk)
        weights = (recalled.weight, *recalled.step_weights)
        if not all(math.isfinite(weight) and -1e-6 <= weight <= 1 + 1e-3 for weight in weights):
            raise ValueError(f"{name}: expected weights from 0 to 1, got {weights}")
        span = self.chunks[recalled.chunk]
        if len(recalled.step_weights) != span.count:
            raise ValueError(
                f"{name}: expected {span.count} step_weights for chunk {span.chunk}, one a step, "
                f"got {len(recalled.step_weights)}"
            )

    def _check_frames(self) -> None:
        if self.frames is None:
            return
        check_kind("frames", self.frames, Tensor, "a tensor [T, H, W, 3]")
        shape = tuple(self.frames.shape)
        wanted = len(self.steps)
        if len(shape) != 4 or shape[3] != 3 or shape[0] != wanted or not all(shape):
            raise ValueError(
                f"frames: expected [{wanted}, H, W, 3], one for each of the steps, "
                f"got {list(shape)}"
            )
        if self.frames.dtype != torch.uint8:
            raise ValueError(f"frames: expected dtype torch.uint8, got {self.frames.dtype}")


Part = TypeVar("Part", bound=NamedTuple)


def _all(
    name: str, parts: object, kind: type[Part], plain: Callable[[str, Part], Part]
) -> tuple[Part, ...]:
    """Return parts of a kind with plain numbers and texts."""
    found = several(name, parts, f"a tuple of {kind.__name__}")
    for place, part in enumerate(found):
        check_kind(f"{name}[{place}]", part, kind, f"a {kind.__name__}")
    return tuple(plain(f"{name}[{place}]", part) for place, part in enumerate(found))


def _span(name: str, span: Span) -> Span:
    counts = ("chunk", "first_step", "count", "episode")
    made: dict[str, Any] = {part: whole(f"{name}.{part}", getattr(span, part)) for part in counts}
    for part in ("first_time", "last_time"):
        made[part] = _or_none(number, f"{name}.{part}", getattr(span, part))
    keys = several(f"{name}.keys", span.keys, "a tuple of str")
    return Span(**made, keys=tuple(_or_none(text, f"{name}.keys", key) for key in keys))


def _seen(name: str, seen: Seen) -> Seen:
    reward = _or_none(number, f"{name}.reward", seen.reward)
    return Seen(text(f"{name}.label", seen.label), reward)


def _moment(name: str, moment: Moment) -> Moment:
    wanted = "a tuple for each layer, of Recalled"
    layers = several(f"{name}.layers", moment.layers, wanted)
    return Moment(
        _or_none(whole, f"{name}.step", moment.step),
        tuple(
            _all(f"{name}.layers[{place}]", layer, Recalled, _recalled)
            for place, layer in enumerate(layers)
        ),
        _or_none(text, f"{name}.action", moment.action),
        _or_none(number, f"{name}.value", moment.value),
        _or_none(whole, f"{name}.asked", moment.asked),
        text(f"{name}.label", moment.label),
    )


def _recalled(name: str, one: Recalled) -> Recalled:
    inside = several(f"{name}.step_weights", one.step_weights, "a tuple of numbers, one a step")
    return Recalled(
        whole(f"{name}.chunk", one.chunk),
        number(f"{name}.weight", one.weight),
        tuple(number(f"{name}.step_weights", weight) for weight in inside),
    )


def _or_none(plain: Callable[[str, object], Any], name: str, value: object) -> Any:
    return None if value is None else plain(name, value)


def check_labels(name: str, labels: Sequence[str]) -> None:
    """Raise a ValueError unless they are several texts."""
    if isinstance(labels, str):
        raise ValueError(f"{name}: expected several str, one each, got one: {labels!r}")
    check_kind(name, labels, Sequence, "several str, one each")
    for place, label in enumerate(labels):
        check_kind(f"{name}[{place}]", label, str, "a str")


def chunk_of(chunks: Sequence[Span], first: int, end: int) -> int | None:
    """Return the place of the chunk that holds most of the steps `first` to below `end`.

    Of equal ones the older; None where none holds any.
    """
    shared = [min(s.first_step + s.count, end) - max(s.first_step, first) for s in chunks]
    most = max(shared, default=0)
    return shared.index(most) if most > 0 else None
