"""The mathematics: tensors in, tensors out; no modules, no state."""

from htm_pytorch.ops.attention import attend, recall
from htm_pytorch.ops.engines import Impl, RecallImpl, check_impl
from htm_pytorch.ops.recency import Recency
from htm_pytorch.ops.reference import masked_softmax
from htm_pytorch.ops.weights import Recall, attend_with_weights, recall_with_weights

__all__ = [
    "Impl",
    "Recall",
    "RecallImpl",
    "Recency",
    "attend",
    "attend_with_weights",
    "check_impl",
    "masked_softmax",
    "recall",
    "recall_with_weights",
]
