"""What exact search costs against the number of chunks: with codes of the summaries, and without.

The same vectors are searched by faiss, if it is installed: exactly (Flat), and by two indices (IVF,
HNSW) that look at as little as finds .98 of the 8 best. Picks are compared before a time is told.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import RESULTS, describe_machine, in_turn, write
from index import KINDS, PIECE, TOPK
from torch import Tensor

from htm_pytorch import ChunkedMemory
from htm_pytorch.memory import ring
from htm_pytorch.ops import native

try:
    import faiss  # pyright: ignore[reportMissingImports]
except ImportError:
    faiss = None

SIZES = (1_000, 4_000, 16_000, 62_500, 312_500)
FOUND, MOST_HNSW = 0.98, 62_500


def summaries_of(kind: str, chunks: int) -> Tensor:
    pieces, last = list[Tensor](), torch.zeros(512)
    for number in range(-(-chunks // PIECE)):
        pieces.append(KINDS[kind](number, last))
        last = pieces[-1][-1]
    return torch.cat(pieces)[:chunks].contiguous()


def queries_like(summaries: Tensor, kind: str, count: int) -> Tensor:
    torch.manual_seed(0)
    noise = torch.randn(count, summaries.shape[1])
    if kind == "unstructured":
        return noise
    return summaries[torch.randint(len(summaries), (count,))] + 0.5 * noise


def ours(summaries: Tensor, queries: Tensor) -> dict[str, Callable[[], Any]]:
    """The same memory twice, of which one is never coded."""
    route = queries[None]
    memory, plain = (
        ChunkedMemory.from_chunks(summaries[None, :, None], summaries=summaries[None], copy=False)
        for _ in range(2)
    )
    ring_of_plain = plain._ring
    ring_of_plain.codes = lambda k, queries: None  # type: ignore[method-assign]
    for _ in range(2):
        found = native.pick(route, memory, TOPK, None)
    for got, wanted in zip(found, native.pick(route, plain, TOPK, None), strict=True):
        if not torch.equal(got, wanted):
            raise SystemExit("search: codes find other chunks, or other weights")
    return {
        "one read of the summaries": summaries.sum,
        "without codes": lambda: native.pick(route, plain, TOPK, None),
        "with codes": lambda: native.pick(route, memory, TOPK, None),
    }


def theirs(summaries: Tensor, queries: Tensor) -> dict[str, Callable[[], Any]]:
    """The indices of faiss, each as it finds enough of the best."""
    if faiss is None:
        return {}
    chunks, dim = summaries.shape
    vectors, asked = summaries.numpy(), queries.numpy()
    flat = faiss.IndexFlatIP(dim)
    flat.add(vectors)
    probe = (
        summaries[:: max(1, chunks // 200)][:200] + 0.5 * torch.randn(min(200, chunks), dim)
    ).numpy()
    best = torch.from_numpy(flat.search(probe, TOPK)[1])

    def is_found(index: Any) -> bool:
        got = torch.from_numpy(index.search(probe, TOPK)[1])
        return float((best[:, :, None] == got[:, None]).any(2).float().mean()) >= FOUND

    runs: dict[str, Callable[[], Any]] = {"faiss Flat": lambda: flat.search(asked, TOPK)}
    lists = max(1, round(4 * chunks**0.5))
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.cp.niter = 8
    ivf.train(vectors)
    ivf.add(vectors)
    ivf.nprobe = 1
    while not is_found(ivf) and ivf.nprobe < lists:
        ivf.nprobe = min(lists, 2 * ivf.nprobe)
    runs[f"faiss IVF at {FOUND}"] = lambda: ivf.search(asked, TOPK)
    if chunks <= MOST_HNSW:
        graph = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 80
        graph.add(vectors)
        graph.hnsw.efSearch = 16
        while not is_found(graph) and graph.hnsw.efSearch < chunks:
            graph.hnsw.efSearch *= 2
        runs[f"faiss HNSW at {FOUND}"] = lambda: graph.search(asked, TOPK)
    return runs


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.6), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        of_kind = [row for row in rows if row["kind"] == kind and row["queries"] == 1]
        names = dict.fromkeys(name for row in of_kind for name in row["ms"])
        for name in names:
            points = [(row["chunks"], row["ms"][name]) for row in of_kind if name in row["ms"]]
            own = name == "with codes"
            axis.loglog(*zip(*points, strict=True), "o-", ms=3, lw=2.5 if own else 1.2, label=name)
        axis.set_title(kind)
        axis.set_xlabel("chunks (512 numbers each)")
    axes[0].set_ylabel("ms for one query")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plot", default="docs/search.png")
    options = parser.parse_args()
    ring.CODED_NUMBERS = 0
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        for chunks in options.sizes:
            summaries = summaries_of(kind, chunks)
            for count in (1, 16):
                queries = queries_like(summaries, kind, count)
                with torch.no_grad():
                    runs = ours(summaries, queries) | (
                        theirs(summaries, queries) if count == 1 else {}
                    )
                    times = in_turn(runs, options.repeats)
                ms = {name: timing.ms for name, timing in times.items()}
                share = ms["with codes"] / ms["one read of the summaries"]
                rows.append({"kind": kind, "chunks": chunks, "queries": count, "ms": ms})
                told = ", ".join(f"{name} {time:.3g}" for name, time in ms.items())
                print(
                    f"{kind} {chunks:,} chunks, {count} queries: {share:.2f} of a read; {told} ms",
                    flush=True,
                )
    result = {"machine": describe_machine(), "rows": rows}
    write(RESULTS / "search.json", result)
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
