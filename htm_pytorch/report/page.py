"""`write_report`: a `Trace` as one HTML file that needs nothing else, and asks no network."""

import base64
import hashlib
import html
import json
import math
import os
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from htm_pytorch.memory import Span
from htm_pytorch.report.png import data_uri, sprite_sheet
from htm_pytorch.report.trace import Moment, Recalled, Trace
from htm_pytorch.shapes import check_at_least, check_kind

MOST_BYTES = 500_000
"""Of a page."""
MOST_ROWS = 200
"""Of the table of decisions."""

_PICTURES = 0.55
"""The share of a page that pictures may take."""
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_NO_PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def write_report(
    trace: Trace, path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES
) -> Path:
    """Write one HTML file in which the trace can be scrubbed by mouse, keyboard and touch.

    Nothing is loaded from anywhere, which the page's own Content-Security-Policy enforces. Where
    it would be too large, frames are halved; then of frames, and of moments, every second, fourth,
    ... is kept, and the page says so. Steps are all kept.

    Args:
        trace: of an episode or sequence.
        path: the file; its folder must exist.
        most_bytes: how large the page may be.

    Raises:
        ValueError: no such folder, or the steps and a few moments are too many.
    """
    check_kind("trace", trace, Trace, "a Trace")
    check_at_least("most_bytes", most_bytes, 1)
    path = check_path("path", path, ".html")
    path.write_text(render(trace, most_bytes), encoding="utf-8", newline="\n")
    return path


def check_path(name: str, path: str | os.PathLike[str], *kinds: str) -> Path:
    """Return the path of a file that can be written, of one of these kinds; `name` is for errors.

    Raises:
        ValueError: another kind of file, or a folder that is not there.
    """
    check_kind(name, path, (str, os.PathLike), "the path of a file")
    path = Path(path)
    if path.suffix not in kinds:
        raise ValueError(f"{name}: expected a file {' or '.join(kinds)}, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{name}: expected a file in a folder that exists, got {str(path)!r}")
    return path


def render(trace: Trace, most_bytes: int = MOST_BYTES) -> str:
    """Return the page.

    Raises:
        ValueError: as for `write_report`.
    """
    frames, sheet = None, _NO_PICTURE
    if trace.frames is not None:
        budget = int(most_bytes * _PICTURES * 3 / 4)
        made = sprite_sheet(trace.frames.cpu(), budget)
        frames = {"places": made.places, "columns": made.columns, "size": list(made.size)}
        sheet = data_uri(made.png)
    stride = 1
    while True:
        page = _page(trace, frames, sheet, stride)
        size = len(page.encode("utf-8"))
        if size <= most_bytes:
            return page
        if stride >= len(trace.moments):
            raise ValueError(
                f"trace: expected a page of at most {most_bytes:,} bytes, got {size:,} with "
                f"{len(trace.steps):,} steps, all kept, and hardly a moment; trace a shorter "
                "piece, or allow a larger page with most_bytes="
            )
        stride *= 2


def as_data(trace: Trace, stride: int = 1) -> dict[str, Any]:
    """Return what the script of the page is given; of the moments every `stride`-th.

    A weight inside a chunk is two digits of 64, so that it is exact to 1 / 8190.
    """
    kept = set(range(0, len(trace.moments), stride))
    numbers = {old: new for new, old in enumerate(sorted(kept))}
    episodes = len({span.episode for span in trace.chunks}) > 1
    return {
        "first": trace.first_step,
        "layers": len(trace.moments[0].layers),
        "labels": [step.label for step in trace.steps],
        "rewards": [_finite(step.reward) for step in trace.steps],
        "chunks": [_chunk(span, episodes) for span in trace.chunks],
        "axis": _axis(trace),
        "stops": _stops(trace, numbers),
        "moments": [_moment(trace.moments[old]) for old in sorted(kept)],
    }


def decoded(text: str) -> list[float]:
    """Return the weights that two digits each stand for."""
    digits = [_DIGITS.index(digit) for digit in text]
    return [(a * 64 + b) / 4095 for a, b in zip(digits[::2], digits[1::2], strict=True)]


def _page(trace: Trace, frames: dict[str, Any] | None, sheet: str, stride: int) -> str:
    here = files("htm_pytorch.report")
    style = (here / "page.css").read_text(encoding="utf-8")
    script = (here / "page.js").read_text(encoding="utf-8")
    facts = dict(trace.facts)
    if stride > 1:
        facts["left out"] = (
            f"every moment but one in {stride} of {len(trace.moments):,}, for the size of the page"
        )
    if frames and (hidden := sum(place < 0 for place in frames["places"])):
        facts["pictures"] = f"{hidden:,} of {len(trace.steps):,} left out, for the size of the page"
    data = json.dumps(
        as_data(trace, stride) | {"frames": frames}, allow_nan=False, separators=(",", ":")
    )
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        csp=policy,
        title=html.escape(trace.title),
        facts="".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
            for name, text in facts.items()
        ),
        last=len(_stops(trace, {})) - 1,
        table=_table(trace),
        # Of what ends a script inside a script, no sign is left.
        data=data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
        style=style,
        script=script,
        sheet=sheet,
    )


def _digest(text: str) -> str:
    made = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(made).decode("ascii")


def _axis(trace: Trace) -> list[list[int]]:
    """Return what is drawn side by side: first step, steps, and the chunk or -1."""
    axis: list[list[int]] = []
    at, end = trace.first_step, trace.first_step + len(trace.steps)
    for place, span in enumerate(trace.chunks):
        if at < span.first_step and at < end:
            axis.append([at, min(span.first_step, end) - at, -1])
        axis.append([span.first_step, span.count, place])
        at = max(at, span.first_step + span.count)
    if at < end:
        axis.append([at, end - at, -1])
    return axis


def _stops(trace: Trace, numbers: dict[int, int]) -> list[list[int | None]]:
    """Return where the slider stops: the step, and the moment there, -1 for none, -2 left out."""
    asked: dict[int | None, list[int]] = {}
    for number, moment in enumerate(trace.moments):
        asked.setdefault(moment.step, []).append(number)
    steps: set[int | None] = {*asked} - {None}
    if steps:
        steps |= set(range(trace.first_step, trace.first_step + len(trace.steps)))
    order: list[int | None] = [*sorted(step for step in steps if step is not None)]
    stops: list[list[int | None]] = []
    for step in (*order, None):
        stops += [[step, numbers.get(number, -2)] for number in asked.get(step, ())]
        if step is not None and step not in asked:
            stops.append([step, -1])
    return stops


def _chunk(span: Span, episodes: bool) -> list[Any]:
    said = [f"episode {span.episode}"] if episodes else []
    if span.first_time is not None and span.last_time is not None:
        said.append(f"{_time(span.first_time)} to {_time(span.last_time)}")
    keys = [key or "" for key in span.keys] or None
    return [span.chunk, span.first_step, span.count, ", ".join(said), keys]


def _time(moment: float) -> str:
    if not (math.isfinite(moment) and 0 <= moment < 2**33):
        return f"time {moment:g}"
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _moment(moment: Moment) -> list[Any]:
    layers = [[_recalled(one) for one in layer] for layer in moment.layers]
    return [
        moment.step,
        moment.action,
        _finite(moment.value),
        moment.asked,
        layers,
        moment.label,
    ]


def _recalled(one: Recalled) -> list[Any]:
    levels = [round(min(max(weight, 0.0), 1.0) * 4095) for weight in one.step_weights]
    inside = "".join(_DIGITS[level // 64] + _DIGITS[level % 64] for level in levels)
    return [one.chunk, round(one.weight, 4), inside]


def _finite(number: float | None) -> float | None:
    return round(number, 6) if number is not None and math.isfinite(number) else None


def _table(trace: Trace) -> str:
    """Return the moments in words, for those who cannot scrub, and for print."""
    layers = len(trace.moments[0].layers)
    names = ["step", "action", "value"]
    names += [f"layer {n + 1}" for n in range(layers)] if layers > 1 else ["recalled"]
    rows = [_row(trace, moment) for moment in trace.moments[:MOST_ROWS]]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    more = len(trace.moments) - MOST_ROWS
    note = f"<p>{more:,} more are not in the table.</p>" if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"


def _row(trace: Trace, moment: Moment) -> str:
    cells = [
        moment.label if moment.step is None else str(moment.step),
        moment.action or "",
        "" if moment.value is None else f"{moment.value:.3g}",
    ]
    for layer in moment.layers:
        cells.append(
            ", ".join(
                f"chunk {trace.chunks[one.chunk].chunk} ({one.weight:.0%})"
                + (" asked about" if one.chunk == moment.asked else "")
                for one in layer
            )
            or "nothing"
        )
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
