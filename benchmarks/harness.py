"""How the benchmarks measure: timed in turn, peak memory, and what machine it was."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"

SETTLE = 0.02
"""Seconds between turns, for threads that wait by spinning to fall asleep."""


class Timing(NamedTuple):
    """Milliseconds of one run: the median of its turns, the extremes, and how many turns."""

    ms: float
    low: float
    high: float
    repeats: int


def in_turn(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    patience: float = math.inf,
    lead: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Timing]:
    """Time each in turn, so that noise meets all alike.

    The order changes from turn to turn, since a run finds the caches as the one before left them;
    those of `lead` always come first. A run that has taken more than `patience` seconds gets no
    further turn.
    """
    lead, order = lead or {}, list(runs.items())
    times: dict[str, list[float]] = {name: [] for name in lead | runs}
    shuffle = random.Random(0).shuffle
    for _ in range(repeats + 1):
        time.sleep(SETTLE)
        shuffle(order)
        for name, run in [*lead.items(), *order]:
            if sum(times[name]) > 1e3 * patience:
                continue
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    # The first turn warms caches and buffers; beside seconds that is nothing.
    counted = {name: all_turns[1:] or all_turns for name, all_turns in times.items()}
    return {
        name: Timing(statistics.median(turns), min(turns), max(turns), len(turns))
        for name, turns in counted.items()
    }


class Rate(NamedTuple):
    """How fast a machine is: FLOP/s in a large fp32 matrix product, bytes/s read from memory."""

    gemm_flops: float
    read_bandwidth: float


class Rates:
    """The machine's rates. They drift, so they are measured in turn with what is timed."""

    def __init__(self) -> None:
        self.seen: list[Rate] = []
        self._factors = torch.randn(2, 1024, 1024)
        # Far larger than any cache.
        self._matrix, self._vector = torch.randn(2**16, 512), torch.randn(512)

    def in_turn(
        self, runs: dict[str, Callable[[], Any]], repeats: int, patience: float = math.inf
    ) -> dict[str, Timing]:
        """Time the runs and, in the same turns, the rates, which are then the latest."""
        a, b = self._factors
        probes = {
            # Torch's threads have slept.
            "(wake)": lambda: a @ b,
            "(gemm)": lambda: a @ b,
            "(read)": lambda: self._matrix @ self._vector,
        }
        timings = in_turn(runs, repeats, patience, lead=probes)
        _, gemm, read = (1e-3 * timings.pop(name).ms for name in probes)
        self.seen.append(Rate(2 * 1024**3 / gemm, self._matrix.nbytes / read))
        return timings

    @property
    def latest(self) -> Rate:
        """Of the last turns."""
        return self.seen[-1]

    def medians(self) -> dict[str, float]:
        """Return each rate's median of all turns; nothing before the first."""
        columns = zip(Rate._fields, zip(*self.seen, strict=True), strict=False)
        return {name: statistics.median(rates) for name, rates in columns}


def seconds(run: Callable[[], Any]) -> float:
    """Return how long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def busy_seconds(run: Callable[[], Any]) -> float:
    """Return how long one run keeps the processor busy, whatever else is at work beside it."""
    start = time.process_time()
    run()
    return time.process_time() - start


def resident(name: str = "VmRSS") -> int:
    """Return the bytes of this process that are in RAM: now, or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and those inside it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_memory(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the most bytes that `run` held at once, its results among them, and the results.

    That is `peak_allocation` and the most that our kernel allocated itself, at whatever moment.
    """
    # Here, since `store.py --against` measures checkouts where they lie elsewhere.
    from htm_pytorch import kernels

    results = None

    def keep_results() -> None:
        nonlocal results
        results = run()

    if not kernels.IS_AVAILABLE:
        return peak_allocation(keep_results), results
    kernels.scratch_peak(reset=True)
    peak = peak_allocation(keep_results)
    return peak + kernels.scratch_peak(), results


def peak_allocation(run: Callable[[], Any]) -> int:
    """Return the most bytes that `run` held on the CPU at once, as its allocator saw it."""
    with (
        _quiet_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            profile_memory=True,
            # torch 2.11 warns where it is left to it.
            acc_events=True,
        ) as profile,
    ):
        run()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep the profiler from reporting that it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def describe_machine(*packages: str) -> dict[str, Any]:
    """Return what a reader needs to judge the figures."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return what git says of this checkout; None where there is no git, or no checkout."""
    ask = ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(
            ask, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def memory_bytes() -> int:
    """Return how much memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
