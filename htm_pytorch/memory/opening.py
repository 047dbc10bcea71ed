"""`memory.open`: from a place to the memory that is stored there."""

import contextlib
import os
from typing import Literal

import torch

from htm_pytorch.memory import earlier, index, place
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.folder_log import FolderLog
from htm_pytorch.memory.formats import DTYPES, Format
from htm_pytorch.memory.lance_access import load_engine
from htm_pytorch.memory.log import REPAIR, Contents, Head, Log
from htm_pytorch.memory.log_file import LogFile
from htm_pytorch.memory.object_log import ObjectLog
from htm_pytorch.memory.place import MARKER, Lock, Place
from htm_pytorch.memory.stored import ExactMemory, IndexedMemory, StoredMemory
from htm_pytorch.memory.versions import Versions
from htm_pytorch.shapes import check_at_least


def open_memory(
    uri: str | os.PathLike[str],
    *,
    dim: int | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    read_only: bool = False,
    search: Literal["exact", "index"] = "exact",
    probes: int = index.PROBES,
    cache_bytes: int = 256 * 2**20,
    sync: bool = True,
    storage_options: dict[str, str] | None = None,
) -> StoredMemory:
    """Open the memory at `uri`, or make one there. Needs the extra `store`.

    Args:
        uri: where the memory is: a folder, or a place in an object store ("s3://bucket/name").
        dim: how many numbers a step has, D. With it, a memory is made where there is none; one that
            exists must agree.
        chunk_size: how many steps a chunk of a new memory holds, C; default 32.
        dtype: how a new memory stores steps: as float32 (default), float16, bfloat16, or as int8
            with one scale a step, which takes and gives float32.
        read_only: whether it is only read, beside its writer; it must exist, and `refresh` shows
            what came since.
        search: "exact" holds codes of the summaries in RAM, by which every query finds the best of
            all of them; "index" holds none and asks the disk, where the index that `build_index`
            made finds most of the best.
        probes: how many lists of the index a query reads: more find more, and take longer.
        cache_bytes: how many bytes of fetched chunks are kept in RAM.
        sync: whether `append` waits until the disk has the steps. Without, they survive the end of
            the process, but not a loss of power.
        storage_options: what Lance needs to know of the object store, as it takes it.

    Raises:
        FileNotFoundError: there is none, and no `dim` to make one.
        MemoryFileError: a ValueError; what is there is damaged, or not a memory of this format.
        ValueError: an argument that does not fit what is there.
        BlockingIOError: it is open for writing already, here or in another process.
    """
    wanted = checked(dim, chunk_size, dtype)
    check_at_least("probes", probes, 1)
    check_at_least("cache_bytes", cache_bytes, 0)
    if search not in ("exact", "index"):
        raise ValueError(f"search: expected 'exact' or 'index', got {search!r}")
    load_engine()
    where = place.find(uri, storage_options)
    may_make = dim is not None and not read_only
    with contextlib.ExitStack() as undo:
        lock = None
        if where.folder is not None:
            place.check_folder(where.folder, may_make)
            place.check_kinds(where.folder)
            if not read_only:
                lock = Lock(where.folder)
                undo.callback(lock.release)
        log = _log(where, wanted if may_make else None, read_only, sync)
        undo.callback(log.close)
        contents = log.read()
        if contents is None:
            raise FileNotFoundError(place.NO_MEMORY.format(where.uri))
        check_agrees(where.uri, contents.head, dim, chunk_size, dtype)
        kind = ExactMemory if search == "exact" else IndexedMemory
        versions = Versions(where, sync)
        memory = kind(where, log, versions, lock, read_only, cache_bytes, probes)
        memory.reopens_as(_again, where.uri, search, probes, cache_bytes, storage_options)
        undo.pop_all()
    return memory


def check_agrees(
    uri: str, head: Head, dim: int | None, chunk_size: int | None, dtype: torch.dtype | None
) -> None:
    """Raise a ValueError where a memory is not as it was expected."""
    form = head.form
    for name, value in {"dim": dim, "chunk_size": chunk_size, "dtype": dtype}.items():
        has = getattr(form, name)
        if value not in (None, has):
            raise ValueError(f"{name}: expected {has}, as the memory at {uri!r} has, got {value}")


def checked(dim: int | None, chunk_size: int | None, dtype: torch.dtype | None) -> Format:
    """Return the sizes of a memory that is made.

    Raises:
        ValueError: one of them is wrong.
    """
    for name, value in {"dim": dim, "chunk_size": chunk_size}.items():
        if value is not None:
            check_at_least(name, value, 1)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype}")
    return Format(dim or 1, chunk_size or 32, dtype or torch.float32)


def _again(
    uri: str,
    search: Literal["exact", "index"],
    probes: int,
    cache_bytes: int,
    storage_options: dict[str, str] | None,
) -> StoredMemory:
    return open_memory(
        uri,
        read_only=True,
        search=search,
        probes=probes,
        cache_bytes=cache_bytes,
        storage_options=storage_options,
    )


def _log(where: Place, form: Format | None, read_only: bool, sync: bool) -> Log:
    """Return the log of the memory at a place; with `form`, one is made where there is none."""
    if where.folder is None:
        found = ObjectLog(where)
        if found.read() is not None:
            return found
        log = earlier.in_object_store(where, found, read_only)
        if log is found and log.read() is None:
            if form is None:
                raise FileNotFoundError(place.NO_MEMORY.format(where.uri))
            found.create(Contents(Head.first(form), []))
        return log
    path = where.log
    if path.exists():
        old = earlier.in_folder(where, sync, read_only)
        if old is not None:
            return old
        file = LogFile(path, sync=sync, read_only=read_only)
        if file.is_of_many():
            raise MemoryFileError(
                f"uri: {where.uri!r} is a folder of many memories: memory.open_many opens it"
            )
        if not read_only:
            # Where whoever made it did not come to that.
            place.mark(where.folder, sync)
        return FolderLog(file, tails=where.tails)
    if any((where.folder / name).exists() for name in (MARKER, "chunks.lance")):
        raise MemoryFileError(
            f"{str(path)!r} is gone, and with it the newest steps of this memory; put it back, or "
            f"{REPAIR}"
        )
    if form is None:
        raise FileNotFoundError(place.NO_MEMORY.format(where.uri))
    file = LogFile.create(path, {"": Contents(Head.first(form), [])}, sync=sync)
    place.mark(where.folder, sync)
    return FolderLog(file, tails=where.tails)
