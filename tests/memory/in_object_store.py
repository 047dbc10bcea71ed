"""Memories in an object store for tests: steps that say which they are, and calls to break off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytest.importorskip("moto", reason="the extra `dev` is not installed")

from htm_pytorch import memory
from tests.memory.s3_server import Fault, Request, S3Server

SIZE, DIM = 4, 2
GROUP = 6 * SIZE * DIM * 4
"""Bytes of closed chunks that become a version of the table."""


def no_fault(request: Request) -> Fault:
    return None


def opened(s3: S3Server, place: str, **others: Any) -> Any:
    options = {**s3.options, **others.pop("storage_options", {})}
    return memory.open(place, storage_options=options, cache_bytes=0, **others)


def made(s3: S3Server, place: str, **others: Any) -> Any:
    return opened(s3, place, dim=DIM, chunk_size=SIZE, **others)


def numbered(first: int, count: int) -> Tensor:
    """Steps [1, count, DIM] that say which they are."""
    return torch.arange(first, first + count).float()[None, :, None].expand(1, count, DIM)


def numbers(held: Any) -> list[int]:
    """Which steps there are, in order."""
    return held.read(0, held.next_step)[0, :, 0].int().tolist()


def assert_holds(s3: S3Server, place: str, expected: list[int]) -> None:
    """Whoever opens the memory now finds these steps, and nothing damaged."""
    for search in ("exact", "index"):
        with opened(s3, place, read_only=True, search=search) as held:
            assert numbers(held) == expected
            assert held.verify() == []


def folder_of(place: str) -> str:
    return place.removeprefix("s3://bucket/")


def copied(s3: S3Server, place: str, target: str) -> None:
    for name in s3.objects(folder_of(place)):
        new = folder_of(target) + name.removeprefix(folder_of(place))
        s3.store.put(new, s3.store.get(name).bytes())


def bodies(s3: S3Server, place: str) -> dict[str, bytes]:
    return {name: bytes(s3.store.get(name).bytes()) for name in s3.objects(folder_of(place))}


def downloaded(s3: S3Server, place: str, folder: Path) -> None:
    for name in s3.objects(folder_of(place)):
        path = folder / name.removeprefix(f"{folder_of(place)}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.store.get(name).bytes())


def uploaded(s3: S3Server, folder: Path, place: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            s3.store.put(f"{folder_of(place)}/{path.relative_to(folder)}", path.read_bytes())


CALLS: dict[str, Callable[[Any], Any]] = {
    "append": lambda held: held.append(numbered(1000, 3)),
    "append a group": lambda held: held.append(numbered(1000, 40)),
    "flush": lambda held: held.flush(),
    "build_index": lambda held: held.build_index(),
    "compact": lambda held: held.compact(),
    "forget": lambda held: held.forget(before_step=7),
    "compact after forget": lambda held: held.compact(),
    "reset": lambda held: held.reset(torch.tensor([True])),
    "compact after reset": lambda held: held.compact(),
}


def before(s3: S3Server, call: str) -> str:
    """A memory to which something was written, as it is before a call."""
    place = s3.place()
    with made(s3, place) as held:
        held.append(numbered(0, 30)).append(numbered(30, 25)).append(numbered(55, 10))
        if call == "compact after forget":
            held.forget(before_step=7)
        if call == "compact after reset":
            held.reset(torch.tensor([True]))
    return place


def steps_after(call: str, is_done: bool) -> list[int]:
    steps = list(range(65))
    if call == "compact after forget" or (call == "forget" and is_done):
        return steps[7:]
    if call == "compact after reset" or (call == "reset" and is_done):
        return []
    if call.startswith("append") and is_done:
        return steps + list(range(1000, 1003 if call == "append" else 1040))
    return steps


def held_by(held: Any) -> list[int]:
    """All steps that were not forgotten."""
    fetched = held.fetch(torch.arange(held.chunks))
    of_chunks = fetched.contents[0][..., 0]
    if fetched.step_mask is not None:
        of_chunks = of_chunks[fetched.step_mask[0]]
    last = held.info()["steps of the open chunk"]
    rest = held.read(held.next_step - last, held.next_step)[0, :, 0]
    return torch.cat([of_chunks.flatten(), rest]).int().tolist()
