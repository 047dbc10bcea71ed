"""Memory over time: a value that is written step by step and read chunk by chunk; its homes."""

from htm_pytorch.memory.chunked import ChunkedMemory, Unrolled
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.home import Home
from htm_pytorch.memory.peers import ShardError
from htm_pytorch.memory.sharded import ShardedMemory
from htm_pytorch.memory.steps import Steps
from htm_pytorch.memory.stored import StoredMemory
from htm_pytorch.memory.stored import open_memory as open

__all__ = [
    "ChunkedMemory",
    "Home",
    "MemoryFileError",
    "ShardError",
    "ShardedMemory",
    "Steps",
    "StoredMemory",
    "Unrolled",
    "open",
]
