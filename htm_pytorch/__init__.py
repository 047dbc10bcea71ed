"""Long-term memory for PyTorch models: Hierarchical Transformer Memory (arXiv 2105.14039)."""

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.nn import HTMAttention, HTMBlock, HTMTransformer
from htm_pytorch.ops import Recall, recall

__version__ = "1.0.0.dev0"

__all__ = ["ChunkedMemory", "HTMAttention", "HTMBlock", "HTMTransformer", "Recall", "recall"]
