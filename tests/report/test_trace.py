"""What a trace refuses, and which chunk is the one asked about."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from htm_pytorch.memory import Span
from htm_pytorch.report import Moment, Recalled, Seen
from htm_pytorch.report.page import as_data, render
from htm_pytorch.report.trace import chunk_of
from tests.report.makers import make_trace

CHUNKS = (Span(0, 0, 4, 0), Span(1, 4, 4, 0), Span(2, 12, 4, 1))


@pytest.mark.parametrize(
    ("steps", "place"),
    [((0, 4), 0), ((3, 6), 1), ((2, 6), 0), ((8, 12), None), ((7, 99), 2), ((16, 20), None)],
)
def test_the_chunk_of_steps_is_the_one_that_holds_most(
    steps: tuple[int, int], place: int | None
) -> None:
    assert chunk_of(CHUNKS, *steps) == place


def test_no_chunk_holds_steps_where_none_has_closed() -> None:
    assert chunk_of((), 0, 4) is None


GOOD = Recalled(0, 1.0, (0.25,) * 4)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no moment": ({"moments": ()}, "moments: expected at least one, got none"),
    "order": (
        {"chunks": (Span(0, 4, 4, 0), Span(1, 0, 4, 0))},
        r"chunks: expected them by their first steps, got \[4, 0\]",
    ),
    "layers": (
        {"moments": (Moment(4, ((GOOD,),)), Moment(8, ((GOOD,), ())))},
        r"moments\[1\].layers: expected 1 as in the first moment, got 2",
    ),
    "asked": (
        {"moments": (Moment(4, ((GOOD,),), asked=2),)},
        r"moments\[0\].asked: expected a place in the 2 chunks of the trace, got 2",
    ),
    "chunk": (
        {"moments": (Moment(4, ((GOOD._replace(chunk=-1),),)),)},
        r"moments\[0\].layers: expected a place in the 2 chunks of the trace, got -1",
    ),
    "weight": (
        {"moments": (Moment(4, ((GOOD._replace(weight=float("nan")),),)),)},
        "expected weights from 0 to 1, got",
    ),
    "step weights": (
        {"moments": (Moment(4, ((Recalled(0, 1.0, (1.0,)),),)),)},
        "expected 4 step_weights for chunk 0, one a step, got 1",
    ),
    "frames": (
        {"frames": torch.zeros(8, 20, 20, 3, dtype=torch.uint8)},
        r"frames: expected \[9, H, W, 3\], one for each of the steps, got \[8, 20, 20, 3\]",
    ),
    "dtype": ({"frames": torch.zeros(9, 20, 20, 3)}, "frames: expected dtype torch.uint8, got"),
}


def of_recalled(**changes: Any) -> dict[str, Any]:
    return {"moments": (Moment(4, ((GOOD._replace(**changes),),)),)}


WHERE = r"moments\[0\].layers\[0\]\[0\]"
WRONG |= {
    "weight of str": (of_recalled(weight="1"), WHERE + ".weight: expected a number, got '1'"),
    "several weights": (of_recalled(weight=torch.ones(2)), ".weight: expected a number, got Ten"),
    "no step weights": (
        of_recalled(step_weights=None),
        WHERE + ".step_weights: expected a tuple of numbers, one a step, got None",
    ),
    "chunk of float": (of_recalled(chunk=0.0), ".chunk: expected a whole number, got 0.0"),
    "chunk of bool": (of_recalled(chunk=True), ".chunk: expected a whole number, got True"),
    "layers not nested": (
        {"moments": (Moment(4, (GOOD,)),)},  # pyright: ignore[reportArgumentType]
        r"moments\[0\].layers\[0\]: expected a tuple of Recalled, got Recalled",
    ),
    "one layer": (
        {"moments": (Moment(4, GOOD),)},  # pyright: ignore[reportArgumentType]
        r"moments\[0\].layers: expected a tuple for each layer, of Recalled, got Recalled",
    ),
    "step": (
        {"moments": (Moment(1.5, ()),)},  # pyright: ignore[reportArgumentType]
        r"moments\[0\].step: expected a whole number, got 1.5",
    ),
    "value": (
        {"moments": (Moment(4, (), value="much"),)},  # pyright: ignore[reportArgumentType]
        r"moments\[0\].value: expected a number, got 'much'",
    ),
    "action": (
        {"moments": (Moment(4, (), action=(1, 2)),)},  # pyright: ignore[reportArgumentType]
        r"moments\[0\].action: expected a str, got tuple",
    ),
    "surrogate": ({"title": "\ud800"}, "title: expected a str that UTF-8 can hold, got"),
    "fact": ({"facts": {"n": None}}, r"facts\['n'\]: expected a str, got None"),
    "title": ({"title": 1j}, "title: expected a str, got complex"),
    "span": ({"chunks": (Span(0, 0, 4.0, 0),)}, r"chunks\[0\].count: expected a whole number"),  # pyright: ignore[reportArgumentType]
    "first step": ({"first_step": None}, "first_step: expected a whole number, got None"),
    "reward": ({"steps": (Seen("", "1"),)}, r"steps\[0\].reward: expected a number, got '1'"),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("integer", [int, np.int16, np.uint8, np.array, torch.tensor])
@pytest.mark.parametrize("real", [float, Fraction, Decimal, np.float32, np.array, torch.tensor])
def test_numbers_of_any_library_give_the_page_of_plain_ones(integer: Any, real: Any) -> None:
    """All of one trace, with every number put through the makers."""

    def of(one: Any, integer: Any, real: Any) -> Any:
        if isinstance(one, tuple):
            parts = (of(part, integer, real) for part in one)
            return type(one)(*parts) if hasattr(one, "_fields") else tuple(parts)
        if isinstance(one, int):
            return integer(one)
        return real(one) if isinstance(one, float) else one

    def made(trace: Any, integer: Any, real: Any) -> Any:
        names = ("chunks", "moments", "steps", "first_step")
        parts = {name: of(getattr(trace, name), integer, real) for name in names}
        return make_trace(frames=None, facts={"n": integer(3)}, **parts)

    plain = made(make_trace(), int, lambda one: float(np.float32(one)))
    given = made(plain, integer, real)
    assert as_data(given) == as_data(plain)
    assert render(given) == render(plain)
    weights = tuple(
        moment._replace(
            action=integer(3),
            layers=tuple(
                tuple(one._replace(step_weights=np.array(one.step_weights)) for one in layer)
                for layer in moment.layers
            ),
        )
        for moment in plain.moments
    )
    assert make_trace(moments=weights).moments[0].action == "3"


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_shown_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trace(**changes)
