"""`open_many`: thousands of small memories, one a user or a stream, in one folder."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from htm_pytorch.memory import entries, forks, place
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.folder_log import FolderLog
from htm_pytorch.memory.formats import CPU
from htm_pytorch.memory.log import REPAIR, Contents, Head, Record
from htm_pytorch.memory.log_file import LogFile, says_many
from htm_pytorch.memory.opening import check_agrees, checked
from htm_pytorch.memory.place import Lock, Place
from htm_pytorch.memory.state import State
from htm_pytorch.memory.stored import ExactMemory
from htm_pytorch.memory.view import View
from htm_pytorch.shapes import check_mask, check_tensor

WAY = "memory.open_many(uri{}).open(name)"
"""How users open one of them, up to options."""
MOST_LOADED = 1024
"""Memories that stay in RAM though nobody else holds them."""


def open_many(
    uri: str | os.PathLike[str],
    *,
    dim: int | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    read_only: bool = False,
    sync: bool = True,
) -> "Memories":
    """Open the folder of many small memories at `uri`, or make one there.

    All of them share one file, one lock and one connection, and each is in RAM as a whole when it
    is used. A memory that outgrows RAM is better off alone, by `memory.open`.

    Args:
        uri: the folder that they are in.
        dim: how many numbers a step has, D, in each of them. With it, the folder is made where
            there is none.
        chunk_size: how many steps a chunk holds, C, in each of a new folder; default 32.
        dtype: how each of a new folder stores steps; `memory.open` says what there is.
        read_only: whether they are only read, beside their writer; the folder must exist, and
            `refresh` shows what came since.
        sync: whether `append` waits until the disk has the steps.

    Raises:
        FileNotFoundError: there is none, and no `dim` to make one.
        MemoryFileError: a ValueError; what is there is damaged, or something else.
        ValueError: an argument that does not fit what is there.
        BlockingIOError: it is open for writing already, here or in another process.
    """
    form = checked(dim, chunk_size, dtype)
    where = place.find(uri, None)
    if where.folder is None:
        raise ValueError(f"uri: expected a folder for many memories, got {where.uri!r}")
    may_make = dim is not None and not read_only
    place.check_folder(where.folder, may_make)
    place.check_kinds(where.folder)
    lock = None if read_only else Lock(where.folder)
    try:
        if not where.log.exists():
            if (where.folder / place.MARKER).exists() or not may_make:
                raise MemoryFileError(f"{str(where.log)!r} is gone; put it back, or {REPAIR}")
            logs = {"": Contents(Head.first(form), [])}
            LogFile.create(where.log, logs, sync=sync, is_of_many=True).close()
            place.mark(where.folder, sync)
        file = LogFile(where.log, sync=sync, read_only=read_only)
        if not file.is_of_many():
            raise MemoryFileError(f"uri: {where.uri!r} is one memory: memory.open opens it")
        contents = FolderLog(file).read()
        if contents is None:
            raise MemoryFileError(f"{file.where} is damaged (it has no head); {REPAIR}")
        check_agrees(where.uri, contents.head, dim, chunk_size, dtype)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return Memories(where, file, lock, contents.head, read_only)


class Memories:
    """Many small stored memories under names; `open_many` opens them.

    `memories.open(name)` makes one where there is none, and `memories[name]` does not. Each is an
    `ExactMemory`, with all that such a memory can do but an index. Several threads may use them.
    """

    def __init__(self, where: Place, file: LogFile, lock: Lock | None, head: Head, read_only: bool):
        self.uri = where.uri
        self.read_only = read_only
        self._place = where
        self._file = file
        self._lock = lock
        self._form = head.form
        # Of one name there is never more than one: two would not know of each other's steps.
        self._loaded: weakref.WeakValueDictionary[str, ExactMemory] = weakref.WeakValueDictionary()
        self._used: OrderedDict[str, ExactMemory] = OrderedDict()
        self._seen: object = None
        # Also that of the memories, which write to one file.
        self.mutex = threading.RLock()
        forks.watch(self)

    def names(self) -> list[str]:
        """Return the names of all memories, in order."""
        return [name for name in self._file.names() if name]

    def __len__(self) -> int:
        """Return how many memories there are."""
        return len(self.names())

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        """Whether there is a memory of this name."""
        return isinstance(name, str) and bool(name) and self._file.has(name)

    def __getitem__(self, name: str) -> ExactMemory:
        """Return the memory of a name.

        Raises:
            KeyError: there is none.
        """
        return self._open(name, may_make=False)

    def open(self, name: str) -> ExactMemory:
        """Return the memory of a name; it is made where there is none."""
        return self._open(name, may_make=not self.read_only)

    def remove(self, name: str) -> None:
        """Remove a memory, damaged or not; no byte of it is left in the file after `compact`.

        Raises:
            KeyError: there is none.
        """
        self._check_writable()
        with self.mutex:
            self._check(name, is_there=True)
            FolderLog(self._file, name).remove()
            self._drop(name)

    def append(
        self,
        names: Sequence[str],
        steps: Tensor,
        is_first: Tensor | None = None,
        *,
        keys: str | Sequence[str | None] | None = None,
        times: float | Tensor | None = None,
    ) -> Self:
        """Store `steps` [B, T, D], a row for each name, all or none; one wait for the disk.

        Args:
            names: B names, which must differ; memories are made where there are none.
            steps: [B, T, D], which come oldest first and have the `dtype` of the memories.
            is_first: [B, T] bool, True where an episode of a row begins.
            keys: what steps are named by, the same for all rows, as `StoredMemory.append` takes it.
            times: when steps happened, the same for all rows, as `StoredMemory.append` takes it.
        """
        self._check_writable()
        names = _checked(names)
        check_tensor("steps", steps, "B T D", B=len(names), D=self._form.dim)
        check_mask("is_first", is_first, "B T", CPU, B=len(names), T=steps.shape[1])
        if len(set(names)) != len(names):
            raise ValueError(f"names: expected different ones, got {names}")
        with self.mutex:
            for name in names:
                self._check(name, is_there=False)
            there = [name for name in names if name in self._loaded or self._file.has(name)]
            memories = {name: self[name] for name in there}
            changes: list[tuple[str, Head, list[Record]]] = []
            after: dict[str, State] = {}
            for row, name in enumerate(names):
                memory = memories.get(name)
                if memory is None:
                    before = State.nothing(Head.first(self._form), self._form.dim, 0)
                else:
                    before = memory.moment().states[0]
                first = None if is_first is None else is_first[row : row + 1]
                batch = entries.batch(before, steps[row : row + 1], first, keys, times)
                if batch is not None:
                    now, closed = entries.appended(before, batch)
                    after[name] = now._replace(unflushed=before.unflushed.extended(closed))
                    changes.append((name, after[name].head, [batch.record()]))
            for memory in memories.values():
                memory.distrust()
            self._file.write(changes)
            for name in names:
                memory = memories.get(name)
                if memory is None:
                    self.open(name)
                elif name in after:
                    memory.become(after[name])
        return self

    def rows(self, names: Sequence[str]) -> View:
        """Return a memory of B rows, that B rows of queries are to recall from, each from its own.

        Args:
            names: which memories the B rows read; the same name may come twice.
        """
        names = _checked(names)
        if not names:
            raise ValueError("names: expected one or more, got none")
        return View([self[name] for name in names], None, has_rows=True)

    def refresh(self) -> Self:
        """Show what the writer has stored since; at once, where that is nothing."""
        seen = self._file.changes()
        if self.read_only and seen != self._seen:
            for name, memory in list(self._loaded.items()):
                if self._file.has(name):
                    memory.refresh()
                else:
                    self._drop(name)
            self._seen = seen
        return self

    def compact(self) -> Self:
        """Write the file anew, without what was removed or forgotten."""
        self._check_writable()
        with self.mutex:
            for name in self.names():
                FolderLog(self._file, name).forget_purge()
            for memory in list(self._loaded.values()):
                memory.distrust()
            self._file.purge()
        return self

    def to_compact(self) -> dict[str, Any]:
        """Return what `compact` would find to do, by name; nothing is changed."""
        purges = [self[name].to_compact()["forgotten and still in files"] for name in self.names()]
        return {
            "bytes of the log that hold nothing": self._file.free(),
            "memories of which what was forgotten is still in files": sum(purges),
        }

    def verify(self) -> list[str]:
        """Read everything, compare it with its checksums and return what is wrong."""
        found = self._file.problems()
        for name in self.names():
            try:
                found += [f"{name!r}: {problem}" for problem in self[name].unfit()]
            except MemoryFileError as error:
                found.append(str(error))
        return found

    def info(self) -> dict[str, Any]:
        """Return what people ask first, by name; sizes are in bytes."""
        return {
            "uri": self.uri,
            "memories": len(self),
            "dim": self._form.dim,
            "chunk_size": self._form.chunk_size,
            "dtype": str(self._form.dtype).removeprefix("torch."),
            "bytes of the log": self._file.size(),
            "memories in RAM": len(self._loaded),
        }

    def close(self) -> None:
        """Give up the right to write, and let go of the file; what was appended is stored."""
        self.read_only = True
        for memory in list(self._loaded.values()):
            memory.close()
        self._file.close()
        if self._lock is not None:
            self._lock.release()

    def inherit(self) -> None:
        """Go on in a forked child, for reading only."""
        self.mutex = threading.RLock()
        self.read_only, self._lock = True, None
        self._file.inherit()

    def __enter__(self) -> Self:
        """Return the memories, to be closed at the end."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close them."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of memories that are only read open them again."""
        if not self.read_only:
            raise TypeError(
                f"{self.uri!r} is open for writing, and two writers would spoil it: share these "
                "memories among threads, or give others memory.open_many(uri, read_only=True)"
            )
        return _again, (self.uri,)

    def __repr__(self) -> str:
        """Say where they are and how many."""
        return f"Memories({self.uri!r}, {len(self):,} memories, dim={self._form.dim})"

    def _open(self, name: str, may_make: bool) -> ExactMemory:
        with self.mutex:
            self._check(name, is_there=False)
            memory = self._loaded.get(name)
            if memory is not None and memory.read_only and not self.read_only:
                # Somebody has closed it, as at the end of a `with`.
                self._drop(name)
                memory = None
            if memory is None:
                log = FolderLog(self._file, name)
                if not may_make:
                    self._check(name, is_there=True)
                elif not self._file.has(name):
                    log.write(Head.first(self._form), [], replace=False)
                memory = ExactMemory(self._place, log, None, None, self.read_only, 0, 1, self.mutex)
                memory.reopens_as(_again_one, self.uri, name, way=WAY)
                self._loaded[name] = memory
            self._used[name] = memory
            self._used.move_to_end(name)
            while len(self._used) > MOST_LOADED:
                self._used.popitem(last=False)
            return memory

    def _drop(self, name: str) -> None:
        """Let go of a memory, if it is in RAM."""
        memory = self._loaded.pop(name, None)
        self._used.pop(name, None)
        if memory is not None:
            memory.close()

    def _check(self, name: str, is_there: bool) -> None:
        """Raise unless it can be the name of a memory, and, with `is_there`, is one."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a str that is not empty, got {name!r}")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"name: expected text, got {name!r} ({error.reason})") from error
        if is_there and not self._file.has(name):
            raise KeyError(f"{name!r}: no such memory in {self.uri!r}; open(name) makes one")

    def _check_writable(self) -> None:
        if self.read_only:
            raise ValueError(
                f"memories: {self.uri!r} is open for reading only; memory.open_many(uri) opens it "
                "for writing"
            )


def holds_many(uri: str | os.PathLike[str]) -> bool:
    """Whether there is a folder of many memories at `uri`, as its file says."""
    where = place.find(uri, None)
    return where.folder is not None and says_many(where.log) is True


def _checked(names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"names: expected several, such as ['ann'], got {names!r}")
    return list(names)


def _again(uri: str) -> Memories:
    return open_many(uri, read_only=True)


def _again_one(uri: str, name: str) -> ExactMemory:
    memory = open_many(uri, read_only=True)[name]
    memory.reopens_as(_again_one, uri, name, way=WAY)
    return memory
