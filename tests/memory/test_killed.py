"""A memory on disk beside processes that are killed, interrupted or without room, at any moment."""

import contextlib
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch.memory import StoredMemory, folder_log, stored, versions
from tests.memory.on_disk import DIM, SIZE, child, look, make, steps_from
from tests.memory.plain_memory import Plain, assert_shows, expected_of, shown_by

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

EPISODE = 3 * SIZE + 1
"""Steps in each."""


def append(held: StoredMemory, count: int) -> None:
    """Store the next steps, whose values, keys, times and episodes say which they are."""
    numbers = torch.arange(held.next_step, held.next_step + count)
    keys = [f"key {n}" if n % 3 else None for n in numbers.tolist()]
    values = steps_from(held.next_step, count)
    held.append(values, numbers[None] % EPISODE == 0, keys=keys, times=numbers.double())


def plain_past(steps: int, forgotten: int = 0) -> Plain:
    numbers = range(steps)
    plain = Plain(SIZE).append(
        steps_from(0, steps)[0].tolist(),
        [n % EPISODE == 0 for n in numbers],
        [float(n) for n in numbers],
        [f"key {n}" if n % 3 else None for n in numbers],
    )
    return plain.without(lambda step: step.number < forgotten)


def make_small() -> None:
    """Let the table have many versions, and the log many tails, in this process."""
    folder_log.FULL, folder_log.WORN = 12_000, 6_000
    stored.GROUP_BYTES = 20 * SIZE * DIM * 4
    versions.MOST_SMALL = 4


# The end of the process.


def change_until_killed(path: Path, pipe: Connection, seed: int) -> None:
    """Do anything, and say before and after what has happened."""
    make_small()
    draw = random.Random(seed)
    held = make(path)
    pipe.send(("opened", 0))
    while True:
        calls = "append", "flush", "compact", "forget", "build_index"
        (call,) = draw.choices(calls, [20, 4, 2, 2, 1])
        if call == "append":
            append(held, draw.choice([1, 1, 2, 3, 7, 50, 120]))
            pipe.send(("stored", held.next_step))
        elif call == "forget":
            # Not in the open chunk, which would then be closed later.
            bound = max(held.next_step - SIZE - draw.randrange(200), 0)
            pipe.send(("may have forgotten", bound))
            held.forget(before_step=bound)
            pipe.send(("forgot", bound))
        else:
            getattr(held, call)()


def heard(pipe: Connection) -> list[tuple[str, int]]:
    """What a process that was killed has said until then."""
    words = []
    with contextlib.suppress(EOFError):
        while True:
            words.append(pipe.recv())
    return words


def kill_at_random(path: Path, moments: int, seed: int) -> None:
    make(path).close()
    steps, forgotten, words = 0, 0, set()
    draw = random.Random(seed)
    for moment in range(moments):
        with child(change_until_killed, path, 1000 * seed + moment) as (process, pipe):
            assert pipe.recv() == ("opened", 0)
            said = [pipe.recv() for _ in range(draw.randrange(40))]
            time.sleep(0.02 * draw.random())
            process.kill()
            said += heard(pipe)
        steps = max([steps, *(number for word, number in said if word == "stored")])
        bounds = [number for word, number in said if word == "forgot"]
        forgotten = max([forgotten, *bounds])
        if said and said[-1][0] == "may have forgotten":
            bounds.append(said[-1][1])
        words |= {word for word, _ in said}
        with look(path) as reader:
            assert reader.next_step >= steps
            steps = reader.next_step
            shown = shown_by(reader)
            if shown != expected_of(plain_past(steps, forgotten)):
                forgotten = max([forgotten, *bounds])
            plain = plain_past(steps, forgotten)
            assert_shows(reader, plain)
            assert reader.verify() == []
        with make(path) as writer:
            assert_shows(writer, plain)
            assert writer.verify() == []
            append(writer, 5)
        steps += 5
    assert {"stored", "forgot"} <= words


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "m", 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_nothing_is_lost_when_processes_are_killed_200_times(tmp_path: Path, seed: int) -> None:
    kill_at_random(tmp_path / "m", 20, seed)


# Ctrl-C.


EVERY = {"append": 8, "flush": 2, "verify": 1, "refresh": 3, "read": 2, "fetch": 2, "compact": 1}
SHORT = {"append": 2, "refresh": 8, "read": 1}
"""Calls by how often they are made: all, and those that take no longer than a millisecond."""
Appended = tuple[int, int, bool]
"""The value of the first step of a call, how many there were, whether it was acknowledged."""


class Interrupted:
    """Calls of a memory, each of which Ctrl-C may end."""

    def __init__(self, path: Path, calls: dict[str, int], seed: int):
        self.calls = calls
        self.held, self.reader = make(path), look(path)
        self.draw = random.Random(seed)
        self.appended: list[Appended] = []
        self.caught = 0
        self.is_armed = False
        signal.signal(signal.SIGINT, self._strike)

    def call(self) -> None:
        (name,) = self.draw.choices(list(self.calls), list(self.calls.values()))
        first = sum(count for _, count, _ in self.appended)
        count = self.draw.choice([1, 2, 3, 7, 50])
        if name == "append":
            self.appended.append((first, count, False))
        try:
            self.is_armed = True
            found = getattr(self, f"_{name}")(first, count)
            self.is_armed = False
        except KeyboardInterrupt:
            self.caught += 1
            return
        assert found in (None, []), found
        if name == "append":
            self.appended[-1] = first, count, True

    def _strike(self, *_: Any) -> None:
        if self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt

    def _append(self, first: int, count: int) -> None:
        self.held.append(steps_from(first, count))

    def _flush(self, *_: int) -> None:
        self.held.flush()

    def _compact(self, *_: int) -> None:
        self.held.compact()

    def _verify(self, *_: int) -> list[str]:
        return self.draw.choice([self.held, self.reader]).verify()

    def _refresh(self, *_: int) -> None:
        self.reader.refresh()

    def _read(self, *_: int) -> None:
        self.held.read(0, self.held.next_step)

    def _fetch(self, *_: int) -> None:
        for held in (self.held, self.reader):
            held.fetch(torch.arange(held.chunks))


def go_on_when_interrupted(
    path: Path, pipe: Connection, calls: dict[str, int], times: int, seed: int
) -> None:
    try:
        make_small()
        run = Interrupted(path, calls, seed)
        pipe.send("ready")
        while run.caught < times:
            run.call()
        held = run.held
        pipe.send((run.appended, values_of(held), held.verify()))
        # Until nobody interrupts any more.
        pipe.recv()
        held.close()
        pipe.send("closed")
    except BaseException:
        pipe.send(traceback.format_exc())


def values_of(held: StoredMemory) -> list[float]:
    every = held.read(0, held.next_step)[0]
    assert torch.equal(every - every[:, :1], steps_from(0, 1)[0].expand(every.shape))
    fetched = held.fetch(torch.arange(held.chunks)).contents[0].flatten(0, 1)
    assert torch.equal(fetched, every[: len(fetched)])
    return every[:, 0].tolist()


def assert_whole_calls(values: list[float], appended: list[Appended]) -> None:
    """The steps of all acknowledged calls, in order, and perhaps those of others."""
    at = 0
    for first, count, is_acknowledged in appended:
        if is_acknowledged or values[at : at + 1] == [first]:
            assert values[at : at + count] == list(range(first, first + count))
            at += count
    assert at == len(values)


def interrupt_at_random(path: Path, calls: dict[str, int], times: int, seed: int) -> None:
    draw, pause = random.Random(seed), 0.02 if calls is EVERY else 0.002
    with child(go_on_when_interrupted, path, calls, times, seed) as (process, pipe):
        assert pipe.recv() == "ready"
        while not pipe.poll(pause * draw.random()):
            os.kill(process.pid, signal.SIGINT)
        said = pipe.recv()
        assert isinstance(said, tuple), said
        appended, values, problems = said
        pipe.send("no more")
        assert pipe.recv() == "closed"
    assert problems == []
    assert_whole_calls(values, appended)
    for reopened in (look(path), make(path)):
        with reopened as held:
            assert values_of(held) == values
            assert held.verify() == []


@pytest.mark.parametrize(("calls", "times"), [(EVERY, 12), (SHORT, 100)], ids=["any", "short"])
def test_a_call_that_ctrl_c_ends_has_happened_or_has_not(
    tmp_path: Path, calls: dict[str, int], times: int
) -> None:
    interrupt_at_random(tmp_path / "m", calls, times, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("calls", "times"), [(EVERY, 50), (SHORT, 1000)], ids=["any", "short"])
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_memory_goes_on_after_ctrl_c_again_and_again(
    tmp_path: Path, calls: dict[str, int], times: int, seed: int
) -> None:
    interrupt_at_random(tmp_path / "m", calls, times, seed)


# No room on the disk.


CALLS: dict[str, Callable[[StoredMemory], Any]] = {
    "append": lambda held: append(held, 3),
    "append to the table": lambda held: append(held, 150),
    "flush": lambda held: held.flush(),
    "forget": lambda held: held.forget(before_step=held.next_step // 3),
    "compact": lambda held: held.compact(),
    "build_index": lambda held: held.build_index(),
}


def call_without_room(path: Path, pipe: Connection, name: str, limits: list[int]) -> None:
    """Call it with so little room, time and again, and then with enough."""
    try:
        make_small()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        held = make(path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        for limit in limits:
            steps, shown = held.next_step, shown_by(held)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                CALLS[name](held)
                said = "enough room"
            except OSError:
                said = "OSError"
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            if said == "OSError":
                assert held.next_step == steps
                assert shown_by(held) == shown
            with look(path) as reader:
                assert shown_by(reader) == shown_by(held)
                assert reader.verify() == held.verify() == []
            pipe.send(said)
        CALLS[name](held)
        append(held, 9)
        held.close()
        pipe.send(held.next_step)
    except BaseException:
        pipe.send(traceback.format_exc())


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_room_on_the_disk_changes_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m"
    with make(path) as held:
        for _ in range(3):
            append(held, 40)
            held.flush()
        append(held, 31)
        if name == "compact":
            held.forget(before_step=50)
    limits = [0, 600, 4096, 12_000]
    with child(call_without_room, path, name, limits) as (_, pipe):
        said = [pipe.recv() for _ in range(len(limits) + 1)]
    assert set(said[:-1]) <= {"OSError", "enough room"}, said
    assert said[:2] == ["OSError"] * 2
    assert isinstance(said[-1], int), said[-1]
    bound = {"compact": 50, "forget": None}.get(name, 0)
    with make(path) as held:
        assert held.next_step == said[-1]
        if bound is None:
            bound = int(held.spans(torch.tensor([0]))[0].first_step)
        assert_shows(held, plain_past(said[-1], bound))
        assert held.verify() == []
