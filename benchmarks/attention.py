"""The layer against its peers on the CPU: forward, forward + backward, peak extra memory.

Peers: the published package htm-pytorch 0.0.4 (its wheel is fetched once; it imports under our
name, so its one file is loaded under another), and dense attention over all steps, with keys and
values cached or projected. Every result is compared with the reference before it is timed.
"""

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import (
    RESULTS,
    describe_machine,
    gemm_flops,
    medians,
    peak_allocation,
    read_bandwidth,
    write,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.nn.attention import sinusoid
from htm_pytorch.ops.reference import htm_attention

HEADS, DIM_HEAD, TOPK, CHUNK = 8, 64, 8, 32
PEERS = Path(__file__).parent / ".peers"


def load_published() -> ModuleType:
    """Return the published package's one module; needs `einops` and, the first time, a network."""
    source = PEERS / "published.py"
    if not source.exists():
        PEERS.mkdir(exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(PEERS)]
        subprocess.run([*fetch, "htm-pytorch==0.0.4"], check=True)
        with zipfile.ZipFile(next(PEERS.glob("*.whl"))) as wheel:
            source.write_bytes(wheel.read("htm_pytorch/htm_pytorch.py"))
    spec = importlib.util.spec_from_file_location("published", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case:
    """One setting: inputs, the layers of equal weights, and the runs to time."""

    def __init__(
        self, batch: int, queries: int, steps: int, dim: int, published: ModuleType | None
    ):
        torch.manual_seed(0)
        sizes = {"dim": dim, "heads": HEADS, "dim_head": DIM_HEAD}
        sizes |= {"topk_mems": TOPK, "mem_chunk_size": CHUNK}
        if steps % CHUNK:
            raise SystemExit(f"--steps: expected multiples of {CHUNK}, got {steps}")
        self.name = f"B{batch} Q{queries} N{steps:,} D{dim}"
        self.shape = {"B": batch, "Q": queries, "N": steps, "D": dim}
        self.queries = torch.randn(batch, queries, dim)
        self.steps = torch.randn(batch, steps, dim)
        self.mask = torch.ones(batch, steps, dtype=torch.bool)
        self.memory = ChunkedMemory.from_steps(self.steps, CHUNK)
        self.ours = HTMAttention(**sizes)
        self.published = published and published.HTMAttention(**sizes)
        if self.published is not None:
            self.published.load_state_dict(self.ours.state_dict(), strict=False)

    def check(self) -> None:
        """Stop unless all agree with the reference within its own single-precision error."""
        weights = dict(self.ours.named_parameters())
        positions = sinusoid(CHUNK, self.shape["D"], torch.float32, self.queries.device)
        arguments: dict[str, Any] = {"heads": HEADS, "k": TOPK, "positions": positions}
        some = slice(0, 4)
        expected = htm_attention(self.queries[:, some], self.memory, weights, **arguments)
        results = {"tensor": self.ours(self.queries, self.steps)[:, some]}
        results["memory"] = self.ours(self.queries, self.memory)[:, some]
        if self.published is not None:
            results["published"] = self.published(self.queries[:, some], self.steps, self.mask)
        for name, result in results.items():
            error = ((result - expected).abs().max() / expected.abs().max()).item()
            if error > 2e-5:
                raise SystemExit(f"{self.name}: {name} is off by {error:.1e} of the largest value")

    def runs(self, backward: bool) -> dict[str, Any]:
        """Return what to time, by name."""
        runs: dict[str, Any] = {
            "ours, tensor": lambda: self.ours(self.input(), self.steps),
            "ours, memory": lambda: self.ours(self.input(), self.memory),
        }
        if self.published is not None:
            runs["published"] = lambda: self.published(self.input(), self.steps, self.mask)
        shape = self.queries.shape[0], HEADS, -1, DIM_HEAD
        query, key, value = (torch.randn(*shape[:2], n, DIM_HEAD) for n in self.lengths())
        project = torch.nn.Linear(self.shape["D"], 2 * HEADS * DIM_HEAD)

        def dense() -> Tensor:
            keys, values = project(self.steps).chunk(2, -1)
            split = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (keys, values)]
            return scaled_dot_product_attention(query, *split)

        runs["dense, projected"] = dense
        if not backward:
            runs["dense, cached"] = lambda: scaled_dot_product_attention(query, key, value)
            return {name: _forward(run) for name, run in runs.items()}
        return {name: _backward(run) for name, run in runs.items()}

    def lengths(self) -> tuple[int, int, int]:
        """Return how many queries, keys and values dense attention has."""
        return self.shape["Q"], self.shape["N"], self.shape["N"]

    def input(self) -> Tensor:
        """Return the queries, as an input that needs a gradient."""
        return self.queries.detach().requires_grad_()


def _forward(run: Any) -> Any:
    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    return forward


def _backward(run: Any) -> Any:
    return lambda: run().sum().backward()


def limit(case: Case, flops: float, bandwidth: float) -> float:
    """Return the milliseconds that the formula's FLOPs, or one read of the summaries, must take."""
    shape = case.shape
    chunks = shape["N"] // CHUNK
    picked = min(TOPK, chunks) * CHUNK * HEADS * shape["D"] * 4
    work = shape["B"] * shape["Q"] * (picked + 2 * chunks * shape["D"]) / flops
    reading = shape["B"] * chunks * shape["D"] * 4 / bandwidth
    return 1e3 * max(work, reading)


def main() -> None:
    """Check, measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 16, 128, 1024])
    parser.add_argument("--steps", type=int, nargs="*", default=[2_048, 20_000, 200_000])
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    parser.add_argument("--published-bytes", type=float, default=3e9)
    options = parser.parse_args()
    published = load_published()
    machine = describe_machine("torch")
    flops, bandwidth = gemm_flops(), read_bandwidth()
    print(f"GEMM {flops / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s")
    rows = []
    grid = [
        (batch, queries, steps, dim)
        for batch in options.batches
        for dim in options.dims
        for steps in options.steps
        for queries in options.queries
    ]
    for batch, queries, steps, dim in grid:
        # The published package repeats the memory's index for every query: it runs out first.
        needs = batch * queries * TOPK * CHUNK * (dim + 2 * HEADS * DIM_HEAD) * 4
        case = Case(
            batch, queries, steps, dim, published if needs < options.published_bytes else None
        )
        case.check()
        row: dict[str, Any] = dict(case.shape)
        row["forward"] = medians(case.runs(backward=False), options.repeats)
        row["forward + backward"] = medians(case.runs(backward=True), options.repeats)
        row["limit"] = limit(case, flops, bandwidth)
        runs = case.runs(backward=False)
        row["peak bytes"] = {name: peak_allocation(run) for name, run in runs.items()}
        rows.append(row)
        print(f"\n{case.name}: at least {row['limit']:.2f} ms")
        for name, forward in row["forward"].items():
            both = row["forward + backward"].get(name)
            peak = row["peak bytes"][name] / 2**20
            print(
                f"  {name:18}{forward:10.2f} ms forward"
                + (f"{both:10.2f} ms with backward" if both else " " * 27)
                + f"{peak:10.1f} MiB"
            )
        write(
            options.out,
            {"machine": machine, "gemm_flops": flops, "read_bandwidth": bandwidth, "rows": rows},
        )


if __name__ == "__main__":
    main()
