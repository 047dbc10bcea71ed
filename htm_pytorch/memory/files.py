"""Tensors in one safetensors file, written whole or not at all."""

import os
from pathlib import Path

from torch import Tensor

FORMAT = "1"


class MemoryFileError(ValueError):
    """A file that is not, or no longer, what it was saved as."""


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], **metadata: str
) -> None:
    """Write `tensors` to `path`; a crash leaves the old file or the new one, never a part.

    `kind` names what is stored and is checked by `load_tensors`; `metadata` travels with it.

    Raises:
        OSError: it cannot be written, since the disk is full for one; then the old file is there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(_apart(tensors), temporary, {"kind": kind, "format": FORMAT, **metadata})
        sync_file(temporary)
        os.replace(temporary, target)
    except SafetensorError as error:
        raise OSError(f"path: {str(path)!r} cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors laid out plainly, none of which shares storage with another."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    return stored


def load_tensors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote as `kind`: the tensors and the metadata.

    Raises:
        FileNotFoundError: no such file.
        MemoryFileError: truncated, of another program, kind or format version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = (metadata.pop("kind", None), metadata.pop("format", None))
            if found != (kind, FORMAT):
                raise MemoryFileError(
                    f"path: expected {str(path)!r} to hold a {kind} of format {FORMAT}, "
                    f"got kind {found[0]!r} of format {found[1]!r}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise MemoryFileError(
            f"path: {str(path)!r} is truncated or not a safetensors file ({error})"
        ) from error


def sync_file(path: Path) -> None:
    """Wait until the disk has what was written to a file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_data(file: int) -> None:
    """Wait until the disk has the bytes of a file that is open under this number."""
    getattr(os, "fdatasync", os.fsync)(file)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder, where the system can say so."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
