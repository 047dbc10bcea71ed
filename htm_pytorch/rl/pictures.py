"""Encoders and decoders of pictures, and of boards: small grids whose numbers are symbols."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

BOARD = 20
"""Squares along the longer side, up to which a grid of small integers is a board."""
SYMBOLS = 8
"""Width of a symbol of a board."""


def is_picture(space: spaces.Box) -> bool:
    """Say whether a Box holds pictures: bytes [H, W, C] or [C, H, W], or a stack of them."""
    return space.dtype == np.uint8 and len(space.shape) in (3, 4) and _sides(space) is not None


def is_board(space: spaces.Box) -> bool:
    """Say whether a Box holds small grids [H, W] or [H, W, C] of integers from 0 to 255."""
    if not np.issubdtype(space.dtype, np.integer) or len(space.shape) not in (2, 3):
        return False
    small = max(space.shape[:2]) <= BOARD and min(space.shape[:2]) > 1
    return small and bool((space.low >= 0).all() and (space.high <= 255).all())


class PictureEncoder(nn.Module):
    """Strided convolutions with residual ones between, each halving the picture."""

    def __init__(self, space: spaces.Box, dim: int):
        super().__init__()
        self.layout = _Layout(space)
        blocks: list[nn.Module] = []
        side, before = (self.layout.height, self.layout.width), self.layout.channels
        for width in (16, 32, 32, 32):
            if min(side) < 4:
                break
            blocks += [nn.Conv2d(before, width, 3, stride=2, padding=1), _Residual(width)]
            side, before = ((side[0] + 1) // 2, (side[1] + 1) // 2), width
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Linear(side[0] * side[1] * before, dim)

    def forward(self, observation: Tensor) -> Tensor:
        """Encode pictures [B, T, ...]: [B, T, D]."""
        x = self.layout(observation.flatten(0, 1)).to(self.out.weight.dtype) / 255
        hidden = nn.functional.relu(self.blocks(x)).flatten(1)
        return self.out(hidden).unflatten(0, observation.shape[:2])


class PictureDecoder(nn.Module):
    """A coarse picture: tiles from features, by one transposed convolution."""

    def __init__(self, space: spaces.Box, dim: int):
        super().__init__()
        self.layout = _Layout(space)
        self.rows, self.columns = (
            -(-side // 8) for side in (self.layout.height, self.layout.width)
        )
        self.squares = nn.Linear(dim, 32 * self.rows * self.columns)
        self.tiles = nn.ConvTranspose2d(32, self.layout.channels, 8, stride=8)

    def loss(self, features: Tensor, observation: Tensor) -> Tensor:
        """Return the cross entropy of pictures [X, ...] as intensities, a pixel's mean."""
        target = self.layout(observation).to(features.dtype) / 255
        squares = nn.functional.relu(self.squares(features))
        made = self.tiles(squares.view(-1, 32, self.rows, self.columns))
        made = made[..., : target.shape[2], : target.shape[3]]
        return nn.functional.binary_cross_entropy_with_logits(made, target)


class BoardEncoder(nn.Module):
    """A symbol's embedding by layer of the board, then all squares at once: boards are small."""

    def __init__(self, space: spaces.Box, dim: int):
        super().__init__()
        self.symbols, self.layers = _symbols_and_layers(space)
        self.embedding = nn.Embedding(self.symbols * self.layers, SYMBOLS)
        places = int(np.prod(space.shape)) * SYMBOLS
        self.out = nn.Sequential(nn.Linear(places, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, observation: Tensor) -> Tensor:
        """Encode boards [B, T, H, W] or [B, T, H, W, C]: [B, T, D]."""
        flat = observation.flatten(0, 1).long()
        flat = flat if flat.ndim == 4 else flat[..., None]
        layer = torch.arange(self.layers, device=flat.device) * self.symbols
        return self.out(self.embedding(flat + layer).flatten(1)).unflatten(0, observation.shape[:2])


class BoardDecoder(nn.Module):
    """The cross entropy of the symbol on each square, a board's mean."""

    def __init__(self, space: spaces.Box, dim: int):
        super().__init__()
        self.symbols, _ = _symbols_and_layers(space)
        self.places = int(np.prod(space.shape))
        self.hidden = nn.Linear(dim, self.places * SYMBOLS)
        self.logits = nn.Linear(SYMBOLS, self.symbols)

    def loss(self, features: Tensor, observation: Tensor) -> Tensor:
        """Return the cross entropy of boards [X, ...] given features [X, D]."""
        hidden = nn.functional.relu(self.hidden(features)).view(-1, SYMBOLS)
        target = observation.long().flatten()
        return nn.functional.cross_entropy(self.logits(hidden), target)


class _Layout:
    """From pictures as an environment shows them to [X, C, H, W]; a stack lies in the channels."""

    def __init__(self, space: spaces.Box):
        sides = _sides(space)
        if sides is None:
            raise ValueError(f"space: expected pictures, got {space}")
        self.channels_last, self.height, self.width = sides
        self.channels = int(np.prod(space.shape)) // (self.height * self.width)

    def __call__(self, pictures: Tensor) -> Tensor:
        if self.channels_last:
            pictures = pictures.movedim(-1, 1) if pictures.ndim == 4 else pictures.movedim(-1, 2)
        return pictures.reshape(len(pictures), self.channels, self.height, self.width)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(nn.functional.relu(x))


def _sides(space: spaces.Box) -> tuple[bool, int, int] | None:
    """Return whether channels come last, height and width; None for what is no picture."""
    first, *_, last = space.shape[-3:]
    if last <= 4 and min(space.shape[-3:-1]) >= 8:
        return True, space.shape[-3], space.shape[-2]
    if (first <= 4 or len(space.shape) == 3) and min(space.shape[-2:]) >= 8:
        return False, space.shape[-2], space.shape[-1]
    return None


def _symbols_and_layers(space: Any) -> tuple[int, int]:
    return int(space.high.max()) + 1, space.shape[2] if len(space.shape) == 3 else 1
