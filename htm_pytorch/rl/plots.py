"""The two pictures of a run: how it learned, and what it recalled."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Moment(NamedTuple):
    """A choice, and what was recalled for it."""

    pictures: np.ndarray
    """[T, 99, 99, 3] uint8, every frame up to the choice, which is the last."""
    weights: np.ndarray
    """[T], the weight of each frame in what was recalled, mean over heads; they sum to 1."""
    chunk_size: int
    instruction: str
    action: str
    success: bool


def plot_curve(metrics: Path, path: Path, chance: float) -> None:
    """Draw the success rate of a metrics.csv over episodes."""
    from matplotlib.figure import Figure

    with metrics.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["episodes"] for r in rows], [r["success"] for r in rows], label="training")
    axes.axhline(chance, linestyle=":", color="grey", label="chance")
    axes.set(xlabel="episodes", ylabel="success, mean of the last 2,000", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def plot_recall(moment: Moment, path: Path, best: int = 8) -> None:
    """Draw the choice, the weight of every past frame, and the `best` frames recalled most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 2])
    top, bottom = (figure.add_subfigure(cell) for cell in grid)
    choice, bars = top.subplots(1, 2, width_ratios=[1, 3])
    now = len(moment.pictures) - 1
    choice.imshow(moment.pictures[now])
    verdict = "finds it" if moment.success else "does not find it"
    top.suptitle(f"step {now}: who danced {moment.instruction}? goes {moment.action}, {verdict}")
    choice.axis("off")

    size = moment.chunk_size
    for chunk in range(now // size):
        share = moment.weights[chunk * size : (chunk + 1) * size].sum()
        if share < 0.005:
            continue
        start, end = chunk * size - 0.5, (chunk + 1) * size - 0.5
        bars.axvspan(start, end, color="tab:orange", alpha=0.05 + 0.35 * share)
        label = f"chunk {chunk}\n{share:.0%}"
        place = ((start + end) / 2, 0.97)
        bars.annotate(label, place, xycoords=("data", "axes fraction"), ha="center", va="top")
    bars.bar(np.arange(now + 1), moment.weights, color="tab:blue")
    bars.set(xlabel="step of the past", ylabel="weight in what was recalled")
    bars.set_xlim(-0.5, now + 0.5)
    bars.margins(y=0.35)

    strongest = np.sort(np.argsort(moment.weights[:now])[::-1][:best])
    frames = np.atleast_1d(bottom.subplots(1, len(strongest)))
    bottom.suptitle("the frames it recalled most")
    for frame, step in zip(frames, strongest, strict=True):
        frame.imshow(moment.pictures[step])
        frame.set_title(f"step {step}: {moment.weights[step]:.0%}", fontsize="small")
        frame.axis("off")
    figure.savefig(path, dpi=120)
