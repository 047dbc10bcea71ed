"""Pictures as PNG, with what Python brings."""

import base64
import math
import struct
import zlib

import torch
from torch import Tensor

LARGEST = 240
"""Pixels along the longer side of a frame that is not halved."""
_SMALLEST = 16
"""Pixels along the shorter side below which no frame is halved."""


def encode(picture: Tensor) -> bytes:
    """Return a picture [H, W, 3] uint8 as PNG, with a palette where there are few colours."""
    height, width, _ = picture.shape
    colours, index = picture.reshape(-1, 3).unique(dim=0, return_inverse=True)
    if len(colours) <= 256:
        rows, kind = index.view(height, width).to(torch.uint8), 3
        palette = _chunk(b"PLTE", colours.numpy().tobytes())
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
            _chunk(b"IDAT", zlib.compress(filtered.contiguous().numpy().tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def sprite_sheet(frames: Tensor, most_bytes: int) -> tuple[bytes, list[int], int, tuple[int, int]]:
    """Put frames [T, H, W, 3] uint8 side by side, equal ones once, smaller if they are too many.

    Returns:
        the PNG, the place of each frame, how many places a row has, and the (W, H) of a place.
    """
    flat, place = frames.flatten(1).unique(dim=0, return_inverse=True)
    different = flat.view(-1, *frames.shape[1:])
    while True:
        sheet, columns = _sheet(different)
        made = encode(sheet)
        height, width = different.shape[1:3]
        large = max(height, width) > LARGEST or len(made) > most_bytes
        if not large or min(height, width) < 2 * _SMALLEST:
            return made, place.tolist(), columns, (width, height)
        halved = different[:, : height // 2 * 2, : width // 2 * 2].permute(0, 3, 1, 2).float()
        halved = torch.nn.functional.avg_pool2d(halved, 2).round().to(torch.uint8)
        different = halved.permute(0, 2, 3, 1).contiguous()


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


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
