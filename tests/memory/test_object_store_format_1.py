"""Memories of format 1 in an object store: how they are read, and how they are moved."""

import contextlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch.memory import MemoryFileError
from tests.memory.in_object_store import bodies, folder_of, no_fault, opened
from tests.memory.s3_server import FAULTS, Fault, Request, S3Server

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")


EARLIER = Path(__file__).with_name("format1_object_store.zip")
"""What the code of format 1 left: 26 steps in the table, 11 in the journal."""
EARLIER_EPISODES = [0, 0, 0, 1, 1, 2, 3, 3, 3, 4]


def earlier(s3: S3Server, place: str) -> dict[str, bytes]:
    """Put a memory of format 1 there and return its objects."""
    with zipfile.ZipFile(EARLIER) as stored:
        objects = {f"{folder_of(place)}/{name}": stored.read(name) for name in stored.namelist()}
    for name, body in objects.items():
        s3.store.put(name, body)
    return objects


def assert_is_the_earlier_one(held: Any) -> None:
    expected = torch.arange(37)[:, None] * torch.tensor([1.0, -2.0, 0.5])
    assert held.read(0, held.next_step)[0].tolist() == expected.tolist()
    assert held.episodes.tolist() == EARLIER_EPISODES
    assert held.verify() == []


def test_format_1_is_read_as_it_is(s3: S3Server, place: str) -> None:
    objects = earlier(s3, place)
    for search in ("exact", "index"):
        with opened(s3, place, read_only=True, search=search) as held:
            assert_is_the_earlier_one(held.refresh())
            assert held.info()["steps"] == 37
    assert bodies(s3, place) == objects


def test_format_1_is_moved_by_a_writer(s3: S3Server, place: str) -> None:
    earlier(s3, place)
    reader = opened(s3, place, read_only=True)
    with opened(s3, place) as held:
        assert_is_the_earlier_one(held)
        assert not [name for name in s3.objects(folder_of(place)) if "journal.lance" in name]
        assert_is_the_earlier_one(reader)
        with pytest.raises(MemoryFileError, match="moved the memory .*, open it again"):
            reader.refresh()
        step = torch.full((1, 5, 3), 7.0)
        held.append(step).flush().compact()
    with opened(s3, place, read_only=True) as held:
        assert held.next_step == 42
        assert held.read(37, 42).tolist() == step.tolist()
        assert held.verify() == []
    with opened(s3, place) as held:
        held.forget(before_step=42).compact()
    assert len(s3.objects(folder_of(place))) <= 4


def moved(s3: S3Server, at: int, fault: Fault) -> bool:
    """Let a request of the move fail; say whether there was one."""
    place = s3.place()
    earlier(s3, place)
    seen = 0

    def fails(request: Request) -> Fault:
        nonlocal seen
        seen += 1
        return fault if seen > at else None

    s3.fault = fails
    with contextlib.suppress(OSError, MemoryFileError):
        opened(s3, place, storage_options={"client_max_retries": "0"}).close()
    s3.fault = no_fault
    with opened(s3, place, read_only=True) as held:
        assert_is_the_earlier_one(held)
    with opened(s3, place) as held:
        assert_is_the_earlier_one(held)
        held.append(torch.zeros(1, 9, 3)).flush()
        assert held.verify() == []
    return seen > at


def test_format_1_whose_move_breaks_off(s3: S3Server, place: str) -> None:
    at = 0
    while moved(s3, at, FAULTS[at % 4]):
        at += 9


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_format_1_whose_move_breaks_off_anywhere(s3: S3Server, fault: Fault) -> None:
    at = 0
    while moved(s3, at, fault):
        at += 1
