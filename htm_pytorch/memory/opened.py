"""`memory.open`: from a place to the memory that is stored there."""

import contextlib
import os
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from htm_pytorch.memory import index
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.journal import LocalJournal, RemoteJournal
from htm_pytorch.memory.stored import ExactMemory, IndexedMemory, StoredMemory
from htm_pytorch.memory.table import DTYPES, Format, Table
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
        uri: a folder, or a place in an object store ("s3://bucket/name").
        dim: D. With it, a memory is made where there is none; one that exists must agree.
        chunk_size: C, of a new memory; default 32.
        dtype: how steps are stored, of a new memory: float32 (default), float16, bfloat16, or int8
            with one scale a step, which takes and gives float32.
        read_only: open one that exists, beside its writer; `refresh` shows what came since.
        search: "exact" holds the summaries in RAM and scores all of them for every query; "index"
            leaves them on the disk, where the index that `build_index` made finds most of the best.
        probes: how many lists of the index a query reads: more find more, and take longer.
        cache_bytes: of fetched chunks kept in RAM.
        sync: whether `append` waits until the disk has the steps. Without, they survive the end of
            the process, but not a loss of power.
        storage_options: of the object store, as Lance takes them.

    Raises:
        FileNotFoundError: there is none, and no `dim` to make one.
        MemoryFileError: a ValueError; what is there is damaged, or not a memory of this format.
        ValueError: an argument that does not fit what is there.
        BlockingIOError: another process writes to it.
    """
    for name, value in {"dim": dim, "chunk_size": chunk_size}.items():
        if value is not None:
            check_at_least(name, value, 1)
    check_at_least("probes", probes, 1)
    check_at_least("cache_bytes", cache_bytes, 0)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype}")
    if search not in ("exact", "index"):
        raise ValueError(f"search: expected 'exact' or 'index', got {search!r}")
    place = str(uri).rstrip("/")
    folder = None if "://" in place else Path(place)
    with contextlib.ExitStack() as undo:
        lock = None
        if folder is not None:
            _check_folder(folder, dim)
            if not read_only:
                lock = _lock(folder)
                undo.callback(lock.release)
        found = Table.open(f"{place}/chunks.lance", storage_options, sync)
        if found is None:
            if dim is None or read_only:
                raise FileNotFoundError(f"uri: no memory at {place!r} (with dim, one is made)")
            form = Format(dim, chunk_size or 32, dtype or torch.float32)
            found = Table.create(f"{place}/chunks.lance", form, storage_options, sync)
        for name, value in {"dim": dim, "chunk_size": chunk_size, "dtype": dtype}.items():
            has = getattr(found.form, name)
            if value not in (None, has):
                raise ValueError(
                    f"{name}: expected {has}, as the memory at {place!r} has, got {value}"
                )
        if folder is not None:
            journal = LocalJournal(folder / "journal", sync)
        else:
            journal = RemoteJournal(f"{place}/journal.lance", storage_options)
        kind = ExactMemory if search == "exact" else IndexedMemory
        memory = kind(place, found, journal, lock, read_only, cache_bytes, probes)
        undo.pop_all()
    return memory


def _check_folder(folder: Path, dim: int | None) -> None:
    """Raise unless the folder is that of a memory, or may become one."""
    if folder.exists() and not folder.is_dir():
        raise MemoryFileError(f"uri: {str(folder)!r} is a file; expected the folder of a memory")
    if (folder / "chunks.lance").exists():
        return
    if folder.exists() and not {entry.name for entry in folder.iterdir()} <= {"lock"}:
        raise MemoryFileError(f"uri: {str(folder)!r} holds other files, and no memory")
    if dim is None:
        raise FileNotFoundError(f"uri: no memory at {str(folder)!r} (with dim, one is made)")


def _lock(folder: Path) -> FileLock:
    """Take the right to write, which ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise PermissionError(
            f"uri: no right to write to {str(folder)!r} ({error}); read_only=True only reads"
        ) from error
    except Timeout:
        raise BlockingIOError(
            f"uri: another process writes to {str(folder)!r}; read_only=True reads beside it"
        ) from None
    return lock
