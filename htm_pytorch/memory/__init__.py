"""Memory over time: a value that is written step by step and read chunk by chunk; its homes."""

from htm_pytorch.memory.chunked import ChunkedMemory, Unrolled
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.home import Home, ScoredHome, SearchedHome
from htm_pytorch.memory.opened import open_memory as open
from htm_pytorch.memory.peers import ShardError
from htm_pytorch.memory.sharded import ShardedMemory
from htm_pytorch.memory.steps import Steps
from htm_pytorch.memory.stored import ExactMemory, IndexedMemory, StoredMemory

__all__ = [
    "ChunkedMemory",
    "ExactMemory",
    "Home",
    "IndexedMemory",
    "MemoryFileError",
    "ScoredHome",
    "SearchedHome",
    "ShardError",
    "ShardedMemory",
    "Steps",
    "StoredMemory",
    "Unrolled",
    "open",
]
