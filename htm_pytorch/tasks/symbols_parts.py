"""What an agent sees of tasks whose symbols are new in every episode."""

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn


class BindingEncoder(nn.Module):
    """Names and objects, each in one way wherever they are, so that what matches is alike.

    A binding is the sum of a name and an object; a question adds the objects in their order to the
    name that is asked for.
    """

    def __init__(self, space: spaces.Space[Any], dim: int):
        super().__init__()
        assert isinstance(space, spaces.Dict)
        (words, size) = space["objects"].shape or (0, 0)
        self.name = symbol_embedding(size, dim)
        self.object = symbol_embedding(size, dim)
        self.options = nn.Linear(words * size, dim, bias=False)
        self.asks = nn.Embedding(2, dim)

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        """Encode names [B, T, S] and objects [B, T, N, S]: [B, T, D]."""
        name, objects, asks = (observation[part] for part in ("name", "objects", "asks"))
        like = self.options.weight.dtype
        objects = objects.to(like)
        shown = torch.where(
            asks[..., None] > 0, self.options(objects.flatten(-2)), self.object(objects[..., 0, :])
        )
        return self.name(name.to(like)) + shown + self.asks(asks)


def symbol_embedding(size: int, dim: int) -> nn.Linear:
    """Return a map of symbols [..., S] to [..., D] that keeps which of them are alike."""
    embedding = nn.Linear(size, dim, bias=False)
    nn.init.orthogonal_(embedding.weight)
    return embedding
