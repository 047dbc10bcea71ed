"""What the log keeps of the files of a table, against damage: their ends, and a manifest.

The engine's files say at their ends where everything in them is, and a manifest says which files
there are. Neither has a checksum of its own, nor have those of an index, which the engine trusts so
far that a flipped bit in one can end the process: of them the log keeps checksums of the whole.
"""

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from htm_pytorch.memory.files import MemoryFileError, sync_file, sync_folder
from htm_pytorch.memory.log import REPAIR, Pin, sealed, unsealed
from htm_pytorch.memory.place import SET_ASIDE

_FOOTER = struct.Struct("<QQQIIHH4s")
_INDICES = "_indices/"
_BLOCK = 2**24
"""Bytes of a file of an index that are read at a time."""


def pin(folder: Path, dataset: Any, before: Pin | None) -> Pin:
    """Return what to keep of a version of a table; `before` is what was kept of an earlier one."""
    known = _files_of(before.body) if before else {}
    unkept = before.ends if before else {}
    found: dict[str, list[int]] = {}
    ends: dict[str, bytes] = {}
    for fragment in dataset.get_fragments():
        names = {f"data/{file.path}": _start for file in fragment.data_files()}
        deleted = fragment.deletion_file()
        if deleted:
            names[str(deleted)] = lambda path: 0
        for name, start_of in names.items():
            if name in known:
                found[name] = known[name]
                if name in unkept:
                    ends[name] = unkept[name]
                continue
            start = start_of(folder / name)
            ends[name] = _read_end(folder / name, start) or b""
            length = start + len(ends[name])
            found[name] = [length, start, zlib.crc32(ends[name])]
    for name in _files_of_indices(folder, dataset, known):
        found[name] = known.get(name) or _sum(folder / name)
    kept = manifest(folder, dataset.version).read_bytes()
    text = json.dumps(found, separators=(",", ":")).encode()
    return Pin(sealed(struct.pack("<I", len(text)) + text + kept), ends)


def check(
    folder: Path, version: int, kept: Pin, end_of: Callable[[str], bytes | None] | None
) -> None:
    """Compare the files of a version with what was kept of them.

    Args:
        folder: where the files of the table are.
        version: which version of the table is compared.
        kept: what was kept of it.
        end_of: gives the ends of files that were kept, to put right what is damaged; None: nothing
            is changed.

    Raises:
        MemoryFileError: one of them is damaged, or gone.
    """
    ends, right = _files_of(kept.body), _manifest_of(kept.body)
    if not folder.exists():
        raise MemoryFileError(f"{str(folder)!r} is gone; {REPAIR}")
    path = manifest(folder, version)
    if not path.exists() or path.read_bytes() != right:
        if end_of is None:
            raise _damaged(path)
        _replace(path, right)
    for name, (length, start, checksum) in ends.items():
        if name.startswith(_INDICES):
            continue
        path = folder / name
        end = _read_end(path, start)
        if end is not None and (start + len(end), zlib.crc32(end)) == (length, checksum):
            continue
        if end_of is None and size(path) >= start:
            raise _damaged(path)
        right = end_of(name) if end_of is not None else None
        # Only an end can be put right, not what comes before it.
        before = path.read_bytes()[:start] if path.exists() else b""
        if right is None or len(before) != start or zlib.crc32(right) != checksum:
            raise MemoryFileError(f"{str(path)!r} is damaged or gone; {REPAIR}")
        _replace(path, before + right)


def damaged_indices(folder: Path, kept: Pin, known: set[str]) -> list[str]:
    """Say which files of an index are not what was written; none of those that are `known`.

    Those that are right become known.
    """
    damaged: list[str] = []
    for name, sums in _files_of(kept.body).items():
        if not name.startswith(_INDICES) or name in known:
            continue
        if _sum(folder / name) == sums:
            known.add(name)
        else:
            damaged.append(
                f"the index is damaged ({str(folder / name)!r}); all else is unharmed. "
                "memory.open(uri).build_index() makes another; where its writer has just "
                "compacted, `refresh()` or open it again"
            )
    return damaged


def files_of(kept: Pin) -> set[str]:
    """Return the names of the files whose ends are kept."""
    return set(_files_of(kept.body))


def _damaged(path: Path) -> MemoryFileError:
    return MemoryFileError(
        f"{str(path)!r} is damaged or gone; open the memory for writing, which puts it right from "
        "a copy; where it was just compacted, `refresh()` or open it again"
    )


def _replace(path: Path, right: bytes) -> None:
    """Give a file other contents, and keep what it was."""
    set_aside(path)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_bytes(right)
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def set_aside(path: Path) -> None:
    """Move a file of a table to where nothing in it is read."""
    if path.exists():
        aside = path.parents[2] / SET_ASIDE
        aside.mkdir(exist_ok=True)
        os.replace(path, aside / f"{path.name}.{os.urandom(4).hex()}")


def files(folder: Path | None) -> Iterator[str]:
    """Yield the places of all files in a table's folder, but for the engine's hint."""
    if folder is None:
        return
    for root, _, names in os.walk(folder):
        for name in names:
            if name != "latest_version_hint.json":
                yield os.path.relpath(os.path.join(root, name), folder)


def size(path: Path) -> int:
    """Return the bytes of a file; none where its writer has just deleted it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def manifest(folder: Path, version: int) -> Path:
    """Return the file that says which files a version has."""
    return folder / "_versions" / f"{2**64 - 1 - version:020d}.manifest"


def version_of(manifest: Path) -> int | None:
    """Return the version that a file tells of; None where it is none of the engine's."""
    return 2**64 - 1 - int(manifest.stem) if manifest.stem.isdigit() else None


def _start(path: Path) -> int:
    """Return where a data file begins to say where in it everything is."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, length - _FOOTER.size))
        footer = file.read()
        if len(footer) != _FOOTER.size:
            return 0
        columns, _, table, buffers, _, _, _, magic = _FOOTER.unpack(footer)
        # Of another version of the engine's files: all of it.
        if magic != b"LANC" or table + 16 * buffers > length or buffers > 64:
            return 0
        file.seek(table)
        places = struct.unpack(f"<{2 * buffers}Q", file.read(16 * buffers))[::2]
    return min(columns, length, *places) if places else min(columns, length)


def _files_of_indices(folder: Path, dataset: Any, known: dict[str, list[int]]) -> Iterator[str]:
    """Yield the files of an index: those that are known, since one that is gone still counts."""
    for found in dataset.describe_indices():
        for segment in found.segments:
            place = f"{_INDICES}{segment.uuid}"
            names = [name for name in known if name.startswith(f"{place}/")]
            yield from names or (f"{place}/{name}" for name in sorted(os.listdir(folder / place)))


def _sum(path: Path) -> list[int]:
    """Return the length of a file, where what is summed begins, and its CRC-32."""
    length = checksum = 0
    with contextlib.suppress(OSError), open(path, "rb") as file:
        while block := file.read(_BLOCK):
            length += len(block)
            checksum = zlib.crc32(block, checksum)
    return [length, 0, checksum]


def _read_end(path: Path, start: int) -> bytes | None:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read()
    except OSError:
        return None


def _files_of(pin: bytes) -> dict[str, list[int]]:
    body = unsealed(pin)
    (length,) = struct.unpack_from("<I", body)
    return json.loads(body[4 : 4 + length])


def _manifest_of(pin: bytes) -> bytes:
    body = unsealed(pin)
    return body[4 + struct.unpack_from("<I", body)[0] :]
