"""The agent: what it sees -> `HTMTransformer` -> what it does, expects and can reconstruct."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from htm_pytorch import HTMTransformer, Recall
from htm_pytorch.envs import ballet_tables as tables
from htm_pytorch.nn import TransformerState


class Observations(NamedTuple):
    """What a batch of environments showed over time."""

    frames: Tensor
    """[B, T, 11, 11] int16 symbols, or [B, T, 99, 99, 3] uint8 pictures."""
    instructions: Tensor
    """[B, T] int64."""
    is_first: Tensor
    """[B, T] bool."""


class Outputs(NamedTuple):
    """What the agent makes of the steps it was asked about, P of each row."""

    features: Tensor
    """[B, P, D]."""
    logits: Tensor
    """[B, P, A] of the policy."""
    values: Tensor
    """[B, P]."""


class Agent(nn.Module):
    """Encoders, memory, policy, value and reconstruction (arXiv 2105.14039, figure 1).

    Widths and sizes are our choices; the paper's tables were not at hand.

    Args:
        observation: "symbols" or "image", as the environment shows them.
        actions: number of actions.
        dim: width of the model.
        depth: layers of the memory.
        heads: heads of its attentions, each `dim / heads` wide.
        topk_mems: chunks a step recalls.
        mem_chunk_size: steps in a chunk.
        mem_chunks: chunks a layer remembers.
        window: steps that local attention covers.
        detach_memories: stop gradients at the memory, as the paper does.
    """

    def __init__(
        self,
        observation: Literal["symbols", "image"],
        actions: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        topk_mems: int,
        mem_chunk_size: int,
        mem_chunks: int,
        window: int,
        detach_memories: bool,
    ):
        super().__init__()
        encoder = {"symbols": SymbolEncoder, "image": ImageEncoder}[observation]
        decoder = {"symbols": SymbolDecoder, "image": ImageDecoder}[observation]
        self.encode_frame = encoder(dim)
        self.encode_instruction = nn.Embedding(len(tables.INSTRUCTIONS), dim)
        self.memory = HTMTransformer(
            dim,
            depth,
            heads,
            dim // heads,
            topk_mems=topk_mems,
            mem_chunk_size=mem_chunk_size,
            mem_chunks=mem_chunks,
            window=window,
            mlp_ratio=2,
            detach_memories=detach_memories,
        )
        self.policy = _mlp(dim, actions)
        self.value = _mlp(dim, 1)
        self.decode_frame = decoder(dim)
        self.decode_instruction = nn.Linear(dim, len(tables.INSTRUCTIONS))

    def initial_state(self, batch_size: int) -> TransformerState:
        """Return the state of rows that have seen nothing."""
        return self.memory.initial_state(batch_size)

    def forward(
        self, seen: Observations, state: TransformerState, at: Tensor
    ) -> tuple[Outputs, TransformerState]:
        """Return the outputs at the steps `at` [B, P] and the state after all T steps."""
        features, state = self.memory(self._encode(seen), state, seen.is_first, at=at)
        return self._heads(features), state

    def recall(
        self, seen: Observations, state: TransformerState, at: Tensor
    ) -> tuple[Outputs, tuple[Recall, ...]]:
        """Return the outputs at the steps `at` [B, P] and what each layer recalled there."""
        encoded = self._encode(seen)
        features, _, recalls = self.memory.recall(encoded, state, seen.is_first, at=at)
        return self._heads(features), recalls

    def reconstruction_loss(self, features: Tensor, frames: Tensor, instructions: Tensor) -> Tensor:
        """Return how badly features [X, D] tell the inputs [X, ...] they were made from.

        No gradient enters the memory through what is recalled later, and reward alone is too
        sparse to teach what to store; reconstruction does.
        """
        words = nn.functional.cross_entropy(self.decode_instruction(features), instructions)
        return self.decode_frame.loss(features, frames) + words

    def _heads(self, features: Tensor) -> Outputs:
        return Outputs(features, self.policy(features), self.value(features)[..., 0])

    def _encode(self, seen: Observations) -> Tensor:
        return self.encode_frame(seen.frames) + self.encode_instruction(seen.instructions)


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
        things = self.square(square) + self.shape(shape) + self.colour(colour)
        things = nn.functional.relu(things)
        return self.mix(walls.index_add(0, frame, things)).unflatten(0, frames.shape[:2])


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


def _mlp(dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs))
