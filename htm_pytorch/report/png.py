"""Pictures as PNG, with what Python brings."""

import base64
import ctypes
import math
import struct
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 256
"""Pixels along the longer side of a frame that is not halved."""
_SMALLEST = 16
"""Pixels along the shorter side below which no frame is halved."""


def encode(picture: Tensor) -> bytes:
    """Return a picture [H, W, 3] uint8 as PNG, with a palette where there are few colours."""
    height, width, _ = picture.shape
    red, green, blue = picture.int().unbind(-1)
    packed = red << 16 | green << 8 | blue
    colours = packed.unique()
    if len(colours) <= 256:
        index = torch.searchsorted(colours, packed)
        rows, kind = index.to(torch.uint8), 3
        parts = torch.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1)
        palette = _chunk(b"PLTE", _bytes(parts.to(torch.uint8)))
        how = 0
    else:
        # Each row as its difference from the one above.
        above = torch.cat([torch.zeros_like(picture[:1]), picture[:-1]])
        rows, kind, palette, how = (picture - above).flatten(1), 2, b"", 2
    filtered = torch.cat([rows.new_full((height, 1), how), rows], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            palette,
            _chunk(b"IDAT", zlib.compress(_bytes(filtered), 6)),
            _chunk(b"IEND", b""),
        )
    )


class Sheet(NamedTuple):
    """Frames side by side in one picture."""

    png: bytes
    places: list[int]
    """Of each frame, counted along the rows; -1: it was left out."""
    columns: int
    """How many places a row has."""
    size: tuple[int, int]
    """(W, H) of a place."""


def sprite_sheet(frames: Tensor, most_bytes: int) -> Sheet:
    """Put frames [T, H, W, 3] uint8 side by side, equal ones once.

    Where they are too many they become smaller; where that is not enough, every second, fourth, ...
    alone is kept.
    """
    seen: dict[bytes, int] = {}
    places = [seen.setdefault(_bytes(frame), len(seen)) for frame in frames]
    first: dict[int, int] = {}
    for step, place in enumerate(places):
        first.setdefault(place, step)
    different = frames[list(first.values())]
    stride = 1
    while True:
        sheet, columns = _sheet(different[::stride])
        height, width = different.shape[1:3]
        is_large = max(height, width) > LARGEST
        png = b"" if is_large else encode(sheet)
        if len(png) <= most_bytes and not is_large:
            kept = [p // stride if p % stride == 0 else -1 for p in places]
            return Sheet(png, kept, columns, (width, height))
        if is_large or min(height, width) >= 2 * _SMALLEST:
            halved = different.permute(0, 3, 1, 2).float()
            halved = torch.nn.functional.avg_pool2d(halved, 2, ceil_mode=True)
            different = halved.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        elif stride < len(different):
            stride *= 2
        else:
            return Sheet(png, [-1] * len(places), columns, (width, height))


def data_uri(png: bytes) -> str:
    """Return a PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _sheet(frames: Tensor) -> tuple[Tensor, int]:
    count, height, width, _ = frames.shape
    columns = max(1, math.ceil(math.sqrt(count * height / width)))
    rows = math.ceil(count / columns)
    padded = frames.new_zeros(rows * columns, height, width, 3)
    padded[:count] = frames
    grid = padded.view(rows, columns, height, width, 3).permute(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, 3).contiguous(), columns


def _bytes(tensor: Tensor) -> bytes:
    # Not by way of numpy, which torch does not require.
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
