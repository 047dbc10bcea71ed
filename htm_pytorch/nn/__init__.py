"""Layers: parameters around `ops.recall`."""

from htm_pytorch.nn.attention import HTMAttention
from htm_pytorch.nn.block import HTMBlock
from htm_pytorch.nn.published import from_haiku
from htm_pytorch.nn.transformer import HTMTransformer, LayerState, TransformerState

__all__ = [
    "HTMAttention",
    "HTMBlock",
    "HTMTransformer",
    "LayerState",
    "TransformerState",
    "from_haiku",
]
