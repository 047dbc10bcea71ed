"""Memories in an object store that are damaged, or of which something is gone."""

import random
from pathlib import Path

import pytest

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.object_log import ObjectLog, salvaged
from htm_pytorch.memory.place import find
from tests.memory.in_object_store import (
    DIM,
    assert_holds,
    downloaded,
    folder_of,
    held_by,
    made,
    numbered,
    numbers,
    opened,
    uploaded,
)
from tests.memory.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")


def test_no_damage_to_the_log_goes_unseen(s3: S3Server, place: str) -> None:
    name = f"{folder_of(place)}/journal"
    with made(s3, place) as held:
        held.append(numbered(0, 60)).append(numbered(60, 3)).append(numbered(63, 7), keys="a key")
    whole = bytes(s3.store.get(name).bytes())
    chance = random.Random(0)
    damaged = [whole[: chance.randrange(len(whole))] for _ in range(20)]
    damaged += [b"", whole + b"\0", whole + whole, bytes(len(whole))]
    for bit in chance.sample(range(8 * len(whole)), 200):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    log = ObjectLog(find(place, s3.options))
    text = f"the log {place}/journal is damaged .*htm memory repair"
    for number, body in enumerate(damaged):
        s3.store.put(name, body)
        with pytest.raises(MemoryFileError, match=text):
            log.read()
        assert log.problems()
        if number % 10 == 0:
            for others in ({"read_only": True}, {"dim": DIM}):
                with pytest.raises(MemoryFileError, match=text):
                    opened(s3, place, **others)
            assert bytes(s3.store.get(name).bytes()) == body
    s3.store.put(name, whole)
    assert_holds(s3, place, list(range(70)))


def test_a_log_that_is_damaged_later(s3: S3Server, place: str) -> None:
    name = f"{folder_of(place)}/journal"
    held = made(s3, place).append(numbered(0, 60)).append(numbered(60, 3))
    reader = opened(s3, place, read_only=True)
    whole = bytes(s3.store.get(name).bytes())
    s3.store.put(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(MemoryFileError, match="htm memory repair"):
        reader.refresh()
    assert numbers(reader) == list(range(63))
    assert "its checksum is wrong" in held.verify()[0]
    with pytest.raises(MemoryFileError, match="htm memory repair"):
        held.append(numbered(63, 1))
    s3.store.put(name, whole)
    held.close()
    assert_holds(s3, place, list(range(63)))


def test_a_log_that_is_gone(s3: S3Server, place: str) -> None:
    name = f"{folder_of(place)}/journal"
    held = made(s3, place).append(numbered(0, 60)).append(numbered(60, 3))
    reader = opened(s3, place, read_only=True)
    kept = bytes(s3.store.get(name).bytes())
    s3.store.delete(name)
    objects = s3.objects(folder_of(place))
    assert objects
    for others in ({"read_only": True}, {"dim": DIM}, {}):
        with pytest.raises(MemoryFileError, match=f"the log {place}/journal is gone, .*repair"):
            opened(s3, place, **others)
    with pytest.raises(MemoryFileError, match="is gone"):
        held.append(numbered(63, 1))
    with pytest.raises(MemoryFileError, match="holds this memory no more|is gone"):
        reader.refresh()
    assert s3.objects(folder_of(place)) == objects
    s3.store.put(name, kept)
    assert_holds(s3, place, list(range(63)))


def test_what_is_right_in_a_damaged_log(s3: S3Server, place: str) -> None:
    with made(s3, place) as held:
        for n in range(9):
            held.append(numbered(2 * n, 2))
    body = bytes(s3.store.get(f"{folder_of(place)}/journal").bytes())
    ((head,), records) = salvaged(body)
    assert head.steps == 18
    assert [record.first_step for record in records] == list(range(0, 18, 2))
    chance = random.Random(0)
    for _ in range(200):
        flipped = bytearray(body)
        bit = chance.randrange(8 * len(body))
        flipped[bit // 8] ^= 1 << bit % 8
        heads, found = salvaged(bytes(flipped))
        assert len(heads) + len(found) >= 9
        assert [record for record in found if record not in records] == []
        assert heads in ([], [head])


@pytest.mark.parametrize("what", ["the head", "a record"])
def test_a_damaged_memory_is_repaired_in_a_folder(
    s3: S3Server, place: str, tmp_path: Path, what: str
) -> None:
    with made(s3, place) as held:
        held.append(numbered(0, 60)).append(numbered(60, 3)).append(numbered(63, 2))
    name = f"{folder_of(place)}/journal"
    body = bytearray(s3.store.get(name).bytes())
    body[body.index(b'"generation"') if what == "the head" else -1] ^= 1
    s3.store.put(name, bytes(body))
    with pytest.raises(MemoryFileError, match="htm memory repair"):
        made(s3, place)
    downloaded(s3, place, tmp_path / "copy")
    report = memory.repair(tmp_path / "copy")
    assert report.steps == (65 if what == "the head" else 63)
    back = s3.place()
    uploaded(s3, tmp_path / "copy", back)
    with made(s3, back) as held:
        assert held_by(held) == list(range(report.steps))
        held.append(numbered(65, 1))
        assert held.next_step == 66
        assert held.verify() == []
