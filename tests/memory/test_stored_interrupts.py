"""Ctrl-C at any place of our code: a call has happened or has not, and the memory goes on."""

import dis
import gc
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError, StoredMemory, lance_access, stored, versions
from htm_pytorch.memory.cache import ChunkCache
from htm_pytorch.memory.formats import Format
from htm_pytorch.memory.many import open_many
from tests.memory.on_disk import DIM, SIZE, beginning, elsewhere, look, make, steps_from
from tests.memory.plain_memory import Plain, assert_shows, expected_of, shown_by

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # A file that was opened when Ctrl-C came is closed later.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

WATCHED = str(Path(memory.__file__).parent), "contextlib.py"
CHECKS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME", "JUMP_BACKWARD"}
"""Python looks for signals behind these."""


class Interrupt:
    """Raises KeyboardInterrupt where Python may see a signal, at the place after `count` others."""

    def __init__(self, count: int):
        self.left = count
        self.error: KeyboardInterrupt | None = None
        """Kept, as Python does at a prompt: what its frames hold is held on to."""
        self._may: dict[CodeType, set[int]] = {}

    def __call__(self, call: Callable[[], Any]) -> bool:
        """Whether it came before the call was at its end."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        except KeyboardInterrupt as error:
            self.error = error
            return True
        finally:
            sys.settrace(before)
        return False

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not (code.co_filename.startswith(WATCHED[0]) or code.co_filename.endswith(WATCHED[1])):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in self._places(code):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self._trace

    def _places(self, code: CodeType) -> set[int]:
        if code not in self._may:
            found = list(dis.get_instructions(code))
            # Behind a jump is where it leads.
            self._may[code] = {
                at.argval if at.opname == "JUMP_BACKWARD" else after.offset
                for at, after in zip(found, found[1:], strict=False)
                if at.opname in CHECKS
            }
        return self._may[code]


def plain_past(steps: int) -> Plain:
    values = steps_from(0, steps)[0].tolist()
    begins = [number == 13 for number in range(steps)]
    return Plain(SIZE).append(values, begins, [1.0] * steps, [None] * steps)


def past(path: Path) -> Plain:
    """Make a memory with chunks in the table, in the log, and an open one."""
    with make(path) as held:
        held.append(steps_from(0, 13), times=1.0).flush()
        held.append(steps_from(13, 9), beginning(9), times=1.0).flush()
        held.append(steps_from(22, 5), times=1.0)
    return plain_past(27)


def append_behind_another_tail(held: StoredMemory) -> None:
    log: Any = held._log
    log._doubtful = log._tail.path.name
    held.append(steps_from(27, 2), times=1.0)


CALLS: dict[str, Callable[[StoredMemory], Any]] = {
    "append": lambda held: held.append(steps_from(27, 2), times=1.0),
    "append behind another tail": append_behind_another_tail,
    "append to the table": lambda held: held.append(steps_from(27, 12), times=1.0),
    "flush": lambda held: held.flush(),
    "forget": lambda held: held.forget(before_step=6),
    "reset": lambda held: held.reset(torch.tensor([True])),
    "compact": lambda held: held.forget(before_step=6).compact(),
    "build_index": lambda held: held.build_index(),
    "verify": lambda held: held.verify(),
    "fetch": lambda held: held.fetch(torch.tensor([5, 0])),
    "read": lambda held: held.read(3, 26),
}
AFTER: dict[str, Plain] = {
    "append": plain_past(29),
    "append behind another tail": plain_past(29),
    "append to the table": plain_past(39),
    "forget": plain_past(27).without(lambda step: step.number < 6),
    "reset": Plain(SIZE),
    "compact": plain_past(27).without(lambda step: step.number < 6),
}


def interrupt(folder: Path, name: str, count: int) -> bool:
    """Interrupt a call at a place; return whether there is one of that number."""
    path = folder / "m"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / "first", path)
    before = plain_past(27)
    possible = [before, AFTER.get(name, before)]
    held = make(path)
    one = Interrupt(count)
    came = one(lambda: CALLS[name](held))
    shown = elsewhere(lambda: shown_by(held))
    right = [plain for plain in possible if expected_of(plain) == shown]
    assert right, f"{name}, {count}: {shown}"
    (now,) = right[-1:]
    values = steps_from(now.next_step, 9)
    elsewhere(lambda: held.append(values, times=1.0))
    del one
    now = now.append(values[0].tolist(), [False] * 9, [1.0] * 9, [None] * 9)
    assert_shows(held, now)
    held.close()
    with look(path) as reader:
        assert_shows(reader, now)
        assert reader.verify() == []
    return came


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(stored, "GROUP_BYTES", 3 * SIZE * 6 * 4)
    monkeypatch.setattr(versions, "MOST_SMALL", 2)
    past(tmp_path / "first")
    yield tmp_path
    gc.collect()


@pytest.mark.parametrize("name", CALLS)
def test_interrupted_at_some_places(small: Path, name: str) -> None:
    counter = Interrupt(10**9)
    shutil.copytree(small / "first", small / "m")
    with make(small / "m") as held:
        counter(lambda: CALLS[name](held))
    places = 10**9 - counter.left
    for count in random.Random(0).sample(range(places), min(places, 12)):
        interrupt(small, name, count)


@pytest.mark.parametrize("slots", [1, 3])
def test_the_cache_is_interrupted_at_every_place(slots: int) -> None:
    """No chunk is ever given for another one, and what is fetched next finds room."""
    steps = torch.arange(6 * SIZE * DIM, dtype=torch.float32).view(6, SIZE, DIM)
    count, came = 0, True
    while came:
        cache = ChunkCache(Format(DIM, SIZE, torch.float32), slots)

        def write(*numbers: int, cache: ChunkCache = cache) -> None:
            cache.write(list(numbers), steps[list(numbers)])

        def fill(write: Callable[..., None] = write) -> None:
            write(0, 1)
            write(2, 3)

        came = Interrupt(count)(fill)
        count += 1
        write(4)
        write(5, 1)
        found = torch.empty_like(steps)
        missing = cache.read(list(range(6)), found)
        for number in set(range(6)) - set(missing):
            assert torch.equal(found[number], steps[number])
        assert 1 not in missing
    assert count > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_interrupted_at_every_place(small: Path, name: str) -> None:
    count = 0
    while interrupt(small, name, count):
        count += 1
    assert count > 20
    print(f"{name}: {count} places")


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_joint_append_is_interrupted(tmp_path: Path, stride: int) -> None:
    """All rows have the steps, or none has."""
    with open_many(tmp_path / "m", dim=DIM, chunk_size=SIZE, sync=False) as many:
        names, steps = ["a", "b"], steps_from(0, 3).expand(2, -1, -1)
        many.append(names, steps)
        count, came, held = 0, True, 3
        while came:
            one = Interrupt(count)
            came = one(lambda: many.append(names, steps))
            there = elsewhere(lambda: [many[name].steps for name in names])
            assert there in ([held] * 2, [held + 3] * 2)
            held = there[0]
            again = open_many(tmp_path / "m", read_only=True)
            assert [again[name].steps for name in names] == there
            again.close()
            elsewhere(lambda: many.append(names, steps))
            held += 3
            count += stride
        assert count > 20
        assert torch.equal(many["b"].read(0, held), steps[:1].repeat(1, held // 3, 1))


@pytest.mark.parametrize("name", ["reading", "writing"])
def test_an_interrupt_that_the_engine_made_an_error_is_one(name: str) -> None:
    """Not a damaged file."""
    place = getattr(lance_access, name)
    with pytest.raises(KeyboardInterrupt), place("rows"):
        raise ValueError("External error: KeyboardInterrupt: ")
    with pytest.raises((MemoryFileError, OSError)), place("rows"):
        raise ValueError("External error: something else")
