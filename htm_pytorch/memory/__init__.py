"""Memory over time: a value that is written step by step and read chunk by chunk."""

from htm_pytorch.memory.chunked import ChunkedMemory, Unrolled
from htm_pytorch.memory.files import MemoryFileError

__all__ = ["ChunkedMemory", "MemoryFileError", "Unrolled"]
