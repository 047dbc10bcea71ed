"""Attention over the newest steps: the compiled kernel, torch's operators, dense attention.

    python benchmarks/window.py          # one thread, milliseconds of the processor

`blocks` is the plain version, blocks of queries against the keys in their reach; `dense` is torch's
own attention over all steps with the same biases as a mask, which is as exact. What they return is
compared before they are timed.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS, busy_seconds, describe_machine, write
from torch import Tensor

from htm_pytorch.ops.window import attend_window

SHAPES = ((128, 110, 2, 16, 8), (16, 128, 4, 16, 16), (64, 160, 4, 16, 40), (4, 2048, 8, 64, 64))
"""Rows, steps, heads, width of a head, window."""
NEAR = 1e-4
"""Of float32, over the largest entry."""


class Inputs(NamedTuple):
    """What all of them get."""

    projected: Tensor
    keys: Tensor
    bias: Tensor
    oldest: Tensor
    grad: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Inputs":
        """Draw them."""
        batch, length, heads, width, window = shape
        projected = torch.randn(batch, length, 3, heads, width, requires_grad=True)
        bias = torch.randn(heads, window, requires_grad=True)
        oldest = torch.zeros(batch, 1, dtype=torch.int64).expand(batch, length)
        keys = torch.zeros(batch, window - 1, heads, width)
        return cls(projected, keys, bias, oldest, torch.randn(batch, length, heads, width))

    def attend(self, *, plainly: bool) -> Tensor:
        """Attend by our function."""
        parts = self.projected, self.keys, self.keys, self.bias, self.oldest
        return attend_window(*parts, plainly=plainly)

    def dense(self) -> Tensor:
        """Attend to all steps, those beyond the window being masked."""
        length, window = self.projected.shape[1], self.bias.shape[1]
        steps = torch.arange(length)
        back = steps[:, None] - steps
        near = (back >= 0) & (back < window)
        mask = self.bias[:, back.clamp(0, window - 1)].masked_fill(~near, -math.inf)
        queries, keys, values = self.projected.permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask)
        return out.transpose(1, 2)

    def learn(self, out: Tensor) -> tuple[Tensor, ...]:
        """Return the output and the gradients."""
        return out, *torch.autograd.grad(out, (self.projected, self.bias), self.grad)


def measure(shape: tuple[int, ...], turns: int) -> dict[str, Any]:
    """Return the median milliseconds of each way, forward and with the way back."""
    inputs = Inputs.of(shape)
    ways: dict[str, Callable[[], Tensor]] = {
        "kernel": lambda: inputs.attend(plainly=False),
        "blocks": lambda: inputs.attend(plainly=True),
        "dense": inputs.dense,
    }
    expected = inputs.learn(ways["blocks"]())
    for name, way in ways.items():
        for found, wanted in zip(inputs.learn(way()), expected, strict=True):
            error = float((found - wanted).detach().abs().max() / wanted.detach().abs().max())
            assert error < NEAR, f"{name} differs by {error:.1e}"
    times: dict[str, list[float]] = {}
    for _ in range(turns):
        for name, way in ways.items():
            with torch.no_grad():
                times.setdefault(f"{name}, forward", []).append(busy_seconds(way))
            both = busy_seconds(lambda way=way: inputs.learn(way()))
            times.setdefault(f"{name}, forward and back", []).append(both)
    medians = {name: round(1e3 * statistics.median(found), 3) for name, found in times.items()}
    return dict(zip(("B", "T", "H", "E", "window"), shape, strict=True)) | medians


def main() -> None:
    """Measure, print and write as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "window.json")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(shape, options.turns) for shape in SHAPES]
    for row in rows:
        print(row)
    write(options.out, {"machine": describe_machine("torch"), "rows": rows})


if __name__ == "__main__":
    main()
