"""Files of a memory that ranks share: what each of them saves, and what others make of it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.files import MemoryFileError, load_tensors, save_tensors
from htm_pytorch.memory.home import Home
from htm_pytorch.memory.opening import open_memory

_KIND = "ShardedMemory"


class Part(NamedTuple):
    """What one rank saved."""

    local: Home
    moment: tuple[int, int]
    tensors: dict[str, Tensor]


def write(path: str | os.PathLike[str], rank: int, ranks: int, part: Part) -> None:
    """Write what a rank has to the folder `path`.

    Raises:
        FileExistsError: it did so before.
    """
    contents, state = _files(path, rank, ranks)
    if state.exists():
        raise FileExistsError(f"path: {str(state)!r} exists")
    state.parent.mkdir(parents=True, exist_ok=True)
    in_memory = isinstance(part.local, ChunkedMemory)
    part.local.save(contents.with_suffix(".safetensors") if in_memory else contents)
    numbers = torch.tensor([part.local.chunks, *part.moment], dtype=torch.int64, device="cpu")
    # The last: where it is, the part is whole.
    kept = "RAM" if in_memory else "disk"
    save_tensors(state, _KIND, part.tensors | {"numbers": numbers}, kept=kept)


def saved_by(path: str | os.PathLike[str], rank: int, ranks: int) -> int:
    """Return how many ranks saved what one of `ranks` is to load.

    Raises:
        FileNotFoundError: it cannot be told.
    """
    if _files(path, rank, ranks)[1].exists():
        return ranks
    found = {int(name.stem.rpartition("-")[2]) for name in Path(path).glob("state-*-of-*")}
    if len(found) != 1:
        raise FileNotFoundError(
            f"path: no part of rank {rank} of {ranks} in {str(path)!r}"
            + (f", but those of {sorted(found)} ranks" if found else "")
        )
    return found.pop()


def read(
    path: str | os.PathLike[str], rank: int, ranks: int, device: torch.device | str | None
) -> Part:
    """Return what one of `ranks` wrote.

    Raises:
        FileNotFoundError: it is not there.
        MemoryFileError: it is damaged, or was appended to later.
    """
    contents, state = _files(path, rank, ranks)
    tensors, metadata = load_tensors(state, _KIND)
    local: Home
    if metadata["kept"] == "RAM":
        local = ChunkedMemory.load(contents.with_suffix(".safetensors"), device=device)
    else:
        local = open_memory(contents)
    chunks, *moment = tensors.pop(
        "numbers", torch.tensor([local.chunks, 0, 0], device="cpu")
    ).tolist()
    if local.chunks != chunks:
        raise MemoryFileError(
            f"path: {str(contents)!r} holds {local.chunks} chunks, expected {chunks}, as when it "
            "was saved, and what goes with the others is not known; save after you append"
        )
    return Part(local, (moment[0], moment[1]), tensors)


def joined(parts: Sequence[Part]) -> ChunkedMemory:
    """Return the whole of what all ranks saved."""
    locals_ = [part.local for part in parts if isinstance(part.local, ChunkedMemory)]
    if len(locals_) < len(parts) or "next" not in parts[0].tensors:
        raise ValueError(
            f"path: expected {len(parts)} ranks, as when it was saved: only parts in RAM that were "
            "dealt out in turn can be loaded by another number of ranks"
        )
    first = locals_[0]
    total = sum(local.chunks for local in locals_)

    def join(name: str) -> Tensor:
        columns = [getattr(local, name) for local in locals_]
        whole = columns[0].new_empty(first.batch, total, *columns[0].shape[2:])
        for rank, column in enumerate(columns):
            whole[:, rank :: len(parts)] = column
        return whole

    names = ["contents", "summaries", "valid", "first_steps", "episodes"]
    names += [] if first.step_mask is None else ["step_mask"]
    number = parts[0].tensors["next"].to(first.device)
    return first._replace(**{name: join(name) for name in names}, next_slot=number)


def _files(path: str | os.PathLike[str], rank: int, ranks: int) -> tuple[Path, Path]:
    """Return where a rank's part is, and what else it knows."""
    name = f"{rank}-of-{ranks}"
    return Path(path, f"part-{name}"), Path(path, f"state-{name}.safetensors")
