"""A stored memory whose chunks an index finds, beside one that scores every summary.

How long 1 query and 16 take, what share of the 8 best chunks the index finds, what RAM each needs,
and how long the index is built. Chunks are of one step, so that little but summaries is stored.
What they are like decides what can be found, so there are three kinds: about 20,000 topics in
1,000 groups; a walk that forgets half of what it was in 34 chunks; and numbers without any
structure. Queries are like a stored summary, with as much noise as summaries differ, or like none.
"""

import argparse
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, describe_machine, in_turn, resident, seconds, stored_bytes, write
from torch import Tensor

from htm_pytorch import memory, recall
from htm_pytorch.memory import ExactMemory, IndexedMemory, StoredMemory

DIM, TOPK = 512, 8
PIECE = 50_000
FORGOTTEN = 0.02


def topics(piece: int, _: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(1000, DIM, generator=generator).repeat_interleave(20, 0)
    centres = groups + 0.7 * torch.randn(20_000, DIM, generator=generator)
    generator.manual_seed(1 + piece)
    topic = torch.randint(20_000, (PIECE,), generator=generator)
    return centres[topic] + 0.5 * torch.randn(PIECE, DIM, generator=generator)


def walk(piece: int, last: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1 + piece)
    keep = 1 - FORGOTTEN
    steps = (1 - keep**2) ** 0.5 * torch.randn(PIECE, DIM, generator=generator)
    steps[0] += keep * last
    # In rounds that double how far back a step looks.
    back = 1
    while back < PIECE:
        steps[back:] += keep**back * steps[:-back].clone()
        back *= 2
    return steps


def unstructured(piece: int, _: Tensor) -> Tensor:
    return torch.randn(PIECE, DIM, generator=torch.Generator().manual_seed(1 + piece))


KINDS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "topics": topics,
    "walk": walk,
    "unstructured": unstructured,
}


def pieces(kind: str, chunks: int) -> Iterator[Tensor]:
    last = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
    for piece in range(-(-chunks // PIECE)):
        steps = KINDS[kind](piece, last)
        last = steps[-1]
        yield steps[None, : chunks - piece * PIECE].bfloat16()


def ask(held: StoredMemory, queries: Tensor) -> Tensor:
    return recall(queries, queries[:, :, None], held, TOPK)


def opened(path: Path, search: Any) -> tuple[StoredMemory, int]:
    """Open a memory, and say how many bytes of RAM it took once it was asked."""
    before = resident()
    held = memory.open(path, read_only=True, search=search)
    ask(held, torch.randn(1, 16, DIM))
    return held, resident() - before


@torch.no_grad()
def measure(path: Path, kind: str, chunks: int) -> dict[str, Any]:
    """Write a memory and its index, and ask both ways."""
    shutil.rmtree(path, ignore_errors=True)
    with memory.open(path, dim=DIM, chunk_size=1, dtype=torch.bfloat16) as writer:
        for steps in pieces(kind, chunks):
            writer.append(steps)
        row: dict[str, Any] = {"kind": kind, "chunks": chunks}
        row["build_s"] = seconds(writer.build_index)
    row["index_bytes"] = stored_bytes(path / "chunks.lance" / "_indices")
    index, row["index_resident_bytes"] = opened(path, "index")
    exact, row["exact_resident_bytes"] = opened(path, "exact")
    assert isinstance(index, IndexedMemory)
    assert isinstance(exact, ExactMemory)
    torch.manual_seed(0)
    summaries = exact.summaries
    like = summaries[:, torch.randint(chunks, (128,))]
    queries = {
        "near": like + torch.randn_like(like) * like.std(2, keepdim=True),
        "unrelated": torch.randn(1, 128, DIM),
    }
    for name, asked in queries.items():
        row[f"found, {name}"] = check(index, exact, summaries[0], asked)
    runs = {
        f"{name}_{count}_ms": functools.partial(ask, held, queries["near"][:, :count])
        for count in (1, 16)
        for name, held in (("index", index), ("exact", exact))
    }
    row |= {name: timing.ms for name, timing in in_turn(runs, repeats=9).items()}
    return row


def check(index: IndexedMemory, exact: ExactMemory, summaries: Tensor, queries: Tensor) -> float:
    """Return the share of the best chunks that the index finds; where all, answers are equal."""
    share = index.index_recall(queries, TOPK)
    best = torch.cat([(q @ summaries.T).topk(TOPK).indices for q in queries[0].split(16)])
    found = index.search(queries, TOPK)[0]
    hits = (best[:, :, None] == found[:, None]).any(2)
    assert abs(float(hits.float().mean()) - share) < 0.01, (float(hits.float().mean()), share)
    whole = hits.all(1)
    answers = ask(index, queries)[0, whole], ask(exact, queries)[0, whole]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    return share


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[312_500, 3_125_000])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/index"), help="emptied first")
    parser.add_argument("--out", type=Path, default=RESULTS / "index.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine("torch", "pylance"), "rows": []}
    try:
        for chunks in options.chunks:
            for kind in options.kinds:
                result["rows"].append(measure(options.folder, kind, chunks))
                write(options.out, result)
                print(json.dumps(result["rows"][-1]), flush=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
