"""The layer against its peers on the CPU: forward, forward + backward, peak extra memory.

Peers: the published package htm-pytorch 0.0.4 (its wheel is fetched once), DeepMind's module in JAX
(where jax is installed), and dense attention over all steps, with keys and values cached or
projected. Every result is compared with the reference before it is timed. First come the targets
(targets.py), then a grid of sizes.
"""

import argparse
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cells import Cell, Past, bytes_of_inputs, rivals
from contest import FORWARD, MEASURES, Limits, contest
from growth import plot
from harness import RESULTS, Rates, describe_machine, memory_bytes, write
from peers import load_published, verify_original
from targets import targets

PLOT = Path(__file__).parents[1] / "docs" / "growth.png"

Rows = Iterator[dict[str, Any]]


def target_rows(options: argparse.Namespace, limits: Limits, rates: Rates) -> Rows:
    """Measure the targets; print each and whether it is reached."""
    reached = []
    for target in targets(load_published(), rates, limits, options.shrink):
        reached.append(target.is_reached)
        print(target, flush=True)
        yield target.as_json()
    print(f"{sum(reached)} of {len(reached)} targets reached")


def grid_rows(options: argparse.Namespace, limits: Limits, rates: Rates) -> Rows:
    """Measure the grid; print a table for each cell."""
    has_jax = importlib.util.find_spec("jax") is not None
    if has_jax:
        verify_original()
    else:
        print("DeepMind's module is left out: jax is not installed")
    published = load_published()

    def measure(past: Past, queries: int) -> dict[str, Any]:
        cell = Cell(past, queries)
        runs = rivals(cell, published, with_original=has_jax)
        return contest(runs, rates, limits, bytes_of_inputs(**cell.shape))

    for batch, dim, length in itertools.product(options.batches, options.dims, options.steps):
        past = None
        for queries in options.queries:
            row: dict[str, Any] = {"B": batch, "Q": queries, "N": length, "D": dim}
            needed = bytes_of_inputs(**row)
            if needed > limits.bytes:
                row["skipped"] = f"the inputs alone are {needed / 1e9:.0f} GB"
            else:
                past = past or Past(batch, length, dim)
                row |= measure(past, queries)
            print_row(row)
            yield row


def print_row(row: dict[str, Any]) -> None:
    """Print who takes what in a cell."""
    print(f"\nB{row['B']} Q{row['Q']} N{row['N']:,} D{row['D']}", end="")
    if "skipped" in row:
        print(f": skipped, {row['skipped']}", flush=True)
        return
    rates = row["rates"][FORWARD]
    print(
        f" ({rates['gemm_flops'] / 1e9:.0f} GFLOP/s, {rates['read_bandwidth'] / 1e9:.1f} GB/s)\n"
        f"  {'':18}" + "".join(f"{measure + ', ms':>24}{'MiB':>10}" for measure in MEASURES)
    )
    for name, entry in row["rivals"].items():
        print(f"  {name:18}" + "".join(columns(entry[measure]) for measure in MEASURES), flush=True)
        for measure in MEASURES:
            if "skipped" in entry[measure]:
                print(f"  {'':18}  {measure}: {entry[measure]['skipped']}")


def columns(found: dict[str, Any]) -> str:
    """Return milliseconds, how often they were measured, and MiB; dashes where left out."""
    if "skipped" in found:
        return f"{'-':>24}{'-':>10}"
    times = f"({found['repeats']}x)"
    peak = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:.1f}"
    return f"{found['ms']:>18,.2f} {times:>5}{peak:>10}"


PARTS = {"targets": target_rows, "grid": grid_rows}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    parser.add_argument("--only", choices=PARTS, help="and leave the other's results as they are")
    parser.add_argument("--plot", action="store_true", help=f"measure nothing, draw {PLOT.name}")
    sizes = {
        "--queries": [1, 16, 128, 1024],
        "--steps": [2_048, 20_000, 200_000, 2_000_000],
        "--dims": [64, 512],
        "--batches": [1, 32],
    }
    for name, default in sizes.items():
        parser.add_argument(name, type=int, nargs="+", default=default, help="of the grid")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide the targets' lengths, to try them out"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--patience", type=float, default=5.0, help="seconds, then a run is not repeated again"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="leave out calls estimated to take longer"
    )
    parser.add_argument(
        "--gigabytes", type=float, default=0.8e-9 * memory_bytes(), help="leave out who needs more"
    )
    return parser.parse_args()


def main() -> None:
    """Check, measure, print, and write JSON."""
    options = parse()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = {part: results[part] for part in PARTS if part in results}
    if options.plot:
        if "grid" not in results:
            raise SystemExit(f"{options.out}: no grid has been measured")
        plot(results["grid"]["rows"], PLOT)
        return
    limits = Limits(options.repeats, options.patience, options.seconds, 1e9 * options.gigabytes)
    packages = [name for name in ("torch", "numpy", "jax") if importlib.util.find_spec(name)]
    about = {"machine": describe_machine(*packages), "limits": limits._asdict()}
    for part in [options.only] if options.only else PARTS:
        rates, rows = Rates(), []
        for row in PARTS[part](options, limits, rates):
            rows.append(row)
            results[part] = {**about, "rates": rates.medians(), "rows": rows}
            # Now, so that an end before the end loses nothing.
            write(options.out, results)


if __name__ == "__main__":
    main()
