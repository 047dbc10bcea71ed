"""Something stands in the folder of a memory that is not of the kind that its name says."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch import memory
from htm_pytorch.memory import MemoryFileError, place
from htm_pytorch.memory.place import MARKER, misplaced
from tests.memory.on_disk import DIM, steps_from

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.name != "posix", reason="links and pipes are those of POSIX"),
]

SECONDS = 20
"""For all that is done with one memory: to read a pipe would not end."""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def file(path: Path) -> None:
    path.write_bytes(b"other")


def is_steps(part: Path) -> bool:
    """Whether steps are in it that are nowhere else."""
    return part.parts[0] == "tails" or part.suffix == ".lance"


MOST_LOST = {"tails": 3, "chunks.lance": 40}
KINDS = (Path.mkdir, file, pipe, link_to_nothing, link_to_itself)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory that has everything: 40 steps in its table, 3 in a tail."""
    path = tmp_path_factory.mktemp("misplaced") / "memory"
    with memory.open(path, dim=DIM, chunk_size=4, sync=False) as made:
        made.append(steps_from(0, 40)).flush()
        made.append(steps_from(40, 3))
    (path / "set-aside").mkdir()
    return path


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def parts(folder: Path) -> list[Path]:
    """Return what there is in the folder, by the way there from it: one of those alike."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    alike = {(path.parent, path.suffix or path.name): path for path in paths}
    return list(alike.values())


def contents(folder: Path) -> list[bytes]:
    """Return what is in all files below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.read_bytes() for path in paths)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_says_so_and_is_repaired(made: Path, tmp_path: Path, kind: Callable[[Path], None]) -> None:
    for part in parts(made):
        signal.alarm(SECONDS)
        copy = tmp_path / "copy"
        shutil.copytree(made, copy)
        wrong, is_folder = copy / part, (copy / part).is_dir()
        if kind is (Path.mkdir if is_folder else file):
            shutil.rmtree(copy)
            continue
        if is_folder:
            shutil.rmtree(wrong)
        else:
            wrong.unlink()
        kind(wrong)
        before = contents(copy)
        if part.name in ("lock", "set-aside"):
            # A writer needs it; nothing is read of it.
            for call in (memory.open, memory.repair):
                with pytest.raises(MemoryFileError, match=f"{wrong}.*move it away"):
                    call(copy)
            assert contents(copy) == before
            shutil.move(wrong, tmp_path / f"{part.name}-{kind.__name__}")
        elif part.name != MARKER:
            assert [one.path for one in misplaced(copy)] == [wrong]
            for read_only in (True, False):
                with pytest.raises(MemoryFileError, match=f"{wrong}.*htm memory repair"):
                    memory.open(copy, read_only=read_only)
            assert contents(copy) == before
        report = memory.repair(copy)
        if misplaced_before := part.name not in ("lock", "set-aside", MARKER):
            assert re.match(f"'{wrong}' is .*; expected", report.problems[0])
            # It was moved, and nothing was deleted.
            assert any(os.path.lexists(aside / part) for aside in (copy / "set-aside").iterdir())
            assert set(before) <= set(contents(copy))
        lost = dict(report.lost)
        missing = sum(end - start for start, end in lost.items())
        # At most what stood in its place; a table keeps copies of all but its steps.
        assert missing <= MOST_LOST.get(part.parts[0], 0)
        assert missing == 0 or part.name in ("tails", "data", "chunks.lance") or is_steps(part)
        assert misplaced_before or not report.problems
        with memory.open(copy, read_only=True) as found:
            assert found.verify() == []
            begins = [0, *lost.values()]
            for begin, end in zip(begins, [*lost, found.next_step], strict=True):
                assert torch.equal(found.read(begin, end), steps_from(begin, end - begin))
        shutil.rmtree(copy)


def test_what_may_be_there_is_not_refused(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    for folder in (copy, *(path for path in copy.rglob("*") if path.is_dir())):
        (folder / ".DS_Store").touch()
        (folder / ".nfs0001").touch()
        (folder / "@eaDir").mkdir()
    linked = tmp_path / "linked"
    shutil.copytree(made, linked)
    for path in sorted(linked.rglob("*")):
        if path.is_file() and path.name != "lock":
            path.unlink()
            path.symlink_to(made / path.relative_to(linked))
    for folder in (copy, linked):
        assert misplaced(folder) == []
        with memory.open(folder, read_only=True) as found:
            assert found.steps == 43
    (linked / "lock").unlink()
    (linked / "lock").symlink_to(made / "lock")
    memory.open(linked, read_only=True).close()
    with pytest.raises(MemoryFileError, match="lock.*is a link; expected a file; move it away"):
        memory.open(linked)


def test_what_a_writer_is_just_making_is_not_taken_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memory"
    memory.open(path, dim=DIM, chunk_size=4, sync=False).close()
    looks = 0
    looked_at = place._looked_at

    def look(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 3:
            with memory.open(path, sync=False) as writer:
                writer.append(steps_from(0, 42)).flush()
        return looked_at(*arguments)

    monkeypatch.setattr(place, "_looked_at", look)
    assert misplaced(path) == []
    with memory.open(path, read_only=True) as found:
        assert found.steps == 42


def test_many_memories_say_a_way_out_that_there_is(tmp_path: Path) -> None:
    path = tmp_path / "many"
    with memory.open_many(path, dim=DIM, sync=False) as many:
        many.open("one").append(steps_from(0, 5))
    (path / "journal-journal").mkdir()
    with pytest.raises(MemoryFileError, match="journal-journal.*htm memory repair"):
        memory.open_many(path)
    assert "journal-journal" in memory.repair(path).problems[0]
    with memory.open_many(path, read_only=True) as many:
        assert many["one"].steps == 5


@pytest.mark.parametrize("kind", [file, pipe, link_to_nothing], ids=lambda kind: kind.__name__)
def test_a_repair_needs_a_place_of_its_own(
    made: Path, tmp_path: Path, kind: Callable[[Path], None]
) -> None:
    signal.alarm(SECONDS)
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    kind(copy / ".repaired")
    with pytest.raises(MemoryFileError, match=r"\.repaired.*expected a folder; move it away"):
        memory.repair(copy)
    with memory.open(copy) as found:
        assert found.steps == 43
