"""What one call of a stored memory costs, by size and place: an append, a refresh, a recall.

Steps of width 512 in bfloat16, chunks of 32; a recall is 16 queries of a layer (k 8), in RAM
("warm") and with nothing of the chunks in RAM ("cold"). Places: a folder; a folder without waiting
for the disk; an S3 server on this machine, where moto is installed: a network adds its own time to
each request. Every answer is compared with that of the same steps in RAM before a time is kept.
"""

import argparse
import contextlib
import json
import logging
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, describe_machine, seconds, write

from htm_pytorch import ChunkedMemory, HTMAttention, memory
from htm_pytorch.memory import StoredMemory

DIM, CHUNK, TOPK, QUERIES = 512, 32, 8, 16
APPENDED = (1, 32, 1024)
REPEATS = 41
SERVER = "S3 server on this machine"
MOST_FOR_SERVER = 100_000
"""Steps; it holds all in RAM, and is slow."""


def times_of(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median milliseconds of a call."""
    return 1e3 * statistics.median(seconds(call) for _ in range(repeats))


@torch.no_grad()
def measure(uri: str, size: int, **options: Any) -> dict[str, Any]:
    """Fill a memory with `size` steps and time calls of it."""
    torch.manual_seed(0)
    layer = HTMAttention(DIM, heads=8, topk_mems=TOPK, mem_chunk_size=CHUNK, dim_head=64)
    steps = torch.randn(1, size, DIM).bfloat16()
    queries = torch.randn(1, QUERIES, DIM)
    # Steps of the open chunk can be recalled of a past given whole only.
    closed = steps[:, : size - size % CHUNK].float()
    expected = layer(queries, ChunkedMemory.from_steps(closed, CHUNK))
    found: dict[str, Any] = {}
    kinds: dict[str, Any] = {"dim": DIM, "chunk_size": CHUNK, "dtype": torch.bfloat16}
    with memory.open(uri, **kinds, **options) as held:
        held.ingest(steps.split(65_536, 1), progress=False)
        check(layer(queries, held), expected)
        found["recall, warm, ms"] = times_of(lambda: layer(queries, held))
        reader_options = {k: v for k, v in options.items() if k != "sync"}
        with memory.open(uri, read_only=True, cache_bytes=0, **reader_options) as reader:
            check(layer(queries, reader), expected)
            found["recall, cold, ms"] = times_of(lambda: layer(queries, reader))
            found["refresh with nothing new, ms"] = times_of(reader.refresh)
            append(held, found)
            refreshed = reader.refresh().next_step
            assert refreshed == held.next_step, "a reader does not see what was appended"
    return found


def append(held: StoredMemory, found: dict[str, Any]) -> None:
    """Time appends of several lengths."""
    for length in APPENDED:
        more, before = torch.randn(1, length, DIM).bfloat16(), held.next_step
        found[f"append of {length}, ms"] = times_of(lambda steps=more: held.append(steps))
        last = held.read(held.next_step - length, held.next_step)
        assert held.next_step == before + REPEATS * length, "steps are missing"
        assert torch.equal(last, more), "other steps are stored than were appended"


def check(answer: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise where an answer is wrong."""
    error = float((answer - expected).abs().max() / expected.abs().max())
    assert error < 1e-2, f"a stored memory answers otherwise than one in RAM, by {error:.2g}"


@contextlib.contextmanager
def places(folder: Path) -> Iterator[dict[str, tuple[str, dict[str, Any]]]]:
    """Yield, by name, where to put memories and how to open them."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "folder": (str(folder / "waits"), {}),
        "folder, sync=False": (str(folder / "does-not"), {"sync": False}),
    }
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        yield found
        return
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "aws_access_key_id": "anyone",
        "aws_secret_access_key": "anything",
        "aws_region": "us-east-1",
        "aws_endpoint": f"http://{host}:{port}",
        "allow_http": "true",
    }
    make_bucket(f"{host}:{port}")
    try:
        yield found | {SERVER: ("s3://bucket/held", {"storage_options": options})}
    finally:
        server.stop()


def make_bucket(address: str) -> None:
    """Make the bucket, as anyone may on such a server."""
    from http.client import HTTPConnection

    connection = HTTPConnection(address)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    connection.close()


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path("runs/calls"), help="emptied first")
    parser.add_argument("--out", type=Path, default=RESULTS / "calls.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine("torch", "pylance"), "rows": []}
    for size in options.steps:
        shutil.rmtree(options.folder, ignore_errors=True)
        options.folder.mkdir(parents=True)
        with places(options.folder) as there:
            for place, (uri, given) in there.items():
                if place == SERVER and size > MOST_FOR_SERVER:
                    continue
                row = {"place": place, "steps": size, **measure(uri, size, **given)}
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
        shutil.rmtree(options.folder)
    write(options.out, result)


if __name__ == "__main__":
    main()
