"""What was recalled: traces of episodes and sequences, and pages that show them."""

import importlib
from typing import TYPE_CHECKING, Any

from htm_pytorch.report.page import write_report
from htm_pytorch.report.recorder import Recorder
from htm_pytorch.report.stored import trace_memory
from htm_pytorch.report.trace import Moment, Recalled, Seen, Trace

if TYPE_CHECKING:
    from htm_pytorch.report.agents import trace_agent
    from htm_pytorch.report.picture import draw_moment, film_moments
    from htm_pytorch.report.scene import Scene
    from htm_pytorch.report.truth import Truth, measure

__all__ = [
    "Moment",
    "Recalled",
    "Recorder",
    "Scene",
    "Seen",
    "Trace",
    "Truth",
    "draw_moment",
    "film_moments",
    "measure",
    "trace_agent",
    "trace_memory",
    "write_report",
]

_PART_OF = {
    "Scene": "scene",
    "Truth": "truth",
    "draw_moment": "picture",
    "film_moments": "picture",
    "measure": "truth",
    "trace_agent": "agents",
}


def __getattr__(name: str) -> Any:
    # On first use: these need the extra `rl`, the others torch alone.
    if name not in _PART_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PART_OF[name]}"), name)
    globals()[name] = found
    return found
