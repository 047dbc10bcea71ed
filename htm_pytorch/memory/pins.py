"""What the log keeps of the files of a table, against damage: of each how it ends, and a manifest.

The engine's files say at their ends where everything in them is, and a manifest says which files
there are. Neither has a checksum of its own.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from htm_pytorch.memory.files import MemoryFileError, sync_file, sync_folder
from htm_pytorch.memory.log import REPAIR, sealed, unsealed

_FOOTER = struct.Struct("<QQQIIHH4s")


def pin(folder: Path, dataset: Any, before: bytes) -> bytes:
    """Return what to keep of a version of a table; `before` is what was kept of an earlier one."""
    known = _files_of(before) if before else {}
    found: dict[str, list[int]] = {}
    for fragment in dataset.get_fragments():
        for file in fragment.data_files():
            name = f"data/{file.path}"
            found[name] = known.get(name) or _end_of(folder / name)
        deleted = fragment.deletion_file()
        if deleted:
            whole = (folder / str(deleted)).read_bytes()
            found[str(deleted)] = [len(whole), 0, zlib.crc32(whole)]
    kept = manifest(folder, dataset.version).read_bytes()
    text = json.dumps(found, separators=(",", ":")).encode()
    return sealed(struct.pack("<I", len(text)) + text + kept)


def check(folder: Path, version: int, kept: bytes, may_mend: bool) -> None:
    """Compare the files of a version with what was kept of them.

    Where `may_mend`, a manifest that is damaged is replaced by the one that was kept.

    Raises:
        MemoryFileError: one of them is damaged, or gone.
    """
    try:
        ends = _files_of(kept)
    except ValueError:
        # The other way round: what was kept is damaged, and tells nothing.
        return
    path, right = manifest(folder, version), _manifest_of(kept)
    if not folder.exists():
        raise MemoryFileError(f"{str(folder)!r} is gone; {REPAIR}")
    if not path.exists() or path.read_bytes() != right:
        if not may_mend:
            raise MemoryFileError(
                f"{str(path)!r} is damaged or gone; open the memory for writing, which puts it "
                "right from a copy; where it was just compacted, open it again"
            )
        set_aside(path)
        temporary = path.with_suffix(".new")
        temporary.write_bytes(right)
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    for name, (length, start, checksum) in ends.items():
        end = _read_end(folder / name, start)
        if end is None or (start + len(end), zlib.crc32(end)) != (length, checksum):
            raise MemoryFileError(
                f"{str(folder / name)!r} is damaged or gone; {REPAIR}; where it was just "
                "compacted, `refresh()` or open it again"
            )


def set_aside(path: Path) -> None:
    """Move a file of a table to where nothing in it is read."""
    if path.exists():
        aside = path.parents[2] / "set-aside"
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


def _end_of(path: Path) -> list[int]:
    """Return length, start and checksum of the part of a data file that says where the rest is."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, length - _FOOTER.size))
        footer = file.read()
        start = 0
        if len(footer) == _FOOTER.size:
            found = _FOOTER.unpack(footer)
            # Of another version of the engine's files: all of it.
            start = min(found[0], length) if found[-1] == b"LANC" else 0
        file.seek(start)
        return [length, start, zlib.crc32(file.read())]


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
