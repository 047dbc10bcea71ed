"""A loss of power at any moment loses nothing that was acknowledged."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("lance", reason="the extra `store` is not installed")

from htm_pytorch import memory
from htm_pytorch.memory import StoredMemory
from tests.memory.crash_states import (
    SIZE,
    SMALL,
    Crash,
    Past,
    add,
    crash,
    key,
    open_for_writing,
    pasts,
    recorded,
    values,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def why_not() -> str | None:
    """Return why nothing can be traced here."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    return f"strace may not trace ({tried.stderr.strip()[:200]})" if tried.returncode else None


def lay_out(state: Crash, folder: Path) -> Path:
    """Make such a disk in a folder."""
    folder.mkdir()
    for name in sorted(state.files):
        data = state.files[name]
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder


def holds(held: StoredMemory, past: Past) -> bool:
    """Whether exactly these steps are there, with the right values."""
    numbers = [step.number for step in past.steps]
    if (held.next_step, held.steps) != (past.next_step, len(numbers)):
        return False
    starts = [i for i, number in enumerate(numbers) if not i or numbers[i - 1] != number - 1]
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=False):
        try:
            found = held.read(numbers[start], numbers[end - 1] + 1)[0]
        except ValueError as error:
            if "first, last" not in str(error):
                raise
            return False
        if not torch.equal(found, values([step.serial for step in past.steps[start:end]])):
            return False
    return True


def closed(held: StoredMemory) -> list[tuple[int, str | None, int]]:
    """Return number, key and episode of all steps in closed chunks."""
    spans = held.spans(torch.arange(held.chunks))
    return [
        (span.first_step + i, span.keys[i], span.episode)
        for span in spans
        for i in range(span.count)
    ]


def wrong(state: Crash, script: int, folder: Path) -> list[str]:
    """Return what is wrong with a memory that finds itself on such a disk."""
    known = pasts(script)
    allowed = known[state.acknowledged : state.acknowledged + 2]
    place = lay_out(state, folder) / "m"
    found = []
    try:
        with open_for_writing(place, sync=False) as held:
            past = next((past for past in allowed if holds(held, past)), None)
            if past is None:
                steps = f"{held.next_step}, {held.steps} steps"
                return [f"holds {steps}, expected {[(p.next_step, len(p.steps)) for p in allowed]}"]
            found += held.verify()
            add(held, past.appended, SIZE + 1, (0, SIZE))
            add(held, past.appended + SIZE + 1, 1, (0,))
        past = past.after("append", (SIZE + 1, (0, SIZE))).after("append", (1, (0,)))
        with open_for_writing(place, sync=False) as held:
            if not holds(held, past):
                found.append(f"opened again, it holds {held.next_step}, {held.steps} steps")
            found += held.verify()
            # The last step is in the open chunk, of which nobody tells the key.
            expected = [(s.number, key(s.serial), s.episode) for s in past.steps[:-1]]
            if closed(held) != expected:
                found.append(f"keys or episodes: {closed(held)}, expected {expected}")
            if held.info()["forgotten and still in files"]:
                held.compact()
                there = [path for path in place.rglob("*") if path.is_file()]
                there = [path for path in there if path.parent.name != "set-aside"]
                files = {str(path.relative_to(place)): path.read_bytes() for path in there}
                found += left_over(files, past.gone) + held.verify()
                if not holds(held, past):
                    found.append(f"compacted, it holds {held.next_step}, {held.steps} steps")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def wrong_to_read(state: Crash, script: int, folder: Path) -> list[str]:
    """Return what is wrong with a memory that is first opened for reading."""
    known = pasts(script)
    allowed = known[state.acknowledged : state.acknowledged + 2]
    try:
        held = memory.open(lay_out(state, folder) / "m", read_only=True, cache_bytes=2**12)
        found = held.verify()
        is_right = any(holds(held, past) for past in allowed)
        held.close()
    except FileNotFoundError as error:
        return [] if not state.acknowledged else [f"read: {error}"]
    except Exception as error:
        return [f"read: {type(error).__name__}: {error}"]
    return found + ([] if is_right else [f"read: it holds {held.next_step}, {held.steps} steps"])


def left_over(files: dict[str, bytes | None], serials: frozenset[int]) -> list[str]:
    """Return in which files there is anything of some steps."""
    parts = [key(serial).encode() for serial in serials]
    parts += [row.numpy().tobytes() for row in values(sorted(serials))]
    return [
        f"forgotten steps are in {name}"
        for name, data in files.items()
        if data is not None and any(part in data for part in parts)
    ]


def states(script: int, numbers: Sequence[int]) -> Iterator[tuple[int, Crash]]:
    """Yield those that are not the same as others before them."""
    trace, before = recorded(script), set()
    for number in numbers:
        state = crash(trace, script, number)
        same = hash((state.acknowledged, frozenset(state.files.items())))
        if same not in before:
            before.add(same)
            yield number, state


def explore(script: int, numbers: Sequence[int]) -> tuple[int, list[str]]:
    """Return how many different states were opened, and what is wrong with them."""
    opened, found = 0, []
    with tempfile.TemporaryDirectory(prefix="htm-crash-") as folder:
        for number, state in states(script, numbers):
            here = Path(folder, str(number))
            told = wrong(state, script, here)
            shutil.rmtree(here)
            if number % 5 == 0:
                told += wrong_to_read(state, script, here)
                shutil.rmtree(here)
            opened += 1
            found += [f"{state.told}: {text}" for text in told]
    return opened, found


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    for bound in SMALL:
        monkeypatch.setattr(*bound)


@pytest.mark.usefixtures("traced")
def test_a_loss_of_power_loses_nothing_that_was_acknowledged() -> None:
    opened, told = explore(1, range(60))
    assert opened >= 45
    assert told == []


@pytest.mark.usefixtures("traced")
def test_what_was_compacted_away_does_not_come_back() -> None:
    found = []
    for _, state in states(1, range(1000, 1300)):
        found += left_over(state.files, pasts(1)[state.acknowledged].purged)
    assert found == []


def test_an_empty_manifest_where_no_version_counts_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in SMALL:
        monkeypatch.setattr(*bound)
    held = open_for_writing(tmp_path / "m", sync=False)
    versions = tmp_path / "m" / "chunks.lance" / "_versions"
    versions.mkdir(parents=True)
    (versions / f"{2**64 - 2:020d}.manifest").touch()
    add(held, 0, 40, ())
    assert held.verify() == []
    held.close()


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("script", range(8))
def test_a_loss_of_power_loses_nothing_in_thousands_of_states(script: int) -> None:
    opened, told = explore(script, range(1000, 1500))
    assert opened >= 250
    assert told == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    for bound in SMALL:
        setattr(*bound)
    script, first, last = (int(argument) for argument in sys.argv[1:])
    opened, told = explore(script, range(first, last))
    print(f"{opened} states opened, {len(told)} wrong", *told, sep="\n")
