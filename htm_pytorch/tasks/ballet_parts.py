"""What an agent sees of Ballet, encoded by square, and told again."""

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from htm_pytorch.envs import ballet_tables as tables


class FrameEncoder(nn.Module):
    """The sum of what stands where and of the word."""

    def __init__(self, space: spaces.Space[Any], dim: int):
        super().__init__()
        self.kind = _kind(space)
        self.frame = self.make_frame(dim)
        self.instruction = nn.Embedding(len(tables.INSTRUCTIONS), dim)

    def make_frame(self, dim: int) -> nn.Module:
        """Return the encoder of frames alone."""
        return (SymbolEncoder if self.kind == "symbols" else ImageEncoder)(dim)

    def forward(self, observation: dict[str, Any]) -> Tensor:
        """Encode frames [B, T, ...] and instructions [B, T]: [B, T, D]."""
        word = self.instruction(observation["instruction"])
        return self.frame(observation[self.kind]) + word


class StageEncoder(FrameEncoder):
    """The same, of symbols by `StageSymbolEncoder`."""

    def make_frame(self, dim: int) -> nn.Module:
        """Return the encoder of frames alone."""
        return StageSymbolEncoder(dim) if self.kind == "symbols" else super().make_frame(dim)


class FrameDecoder(nn.Module):
    """What stands where, and the word."""

    def __init__(self, space: spaces.Space[Any], dim: int):
        super().__init__()
        self.kind = _kind(space)
        self.frame = (SymbolDecoder if self.kind == "symbols" else ImageDecoder)(dim)
        self.instruction = nn.Linear(dim, len(tables.INSTRUCTIONS))

    def loss(self, features: Tensor, observation: dict[str, Any]) -> Tensor:
        """Return the cross entropy of observations [X, ...] given features [X, D]."""
        told = self.instruction(features)
        words = nn.functional.cross_entropy(told, observation["instruction"])
        return self.frame.loss(features, observation[self.kind]) + words


class SymbolEncoder(nn.Module):
    """What stands on each square: a sum over squares, bound by a non-linearity, then mixed."""

    def __init__(self, dim: int):
        super().__init__()
        squares = tables.BOARD**2
        self.square = nn.Embedding(squares, dim)
        self.shape = nn.Embedding(len(tables.SHAPES) + 1, dim)
        self.colour = nn.Embedding(len(tables.COLOURS) + 1, dim)
        self.walls = nn.Linear(squares, dim)
        self.mix = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames [B, T, 11, 11]: [B, T, D]."""
        flat = frames.flatten(0, 1).flatten(1)
        walls = self.walls((flat == tables.WALL).to(self.square.weight.dtype))
        frame, square = (flat >= tables.AGENT).nonzero(as_tuple=True)
        shape, colour = _shape_and_colour(flat[frame, square])
        things = self.place(square) + self.shape(shape) + self.colour(colour)
        things = nn.functional.relu(things)
        return self.mix(walls.index_add(0, frame, things)).unflatten(0, frames.shape[:2])

    def place(self, square: Tensor) -> Tensor:
        """Encode squares [X] of the view: [X, D]."""
        return self.square(square)


class StageSymbolEncoder(SymbolEncoder):
    """As `SymbolEncoder`, with a part that squares have in common, as in a convolution of stride 3.

    Dancers have stages of 3 by 3 squares each; a step to the north is then the same step on all of
    them, where the squares of each would have to be learned apart.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.step = nn.Embedding(9, dim)

    def place(self, square: Tensor) -> Tensor:
        """Encode squares [X] of the view: [X, D]."""
        row, column = square // tables.BOARD % 3, square % tables.BOARD % 3
        return self.square(square) + self.step(3 * row + column)


class SymbolDecoder(nn.Module):
    """Which kind of thing stands on each square, and the shape and colour where it is a dancer."""

    def __init__(self, dim: int):
        super().__init__()
        self.kinds = nn.Linear(dim, tables.BOARD**2 * 4)
        self.square = nn.Embedding(tables.BOARD**2, dim)
        self.looks = nn.Linear(dim, len(tables.SHAPES) + len(tables.COLOURS) + 2)

    def loss(self, features: Tensor, frames: Tensor) -> Tensor:
        """Return the cross entropy of frames [X, 11, 11] given features [X, D], a frame's mean."""
        flat = frames.flatten(1).long()
        kinds = self.kinds(features).unflatten(-1, (-1, 4)).flatten(0, 1)
        kind = flat.clamp(max=tables.FIRST_DANCER).flatten()
        loss = nn.functional.cross_entropy(kinds, kind, reduction="sum")
        frame, square = (flat >= tables.FIRST_DANCER).nonzero(as_tuple=True)
        shape, colour = _shape_and_colour(flat[frame, square])
        looks = self.looks(nn.functional.relu(features[frame] + self.square(square)))
        shapes, colours = looks.split([len(tables.SHAPES) + 1, len(tables.COLOURS) + 1], -1)
        loss = loss + nn.functional.cross_entropy(shapes, shape, reduction="sum")
        loss = loss + nn.functional.cross_entropy(colours, colour, reduction="sum")
        return loss / len(features)


def _shape_and_colour(symbols: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and colour from 1; 0 and 0 for the agent."""
    dancer = symbols.long() - tables.FIRST_DANCER
    is_dancer = dancer >= 0
    shape = torch.where(is_dancer, dancer // len(tables.COLOURS) + 1, 0)
    return shape, torch.where(is_dancer, dancer % len(tables.COLOURS) + 1, 0)


class ImageEncoder(nn.Module):
    """A residual network on the picture, one strided block a halving, after a tile-wise stem."""

    def __init__(self, dim: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, tables.TILE, stride=tables.TILE)
        self.blocks = nn.ModuleList(_Residual(32) for _ in range(2))
        self.out = nn.Linear(32 * tables.BOARD**2, dim)

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames [B, T, 99, 99, 3]: [B, T, D]."""
        x = frames.flatten(0, 1).permute(0, 3, 1, 2).to(self.out.weight.dtype) / 255
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(nn.functional.relu(x).flatten(1)).unflatten(0, frames.shape[:2])


class ImageDecoder(nn.Module):
    """The picture from features, by a transposed convolution of tiles."""

    def __init__(self, dim: int):
        super().__init__()
        self.squares = nn.Linear(dim, 32 * tables.BOARD**2)
        self.tiles = nn.ConvTranspose2d(32, 3, tables.TILE, stride=tables.TILE)

    def loss(self, features: Tensor, frames: Tensor) -> Tensor:
        """Return the cross entropy of frames [X, 99, 99, 3] as intensities, a pixel's mean."""
        squares = nn.functional.relu(self.squares(features)).view(
            -1, 32, tables.BOARD, tables.BOARD
        )
        target = frames.permute(0, 3, 1, 2).to(features.dtype) / 255
        return nn.functional.binary_cross_entropy_with_logits(self.tiles(squares), target)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(nn.functional.relu(x))
        return x + self.second(nn.functional.relu(hidden))


def _kind(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Dict):
        for kind in ("symbols", "image"):
            if set(space) == {kind, "instruction"}:
                return kind
    raise ValueError(
        f"env: expected Ballet's symbols or image beside its instruction, got {space}; "
        "by its id, not its name, Ballet is trained like any other environment"
    )
