"""Long-term memory for PyTorch models: Hierarchical Transformer Memory (arXiv 2105.14039)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htm_pytorch.memory import ChunkedMemory
    from htm_pytorch.nn import HTMAttention, HTMBlock, HTMTransformer
    from htm_pytorch.ops import Recall, recall

__version__ = "1.0.0.dev0"

__all__ = ["ChunkedMemory", "HTMAttention", "HTMBlock", "HTMTransformer", "Recall", "recall"]

_PARTS = ("memory", "nn", "ops")
_PART_OF = {
    "ChunkedMemory": "memory",
    "HTMAttention": "nn",
    "HTMBlock": "nn",
    "HTMTransformer": "nn",
    "Recall": "ops",
    "recall": "ops",
}


def __getattr__(name: str) -> Any:
    # On first use, so that what needs no torch, such as the help of `htm`, does not wait for it.
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PART_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PART_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, *__all__})
