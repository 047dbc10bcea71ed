"""What an agent sees of Ballet, encoded by square, and told again."""

from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from htm_pytorch.envs import ballet_tables as tables


class FrameEncoder(nn.Module):
    """The sum of what stands where and of the word."""

    stages = False
    """Whether squares have a part in common, as in a convolution of stride 3.

    Dancers have stages of 3 by 3 squares each; a step to the north is then the same step on all of
    them, where the squares of each would have to be learned apart.
    """

    def __init__(self, space: spaces.Space[Any], dim: int):
        super().__init__()
        self.kind = _kind(space)
        kind = SymbolEncoder if self.kind == "symbols" else TileEncoder
        self.frame = kind(dim, self.stages)
        self.instruction = nn.Embedding(len(tables.INSTRUCTIONS), dim)

    def forward(self, observation: dict[str, Any]) -> Tensor:
        """Encode frames [B, T, ...] and instructions [B, T]: [B, T, D]."""
        word = self.instruction(observation["instruction"])
        return self.frame(observation[self.kind]) + word


class StageEncoder(FrameEncoder):
    """The same, with `stages`."""

    stages = True


class FrameDecoder(nn.Module):
    """What stands where, and the word."""

    def __init__(self, space: spaces.Space[Any], dim: int):
        super().__init__()
        self.kind = _kind(space)
        self.frame = (SymbolDecoder if self.kind == "symbols" else TileDecoder)(dim)
        self.instruction = nn.Linear(dim, len(tables.INSTRUCTIONS))

    def loss(self, features: Tensor, observation: dict[str, Any]) -> Tensor:
        """Return the cross entropy of observations [X, ...] given features [X, D]."""
        told = self.instruction(features)
        words = nn.functional.cross_entropy(told, observation["instruction"])
        return self.frame.loss(features, observation[self.kind]) + words


class Seen(NamedTuple):
    """X frames, and the N things in them."""

    ground: Tensor
    """[X, 121] what is no thing, a number a square."""
    frame: Tensor
    """[N] in which frame a thing stands."""
    square: Tensor
    """[N] on which of its squares."""
    looks: Tensor
    """[N, D] encoded."""


class SquareEncoder(nn.Module):
    """What stands on each square: a sum over squares, bound by a non-linearity, then mixed."""

    def __init__(self, dim: int, stages: bool = False):
        super().__init__()
        squares = tables.BOARD**2
        self.square = nn.Embedding(squares, dim)
        self.make_looks(dim)
        self.walls = nn.Linear(squares, dim)
        self.mix = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.step = nn.Embedding(9, dim) if stages else None

    def make_looks(self, dim: int) -> None:
        """Make what encodes the looks of a thing."""
        raise NotImplementedError

    def see(self, frames: Tensor) -> Seen:
        """Find what stands in frames [X, ...]."""
        raise NotImplementedError

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames [B, T, ...]: [B, T, D]."""
        seen = self.see(frames.flatten(0, 1))
        things = nn.functional.relu(self.place(seen.square) + seen.looks)
        mixed = self.mix(self.walls(seen.ground).index_add(0, seen.frame, things))
        return mixed.unflatten(0, frames.shape[:2])

    def place(self, square: Tensor) -> Tensor:
        """Encode squares [X] of the view: [X, D]."""
        if self.step is None:
            return self.square(square)
        row, column = square // tables.BOARD % 3, square % tables.BOARD % 3
        return self.square(square) + self.step(3 * row + column)


class SymbolEncoder(SquareEncoder):
    """Frames of symbols [X, 11, 11]."""

    def make_looks(self, dim: int) -> None:
        """Make the embeddings of shapes and colours."""
        self.shape = nn.Embedding(len(tables.SHAPES) + 1, dim)
        self.colour = nn.Embedding(len(tables.COLOURS) + 1, dim)

    def see(self, frames: Tensor) -> Seen:
        """Find the agent and the dancers; walls are the ground."""
        flat = frames.flatten(1)
        walls = (flat == tables.WALL).to(self.walls.weight.dtype)
        frame, square = (flat >= tables.AGENT).nonzero(as_tuple=True)
        shape, colour = _shape_and_colour(flat[frame, square])
        return Seen(walls, frame, square, self.shape(shape) + self.colour(colour))


class TileEncoder(SquareEncoder):
    """Pictures [X, 99, 99, 3], by tiles: one of a single shade is ground, any other is a thing.

    All tiles through a convolution cost 40 times as much, and few of them differ.
    """

    def make_looks(self, dim: int) -> None:
        """Make the network of a tile."""
        self.tile = nn.Sequential(nn.Linear(_TILE_BYTES, dim), nn.GELU(), nn.Linear(dim, dim))

    def see(self, frames: Tensor) -> Seen:
        """Find the tiles with a pattern."""
        tiles = _tiles(frames, self.walls.weight.dtype)
        return Seen(tiles.shade, tiles.frame, tiles.square, self.tile(tiles.things))


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


class TileDecoder(nn.Module):
    """The shade of each square, whether a thing stands there, and its picture."""

    def __init__(self, dim: int):
        super().__init__()
        self.squares = nn.Linear(dim, tables.BOARD**2 * 2)
        self.square = nn.Embedding(tables.BOARD**2, dim)
        self.tile = nn.Linear(dim, _TILE_BYTES)

    def loss(self, features: Tensor, frames: Tensor) -> Tensor:
        """Return the cross entropy of pictures [X, 99, 99, 3], a mean over frames.

        Of a thing's picture, that of one line of it.
        """
        tiles = _tiles(frames, features.dtype)
        is_thing = torch.zeros_like(tiles.shade)
        is_thing[tiles.frame, tiles.square] = 1
        told = self.squares(features)
        loss = _cross_entropy(told, torch.cat([tiles.shade, is_thing], 1))
        hidden = nn.functional.relu(features[tiles.frame] + self.square(tiles.square))
        loss = loss + _cross_entropy(self.tile(hidden), tiles.things) / tables.TILE
        return loss / len(features)


class _Tiles(NamedTuple):
    shade: Tensor
    """[X, 121] from 0 to 1, 0 where a tile has a pattern."""
    frame: Tensor
    square: Tensor
    things: Tensor
    """[N, 243] from 0 to 1, the tiles with a pattern."""


_TILE_BYTES = tables.TILE**2 * 3


def _tiles(pictures: Tensor, dtype: torch.dtype) -> _Tiles:
    """Cut bytes [X, 99, 99, 3]."""
    strips = pictures.unflatten(1, (tables.BOARD, -1)).flatten(3).unflatten(3, (tables.BOARD, -1))
    # Lines first, then their bytes: in one step it takes five times as long.
    brightest, darkest = strips.amax(2).amax(3).flatten(1), strips.amin(2).amin(3).flatten(1)
    shade = torch.where(brightest == darkest, brightest, 0).to(dtype) / 255
    frame, square = (brightest != darkest).nonzero(as_tuple=True)
    row, column = square // tables.BOARD, square % tables.BOARD
    things = strips.transpose(2, 3)[frame, row, column].flatten(1).to(dtype) / 255
    return _Tiles(shade, frame, square, things)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")


def _kind(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Dict):
        for kind in ("symbols", "image"):
            if set(space) == {kind, "instruction"}:
                return kind
    raise ValueError(
        f"env: expected Ballet's symbols or image beside its instruction, got {space}; "
        "by its id, not its name, Ballet is trained like any other environment"
    )
