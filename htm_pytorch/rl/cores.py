"""Memories in the middle of an agent: one contract, and those that keep it.

A core has `dim`, `initial_state(batch)`, and `y, state = core(x, state, is_first, mask, at=at)`:

* x [B, T, D], is_first [B, T] bool where a row begins an episode, with nothing of what it saw;
* mask [B, T] bool, False for steps that do not exist: the row goes on without them; None: all do;
* y [B, T, D], or with at [B, P] int64 the outputs of these steps alone, [B, P, D];
* the state is a value: a tree of tensors with the rows first, as `torch.utils._pytree` sees it, or
  something with `select(rows)` and `detach()`. Steps one by one give what they give at once.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from htm_pytorch import HTMTransformer
from htm_pytorch.rl.config import MemoryConfig
from htm_pytorch.rl.recurrent import NoMemory, RecurrentCore

State = Any


class Core(Protocol):
    """What an agent asks of its memory."""

    def initial_state(self, batch_size: int) -> State:
        """Return the state of rows that have seen nothing."""
        ...

    def __call__(
        self,
        x: Tensor,
        state: State,
        is_first: Tensor,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Return the outputs and the state after all steps."""
        ...


def select_rows(state: State, rows: Tensor) -> State:
    """Return a copy of some rows [R] int64 of a state."""
    # A tensor alone is a tree, too; its own `select` is another one.
    if hasattr(state, "select") and not isinstance(state, Tensor):
        return state.select(rows)
    return pytree.tree_map(lambda part: part[rows], state)


def detach(state: State) -> State:
    """Return a state cut from the graph."""
    if hasattr(state, "detach"):
        return state.detach()
    return pytree.tree_map(torch.Tensor.detach, state)


def make_core(config: MemoryConfig) -> nn.Module:
    """Return the config's memory, with about as many parameters as `htm` has at these sizes."""
    return _maker(config)(None)


def count_parameters(config: MemoryConfig) -> int:
    """Return how many parameters the config's memory has, without making it."""
    return _count(_maker(config))


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
