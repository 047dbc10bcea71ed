"""Small models, agents and traces for the tests of reports."""

from typing import Any

import torch

from htm_pytorch import HTMTransformer
from htm_pytorch.memory import Span
from htm_pytorch.report import Moment, Recalled, Seen, Trace


def make_model(**changes: Any) -> HTMTransformer:
    sizes: dict[str, Any] = {
        "dim": 8,
        "depth": 2,
        "heads": 2,
        "dim_head": 4,
        "topk_mems": 2,
        "mem_chunk_size": 4,
        "mem_chunks": 5,
        "window": 4,
    }
    return HTMTransformer(**sizes | changes)


def make_trace(**changes: Any) -> Trace:
    """Nine steps, two chunks of four, and two moments."""
    chunks = (Span(0, 0, 4, 0), Span(1, 4, 4, 0))
    first = (Recalled(0, 1.0, (0.1, 0.2, 0.3, 0.4)),)
    both = (Recalled(1, 0.75, (0.7, 0.1, 0.1, 0.1)), Recalled(0, 0.25, (0.25,) * 4))
    parts: dict[str, Any] = {
        "title": "Nine <steps> & more",
        "chunks": chunks,
        "moments": (Moment(4, (first,), "N", 0.5, 0), Moment(8, (both,), "S", 0.25, 1)),
        "steps": tuple(Seen(f"word{n}", float(n == 8)) for n in range(9)),
        "frames": torch.randint(256, (9, 20, 24, 3), dtype=torch.uint8),
        "facts": {"return": "1"},
    }
    return Trace(**parts | changes)
