"""`Trace`: one episode or sequence, and what was recalled at which of its steps, as plain data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory import Span
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
        kinds = {"chunks": Span, "moments": Moment, "steps": Seen}
        for name, kind in kinds.items():
            check_kind(name, parts := getattr(self, name), Sequence, f"a tuple of {kind.__name__}")
            for number, part in enumerate(parts):
                check_kind(f"{name}[{number}]", part, kind, f"a {kind.__name__}")
        if not self.moments:
            raise ValueError(
                "moments: expected at least one, got none: nothing was asked of the memory; "
                "a longer sequence or another seed has some"
            )
        firsts = [span.first_step for span in self.chunks]
        if firsts != sorted(firsts):
            raise ValueError(f"chunks: expected them by their first steps, got {firsts}")
        layers = len(self.moments[0].layers)
        for number, moment in enumerate(self.moments):
            if len(moment.layers) != layers:
                raise ValueError(
                    f"moments[{number}].layers: expected {layers} as in the first moment, "
                    f"got {len(moment.layers)}"
                )
            if moment.asked is not None:
                self._check_place(f"moments[{number}].asked", moment.asked)
            for recalled in (one for layer in moment.layers for one in layer):
                self._check_recalled(f"moments[{number}].layers", recalled)
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


def check_labels(name: str, labels: Sequence[str]) -> None:
    """Raise a ValueError unless they are several texts."""
    if isinstance(labels, str):
        raise ValueError(f"{name}: expected several str, one each, got one: {labels!r}")
    check_kind(name, labels, Sequence, "several str, one each")
    for number, label in enumerate(labels):
        check_kind(f"{name}[{number}]", label, str, "a str")


def chunk_of(chunks: Sequence[Span], first: int, end: int) -> int | None:
    """Return the place of the chunk that holds most of the steps `first` to below `end`.

    Of equal ones the older; None where none holds any.
    """
    shared = [min(s.first_step + s.count, end) - max(s.first_step, first) for s in chunks]
    most = max(shared, default=0)
    return shared.index(most) if most > 0 else None
