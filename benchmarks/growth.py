"""The picture of how the time of a call grows with the memory."""

from pathlib import Path
from typing import Any

from contest import FORWARD

# Marker, dashes, grey: told apart without colours. Ours are black.
STYLES = {
    "ours, memory": ("o", "-", "0"),
    "ours, tensor": ("s", "-", "0"),
    "published": ("^", "--", "0.35"),
    "DeepMind's, JAX": ("v", "--", "0.35"),
    "dense, cached": ("D", ":", "0.55"),
    "dense, projected": ("x", ":", "0.55"),
}


def plot(rows: list[dict[str, Any]], path: Path, queries: tuple[int, ...] = (1, 128)) -> None:
    """Draw the forward of one batch row, for the widest memories among the results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dim = max(row["D"] for row in rows)
    figure, panels = pyplot.subplots(
        1, len(queries), figsize=(9, 4), sharex=True, sharey=True, layout="constrained"
    )
    for panel, count in zip(panels, queries, strict=True):
        chosen = [row for row in rows if (row["B"], row["Q"], row["D"]) == (1, count, dim)]
        for name, (marker, dashes, grey) in STYLES.items():
            points = sorted(_points(chosen, name))
            if points:
                panel.loglog(
                    *zip(*points, strict=True),
                    marker=marker,
                    linestyle=dashes,
                    color=grey,
                    markerfacecolor="white" if name == "ours, tensor" else grey,
                    label=name,
                )
        panel.set_title("1 query" if count == 1 else f"{count} queries")
        panel.set_xlabel("steps in memory")
        panel.grid(color="0.9")
    panels[0].set_ylabel("milliseconds, forward")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    entries = [(row["N"], row.get("rivals", {}).get(name, {}).get(FORWARD, {})) for row in rows]
    return [(length, entry["ms"]) for length, entry in entries if "ms" in entry]
