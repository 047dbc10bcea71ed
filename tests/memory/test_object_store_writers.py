"""Two writers of a memory in an object store: what either was told is stored is stored."""

import contextlib
import random
from typing import Any

import pytest

from tests.memory.in_object_store import (
    CALLS,
    assert_holds,
    before,
    copied,
    folder_of,
    held_by,
    made,
    no_fault,
    numbered,
    numbers,
    steps_after,
)
from tests.memory.s3_server import Fault, Request, S3Server

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")


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
