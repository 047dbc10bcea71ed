"""What was recalled: traces of episodes and sequences, and pages that show them."""

from typing import TYPE_CHECKING

from htm_pytorch.lazy import on_first_use
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

# These need the extra `rl`, the others torch alone.
_MODULE_OF = {
    "Scene": "scene",
    "Truth": "truth",
    "draw_moment": "picture",
    "film_moments": "picture",
    "measure": "truth",
    "trace_agent": "agents",
}
__getattr__ = on_first_use(__name__, _MODULE_OF)
