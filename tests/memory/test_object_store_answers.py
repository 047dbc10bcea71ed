"""A memory in an object store whose answers are lost: a call happens once, or not at all."""

import random

import pytest

from htm_pytorch.memory import MemoryFileError
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
    opened,
    steps_after,
)
from tests.memory.s3_server import FAULTS, Fault, Request, S3Server

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")


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
