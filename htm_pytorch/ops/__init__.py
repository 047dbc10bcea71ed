"""The mathematics: tensors in, tensors out; no modules, no state."""

from htm_pytorch.ops.attention import Impl, Recall, check_impl, recall, recall_with_weights
from htm_pytorch.ops.reference import allowed_chunks, masked_softmax

__all__ = [
    "Impl",
    "Recall",
    "allowed_chunks",
    "check_impl",
    "masked_softmax",
    "recall",
    "recall_with_weights",
]
