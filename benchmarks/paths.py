"""The ways to compute the layer, and whether `impl="auto"` takes a good one, shape by shape.

The constants of the cost model in ops/projected.py are fitted to what this writes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checks import Expected, expect_layer
from contest import MEASURES, Limits, Rival, contest
from harness import RESULTS, Rates, describe_machine, memory_bytes, write
from peers import bind
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.ops import Impl, reference

NAMED: tuple[Impl, ...] = ("native", "projected", "blocked")
TOO_SLOW = 1.2
"""Times the best one, for auto."""


class Shape(NamedTuple):
    """Letters of htm_pytorch/shapes.py."""

    B: int
    Q: int
    N: int
    D: int
    C: int
    k: int
    H: int = 8
    E: int = 64


SHAPES = {
    "acting": [
        Shape(1, 1, 2048, 512, 32, 8),
        Shape(1, 1, 20_000, 512, 32, 8),
        Shape(32, 1, 2048, 512, 32, 8),
        Shape(32, 1, 20_000, 64, 32, 8),
    ],
    "few queries": [
        Shape(1, 16, 2048, 512, 32, 8),
        Shape(1, 16, 20_000, 512, 32, 8),
        Shape(1, 16, 20_000, 64, 32, 8),
        Shape(8, 4, 4096, 256, 16, 4),
    ],
    "many queries": [
        Shape(1, 128, 20_000, 512, 32, 8),
        Shape(1, 128, 20_000, 64, 32, 8),
        Shape(1, 1024, 20_000, 512, 32, 8),
        Shape(1, 2048, 20_000, 512, 32, 8),
        Shape(1, 512, 20_000, 512, 32, 8, 4, 32),
        Shape(1, 512, 20_000, 512, 32, 8, 16, 64),
    ],
    "short past": [
        Shape(1, 64, 512, 512, 32, 8),
        Shape(1, 128, 2048, 512, 32, 8),
        Shape(1, 256, 2048, 512, 32, 8),
        Shape(1, 512, 2048, 512, 32, 8),
        Shape(1, 1024, 2048, 512, 32, 8),
        Shape(1, 1024, 2048, 64, 32, 8),
        Shape(1, 512, 2048, 256, 32, 8),
        Shape(4, 512, 2048, 256, 32, 2),
        Shape(2, 512, 512, 64, 16, 4),
        Shape(8, 128, 512, 128, 16, 4),
        Shape(4, 256, 2048, 256, 32, 8, 4, 32),
    ],
    "own past": [
        Shape(8, 128, 128, 256, 16, 4),
        Shape(4, 256, 256, 96, 8, 4),
        Shape(8, 256, 256, 256, 16, 8),
        Shape(8, 1024, 1024, 256, 16, 8),
        Shape(2, 4096, 4096, 256, 16, 8),
    ],
    "agent": [
        Shape(32, 3, 32, 96, 16, 2),
        Shape(32, 34, 32, 96, 16, 2),
        Shape(64, 1, 68, 64, 17, 2, 4, 16),
        Shape(64, 34, 68, 64, 17, 2, 4, 16),
    ],
}


class Setting:
    """The inputs of a shape, and a layer for each implementation."""

    def __init__(self, shape: Shape, *, is_causal: bool):
        torch.manual_seed(0)
        B, Q, N, D, C, k, H, E = self.shape = shape
        self.queries, self.cotangent = torch.randn(2, B, Q, D)
        steps = self.queries if is_causal else torch.randn(B, N, D)
        self.memory = ChunkedMemory.from_steps(steps, C)
        self.layers = {impl: HTMAttention(D, H, k, C, E, impl=impl) for impl in (*NAMED, "auto")}
        for layer in self.layers.values():
            layer.load_state_dict(self.layers["auto"].state_dict())
        self.mask: Tensor | None = None
        if is_causal:
            last_step = torch.arange(1, self.memory.chunks + 1) * C - 1
            self.mask = (last_step < torch.arange(Q)[:, None]).expand(B, -1, -1)

    def rivals(self) -> dict[str, Rival]:
        inputs = self.queries, self.memory, None, self.mask

        def rival(layer: HTMAttention) -> Rival:
            return Rival(lambda given: bind(layer, *inputs, cotangent=given), self.expect)

        return {impl: rival(layer) for impl, layer in self.layers.items()}

    def expect(self, backward: bool) -> Expected:
        """Return what each must give."""
        return expect_layer(
            self.layers["auto"], self.queries, self.memory, self.cotangent, self.mask
        )

    @torch.no_grad()
    def chunks_kept(self) -> int:
        """Return how many of all chunks any query keeps."""
        layer = self.layers["auto"]
        route = layer.to_summary_queries(self.queries) @ layer.to_summary_keys.weight
        picked = reference.select(route, self.memory, self.shape.k, self.mask)
        row = torch.arange(self.shape.B)[:, None, None] * self.memory.chunks
        return (row + picked.chunks)[picked.kept].unique().numel()


def measure(groups: list[str], rates: Rates, limits: Limits) -> Iterator[dict[str, Any]]:
    """Time each shape; print it and, of auto, the ratio to the best one."""
    names = *NAMED, "auto"
    print(f"{'':46}" + "".join(f"{name:>11}" for name in names) + "   auto / best")
    for group in groups:
        for shape in SHAPES[group]:
            setting = Setting(shape, is_causal=group == "own past")
            found = contest(setting.rivals(), rates, limits)
            row = {"group": group, **shape._asdict(), "chunks_kept": setting.chunks_kept()}
            row |= {"ratio": {}, **found}
            for measure in MEASURES:
                times = {name: found["rivals"][name][measure]["ms"] for name in names}
                ratio = times["auto"] / min(times[name] for name in NAMED)
                row["ratio"][measure] = ratio
                letters = " ".join(f"{letter}{size}" for letter, size in shape._asdict().items())
                print(
                    f"{letters:44}{'f' if measure == MEASURES[0] else 'fb':2}"
                    + "".join(f"{times[name]:11.2f}" for name in names)
                    + f"{ratio:8.2f}{'  !' if ratio > TOO_SLOW else ''}",
                    flush=True,
                )
            yield row


def main() -> None:
    """Check, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "paths.json")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    limits = Limits(options.repeats, 10.0, 60.0, 0.8 * memory_bytes())
    about = {"machine": describe_machine("torch"), "limits": limits._asdict()}
    rates, rows = Rates(), []
    for row in measure(options.only, rates, limits):
        rows.append(row)
        write(options.out, {**about, "rates": rates.medians(), "rows": rows})
    ratios = [ratio for row in rows for ratio in row["ratio"].values()]
    slow = sum(ratio > TOO_SLOW for ratio in ratios)
    print(f"auto takes more than {TOO_SLOW} x the best in {slow} of {len(ratios)} cells (!)")


if __name__ == "__main__":
    main()
