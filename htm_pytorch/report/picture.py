"""One moment of a `Trace` as a picture for papers, and several as moving pictures."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from htm_pytorch.report.page import check_path
from htm_pytorch.report.trace import Moment, Trace
from htm_pytorch.rl.plots import check_film, write_film
from htm_pytorch.shapes import check_at_least, check_kind

PICTURES = (".png", ".pdf", ".svg")
"""Kinds of files."""
MOST_MOMENTS = 60
"""That moving pictures show, evenly spread."""


def draw_moment(
    trace: Trace, path: str | os.PathLike[str], number: int = 0, *, layer: int = -1, best: int = 6
) -> Path:
    """Draw what one layer recalled at one moment, in a file .png, .pdf or .svg.

    Args:
        trace: of an episode or sequence.
        path: the file; its folder must exist.
        number: of the moment; negative numbers count from the last.
        layer: whose recall is drawn; negative numbers count from the last.
        best: how many of the steps recalled most are shown by their frames.

    Raises:
        ValueError: no such moment, layer or folder.
    """
    check_kind("trace", trace, Trace, "a Trace")
    check_at_least("best", best, 0)
    path = check_path("path", path, *PICTURES)
    _check("number", number, len(trace.moments), "moments")
    _check("layer", layer, len(trace.moments[0].layers), "layers")
    _figure(trace, trace.moments[number], layer, best).savefig(path, dpi=150)
    return path


def film_moments(trace: Trace, path: str | os.PathLike[str], *, layer: int = -1) -> Path:
    """Write what one layer recalled at the moments of the trace as a film, .gif or .mp4.

    Raises:
        ValueError: no such layer or folder, or another kind of file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_kind("trace", trace, Trace, "a Trace")
    path = Path(path)
    check_film("path", path)
    _check("layer", layer, len(trace.moments[0].layers), "layers")
    count = len(trace.moments)
    shown = np.unique(np.linspace(0, count - 1, min(count, MOST_MOMENTS)).round().astype(int))
    pictures: list[Any] = []
    for number in shown:
        canvas = FigureCanvasAgg(_figure(trace, trace.moments[number], layer, 6))
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    write_film(pictures, path, frames_per_second=2)
    return path


def _check(name: str, number: int, count: int, kind: str) -> None:
    check_kind(name, number, int, f"the number of one of {count} {kind}")
    if not -count <= number < count:
        raise ValueError(f"{name}: expected one of {count} {kind}, got {number}")


def _figure(trace: Trace, moment: Moment, layer: int, best: int) -> Any:
    from matplotlib.figure import Figure

    recalled = moment.layers[layer]
    weights: dict[int, float] = {}
    for one in recalled:
        first = trace.chunks[one.chunk].first_step
        for place, weight in enumerate(one.step_weights):
            weights[first + place] = weight * one.weight
    with_frames = trace.frames is not None and moment.step is not None
    figure = Figure(figsize=(10, 5.2 if with_frames else 2.8), layout="constrained")
    rows: Any = [figure]
    if with_frames:
        rows = figure.subfigures(2, 1, height_ratios=[3, 2])
    bars = rows[0].subplots()
    # Chunks stand side by side, wherever they lie in the past.
    at, ticks = 0.0, []
    for place, span in enumerate(trace.chunks):
        share = sum(one.weight for one in recalled if one.chunk == place)
        asked = place == moment.asked
        bars.axvspan(
            at - 0.5,
            at + span.count - 0.5,
            facecolor=str(1 - 0.3 * share),
            edgecolor="black" if asked else "0.7",
            linestyle="--" if asked else "-",
            linewidth=2 if asked else 0.5,
        )
        text = f"chunk {span.chunk}" + (f"\n{share:.0%}" if share else "")
        text += "\nasked" if asked else ""
        middle = (at + span.count / 2 - 0.5, 0.97)
        if len(trace.chunks) <= 16 or share or asked:
            bars.annotate(
                text,
                middle,
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize="small",
            )
        steps = range(span.first_step, span.first_step + span.count)
        bars.bar(
            [at + n for n in range(span.count)],
            [weights.get(step, 0.0) for step in steps],
            color="black",
        )
        ticks.append((at, span.first_step))
        at += span.count
    every = max(1, len(ticks) // 12)
    bars.set_xticks([a for a, _ in ticks[::every]], [str(step) for _, step in ticks[::every]])
    bars.set(xlabel="first step of each chunk", ylabel="weight")
    bars.set_xlim(-0.5, max(at, 1) - 0.5)
    bars.margins(y=0.45)
    rows[0].suptitle(_said(trace, moment), fontsize="medium")
    if with_frames:
        _frames(trace, moment, weights, best, rows[1])
    return figure


def _frames(
    trace: Trace, moment: Moment, weights: dict[int, float], best: int, figure: Any
) -> None:
    assert trace.frames is not None and moment.step is not None
    strongest = sorted(sorted(weights, key=lambda step: -weights[step])[:best])
    shown = [step for step in (moment.step, *strongest) if step - trace.first_step >= 0]
    for axes, step in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        axes.imshow(trace.frames[step - trace.first_step].numpy())
        is_now = step == moment.step
        axes.set_title(
            f"now: step {step}" if is_now else f"step {step}: {weights[step]:.0%}",
            fontsize="small",
        )
        axes.axis("off")


def _said(trace: Trace, moment: Moment) -> str:
    if moment.step is None:
        return moment.label
    place = moment.step - trace.first_step
    label = trace.steps[place].label if 0 <= place < len(trace.steps) else ""
    said = f"step {moment.step}" + (f", {label}" if label else "")
    if moment.action is not None:
        said += f": does {moment.action}"
    if moment.value is not None:
        said += f", expects {moment.value:.2f}"
    return f"{said}; return {trace.facts['return']}" if "return" in trace.facts else said
