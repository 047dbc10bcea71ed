"""Long-term memory for PyTorch models: Hierarchical Transformer Memory (arXiv 2105.14039)."""

from typing import TYPE_CHECKING

from htm_pytorch.lazy import on_first_use

if TYPE_CHECKING:
    from htm_pytorch.memory import ChunkedMemory
    from htm_pytorch.nn import HTMAttention, HTMBlock, HTMTransformer
    from htm_pytorch.ops import Recall, recall

__version__ = "1.0.0.dev0"

__all__ = ["ChunkedMemory", "HTMAttention", "HTMBlock", "HTMTransformer", "Recall", "recall"]

# So that what needs no torch, such as the help of `htm`, does not wait for it.
_MODULE_OF = {
    **dict.fromkeys(("memory", "nn", "ops"), ""),
    "ChunkedMemory": "memory",
    "HTMAttention": "nn",
    "HTMBlock": "nn",
    "HTMTransformer": "nn",
    "Recall": "ops",
    "recall": "ops",
}

__getattr__ = on_first_use(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
