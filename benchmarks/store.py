"""A memory on disk while it grows: writing, asking, and RAM, beside what the machine allows.

Written: bfloat16 steps, against the disk's own sequential rate. Asked: batches of 16 queries (k 8,
C 32), with nothing in the page cache and with everything in RAM, against one read of the summaries
and one random read of each chunk that is kept. Answers are compared with those of the same memory
in RAM. `--against CHECKOUT` measures another checkout in turn, small appends and commits, too.
Where `memorizing-transformers-pytorch` is installed (FAISS and a memory map), it is measured beside
ours; it asks for packages that are not needed, so install it by
`pip install --no-deps memorizing-transformers-pytorch einops-exts einops faiss-cpu`.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Rates, describe_machine, resident, seconds, stored_bytes, write
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention, memory
from htm_pytorch.memory import StoredMemory

DIM, CHUNK, TOPK, QUERIES = 512, 32, 8, 16
PIECE = 65_536
"""Steps appended at a time."""
BLOCK = 2**26
"""Bytes that the disk is given at a time."""
COMPARED = 1_000_000
"""Steps, at most, of a memory that is also held in RAM."""
BATCHES = 7
COMMITS = 1500
ROUND = ["ingest_bytes_per_s", "open_s", "warm_ms", "cold_ms", "resident_bytes", "bytes"]
PEER = "memorizing-transformers-pytorch"
PLOT = Path(__file__).parents[1] / "docs" / "store.png"


def piece(number: int) -> Tensor:
    """Return the steps of a piece, always the same."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1, PIECE, DIM, generator=generator).bfloat16()


def pieces(first: int, last: int) -> Iterator[Tensor]:
    """Return the steps from `first` up to `last`."""
    for number in range(first // PIECE, -(-last // PIECE)):
        start = number * PIECE
        yield piece(number)[:, max(first - start, 0) : last - start]


def write_rate(folder: Path, size: int) -> float:
    """Return the bytes/s of one large file, written from end to end, until the disk has it."""
    block, path = os.urandom(BLOCK), folder / "sequential"

    def fill() -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(size // BLOCK):
                file.write(block)
            os.fsync(file.fileno())

    taken = seconds(fill)
    path.unlink()
    return size / taken


def forget(folder: Path) -> None:
    """Take all files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def random_reads(folder: Path, count: int) -> float:
    """Return the seconds that `count` reads of a chunk's bytes take, at random, from the disk."""
    size = CHUNK * DIM * 2
    files = list((folder / "chunks.lance" / "data").iterdir())
    lengths = torch.tensor([float(max(0, path.stat().st_size - size)) for path in files])
    generator = torch.Generator().manual_seed(1)
    chosen = torch.multinomial(lengths, count, replacement=True, generator=generator).tolist()
    places = [int(lengths[file] * torch.rand(1, generator=generator)) for file in chosen]
    handles = [os.open(path, os.O_RDONLY) for path in files]
    forget(folder)
    taken = seconds(
        lambda: [os.pread(handles[f], size, p) for f, p in zip(chosen, places, strict=True)]
    )
    for handle in handles:
        os.close(handle)
    return taken


def layer_and_queries() -> tuple[HTMAttention, Tensor]:
    torch.manual_seed(0)
    layer = HTMAttention(DIM, heads=8, topk_mems=TOPK, mem_chunk_size=CHUNK, dim_head=64)
    return layer, torch.randn(BATCHES, 1, QUERIES, DIM)


@torch.no_grad()
def ask(path: Path) -> dict[str, Any]:
    """Open a memory and ask it, in a process that does nothing else."""
    layer, batches = layer_and_queries()
    layer(batches[0], ChunkedMemory.from_steps(torch.randn(1, 4096, DIM), CHUNK))
    rates = Rates()
    before = resident()
    forget(path)
    opening = time.perf_counter()
    held = memory.open(path, read_only=True)
    found: dict[str, Any] = {"open_s": time.perf_counter() - opening, "steps": held.steps}
    answers = [layer(queries, held) for queries in batches]
    found["resident_bytes"] = resident() - before
    found["most_resident_bytes"] = resident("VmHWM") - before
    kept = [distinct(layer, queries, held) for queries in batches]
    found["chunks_kept"] = statistics.median(kept)
    warm = rates.in_turn({"warm": lambda: layer(batches[0], held)}, repeats=15)["warm"]
    summaries, vector = held.summaries[0], torch.randn(DIM)
    scan = rates.in_turn({"scan": lambda: summaries @ vector}, repeats=15)["scan"]
    found |= {"warm_ms": warm.ms, "scan_ms": scan.ms}
    found["read_bandwidth"] = summaries.nbytes / scan.ms * 1e3
    found["gemm_flops"] = rates.latest.gemm_flops
    cold_memory = memory.open(path, read_only=True, cache_bytes=0)
    cold, reads = [], []
    for queries, count, answer in zip(batches, kept, answers, strict=True):
        forget(path)
        outs: list[Tensor] = []
        cold.append(1e3 * seconds(lambda q=queries, o=outs: o.append(layer(q, cold_memory))))
        assert torch.equal(outs[0], answer), "a cold memory answered otherwise than a warm one"
        reads.append(1e3 * random_reads(path, count))
    found |= {"cold_ms": statistics.median(cold), "random_reads_ms": statistics.median(reads)}
    if held.steps <= COMPARED:
        steps = torch.cat(list(pieces(0, held.steps)), 1)
        steps = steps[:, : held.steps - held.steps % CHUNK].float()
        in_ram = ChunkedMemory.from_steps(steps, CHUNK)
        differences = [
            float((layer(q, in_ram) - a).abs().max() / a.abs().max())
            for q, a in zip(batches, answers, strict=True)
        ]
        found["difference_to_ram"] = max(differences)
        assert max(differences) < 1e-4, differences
    found["cold / limit"] = found["cold_ms"] / (found["scan_ms"] + found["random_reads_ms"])
    found["warm / scan"] = found["warm_ms"] / found["scan_ms"]
    return found


def distinct(layer: HTMAttention, queries: Tensor, held: StoredMemory) -> int:
    """Return how many different chunks a batch of queries keeps."""
    _, recalled = layer.recall(queries, held)
    return recalled.chunks.unique().numel()


def ask_alone(path: Path) -> dict[str, Any]:
    run = [sys.executable, __file__, "--ask", str(path)]
    return json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def grow(folder: Path, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Write a memory up to each of the sizes, and ask it there."""
    path = folder / "memory"
    bytes_a_step = 2 * DIM
    with memory.open(path, dim=DIM, chunk_size=CHUNK, dtype=torch.bfloat16) as held:
        first = 0
        for size in sizes:
            rates, taken = [], 0.0
            for steps in pieces(first, size):
                taken += seconds(functools.partial(held.append, steps))
            rates.append(write_rate(folder, max(BLOCK, min(2**31, (size - first) * bytes_a_step))))
            row: dict[str, Any] = {
                "steps": size,
                "ingest_bytes_per_s": (size - first) * bytes_a_step / taken,
                "disk_bytes_per_s": statistics.median(rates),
            }
            row["ingest / disk"] = row["ingest_bytes_per_s"] / row["disk_bytes_per_s"]
            held.flush()
            row |= ask_alone(path)
            row["bytes"] = stored_bytes(path)
            yield row
            first = size


def small(folder: Path) -> dict[str, float]:
    """Return the ms of small appends, of small commits, and of opening what they leave."""
    found: dict[str, float] = {}
    options: Any = {"dim": DIM, "chunk_size": CHUNK, "dtype": torch.bfloat16}
    for count in (1, 8, 32):
        path = folder / f"appends of {count}"
        with memory.open(path, **options) as held:
            steps = piece(0)[:, :count]
            held.append(steps)
            taken = [1e3 * seconds(functools.partial(held.append, steps)) for _ in range(500)]
        found[f"append of {count}, ms"] = statistics.median(taken)
        found[f"opening after 500 appends of {count}, ms"] = 1e3 * statistics.median(
            seconds(lambda p=path: memory.open(p, read_only=True)) for _ in range(5)
        )
        shutil.rmtree(path)
    path = folder / "commits"
    with memory.open(path, **options) as held:
        taken = []
        chunks = piece(0).split(CHUNK, 1)
        for number in range(COMMITS):
            held.append(chunks[number % len(chunks)])
            taken.append(1e3 * seconds(held.flush))
    found["of the first commits, ms"] = statistics.median(taken[20:120])
    found[f"of the last of {COMMITS} commits, ms"] = statistics.median(taken[-100:])
    found["opening after them, ms"] = 1e3 * seconds(lambda: memory.open(path, read_only=True))
    shutil.rmtree(path)
    return found


def one_round(folder: Path, steps: int) -> dict[str, Any]:
    """Measure all of it once, in this process and with the package that it imports."""
    (row,) = grow(folder, [steps])
    shutil.rmtree(folder / "memory")
    return {name: row[name] for name in ROUND} | small(folder)


def against(checkout: Path, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Measure this checkout and another one in turn; return medians and their ratios."""
    root = Path(__file__).parents[1]
    places = {"now": root, "before": checkout.resolve()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
    for number in range(rounds):
        for name in sorted(places, reverse=bool(number % 2)):
            run = [sys.executable, __file__, "--round", str(folder), "--steps", str(steps)]
            environment = os.environ | {"PYTHONPATH": str(places[name])}
            done = subprocess.run(run, check=True, capture_output=True, text=True, env=environment)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, json.dumps(found[name][-1]), flush=True)
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    ratios = {key: value / medians["before"][key] for key, value in medians["now"].items()}
    return {"rounds": rounds, "steps": steps, **medians, "now / before": ratios}


def peer(folder: Path, sizes: list[int], most_seconds: float) -> Iterator[dict[str, Any]]:
    """The same growth for the nearest neighbours of memorizing-transformers-pytorch."""
    try:
        from memorizing_transformers_pytorch import KNNMemory
    except ImportError as error:
        yield {"skipped": str(error)}
        return
    for size in sizes:
        knn = KNNMemory(
            dim=64,
            max_memories=size,
            num_indices=1,
            memmap_filename=str(folder / f"knn-{size}.memmap"),
        )
        add = 0.0
        for start in range(0, size, PIECE):
            keys_values = torch.randn(1, min(PIECE, size - start), 2, 64)
            add += seconds(functools.partial(knn.add, keys_values))
            if add > most_seconds:
                yield {"steps": size, "skipped": f"adding takes more than {most_seconds:.0f} s"}
                return
        queries = torch.randn(1, 8, QUERIES, 64)
        search = functools.partial(knn.search, queries, topk=32)
        asked = [1e3 * seconds(search) for _ in range(9)]
        yield {"steps": size, "add_s": add, "ask_ms": statistics.median(asked)}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw how long a batch of queries takes while the memory grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    steps = [row["steps"] for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    limit = [row["scan_ms"] + row["random_reads_ms"] for row in rows]
    axes.loglog(steps, [row["cold_ms"] for row in rows], "o-", label="nothing in RAM but summaries")
    axes.loglog(steps, limit, "o:", color="C0", label="its limit: scan + random reads")
    axes.loglog(steps, [row["warm_ms"] for row in rows], "s-", label="chunks cached")
    axes.loglog(steps, [row["scan_ms"] for row in rows], "s:", color="C1", label="its limit: scan")
    theirs = [row for row in result[PEER] if "ask_ms" in row]
    if theirs:
        x, y = [row["steps"] for row in theirs], [row["ask_ms"] for row in theirs]
        axes.loglog(x, y, "^-", label="neighbours by FAISS, memory map")
    axes.set(xlabel="steps stored", ylabel="ms for 16 queries")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, write JSON, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path("runs/store"), help="emptied first")
    parser.add_argument("--out", type=Path, default=RESULTS / "store.json")
    parser.add_argument("--peer-seconds", type=float, default=120.0)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.round:
        print(json.dumps(one_round(options.round, options.steps[0])))
        return
    if options.ask:
        print(json.dumps(ask(options.ask)))
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    if options.against:
        machine = describe_machine("torch", "pylance")
        rounds = against(options.against, options.folder, options.steps[0], options.rounds)
        write(RESULTS / "store_before.json", {"machine": machine, **rounds})
        print(json.dumps(rounds["now / before"], indent=2))
        shutil.rmtree(options.folder)
        return
    result: dict[str, Any] = {"machine": describe_machine("torch", "pylance"), "rows": []}
    try:
        for row in grow(options.folder, options.steps):
            result["rows"].append(row)
            write(options.out, result)
            print(json.dumps(row), flush=True)
        shutil.rmtree(options.folder / "memory")
        result[PEER] = list(peer(options.folder, options.steps, options.peer_seconds))
        write(options.out, result)
        print(json.dumps(result[PEER]))
        plot(result, PLOT)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
