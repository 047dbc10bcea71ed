"""What a trace refuses, and which chunk is the one asked about."""

from typing import Any

import pytest
import torch

from htm_pytorch.memory import Span
from htm_pytorch.report import Moment, Recalled
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


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_shown_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trace(**changes)
