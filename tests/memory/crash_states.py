"""States that a loss of power may leave, made of the file operations that a writer was seen to do.

`python -m tests.memory.test_crash_states SCRIPT FIRST LAST` opens states of one script and prints
what is wrong. Two models of a disk:

ordered  names change in the order of the calls, folder by folder; a file that was waited for has
         its name, and all names before that in its folder (as ext4 does it)
loose    of the changes of names that nobody has waited for at their folder, any may be missing,
         and of a rename either half

In both, of what was written to a file since somebody waited for it, each part may be there, or
missing, or half there, or zeros.
"""

import functools
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch import memory
from htm_pytorch.memory import StoredMemory, folder_log, stored, versions

ROOT = Path(__file__).parents[2]
CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,rename,renameat,"
    "renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,fallocate,close,dup,dup2,dup3,"
    "copy_file_range,sendfile,link,linkat,symlink,symlinkat,lseek,mmap,io_uring_setup"
)
MODES = ("random", "random", "random", "random", "missing", "there", "names only", "data only")


class Write(NamedTuple):
    """Of bytes at a place of a file; where there is no offset, it is cut to `size`."""

    file: int
    offset: int | None
    data: bytes
    size: int = 0


class Names(NamedTuple):
    """Changes of names at once: (folder, name, file or None)."""

    changes: tuple[tuple[int, str, int | None], ...]


class Sync(NamedTuple):
    """Somebody has waited for a file or folder; operations before `since` are on the disk."""

    file: int
    since: int


class Ack(NamedTuple):
    """So many calls have returned."""

    count: int


Operation = Write | Names | Sync | Ack


class Trace(NamedTuple):
    operations: tuple[Operation, ...]
    folders: frozenset[int]


class _Open:
    def __init__(self, file: int, appends: bool):
        self.file, self.appends, self.at = file, appends, 0


def _text(quoted: str) -> bytes:
    return bytes.fromhex(quoted.replace("\\x", ""))


def _whole(lines: Sequence[str]) -> Iterator[tuple[bool, str, str, str]]:
    """Yield (whether it begins, thread, name, arguments and answer); the beginning comes first."""
    begun: dict[str, str] = {}
    for line in lines:
        thread, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.startswith(("+++", "---")):
            continue
        if rest.startswith("<..."):
            rest = begun.pop(thread) + rest.partition("resumed>")[2]
        else:
            yield True, thread, *rest.partition("(")[::2]
            if rest.endswith("<unfinished ...>"):
                begun[thread] = rest.removesuffix("<unfinished ...>")
                continue
        yield False, thread, *rest.partition("(")[::2]


_PATH = re.compile(r'(AT_FDCWD|\d+)?(?:<([^>]*)>)?(?:, )?"((?:\\x..)*)"')
_ANSWER = re.compile(r"\)\s+= (-?\d+)(.*)$")


class _Reader:
    """Makes operations on the files under a folder of the lines of `strace`."""

    def __init__(self, top: Path, acks: Path):
        self.top, self.acks = os.fsencode(top), os.fsencode(acks)
        self.operations: list[Operation] = []
        self.names: dict[int, dict[str, int]] = {0: {}}
        self.sizes: dict[int, int] = {}
        self.open: dict[int, _Open] = {}
        self.last = 0

    def place(self, path: bytes) -> tuple[int, str] | None:
        """Return the folder and the name of a path; None where it is elsewhere."""
        if path == self.top:
            return 0, ""
        if not path.startswith(self.top + b"/"):
            return None
        *folders, name = os.fsdecode(path[len(self.top) + 1 :]).split("/")
        at = 0
        for folder in folders:
            at = self.names[at][folder]
        return at, name

    def new(self, folder: int, name: str, is_folder: bool) -> int:
        self.last += 1
        if is_folder:
            self.names[self.last] = {}
        else:
            self.sizes[self.last] = 0
        self.rename(((folder, name, self.last),))
        return self.last

    def rename(self, changes: tuple[tuple[int, str, int | None], ...]) -> None:
        for folder, name, file in changes:
            if file is None:
                del self.names[folder][name]
            else:
                self.names[folder][name] = file
        self.operations.append(Names(changes))

    def write(self, file: int, offset: int, data: bytes) -> None:
        self.operations.append(Write(file, offset, data))
        self.sizes[file] = max(self.sizes[file], offset + len(data))

    def cut(self, file: int, size: int) -> None:
        self.operations.append(Write(file, None, b"", size))
        self.sizes[file] = size

    def read(self, lines: Sequence[str]) -> Trace:
        since: dict[str, int] = {}
        for begins, thread, name, rest in _whole(lines):
            if begins:
                since[thread] = len(self.operations)
                if name == "close":
                    self.open.pop(int(re.match(r"\d+", rest)[0]), None)  # type: ignore[index]
                continue
            answer = _ANSWER.search(rest)
            if answer is None or int(answer[1]) < 0 or name == "close":
                continue
            if self.acks.hex() in rest.replace("\\x", ""):
                if name == "write":
                    said = _text(re.findall(r'"([^"]*)"', rest)[0])
                    self.operations.append(Ack(int(said.split()[0])))
                continue
            self.take(name, rest, int(answer[1]), since[thread])
        return Trace(tuple(self.operations), frozenset(self.names))

    def paths(self, rest: str) -> list[bytes]:
        found = []
        for _, folder, path in _PATH.findall(rest):
            found.append(os.path.normpath(os.path.join(_text(folder), _text(path))))
        return found

    def take(self, name: str, rest: str, answer: int, since: int) -> None:
        number = re.match(r"\d+", rest)
        held = self.open.get(int(number[0])) if number else None
        if name in ("openat", "open", "creat"):
            self.take_open(self.paths(rest)[0], rest, answer)
        elif name in ("mkdir", "mkdirat"):
            place = self.place(self.paths(rest)[0])
            if place is not None:
                self.new(*place, is_folder=True)
        elif name in ("unlink", "unlinkat", "rmdir"):
            place = self.place(self.paths(rest)[0])
            if place is not None:
                self.rename(((*place, None),))
        elif name in ("rename", "renameat", "renameat2", "link", "linkat"):
            old, new = (self.place(path) for path in self.paths(rest))
            assert (old is None) == (new is None), f"{name} from or to another folder"
            if old is not None and new is not None:
                file = self.names[old[0]][old[1]]
                gone = ((*old, None),) if name.startswith("rename") else ()
                self.rename((*gone, (*new, file)))
        elif name in ("fsync", "fdatasync") and held:
            self.operations.append(Sync(held.file, since))
        elif name == "ftruncate" and held:
            self.cut(held.file, int(re.search(r", (\d+)\s*\)", rest)[1]))  # type: ignore[index]
        elif name == "write" and held:
            data = _text(re.findall(r'"([^"]*)"', rest)[0])[:answer]
            held.at = self.sizes[held.file] if held.appends else held.at
            self.write(held.file, held.at, data)
            held.at += answer
        elif name == "pwrite64" and held:
            offset = int(re.search(r", (\d+)\s*\)\s+=", rest)[1])  # type: ignore[index]
            self.write(held.file, offset, _text(re.findall(r'"([^"]*)"', rest)[0])[:answer])
        elif name == "lseek" and held:
            held.at = answer
        elif name == "mmap":
            is_shared = "MAP_SHARED" in rest and "PROT_WRITE" in rest
            assert not (is_shared and self.top.hex() in rest.replace("\\x", "")), "mapped"
        elif held or name in ("truncate", "io_uring_setup"):
            raise AssertionError(f"{name}: not known here")

    def take_open(self, path: bytes, rest: str, answer: int) -> None:
        self.open.pop(answer, None)
        place = self.place(path)
        if place is None:
            return
        file = self.names[place[0]].get(place[1]) if place[1] else 0
        if file is None:
            file = self.new(*place, is_folder=False)
        elif "O_TRUNC" in rest and self.sizes[file]:
            self.cut(file, 0)
        self.open[answer] = _Open(file, "O_APPEND" in rest)


@functools.cache
def recorded(script: int) -> Trace:
    """Return what a writer does that runs a script."""
    with tempfile.TemporaryDirectory(prefix="htm-crash-") as folder:
        here = Path(folder).resolve()
        (here / "disk").mkdir()
        strace = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "10000000"]
        strace += ["-o", str(here / "lines"), "-e", f"trace={CALLS}"]
        child = [sys.executable, "-m", "tests.memory.crash_states", str(here), str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKIO_WORKER_THREADS": "2"}
        done = subprocess.run(
            [*strace, *child], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = (here / "lines").read_text().splitlines()
        trace = _Reader(here / "disk", here / "acks").read(lines)
        found = {str(path.relative_to(here / "disk")): path for path in here.glob("disk/**/*")}
        expected = whole(trace, len(trace.operations))
        there = {name: None if path.is_dir() else path.read_bytes() for name, path in found.items()}
        assert there == expected, "the trace does not tell everything"
        return trace


class Crash(NamedTuple):
    """What is on the disk after a loss of power: bytes of files, None for folders."""

    files: dict[str, bytes | None]
    acknowledged: int
    told: str
    """Where, and what was lost."""


def crash(trace: Trace, script: int, number: int) -> Crash:
    """Return the state of a number, of all that there may be."""
    draw = random.Random(f"{script} {number}")
    end = _moment(trace.operations, draw)
    model, mode = draw.choice(("ordered", "loose")), draw.choice(MODES)
    seen = trace.operations[:end]
    waited = {0: 0}
    for operation in seen:
        if isinstance(operation, Sync):
            waited[operation.file] = max(waited.get(operation.file, 0), operation.since)
    names = _names(trace, end, waited, model, mode, draw)
    contents = _contents(seen, waited, mode, draw)
    files = _files(trace, names, contents)
    acks = [operation.count for operation in seen if isinstance(operation, Ack)]
    told = f"script {script}, state {number}: {model}, {mode}, operation {end}"
    return Crash(files, max(acks, default=0), told)


def whole(trace: Trace, end: int) -> dict[str, bytes | None]:
    """Return what is there after so many operations, where nothing is lost."""
    draw = random.Random(0)
    names = _names(trace, end, {}, "ordered", "there", draw)
    return _files(trace, names, _contents(trace.operations[:end], {}, "there", draw))


def _files(
    trace: Trace, names: dict[int, dict[str, int]], contents: dict[int, bytearray]
) -> dict[str, bytes | None]:
    files: dict[str, bytes | None] = {}
    walk = [("", 0)]
    while walk:
        before, folder = walk.pop()
        for name, file in names[folder].items():
            is_folder = file in trace.folders
            files[before + name] = None if is_folder else bytes(contents.get(file, b""))
            if is_folder:
                walk.append((f"{before}{name}/", file))
    return files


def _moment(operations: Sequence[Operation], draw: random.Random) -> int:
    """Return a number of operations: of each call as often, and often about where names change."""
    ends = [i + 1 for i, operation in enumerate(operations) if isinstance(operation, Ack)]
    call = draw.randrange(len(ends))
    start = ends[call - 1] if call else 0
    changes = [i for i in range(start, ends[call]) if isinstance(operations[i], Names | Sync)]
    if changes and draw.random() < 0.5:
        return min(max(draw.choice(changes) + draw.randint(-1, 2), start), ends[call])
    return draw.randint(start, ends[call])


def _names(
    trace: Trace, end: int, waited: dict[int, int], model: str, mode: str, draw: random.Random
) -> dict[int, dict[str, int]]:
    seen = trace.operations[:end]
    sure = {folder: waited.get(folder, 0) for folder in trace.folders}
    if model == "ordered":
        for i, operation in reversed(list(enumerate(seen))):
            for folder, _, file in operation.changes if isinstance(operation, Names) else ():
                is_sure = file is not None and waited.get(file, 0) > i
                if is_sure or (file in sure and sure[file] > i):
                    sure[folder] = max(sure[folder], i + 1)
    upto = {
        folder: {"missing": low, "data only": low, "there": end, "names only": end}.get(
            mode, draw.randint(min(low, end), end)
        )
        for folder, low in sure.items()
    }
    names: dict[int, dict[str, int]] = {folder: {} for folder in trace.folders}
    for i, operation in enumerate(seen):
        for folder, name, file in operation.changes if isinstance(operation, Names) else ():
            if model == "loose" and mode == "random":
                is_there = i < sure[folder] or draw.random() < 0.5
            else:
                is_there = i < upto[folder]
            if is_there and file is None:
                names[folder].pop(name, None)
            elif is_there and file is not None:
                names[folder][name] = file
    return names


def _contents(
    seen: Sequence[Operation], waited: dict[int, int], mode: str, draw: random.Random
) -> dict[int, bytearray]:
    contents: dict[int, bytearray] = {}
    for i, operation in enumerate(seen):
        if not isinstance(operation, Write):
            continue
        data = contents.setdefault(operation.file, bytearray())
        fates = {"missing": ["missing"], "names only": ["missing"]}.get(mode, ["there"])
        if mode == "random":
            fates = ["there", "there", "missing", "half", "zeros"]
        fate = "there" if i < waited.get(operation.file, 0) else draw.choice(fates)
        if fate == "missing":
            continue
        if operation.offset is None:
            del data[operation.size :]
            data.extend(bytes(operation.size - len(data)))
            continue
        part = operation.data[: len(operation.data) // 2] if fate == "half" else operation.data
        part = bytes(len(part)) if fate == "zeros" else part
        stop = operation.offset + len(part)
        data.extend(bytes(max(0, stop - len(data))))
        data[operation.offset : stop] = part
    return contents


# What is written, and what must be there.

SIZE, DIM = 4, 3
SMALL = (
    (stored, "GROUP_BYTES", 5 * SIZE * DIM * 4),
    (versions, "MOST_SMALL", 4),
    (folder_log, "FULL", 2000),
    (folder_log, "WORN", 1000),
)
"""So that versions of a table come often, and are joined often, and tails are replaced often."""


class Step(NamedTuple):
    number: int
    serial: int
    """Of all that were ever appended."""
    episode: int


class Past(NamedTuple):
    """What a memory holds."""

    steps: tuple[Step, ...] = ()
    next_step: int = 0
    episode: int = -1
    appended: int = 0
    gone: frozenset[int] = frozenset()
    purged: frozenset[int] = frozenset()
    """Serials of what was forgotten; and of that, what is in no file any more."""

    def after(self, what: str, argument: Any) -> "Past":
        if what == "append":
            count, borders = argument
            steps, episode = list(self.steps), max(self.episode + (borders[:1] == (0,)), 0)
            for i in range(count):
                episode += i > 0 and i in borders
                steps.append(Step(self.next_step + i, self.appended + i, episode))
            end, appended = self.next_step + count, self.appended + count
            return Past(tuple(steps), end, episode, appended, self.gone, self.purged)
        if what == "compact":
            return self._replace(purged=self.gone)
        if what == "forget":
            episodes, before = argument
            left = [s for s in self.steps if s.episode not in episodes and s.number >= before]
        elif what == "reset":
            left = []
        else:
            return self
        gone = self.gone | ({s.serial for s in self.steps} - {s.serial for s in left})
        now = self._replace(steps=tuple(left), gone=frozenset(gone))
        return now._replace(next_step=0, episode=-1) if what == "reset" else now


def calls(script: int) -> Iterator[tuple[str, Any]]:
    """Yield the calls of a script."""
    draw = random.Random(script)
    past = Past()
    length = 30 if script % 2 else 22
    for i in range(length):
        whats = ["append"] * 12 + ["flush", "forget", "compact", "reopen"]
        what = "reset" if script % 2 and i == length - 7 else draw.choice(whats)
        what = {length - 4: "forget", length - 2: "compact"}.get(i, what)
        argument: Any = None
        if what == "append":
            count = draw.randint(1, 9)
            borders = tuple(step for step in range(count) if draw.random() < 0.15)
            argument = count, borders
        elif what == "forget":
            argument = [draw.randint(0, max(past.episode, 0))], 0
            if draw.random() < 0.5:
                argument = [], draw.randint(0, past.next_step)
        past = past.after(what, argument)
        yield what, argument


def pasts(script: int) -> list[Past]:
    """Return what is there after each number of acknowledged calls; the first makes the memory."""
    found = [Past(), Past()]
    for call in calls(script):
        found.append(found[-1].after(*call))
    return found


def key(serial: int) -> str:
    return f"key of {serial:05}"


def values(serials: Sequence[int]) -> Tensor:
    """[T, D], none of them a mean of others."""
    numbers = torch.tensor(serials, dtype=torch.float32)
    return torch.stack([numbers + 1, numbers * numbers / 64 + 1, (numbers + 2).sqrt()], 1)


def add(held: StoredMemory, first: int, count: int, borders: Sequence[int]) -> None:
    serials = range(first, first + count)
    is_first = torch.tensor([[i in borders for i in range(count)]])
    held.append(values(serials)[None], is_first, keys=[key(serial) for serial in serials])


def open_for_writing(place: Path, sync: bool = True) -> StoredMemory:
    return memory.open(place, dim=DIM, chunk_size=SIZE, sync=sync, cache_bytes=2**12)


def write(here: Path, script: int) -> None:
    """Run a script, and say of each call that it has returned."""
    for bound in SMALL:
        setattr(*bound)
    acks = os.open(here / "acks", os.O_CREAT | os.O_WRONLY)
    held, appended = open_for_writing(here / "disk" / "m"), 0
    os.write(acks, b"1 open\n")
    for number, (what, argument) in enumerate(calls(script), 2):
        if what == "append":
            add(held, appended, *argument)
            appended += argument[0]
        elif what == "forget":
            held.forget(episodes=argument[0], before_step=argument[1])
        elif what == "reset":
            held.reset(torch.tensor([True]))
        elif what == "reopen":
            held.close()
            held = open_for_writing(here / "disk" / "m")
        else:
            getattr(held, what)()
        os.write(acks, f"{number} {what}\n".encode())
    held.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Path(sys.argv[1]), int(sys.argv[2]))
