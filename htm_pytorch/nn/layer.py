"""`Layer`: of an `HTMTransformer`; the recent past, then the far past, then an MLP."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.memory.writing import Reached
from htm_pytorch.nn import fused
from htm_pytorch.nn.affine import is_plain
from htm_pytorch.nn.attention import HTMAttention
from htm_pytorch.nn.block import HTMBlock
from htm_pytorch.nn.local import LocalAttention
from htm_pytorch.nn.state import LayerState
from htm_pytorch.ops import Recall
from htm_pytorch.shapes import is_seen, may_look_at

MASK_BYTES = 32 * 2**20
"""Of the mask of steps by chunks that is made at a time."""
AGE_BYTES = 12
"""Of an age of a chunk and of its logarithm, where a mask has one."""


class Given(NamedTuple):
    """The steps that a memory gets."""

    steps: Tensor  # [B, T, D]
    is_first: Tensor | None  # [B, T]
    lengths: Tensor | None  # [B]

    def split(self, count: int) -> tuple["Given", "Given"]:
        """Return the first `count` of them, and the others."""
        steps, is_first, lengths = self
        first = Given(
            steps[:, :count],
            None if is_first is None else is_first[:, :count],
            None if lengths is None else lengths.clamp(max=count),
        )
        others = Given(
            steps[:, count:],
            None if is_first is None else is_first[:, count:],
            None if lengths is None else (lengths - count).clamp(min=0),
        )
        return first, others


class Layer(nn.Module):
    """Local attention, `HTMBlock` on the layer's own memory (or none), and an MLP, with skips."""

    def __init__(
        self, htm: HTMBlock | None, local: LocalAttention, dim: int, dim_hidden: int, **made: Any
    ):
        super().__init__()
        self.local = local
        self.htm = htm
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim, **made),
            nn.Linear(dim, dim_hidden, **made),
            nn.GELU(),
            nn.Linear(dim_hidden, dim, **made),
        )

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        is_first: Tensor | None,
        lengths: Tensor | None,
        at: Tensor | None,
        with_recall: bool,
    ) -> tuple[Tensor, LayerState, Recall | None]:
        """Return the outputs, the state after the steps and, if asked for, what they recalled.

        Args:
            x: [B, T, D].
            state: of this layer.
            is_first: [B, T] bool, where episodes begin.
            lengths: [B] int64, how many of the T steps there are; None: all.
            at: [B, P] int64, the steps whose outputs are asked for; None: all.
            with_recall: whether what was recalled is asked for.
        """
        if x.shape[1] == 1 and is_first is None and lengths is None and not with_recall:
            # `at` can ask for nothing but the one step.
            made = fused.step(self, x, state) if at is None or at.shape[1] == 1 else None
            if made is not None:
                return *made, None
        attended, window = self.local(x, state, is_first, lengths)
        x = x + attended
        if self.htm is None or state.memory is None:
            x = x if at is None else _taken(x, at)
            return x + self.mlp(x), LayerState(None, *window), None
        memory = state.memory
        is_heard = _has_any_global_hook() or not (
            is_plain(self.htm, HTMBlock) and is_plain(self.htm.attn, HTMAttention)
        )
        if is_heard:
            # Whoever listens may keep what it is given.
            memory._ring.keep()
        flows = not self.htm.attn.detach_memories
        steps = x if flows or not x.requires_grad else x.detach()
        if steps.dtype != memory.dtype:
            steps = steps.to(memory.dtype)
        given = Given(steps, is_first, lengths)
        if at is not None:
            if not (is_heard or with_recall) and (early := _unasked(at, x.shape[1])):
                # What is held need not lie beside what these close.
                first, given = given.split(early)
                memory, x, at = memory._append(*first), x[:, early:], at - early
            x = _taken(x, at)
        reached = memory.reach(*given)
        if at is None and (reached.reach.times is not None or with_recall):
            at = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        recall = None
        if with_recall and at is not None:
            visible, ages = reached.reach.visible(at), _ages(self.htm, reached, at)
            x, recall = self.htm.recall(x, reached.read, chunk_attn_mask=visible, ages=ages)
            # Of the ring's slots those that were never written were left out.
            left_out = memory.chunks - reached.reach.held
            is_new = recall.chunks >= reached.reach.held
            recall = recall._replace(chunks=recall.chunks + left_out * is_new)
        else:
            x = _recalled(self.htm, x, reached, at, memory.chunks)
        return x + self.mlp(x), LayerState(reached.after().detach(), *window), recall


def _unasked(at: Tensor, length: int) -> int:
    """Return how many of so many steps are before all those asked for, `at` [B, P], if known."""
    if not at.shape[1]:
        return length
    # With gradients, both calls would copy what is held.
    if torch.is_grad_enabled() or not may_look_at(at) or not at.numel():
        return 0
    return int(at.min())


def _recalled(
    htm: HTMBlock, x: Tensor, reached: Reached[ChunkedMemory], time: Tensor | None, room: int
) -> Tensor:
    """Return x with what the steps `time` [B, P] recalled, a few at a time if they are many.

    So the mask of steps by chunks, and what is made of it, do not grow with their product. Where
    all steps see the same, `time` may be None.
    """
    recency = htm.attn.recency
    if reached.reach.times is None or time is None:
        return htm(x, reached.read, ages=_ages(htm, reached, time))
    batch, chunks = reached.reach.valid.shape
    each = MASK_BYTES // (AGE_BYTES if recency else 1)
    whole = batch * time.shape[1] * chunks <= each
    if whole or not is_seen():
        visible, ages = reached.reach.visible(time), _ages(htm, reached, time)
        return htm(x, reached.read, chunk_attn_mask=visible, ages=ages)
    # In so many steps at most as many chunks close as the ring has room for.
    block = each // (batch * (2 * room + 1))
    block = max(1, min(block, room * reached.read.chunk_size))
    parts: list[Tensor] = []
    for some, when in zip(x.split(block, 1), time.split(block, 1), strict=True):
        read, visible, ages = reached.seen(when, with_ages=recency)
        parts.append(htm(some, read, chunk_attn_mask=visible, ages=ages))
    return torch.cat(parts, 1)


def _ages(htm: HTMBlock, reached: Reached[ChunkedMemory], time: Tensor | None) -> Tensor | None:
    """Return how old the chunks are for the steps `time` [B, P]; None where it does not count."""
    return reached.reach.ages(time) if htm.attn.recency else None


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """Return the steps `at` [B, P] of x [B, T, D]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
