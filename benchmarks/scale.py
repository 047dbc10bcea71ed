"""What a memory on up to 1,000 machines would hold, and what a query would cost.

Nothing here runs on 1,000 machines. What one rank does is measured on this one; the network and the
rest is assumed, and `ASSUMPTIONS` says how. Ranks wait for the one that most of the kept chunks
fall to, which is drawn.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from harness import RESULTS, describe_machine, write
from torch import Tensor
from torch import distributed as dist

from htm_pytorch import ChunkedMemory, recall
from htm_pytorch.memory import ShardedMemory
from htm_pytorch.ops import native
from htm_pytorch.ops.sharded import choose, exchanged_bytes

DIM, HEADS, CHUNK_SIZE, KEPT = 512, 8, 32, 8
QUERIES = (1, 128)
RANKS = (1, 10, 100, 1000)
MACHINE_BYTES = 64 * 2**30
"""Of the memory, on each machine."""
CHUNK_BYTES = 4 * DIM * (CHUNK_SIZE + 1) + 1
"""float32 steps, their summary, and whether it is valid."""

PARTS, KINDS = ("scan", "attend", "merge", "call"), ("tree", "ring")

SCANNED, STORED = 65_536, 4_096
"""Chunks whose summaries are scanned (128 MiB) and whose steps are read (256 MiB) when measured."""

ASSUMPTIONS = [
    "a rank scores n summaries in n / SCANNED of the time measured for SCANNED",
    "a rank attends inside c chunks in c times the time measured per chunk, far from the caches",
    "of the calls measured the fastest counts, since others used the machine too; total_uneven "
    "draws each rank's time among all of them instead, and waits for the slowest",
    "each kept chunk is on a rank drawn evenly",
    "every message takes the latency plus its bytes over the bandwidth, links do not share, and "
    "ranks send and receive at once",
    "tree: all_gather by doubling, ceil(log2 R) messages; all_reduce 2 ceil(log2 R)",
    "ring: all_gather R - 1 messages, all_reduce 2 (R - 1); what gloo does",
    "either way a rank receives (R - 1) n bytes in an all_gather of n bytes, 2 n (R - 1) / R in an "
    "all_reduce",
    "what a call costs whatever its size is measured in a group of one rank; the projections of a "
    "layer are not counted",
    "no rank fails",
]


class Network(NamedTuple):
    """Seconds a message, bytes a second."""

    latency: float
    bandwidth: float


NETWORKS = {
    "10 Gbit/s, 25 us": Network(25e-6, 10e9 / 8),
    "100 Gbit/s, 5 us": Network(5e-6, 100e9 / 8),
}


class Local(NamedTuple):
    """Seconds of calls on this machine, one by one; of one number of queries."""

    scan: list[float]  # SCANNED summaries
    attend: list[float]  # one kept chunk of one query
    merge: dict[int, float]  # choosing among the scores of so many ranks
    call: float  # a recall by one rank that holds one chunk


def time_calls(call: Callable[[], Any], repeats: int) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@torch.no_grad()
def measure(queries: int, repeats: int) -> Local:
    """What one rank does for so many queries, by the compiled kernel."""
    torch.manual_seed(0)
    route = torch.randn(1, queries, DIM)
    probe = torch.randn(1, queries, HEADS, DIM) / DIM
    # Their steps are not looked at.
    steps = torch.zeros(1, 1, 1, DIM).expand(1, SCANNED, 1, DIM)
    scanned = ChunkedMemory.from_chunks(steps, summaries=torch.randn(1, SCANNED, DIM))
    scan = time_calls(lambda: native.pick(route, scanned, KEPT, None), repeats)
    stored = ChunkedMemory.from_chunks(torch.randn(1, STORED, CHUNK_SIZE, DIM))
    weights = torch.full((1, queries, KEPT), 1 / KEPT)

    def attend() -> Tensor:
        picked = torch.randint(STORED, (1, queries, KEPT))
        return native.attend(probe, stored, None, picked, weights)

    attends = [seconds / (queries * KEPT) for seconds in time_calls(attend, repeats)]
    merge = {}
    for ranks in RANKS:
        scores = torch.randn(1, queries, ranks, KEPT)
        numbers = torch.arange(ranks * KEPT).view(ranks, KEPT).expand_as(scores)
        times = time_calls(lambda s=scores, n=numbers: choose(s, n, KEPT), repeats)
        merge[ranks] = min(times)
    single = ShardedMemory(ChunkedMemory.from_chunks(torch.randn(1, 1, CHUNK_SIZE, DIM)))
    call = min(time_calls(lambda: recall(route, probe, single, KEPT), repeats))
    return Local(scan, attends, merge, call)


def gather_time(network: Network, ranks: int, sent: int, ring: bool) -> float:
    messages = ranks - 1 if ring else math.ceil(math.log2(ranks))
    return messages * network.latency + (ranks - 1) * sent / network.bandwidth


def reduce_time(network: Network, ranks: int, sent: int, ring: bool) -> float:
    messages = ranks - 1 if ring else math.ceil(math.log2(ranks))
    return 2 * (messages * network.latency + sent * (ranks - 1) / ranks / network.bandwidth)


def simulate(local: Local, queries: int, ranks: int, chunks: int, trials: int) -> dict[str, Any]:
    """Milliseconds of a recall over `chunks` on each rank: each part, and the whole."""
    generator = torch.Generator().manual_seed(ranks)
    owners = torch.randint(ranks, (trials, queries * KEPT), generator=generator)
    picks = torch.zeros(trials, ranks).scatter_add_(1, owners, torch.ones(owners.shape))

    def draw(times: list[float]) -> Tensor:
        index = torch.randint(len(times), (trials, ranks), generator=generator)
        return torch.tensor(times)[index]

    parts = {
        "scan": min(local.scan) * chunks / SCANNED,
        "attend": min(local.attend) * picks.amax(1).median().item(),
        "merge": local.merge[ranks],
        "call": local.call,
    }
    uneven = (draw(local.scan) * chunks / SCANNED + draw(local.attend) * picks).amax(1)
    slowest = uneven.median().item() - parts["scan"] - parts["attend"]
    sent = exchanged_bytes(queries, HEADS, DIM, KEPT)
    networks = {}
    for name, network in NETWORKS.items():
        for ring in (False, True):
            exchange = (
                gather_time(network, ranks, sent.header, ring)
                + gather_time(network, ranks, sent.scores, ring)
                + reduce_time(network, ranks, sent.contexts, ring)
            )
            total = sum(parts.values()) + exchange
            networks[f"{name}, {'ring' if ring else 'tree'}"] = {
                "exchange": 1e3 * exchange,
                "total": 1e3 * total,
                "total_uneven": 1e3 * (total + slowest),
            }
    received = (ranks - 1) * (sent.header + sent.scores + 2 * sent.contexts // ranks)
    milliseconds = {name: 1e3 * seconds for name, seconds in parts.items()}
    return {**milliseconds, "received_bytes": received, "networks": networks}


def main() -> None:
    """Measure, simulate, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    measured = {queries: measure(queries, options.repeats) for queries in QUERIES}
    dist.destroy_process_group()
    full = MACHINE_BYTES // CHUNK_BYTES
    # Each machine full; and what fills one machine, dealt out.
    scalings = {"full": lambda ranks: full, "dealt": lambda ranks: -(-full // ranks)}
    rows = []
    for scaling, chunks_of in scalings.items():
        for queries, local in measured.items():
            print(f"\n{scaling}, {queries} queries: ms; networks: exchange, total")
            print(f"{'ranks':>6}{'steps':>16}" + "".join(f"{name:>9}" for name in PARTS), end="")
            print("".join(f"{f'{name}, {kind}':>24}" for name in NETWORKS for kind in KINDS))
            for ranks in RANKS:
                chunks = chunks_of(ranks)
                found = simulate(local, queries, ranks, chunks, options.trials)
                steps = ranks * chunks * CHUNK_SIZE
                row = {"scaling": scaling, "queries": queries, "ranks": ranks, "steps": steps}
                rows.append(row | {"chunks_per_rank": chunks} | found)
                print(f"{ranks:6}{steps:16,}" + "".join(f"{found[p]:9.3f}" for p in PARTS), end="")
                each = found["networks"].values()
                print("".join(f"{cost['exchange']:14.2f}{cost['total']:10.2f}" for cost in each))
    result = {
        "machine": describe_machine("torch"),
        "sizes": {"D": DIM, "H": HEADS, "C": CHUNK_SIZE, "k": KEPT, "dtype": "float32"},
        "machine_bytes": MACHINE_BYTES,
        "assumptions": ASSUMPTIONS,
        "networks": {name: network._asdict() for name, network in NETWORKS.items()},
        "measured": {
            queries: {
                "scan_ms": {"least": 1e3 * min(local.scan), "median": 1e3 * median(local.scan)},
                "scan_bytes_per_second": 4 * DIM * SCANNED / min(local.scan),
                "attend_us_per_chunk": {
                    "least": 1e6 * min(local.attend),
                    "median": 1e6 * median(local.attend),
                },
                "merge_ms": {ranks: 1e3 * seconds for ranks, seconds in local.merge.items()},
                "call_ms": 1e3 * local.call,
            }
            for queries, local in measured.items()
        },
        "rows": rows,
    }
    write(options.out, result)


if __name__ == "__main__":
    main()
