"""Memories in an object store: two writers, lost answers, damage, and what is left behind."""

import contextlib
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytest.importorskip("moto", reason="the extra `dev` is not installed")

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.object_log import ObjectLog, salvaged
from htm_pytorch.memory.place import find
from tests.memory.s3_server import FAULTS, Fault, Request, S3Server

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, DIM = 4, 2
GROUP = 6 * SIZE * DIM * 4
"""Bytes of closed chunks that become a version of the table."""
EARLIER = Path(__file__).with_name("format1_object_store.zip")
"""What the code of format 1 left: 26 steps in the table, 11 in the journal."""
EARLIER_EPISODES = [0, 0, 0, 1, 1, 2, 3, 3, 3, 4]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htm_pytorch.memory.stored.GROUP_BYTES", GROUP)


@pytest.fixture
def place(s3: S3Server) -> Iterator[str]:
    yield s3.place()
    s3.fault = no_fault


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


# Two writers.


def two_writers(s3: S3Server, place: str, seed: int, calls: int) -> None:
    """Calls of two who do not know of each other; the store shows what was acknowledged."""
    chance = random.Random(seed)
    stored: list[int] = []
    writers: list[Any] = [made(s3, place), None]
    # Whether the other one has changed something since a writer opened the memory.
    is_behind = [False, False]
    at = 0
    for _ in range(calls):
        who = chance.randrange(2)
        if writers[who] is None or chance.random() < 0.1:
            if writers[who] is not None:
                writers[who].close()
            writers[who], is_behind[who] = made(s3, place), False
        writer = writers[who]
        call = chance.choice(["append"] * 5 + ["flush", "compact", "verify", "read", "build_index"])
        before = s3.store.head(f"{folder_of(place)}/journal")["e_tag"]
        try:
            if call == "append":
                batch = list(range(at, at + chance.choice([1, 3, 9, 40])))
                at = batch[-1] + 1
                writer.append(numbered(batch[0], len(batch)))
                stored += batch
                assert not is_behind[who]
            elif call == "read":
                found = numbers(writer)
                assert found == stored[: len(found)]
            elif call == "verify":
                assert writer.verify() == []
            else:
                getattr(writer, call)()
        except BlockingIOError as error:
            assert is_behind[who], error
            assert "changed by another writer since this one opened it" in str(error)
            assert "close this memory, and open it again" in str(error)
        if s3.store.head(f"{folder_of(place)}/journal")["e_tag"] != before:
            is_behind[1 - who] = writers[1 - who] is not None
    for writer in filter(None, writers):
        writer.close()
    assert_holds(s3, place, stored)


@pytest.mark.parametrize("seed", range(2))
def test_two_writers(s3: S3Server, place: str, seed: int) -> None:
    two_writers(s3, place, seed, 30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_two_writers_for_long(s3: S3Server, place: str, seed: int) -> None:
    two_writers(s3, place, seed, 60)


def test_a_look_does_not_make_a_writer_the_newest_one(s3: S3Server, place: str) -> None:
    first = made(s3, place).append(numbered(0, 5))
    second = made(s3, place).append(numbered(5, 30))
    assert first.verify() == []
    with pytest.raises(BlockingIOError, match="another writer"):
        first.append(numbered(100, 3))
    # It sees what the other one has stored, and stays out.
    assert numbers(first) == list(range(35))
    with pytest.raises(BlockingIOError, match="another writer"):
        first.append(numbered(100, 3))
    first.close()
    second.append(numbered(35, 1)).close()
    assert_holds(s3, place, list(range(36)))


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


def meeting(s3: S3Server, source: str, call: str, at: int) -> bool:
    """Let a second writer come at a request of the first one's call; say whether there was one."""
    place = s3.place()
    copied(s3, source, place)
    first = made(s3, place)
    seen, errors = 0, []

    def second(request: Request) -> Fault:
        nonlocal seen
        seen += 1
        if seen == at + 1:
            s3.fault = no_fault
            try:
                with made(s3, place) as other:
                    other.append(numbered(2000, 9)).flush().append(numbered(2009, 2))
            except BaseException as error:
                errors.append(error)
        return None

    s3.fault = second
    is_done = True
    try:
        CALLS[call](first)
    except OSError:
        is_done = False
    s3.fault = no_fault
    assert not errors, errors
    came = list(range(2000, 2011))
    with made(s3, place) as third:
        found = held_by(third)
        assert third.verify() == []
    expected = steps_after(call, is_done)
    possible = [expected]
    if seen > at:
        possible = [expected + came]
        if is_done and call.startswith("append"):
            possible.append(steps_after(call, False) + came + expected[65:])
    assert found in possible, (call, at, is_done)
    with contextlib.suppress(BlockingIOError):
        first.append(numbered(3000, 1))
        first.flush()
    first.close()
    with made(s3, place) as third:
        assert held_by(third)[: len(found)] == found
        assert third.verify() == []
    return seen > at


@pytest.mark.parametrize("call", CALLS)
def test_a_second_writer_in_the_midst_of_a_call(s3: S3Server, place: str, call: str) -> None:
    source = before(s3, call)
    at = 0
    # Not at each of some hundred: that is the slow form.
    while meeting(s3, source, call, at):
        at += 1 + 2 * at


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_second_writer_at_every_request(s3: S3Server, place: str, call: str) -> None:
    source = before(s3, call)
    at = 0
    while meeting(s3, source, call, at):
        at += 1


def test_a_store_that_heeds_no_conditions_is_refused(s3: S3Server, place: str) -> None:
    s3.heeds_conditions = False
    try:
        with pytest.raises(ValueError, match=r"^uri: the store of .* \(If-Match\), so nothing"):
            made(s3, place)
    finally:
        s3.heeds_conditions = True
    assert s3.objects(folder_of(place)) == {}


# Lost answers.


def uncertain(s3: S3Server, source: str, call: str, at: int, fault: Fault) -> bool:
    """Let a request of a call fail; say whether there was one.

    The call is acknowledged and has happened once, or it raises; then it has happened as a whole,
    or not at all.
    """
    place = s3.place()
    copied(s3, source, place)
    held = opened(s3, place, storage_options={"client_max_retries": "1"})
    seen = 0

    def fails(request: Request) -> Fault:
        nonlocal seen
        seen += 1
        return fault if seen == at + 1 else None

    s3.fault = fails
    is_done = True
    try:
        CALLS[call](held)
    except BlockingIOError:
        raise
    except (OSError, MemoryFileError):
        is_done = False
    s3.fault = no_fault
    possible = [steps_after(call, True)] + [steps_after(call, False)] * (not is_done)
    found = held_by(held)
    assert found in possible, (call, at, fault, is_done)
    held.append(numbered(3000, 9)).flush()
    held.append(numbered(3009, 1))
    assert held.verify() == []
    held.close()
    with made(s3, place) as again:
        assert held_by(again) == found + list(range(3000, 3010)), (call, at, fault)
        assert again.verify() == []
    return seen > at


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("call", ["append", "append a group"])
def test_a_lost_answer(s3: S3Server, place: str, call: str, turn: int) -> None:
    source = before(s3, call)
    at = 0
    # Not each fault at each of them: that is the slow form.
    while uncertain(s3, source, call, at, FAULTS[(at + 2 * turn) % 4]):
        at += 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_lost_answer_at_every_request(s3: S3Server, place: str, call: str, fault: Fault) -> None:
    source = before(s3, call)
    at = 0
    while uncertain(s3, source, call, at, fault):
        at += 1


def many_faults(s3: S3Server, place: str, seed: int, calls: int, share: float) -> None:
    chance = random.Random(seed)

    def sometimes(request: Request) -> Fault:
        return chance.choice(FAULTS) if chance.random() < share else None

    stored: list[int] = []
    held, at = made(s3, place, storage_options={"client_max_retries": "1"}), 0
    for _ in range(calls):
        call = chance.choice(["append"] * 6 + ["flush", "compact", "build_index"])
        batch = list(range(at, at + chance.choice([1, 5, 40]))) if call == "append" else []
        at += len(batch)
        s3.fault = sometimes
        try:
            if batch:
                held.append(numbered(batch[0], len(batch)))
            else:
                getattr(held, call)()
            stored += batch
        except BlockingIOError:
            raise
        except (OSError, MemoryFileError):
            s3.fault = no_fault
            found = numbers(held)
            assert found in (stored, stored + batch)
            stored = found
        s3.fault = no_fault
        if chance.random() < 0.1:
            held.close()
            held = made(s3, place, storage_options={"client_max_retries": "1"})
        assert numbers(held) == stored
    held.close()
    assert_holds(s3, place, stored)


def test_many_lost_answers(s3: S3Server, place: str) -> None:
    many_faults(s3, place, 0, 18, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 115))
def test_many_lost_answers_for_long(s3: S3Server, place: str, seed: int) -> None:
    many_faults(s3, place, seed, 60, 0.05 + 0.2 * (seed % 3))


def test_what_comes_late_is_not_taken_for_another_writer(s3: S3Server, place: str) -> None:
    """A put of which no answer came is carried out after the next call has looked."""
    held = made(s3, place, storage_options={"client_max_retries": "0"}).append(numbered(0, 3))
    kept: list[tuple[bytes, str]] = []
    name = f"{folder_of(place)}/journal"
    tag = s3.store.head(name)["e_tag"]

    def late(request: Request) -> Fault:
        if request.method == "PUT":
            kept.append((request.body, request.if_match))
            return "dropped"
        return None

    s3.fault = late
    with pytest.raises(OSError, match="cannot be written"):
        held.append(numbered(3, 2))
    assert [condition for _, condition in kept] == [tag]
    looked = False

    def after_the_look(request: Request) -> Fault:
        nonlocal looked
        if request.method == "PUT" and not looked:
            looked = True
            s3.fault = no_fault
            s3.store.put(name, kept[0][0], mode={"e_tag": tag})
        return None

    s3.fault = after_the_look
    with pytest.raises(OSError, match="could not be written; try again") as raised:
        held.append(numbered(5, 1))
    assert not isinstance(raised.value, BlockingIOError)
    assert numbers(held) == list(range(5))
    held.append(numbered(5, 1)).close()
    assert_holds(s3, place, list(range(6)))


# What is damaged or missing.


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


# Between an object store and a folder.


def downloaded(s3: S3Server, place: str, folder: Path) -> None:
    for name in s3.objects(folder_of(place)):
        path = folder / name.removeprefix(f"{folder_of(place)}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.store.get(name).bytes())


def uploaded(s3: S3Server, folder: Path, place: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            s3.store.put(f"{folder_of(place)}/{path.relative_to(folder)}", path.read_bytes())


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
    back = s3.place()
    uploaded(s3, tmp_path / "copy", back)
    assert_holds(s3, back, list(range(95)))
    with made(s3, back) as held:
        held.append(numbered(95, 1)).compact()
        with made(s3, back) as other:
            other.append(numbered(96, 1))
        with pytest.raises(BlockingIOError):
            held.append(numbered(97, 1))
    assert_holds(s3, back, list(range(97)))


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


# Memories of format 1.


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


def bodies(s3: S3Server, place: str) -> dict[str, bytes]:
    return {name: bytes(s3.store.get(name).bytes()) for name in s3.objects(folder_of(place))}


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


# Where it is, and who may reach it.


def test_options_come_as_strings(s3: S3Server, place: str) -> None:
    """Of AWS by their names, of connections, and of the table's engine alone."""
    loud = {name.upper(): value for name, value in s3.options.items()}
    short = {name.removeprefix("aws_"): value for name, value in s3.options.items()}
    more = {
        "allow_invalid_certificates": "false",
        "aws_virtual_hosted_style_request": "false",
        "client_retry_timeout": "20",
        "connect_timeout": "4s",
        "download_retry_count": "3",
        "lance_aimd_max_retries": "2",
        "pool_idle_timeout": "3s",
        "pool_max_idle_per_host": "2",
        "timeout": "30 seconds",
        "user_agent": "a test",
    }
    at = 0
    for options in (s3.options, loud, short, {**s3.options, **more}):
        with memory.open(place, dim=DIM, cache_bytes=0, storage_options=options) as held:
            held.append(numbered(at, 40)).flush()
            at += 40
    assert_holds(s3, place, list(range(at)))


def test_options_come_from_the_environment(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("aws_access_key_id", "aws_secret_access_key", "aws_region", "aws_endpoint"):
        monkeypatch.setenv(name.upper(), s3.options[name])
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with memory.open(place, dim=DIM, cache_bytes=0) as held:
        held.append(numbered(0, 40)).flush()
    assert_holds(s3, place, list(range(40)))


def test_credentials_come_from_a_profile(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    lines = ["[default]", "aws_access_key_id = one", "aws_secret_access_key = two"]
    tmp_path.joinpath("credentials").write_text("\n".join(lines))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    options = {n: v for n, v in s3.options.items() if n not in credentials}
    with memory.open(place, dim=DIM, cache_bytes=0, storage_options=options) as held:
        held.append(numbered(0, 40)).flush()
    assert_holds(s3, place, list(range(40)))


credentials = ("aws_access_key_id", "aws_secret_access_key")


def test_what_cannot_be_reached_is_one_sentence(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else boto3 looks for those of the machine it is on.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for read_only in (False, True):
        others: Any = {"read_only": True} if read_only else {"dim": DIM}

        def fails(error: type[Exception], text: str, uri: str, options: Any) -> None:
            with pytest.raises(error, match=text) as raised:
                memory.open(uri, storage_options=options, **others)  # noqa: B023
            said = str(raised.value)
            assert "\n" not in said
            assert said.startswith("uri")
            assert "anything" not in said, "a secret"

        without = {n: v for n, v in s3.options.items() if n not in credentials}
        way_out = (
            "see to credentials, region and endpoint, which come from `storage_options` or the env"
        )
        fails(PermissionError, f"no credentials were found: .*{way_out}", place, without)
        half = {n: v for n, v in s3.options.items() if n != "aws_secret_access_key"}
        fails(ValueError, "storage_options: .*Missing SecretAccessKey", place, half)
        closed = {**s3.options, "aws_endpoint": "http://127.0.0.1:9"}
        fails(OSError, f"storage_options: {place}/journal cannot be .*{way_out}", place, closed)
        safe = {n: v for n, v in s3.options.items() if n != "allow_http"}
        fails(OSError, "an endpoint of http:// needs allow_http", place, safe)
        typo = {**s3.options, "aws_acess_key": "one"}
        fails(ValueError, "storage_options: .*'aws_acess_key' is not valid", place, typo)
        text = "there is no bucket 's3://another', .* make the bucket first, or correct `uri`"
        fails(OSError, text, "s3://another/life", s3.options)
    with pytest.raises(FileNotFoundError, match=f"uri: no memory at '{place}'"):
        opened(s3, place)


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://bucket/life",
        "memory://bucket/life",
        "s3://bucket/a?1",
        "s3://bucket/a#1",
        "s3://bucket/a%201",
        "s3://bucket/a//b",
        "s3://bucket/a/../b",
        "s3://bucket/./b",
    ],
)
def test_log_and_table_would_be_in_two_places(s3: S3Server, uri: str) -> None:
    s3.requests.clear()
    with pytest.raises(ValueError, match=r"^uri: expected a (place without|folder or one of)"):
        made(s3, uri)
    assert s3.requests == []


def test_places_with_odd_names(s3: S3Server, place: str) -> None:
    for name in ("a b", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "a+b&c=d", "~", "life.lance"):
        with made(s3, f"{place}/{name}") as held:
            held.append(numbered(0, 40)).flush()
        assert_holds(s3, f"{place}/{name}/", list(range(40)))
        found = {path.split("/")[2] for path in s3.objects(f"{folder_of(place)}/{name}")}
        assert found == {"journal", "chunks.lance"}


CHILD = """
import os, sys, json, warnings
import torch
from htm_pytorch import memory
warnings.simplefilter("ignore")
place, options = json.loads(sys.argv[1])
held = memory.open(place, storage_options=options, cache_bytes=0)
every = torch.arange(held.chunks)
child = os.fork()
if not child:
    found = []
    for call in (lambda: int(held.fetch(every).contents.sum()), held.refresh, held.info,
                 lambda: memory.open(place, storage_options=options, read_only=True),
                 lambda: held.append(torch.zeros(1, 1, 2))):
        try:
            found.append(str(call()))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    print(json.dumps(found), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0
held.append(torch.zeros(1, 1, 2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_told_rather_than_left_waiting(s3: S3Server, place: str) -> None:
    made(s3, place).append(numbered(0, 40)).close()
    run = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([place, s3.options])],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    fetched, *told, appended = json.loads(run.stdout)
    assert fetched == str(DIM * sum(range(40))) or "'spawn' or 'forkserver'" in fetched
    assert len(told) == 3
    assert all("fork" in said and "'spawn' or 'forkserver'" in said for said in told)
    assert "open for reading only" in appended
    assert opened(s3, place, read_only=True).steps == 41
