"""What a step of a stream costs: by the ring's size, beside `nn.LSTM`, and beside an older package.

One layer of `HTMTransformer`, width 64, chunks of 16, no gradient, one thread: an agent that acts.
Steps are counted with those that close a chunk. The answers of single steps are compared with those
of the whole sequence before a time is kept. Times are the processor's, which the one thread took,
so that other work on the machine counts for little. With `--before`, a checkout of an older package
(with its kernel) takes turns with this one, each in processes of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, busy_seconds, describe_machine, write

from htm_pytorch import HTMTransformer

DIM, CHUNK, TOPK, WINDOW = 64, 16, 2, 16
RINGS = (100, 1_000, 10_000, 50_000)
ROWS = (4, 64, 256)
TURNS = 5


def build(chunks: int) -> HTMTransformer:
    """Return one layer that remembers so many chunks."""
    torch.manual_seed(0)
    return HTMTransformer(
        DIM, 1, 4, 16, topk_mems=TOPK, mem_chunk_size=CHUNK, mem_chunks=chunks, window=WINDOW
    )


def check(rows: int) -> None:
    """Raise unless steps one by one are the whole sequence."""
    model, x = build(8), torch.randn(rows, 5 * CHUNK, DIM)
    whole, _ = model(x)
    state, parts = model.initial_state(rows), []
    for step in x.split(1, 1):
        y, state = model(step, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


class Stream:
    """A model in the middle of a stream, and an LSTM of its width beside it."""

    def __init__(self, rows: int, chunks: int, steps: int):
        self.model, self.lstm = build(chunks), torch.nn.LSTM(DIM, DIM, batch_first=True)
        self.x = torch.randn(rows, 1, DIM)
        _, self.state = self.model(torch.randn(rows, steps, DIM))
        self.hidden: Any = None

    def step(self, count: int) -> None:
        """Take so many steps."""
        for _ in range(count):
            _, self.state = self.model(self.x, self.state)

    def step_lstm(self, count: int) -> None:
        """Let the LSTM take them."""
        for _ in range(count):
            _, self.hidden = self.lstm(self.x, self.hidden)


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Return the milliseconds of a mean step, by setting."""
    found: dict[str, Any] = {}
    check(4)
    streams = {f"4 rows, room for {chunks:,} chunks": Stream(4, chunks, 1_000) for chunks in RINGS}
    for rows in ROWS[1:]:
        check(rows)
        streams[f"{rows} rows, room for 100 chunks"] = Stream(rows, 100, 1_000)
    count = 10 * CHUNK
    for stream in streams.values():
        stream.step(count)
        stream.step_lstm(count)
    times: dict[str, list[float]] = {name: [] for name in streams}
    ratios: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(TURNS):
        for name, stream in streams.items():
            ours, theirs = stream_times(stream, count)
            times[name].append(1e3 * ours / count)
            ratios[name].append(ours / theirs)
    for name in streams:
        found[name] = {
            "ms": round(statistics.median(times[name]), 4),
            "over nn.LSTM": round(statistics.median(ratios[name]), 2),
        }
    found["forward and backward, 8 rows of 512 steps"] = {"ms": round(learn(), 1)}
    return found


def stream_times(stream: Stream, count: int) -> tuple[float, float]:
    """Return the seconds of so many steps, and of the LSTM's."""
    return busy_seconds(lambda: stream.step(count)), busy_seconds(lambda: stream.step_lstm(count))


@torch.enable_grad()
def learn() -> float:
    """Return the milliseconds of learning from a batch of sequences."""
    model, x = build(40), torch.randn(8, 512, DIM)

    def update() -> None:
        y, _ = model(x)
        y.square().mean().backward()

    update()
    return 1e3 * statistics.median(busy_seconds(update) for _ in range(5))


def in_process(package: Path) -> dict[str, Any]:
    """Measure with the package of a checkout, in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure in turn and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="checkout of an older package")
    parser.add_argument("--turns", type=int, default=3, help="processes of each package")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure()))
        return
    packages = {"now": Path(__file__).parents[1]}
    if options.before is not None:
        packages["before"] = options.before
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
    for _ in range(options.turns):
        for name, package in packages.items():
            runs[name].append(in_process(package))
    rows = [row_of(setting, runs) for setting in runs["now"][0]]
    for row in rows:
        print(row)
    write(RESULTS / "streams.json", {"machine": describe_machine("torch"), "rows": rows})


def row_of(setting: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of a setting over all processes."""
    row: dict[str, Any] = {"setting": setting}
    for name, measured in runs.items():
        for figure in measured[0][setting]:
            values = [one[setting][figure] for one in measured]
            row[f"{name}, {figure}"] = round(statistics.median(values), 4)
    if "before" in runs:
        pairs = zip(runs["before"], runs["now"], strict=True)
        ratios = [old[setting]["ms"] / new[setting]["ms"] for old, new in pairs]
        row["before over now"] = round(statistics.median(ratios), 2)
    return row


if __name__ == "__main__":
    main()
