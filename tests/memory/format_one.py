"""Memories of format 1, written as releases before format 2 wrote them."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GENERATION = bytes(range(16))


def table(uri: str, chunks: Sequence[tuple[int, int, Tensor]], size: int) -> None:
    """Write chunks, (first step, episode, steps [t, D] float32), as a table, a version for each."""
    import lance
    import pyarrow as pa

    dim = chunks[0][2].shape[1] if chunks else 8
    metadata = {
        "htm_pytorch": "1",
        "generation": GENERATION.hex(),
        "dim": str(dim),
        "chunk_size": str(size),
        "dtype": "float32",
    }
    schema = pa.schema(
        {
            "contents": pa.list_(pa.uint8(), size * dim * 4),
            "summary": pa.list_(pa.float32(), dim),
            "steps": pa.int32(),
            "episode": pa.int64(),
            "first_step": pa.int64(),
            "checksum": pa.int64(),
        },
        metadata,
    )
    dataset = lance.write_dataset(schema.empty_table(), uri)
    for first_step, episode, steps in chunks:
        contents = torch.zeros(size, dim)
        contents[size - len(steps) :] = steps
        data = contents.numpy().tobytes()
        row = {
            "contents": list(data),
            "summary": steps.mean(0).tolist(),
            "steps": len(steps),
            "episode": episode,
            "first_step": first_step,
            "checksum": zlib.crc32(data),
        }
        dataset.insert(pa.Table.from_pylist([row], schema), mode="append")


def record(first_step: int, episode: int, borders: Sequence[int], steps: Tensor) -> bytes:
    """Return what one call of `append` added to a journal."""
    of_borders = struct.pack(f"<{len(borders)}I", *borders)
    data = steps.contiguous().numpy().tobytes()
    checked = struct.pack("<QqII", first_step, episode, len(of_borders), len(data))
    checked += of_borders + data
    return struct.pack("<I", zlib.crc32(checked)) + checked


def journal(*records: bytes, generation: bytes = GENERATION) -> bytes:
    return struct.pack("<8s16s", b"HTMJRNL1", generation) + b"".join(records)


def folder(
    path: Path, chunks: Sequence[tuple[int, int, Tensor]], records: Sequence[bytes], size: int = 4
) -> Path:
    """Make the folder of a memory."""
    path.mkdir()
    table(str(path / "chunks.lance"), chunks, size)
    (path / "journal").write_bytes(journal(*records))
    (path / "lock").touch()
    return path


def cut(steps: Tensor, first: int, last: int, size: int = 4, episode: int = 0) -> list[Any]:
    """Return the chunks of steps [N, D] from one number up to another."""
    starts = range(first, last, size)
    return [(start, episode, steps[start : min(start + size, last)]) for start in starts]
