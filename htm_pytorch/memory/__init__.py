"""Memory over time: a value that is written step by step and read chunk by chunk; its homes."""

from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.home import ExactHome, Home, ScoredHome, SearchedHome
from htm_pytorch.memory.many import Memories, open_many
from htm_pytorch.memory.opening import open_memory as open
from htm_pytorch.memory.rank_group import ShardError
from htm_pytorch.memory.reading import Found
from htm_pytorch.memory.repair import Report, repair
from htm_pytorch.memory.sharded import ShardedMemory
from htm_pytorch.memory.span import Span
from htm_pytorch.memory.steps import Steps
from htm_pytorch.memory.stored import ExactMemory, IndexedMemory, StoredMemory
from htm_pytorch.memory.view import View
from htm_pytorch.memory.writing import Unrolled

__all__ = [
    "ChunkedMemory",
    "ExactHome",
    "ExactMemory",
    "Found",
    "Home",
    "IndexedMemory",
    "Memories",
    "MemoryFileError",
    "Report",
    "ScoredHome",
    "SearchedHome",
    "ShardError",
    "ShardedMemory",
    "Span",
    "Steps",
    "StoredMemory",
    "Unrolled",
    "View",
    "open",
    "open_many",
    "repair",
]
