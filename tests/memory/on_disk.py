"""Memories on disk for tests: steps that say which they are, and writers in other processes."""

import contextlib
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htm_pytorch import memory
from htm_pytorch.memory import StoredMemory, folder_log, stored, versions

SIZE, DIM = 4, 6


def make(path: Path, **options: Any) -> StoredMemory:
    sizes = {"dim": DIM, "chunk_size": SIZE, "cache_bytes": 2**12, "sync": False}
    return memory.open(path, **(sizes | options))


def look(path: Path, **options: Any) -> StoredMemory:
    """Open one that exists, for reading."""
    return memory.open(path, **({"read_only": True, "cache_bytes": 2**12} | options))


def steps_from(first: int, count: int) -> Tensor:
    """Steps that say which they are."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return (numbers[:, None] + torch.arange(DIM) / 8)[None]


def beginning(length: int) -> Tensor:
    """`is_first`, where an episode begins with the first of so many steps."""
    return torch.arange(length)[None] == 0


def assert_holds(held: StoredMemory, least: int) -> None:
    """All steps from 0 on, at least so many, none damaged."""
    assert held.steps == held.next_step >= least
    assert held.chunks == held.steps // SIZE
    assert held.verify() == []
    contents = held.fetch(torch.arange(held.chunks)).contents
    assert torch.equal(contents.flatten(1, 2), steps_from(0, held.chunks * SIZE))
    assert torch.equal(held.read(0, held.steps), steps_from(0, held.steps))
    torch.testing.assert_close(held.summaries, contents.mean(2))


def flip(path: Path, found: bytes, bit: int = 1) -> None:
    """Flip a bit in the first byte of what is to be found in a file."""
    data = bytearray(path.read_bytes())
    assert data.count(found) == 1
    data[data.index(found)] ^= bit
    path.write_bytes(data)


def write_until_killed(
    path: Path, pipe: Connection, seed: int = 0, before: Callable[[], Any] | None = None
) -> None:
    """Append pieces of any length and say how many steps are stored, until something kills us."""
    stored.GROUP_BYTES = 20 * SIZE * DIM * 4
    versions.MOST_SMALL = 4
    folder_log.FULL, folder_log.WORN = 12_000, 6_000
    draw = random.Random(seed)
    held = make(path, sync=before is not None)
    if before is not None:
        before()
    pipe.send(held.steps)
    while True:
        count = draw.choice([1, 1, 2, 3, 7, 50, 200])
        held.append(steps_from(held.steps, count))
        pipe.send(held.steps)


@contextlib.contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
    """Run a function in another process, with a pipe as its second argument."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lance", "pyarrow", "htm_pytorch.memory", __name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(args[0], theirs, *args[1:]), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def elsewhere(call: Callable[[], Any]) -> Any:
    """Call it in another thread, which is kept waiting by a lock that was left behind."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(timeout=30)


def last_word(pipe: Connection) -> int:
    said = 0
    with contextlib.suppress(EOFError):
        while True:
            said = pipe.recv()
    return said
