"""Memories in the middle of an agent, all of which keep `contract.Core`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from htm_pytorch import HTMTransformer
from htm_pytorch.rl.config import MemoryConfig
from htm_pytorch.rl.newest import NewestCore
from htm_pytorch.rl.recurrent import NoMemory, RecurrentCore


def make_core(config: MemoryConfig) -> nn.Module:
    """Return the config's memory, with about as many parameters as `htm` has at these sizes."""
    return _whole(config)(None)


def count_parameters(config: MemoryConfig) -> int:
    """Return how many parameters the config's memory has, without making it."""
    return _count(_whole(config))


def _whole(config: MemoryConfig) -> Callable[[Any], nn.Module]:
    make = _maker(config)
    if config.newest == 1:
        return make
    return lambda device: NewestCore(make(device), config.dim, config.newest, device)


def _maker(config: MemoryConfig) -> Callable[[Any], nn.Module]:
    dim, depth = config.dim, config.depth
    match config.memory:
        case "htm":
            return lambda device: _htm(config, device)
        case "gru" | "lstm":
            kind = nn.GRU if config.memory == "gru" else nn.LSTM
            return _fitted(config, lambda w, d: RecurrentCore(kind, dim, depth, w, d))
        case "none":
            return _fitted(config, lambda w, d: NoMemory(dim, depth, w, d))
        case "window":
            return lambda device: _without_chunks(config, config.window, device)
        case "transformer":
            reach = config.mem_chunks * config.mem_chunk_size + config.window
            return lambda device: _without_chunks(config, reach, device)


def _fitted(
    config: MemoryConfig, make: Callable[[int, Any], nn.Module]
) -> Callable[[Any], nn.Module]:
    """Return a maker of the width whose parameter count is nearest to that of `htm`."""

    def count(width: int) -> int:
        return _count(lambda device: make(width, device))

    wanted = _count(lambda device: _htm(config, device))
    low, high = 1, 2
    while count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    nearest = min((low, high), key=lambda width: abs(count(width) - wanted))
    return lambda device: make(nearest, device)


def _htm(config: MemoryConfig, device: Any) -> HTMTransformer:
    return _transformer(config, config.mem_chunks, config.window, _MLP_RATIO, device)


def _without_chunks(config: MemoryConfig, window: int, device: Any) -> HTMTransformer:
    # An HTM block has 6 D^2 weights more, an MLP 2 D^2 for each unit of its ratio.
    return _transformer(config, 0, window, _MLP_RATIO + 3, device)


def _transformer(
    config: MemoryConfig, chunks: int, window: int, ratio: int, device: Any
) -> HTMTransformer:
    return HTMTransformer(
        config.dim,
        config.depth,
        config.heads,
        config.dim // config.heads,
        topk_mems=config.topk_mems,
        mem_chunk_size=config.mem_chunk_size,
        mem_chunks=chunks,
        window=window,
        mlp_ratio=ratio,
        recency=config.recency,
        detach_memories=config.detach_memories,
        device=device,
    )


def _count(make: Callable[[Any], nn.Module]) -> int:
    return sum(parameter.numel() for parameter in make("meta").parameters())


_MLP_RATIO = 2
