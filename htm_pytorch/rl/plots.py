"""The learning curve of a run, and moving pictures of an episode."""

import csv
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
    axes.plot(frames, [float(row["return"]) for row in rows], label="training")
    judged = [float(row["unseen_return"] or math.nan) for row in rows]
    if not all(map(math.isnan, judged)):
        known = [(f, value) for f, value in zip(frames, judged, strict=True) if value == value]
        axes.plot(*zip(*known, strict=True), "o-", label="unseen episodes")
    axes.set(xlabel="frames", ylabel="mean return")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def write_film(pictures: list[Any], path: Path, frames_per_second: int = 8) -> None:
    """Write pictures [H, W, 3] of bytes as .gif, or as .mp4 where imageio-ffmpeg is installed.

    Raises:
        ValueError: another kind of file.
    """
    if path.suffix == ".mp4":
        try:
            import imageio.v3 as imageio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                "render: expected a .gif, as imageio-ffmpeg is not installed, got an .mp4"
            ) from error
        imageio.imwrite(path, pictures, fps=frames_per_second)
        return
    if path.suffix != ".gif":
        raise ValueError(f"render: expected a file .gif or .mp4, got {str(path)!r}")
    from PIL import Image

    first, *others = (Image.fromarray(picture) for picture in pictures)
    duration = 1000 // frames_per_second
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)
