"""Memory over time: a value that is written step by step and read chunk by chunk."""

from htm_pytorch.memory.chunked import ChunkedMemory, Unrolled
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.peers import ShardError
from htm_pytorch.memory.sharded import ShardedMemory
from htm_pytorch.memory.steps import Steps

__all__ = [
    "ChunkedMemory",
    "MemoryFileError",
    "ShardError",
    "ShardedMemory",
    "Steps",
    "Unrolled",
]
