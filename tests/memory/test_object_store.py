"""Memories in an object store: what is written, followed, forgotten and copied."""

import random
from pathlib import Path

import pytest
import torch

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError
from tests.memory.in_object_store import (
    DIM,
    assert_holds,
    bodies,
    downloaded,
    folder_of,
    made,
    numbered,
    numbers,
    uploaded,
)
from tests.memory.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")


def test_many_appends_leave_one_object(s3: S3Server, place: str) -> None:
    with memory.open(place, dim=64, chunk_size=4, storage_options=s3.options) as held:
        step = torch.randn(1, 100, 64)
        # Of the size of a version of the table, in the end.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("htm_pytorch.memory.stored.GROUP_BYTES", 2**20)
            for _ in range(100):
                s3.requests.clear()
                held.append(step)
                methods = [request.method for request in s3.requests]
                if held.info()["chunks in the log"]:
                    assert methods == ["PUT"]
        written = held.steps * 64 * 4
        objects = s3.objects(folder_of(place))
        assert sum(objects.values()) < 1.5 * written
        # A version of the table has three.
        assert len(objects) <= 1 + 3 * 3
        held.compact()
        objects = s3.objects(folder_of(place))
        log = f"{folder_of(place)}/journal"
        assert [name for name in objects if "chunks.lance" not in name] == [log]
        assert objects[log] < 1000
        # What was joined stays for an hour, for readers.
        assert sum(objects.values()) < 3 * written
        assert len(objects) <= 1 + 5 * 3


def test_a_reader_follows_the_writer(s3: S3Server, place: str) -> None:
    chance = random.Random(0)
    at = 0
    with made(s3, place) as held, made(s3, place, read_only=True) as reader:
        for _ in range(25):
            count = chance.choice([1, 2, 5, 30])
            held.append(numbered(at, count))
            at += count
            if chance.random() < 0.2:
                chance.choice([held.flush, held.compact, held.build_index])()
            assert reader.next_step <= at
            if chance.random() < 0.5:
                assert numbers(reader.refresh()) == list(range(at))
        s3.requests.clear()
        reader.refresh()
        s3.requests.clear()
        reader.refresh()
        # Where nothing is new, nothing is read.
        assert [request.method for request in s3.requests] == ["GET"]
        held.forget(before_step=at - 3)
        held.compact()
        assert reader.refresh().steps == 3
        assert reader.read(at - 3, at)[0, :, 0].tolist() == [at - 3, at - 2, at - 1]
        held.reset(torch.tensor([True]))
        assert reader.refresh().next_step == 0
        held.append(numbered(0, 5))
        assert numbers(reader.refresh()) == list(range(5))


def test_what_was_forgotten_is_in_no_object(s3: S3Server, place: str) -> None:
    steps = torch.randn(1, 200, DIM)

    def found() -> set[int]:
        """Of which steps there are bytes."""
        every = b"".join(bodies(s3, place).values())
        return {n for n in range(200) if steps[0, n].numpy().tobytes() in every}

    with made(s3, place) as held:
        for piece in steps.split(9, 1):
            held.append(piece, torch.zeros(1, piece.shape[1], dtype=torch.bool))
        held.build_index()
        held.append(torch.zeros(1, 3, DIM))
        assert found() == set(range(200))
        held.forget(before_step=77)
        held.compact()
        assert found() == set(range(77, 200))
        assert torch.equal(held.read(77, 200), steps[:, 77:])
        assert held.verify() == []
        held.reset(torch.tensor([True]))
        held.compact()
        assert found() == set()
        assert len(s3.objects(folder_of(place))) <= 4
        held.append(steps).flush()
        assert torch.equal(held.read(0, 200), steps)


def test_a_memory_can_be_copied_there_and_back(s3: S3Server, place: str, tmp_path: Path) -> None:
    with made(s3, place) as held:
        held.append(numbered(0, 60), keys="a key").append(numbered(60, 3))
        spans = held.spans(torch.arange(held.chunks))
    downloaded(s3, place, tmp_path / "copy")
    with memory.open(tmp_path / "copy", read_only=True, cache_bytes=0) as held:
        assert numbers(held.refresh()) == list(range(63))
        assert held.spans(torch.arange(held.chunks)) == spans
        assert held.verify() == []
        assert held.info()["bytes of the log"] > 0
    with memory.open(tmp_path / "copy", cache_bytes=0) as held:
        held.append(numbered(63, 30)).append(numbered(93, 2))
        assert held.verify() == []
    with memory.open(tmp_path / "copy", read_only=True, cache_bytes=0) as held:
        assert numbers(held) == list(range(95))
    (tail,) = (tmp_path / "copy" / "tails").iterdir()
    back = s3.place()
    uploaded(s3, tmp_path / "copy", back)
    assert_holds(s3, back, list(range(95)))
    s3.store.delete(f"{folder_of(back)}/tails/{tail.name}")
    with pytest.raises(MemoryFileError, match=f"{tail.name}, which is not there.*memory repair"):
        made(s3, back)
    uploaded(s3, tmp_path / "copy", back)
    with made(s3, back) as held:
        held.append(numbered(95, 1)).compact()
        assert f"tails/{tail.name}" in {name.partition("/")[2] for name in bodies(s3, back)}
        with made(s3, back) as other:
            other.append(numbered(96, 1))
        with pytest.raises(BlockingIOError):
            held.append(numbered(97, 1))
    assert_holds(s3, back, list(range(97)))
    with made(s3, back) as held:
        held.forget(before_step=20).compact()
    assert not [name for name in bodies(s3, back) if tail.name in name]
