"""From an observation space to tensors, to an encoder, and to what reconstructs it.

What is seen is nested as the space is: dicts and tuples of tensors [B, T, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from htm_pytorch.rl.pictures import (
    BoardDecoder,
    BoardEncoder,
    PictureDecoder,
    PictureEncoder,
    is_board,
    is_picture,
)
from htm_pytorch.rl.space import check_size, units_of

Nested = Any
"""A tensor or an array, or a dict or tuple of such."""


class Steps(NamedTuple):
    """What a batch of environments showed over time."""

    observation: Nested
    """[B, T, ...] each."""
    is_first: Tensor
    """[B, T] bool, the first of an episode."""
    exists: Tensor | None = None
    """[B, T] bool, False where a row waited for others; None: everywhere True."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Steps":
        """Return the steps with a function applied to each tensor."""
        exists = None if self.exists is None else function(self.exists)
        return Steps(nested(function, self.observation), function(self.is_first), exists)


def nested(function: Callable[..., Any], first: Nested, *others: Nested) -> Nested:
    """Return `function` of the leaves that have the same place in each."""
    if isinstance(first, dict):
        return {key: nested(function, first[key], *(o[key] for o in others)) for key in first}
    if isinstance(first, tuple):
        return tuple(nested(function, *parts) for parts in zip(first, *others, strict=True))
    return function(first, *others)


def leaves(value: Nested) -> list[Any]:
    """Return the leaves, in order."""
    found: list[Any] = []
    nested(found.append, value)
    return found


def as_tensor(array: Any) -> Tensor:
    """Return an array as a tensor of its own, of a dtype that torch computes with."""
    array = np.asarray(array)
    if array.dtype == np.uint16:
        # Half as much to copy as 32 bits; up to 32767 it is the same.
        small = not array.size or int(array.max()) < 2**15
        array = array.view(np.int16) if small else array.astype(np.int32)
    elif array.dtype in (np.uint32, np.uint64):
        array = array.astype(np.int64)
    elif array.dtype == np.float64:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def make_encoder(space: spaces.Space[Any], dim: int) -> nn.Module:
    """Return a module from what the space holds, nested [B, T, ...], to [B, T, D].

    Raises:
        ValueError: a space without an encoder.
    """
    return _make(space, dim, "", 0)


def make_decoder(space: spaces.Space[Any], dim: int) -> nn.Module:
    """Return a module whose `loss(features [X, D], observation [X, ...])` is small if they fit.

    Raises:
        ValueError: a space without a decoder.
    """
    return _make(space, dim, "", 1)


def _make(space: spaces.Space[Any], dim: int, place: str, which: int) -> nn.Module:
    """Return the encoder (0) or the decoder (1)."""
    where = place.lstrip(".")
    check_size(space, f"observations at {where}" if where else "observations")
    match space:
        case spaces.Dict():
            parts = {name: _make(s, dim, f"{place}.{name}", which) for name, s in space.items()}
            return (EncodedParts, DecodedParts)[which](parts, dim)
        case spaces.Tuple():
            named = {str(n): _make(s, dim, f"{place}[{n}]", which) for n, s in enumerate(space)}
            return (EncodedParts, DecodedParts)[which](named, dim)
        case spaces.Discrete():
            return (ChoiceEncoder, ChoiceDecoder)[which]([int(space.n)], dim, int(space.start))
        case spaces.MultiDiscrete():
            nvec = [int(n) for n in space.nvec.ravel()]
            return (ChoiceEncoder, ChoiceDecoder)[which](nvec, dim, space.start.ravel())
        case spaces.MultiBinary():
            box = spaces.Box(0, 1, space.shape, np.int8)
            return (VectorEncoder, VectorDecoder)[which](box, dim)
        case spaces.Box() if is_board(space):
            return (BoardEncoder, BoardDecoder)[which](space, dim)
        case spaces.Box() if is_picture(space):
            return (PictureEncoder, PictureDecoder)[which](space, dim)
        case spaces.Box():
            return (VectorEncoder, VectorDecoder)[which](space, dim)
    raise ValueError(
        f"env: expected observations of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple, "
        f"got {space}{' at ' + place.lstrip('.') if place else ''}; "
        "--observe names the parts to keep, and make_agent takes an encoder"
    )


class EncodedParts(nn.Module):
    """Dict and Tuple: each part encoded, then bound to the others."""

    def __init__(self, parts: dict[str, nn.Module], dim: int):
        super().__init__()
        self.names = list(parts)
        self.parts = nn.ModuleList(parts.values())
        self.bind = nn.Sequential(nn.GELU(), nn.Linear(dim * len(parts), dim))

    def forward(self, observation: Nested) -> Tensor:
        """Encode a dict or tuple of [B, T, ...]: [B, T, D]."""
        values = _parts(observation, self.names)
        encoded = [part(value) for part, value in zip(self.parts, values, strict=True)]
        return self.bind(torch.cat(encoded, -1))


class DecodedParts(nn.Module):
    """Dict and Tuple: the sum of the parts' losses."""

    def __init__(self, parts: dict[str, nn.Module], dim: int):
        super().__init__()
        self.names = list(parts)
        self.parts = nn.ModuleList(parts.values())

    def loss(self, features: Tensor, observation: Nested) -> Tensor:
        """Return the loss of a dict or tuple of [X, ...] given features [X, D]."""
        values = _parts(observation, self.names)
        pairs = zip(self.parts, values, strict=True)
        return torch.stack([part.loss(features, value) for part, value in pairs]).sum()  # pyright: ignore[reportCallIssue]


class ChoiceEncoder(nn.Module):
    """Discrete and MultiDiscrete: an embedding for each possibility of each choice."""

    offset: Tensor

    def __init__(self, nvec: list[int], dim: int, start: Any):
        super().__init__()
        self.embedding = nn.Embedding(sum(nvec), dim)
        offset = np.concatenate([[0], np.cumsum(nvec)[:-1]]) - start
        self.register_buffer("offset", torch.as_tensor(offset), persistent=False)

    def forward(self, observation: Tensor) -> Tensor:
        """Encode integers [B, T, ...]: [B, T, D]."""
        chosen = observation.long().reshape(*observation.shape[:2], -1) + self.offset
        return self.embedding(chosen).sum(2)


class ChoiceDecoder(nn.Module):
    """Discrete and MultiDiscrete: the cross entropy of each choice."""

    start: Tensor

    def __init__(self, nvec: list[int], dim: int, start: Any):
        super().__init__()
        self.nvec = nvec
        self.logits = nn.Linear(dim, sum(nvec))
        self.register_buffer("start", torch.as_tensor(start), persistent=False)

    def loss(self, features: Tensor, observation: Tensor) -> Tensor:
        """Return the cross entropy of integers [X, ...] given features [X, D]."""
        chosen = observation.long().flatten(1) if observation.ndim > 1 else observation[:, None]
        chosen = chosen - self.start
        parts = zip(self.logits(features).split(self.nvec, -1), chosen.unbind(1), strict=True)
        return torch.stack([nn.functional.cross_entropy(a, b) for a, b in parts]).sum()


class Scaled(nn.Module):
    """Numbers [..., N] of a Box; of bounded ones, from -1 to 1."""

    middle: Tensor
    scale: Tensor

    def __init__(self, space: spaces.Box):
        super().__init__()
        # Bounds like those of CartPole's velocities, 3e38, say nothing.
        for name, part in zip(("middle", "scale"), units_of(space, 1e4), strict=True):
            made = torch.tensor(part.ravel(), dtype=torch.get_default_dtype())
            self.register_buffer(name, made, persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Return them scaled."""
        return (numbers.to(self.middle.dtype) - self.middle) / self.scale


class VectorEncoder(nn.Module):
    """Box of numbers, in any shape, as one vector; bounded ones are scaled to -1 to 1."""

    def __init__(self, space: spaces.Box, dim: int):
        super().__init__()
        self.scaled = Scaled(space)
        size = len(self.scaled.middle)
        self.net = nn.Sequential(nn.Linear(size, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, observation: Tensor) -> Tensor:
        """Encode numbers [B, T, ...]: [B, T, D]."""
        return self.net(self.scaled(observation.reshape(*observation.shape[:2], -1)))


class VectorDecoder(nn.Module):
    """Box of numbers: half the squared error of the scaled vector, a number's mean."""

    def __init__(self, space: spaces.Box, dim: int):
        super().__init__()
        self.scaled = Scaled(space)
        self.net = nn.Linear(dim, len(self.scaled.middle))

    def loss(self, features: Tensor, observation: Tensor) -> Tensor:
        """Return the error of numbers [X, ...] given features [X, D]."""
        target = self.scaled(observation.reshape(len(features), -1))
        return 0.5 * nn.functional.mse_loss(self.net(features), target)


def _parts(observation: Nested, names: list[str]) -> list[Nested]:
    if isinstance(observation, dict):
        return [observation[name] for name in names]
    return list(observation)
