"""The learning curve of a run, and moving pictures of an episode."""

import csv
import importlib.util
import math
from pathlib import Path
from typing import Any


def plot_curve(metrics: Path, path: Path) -> None:
    """Draw the mean returns of a metrics.csv over frames."""
    from matplotlib.figure import Figure

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    frames = [int(row["frames"]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    stages = sorted({row["stage"] for row in rows}, key=int)
    for stage in stages:
        played = [(int(r["frames"]), float(r["return"])) for r in rows if r["stage"] == stage]
        label = "training" if len(stages) == 1 else f"training, stage {stage}"
        axes.plot(*zip(*played, strict=True), label=label)
    judged = [float(row["unseen_return"] or math.nan) for row in rows]
    if not all(map(math.isnan, judged)):
        known = [(f, value) for f, value in zip(frames, judged, strict=True) if value == value]
        axes.plot(*zip(*known, strict=True), "o-", label="unseen episodes")
    axes.set(xlabel="frames", ylabel="mean return")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def check_film(name: str, path: Path) -> None:
    """Refuse a file that `write_film` cannot write; `name` is for errors.

    Raises:
        ValueError: another kind of file, or a folder that is not there.
    """
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"{name}: expected a file .gif or .mp4, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{name}: expected a file in a folder that exists, got {str(path)!r}")
    lacking = [n for n in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(n) is None]
    if path.suffix.lower() == ".mp4" and lacking:
        raise ValueError(f"{name}: expected a .gif, as {lacking} are not installed, got an .mp4")


def write_film(pictures: list[Any], path: Path, frames_per_second: int = 8) -> None:
    """Write pictures [H, W, 3] of bytes as .gif, or as .mp4 where imageio-ffmpeg is installed."""
    if path.suffix.lower() == ".mp4":
        import imageio.v3 as imageio  # pyright: ignore[reportMissingImports]

        imageio.imwrite(path, pictures, fps=frames_per_second)
        return
    from PIL import Image

    first, *others = (Image.fromarray(picture) for picture in pictures)
    duration = 1000 // frames_per_second
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)
