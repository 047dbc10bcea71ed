"""`HTMTransformer`: layers that attend to the recent past and recall the far past."""

import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.memory.plan import existing
from htm_pytorch.nn.block import HTMBlock
from htm_pytorch.nn.layer import Layer
from htm_pytorch.nn.local import LocalAttention
from htm_pytorch.nn.state import LayerState, TransformerState, begun, check_layer, in_place
from htm_pytorch.ops import Impl, Recall, check_impl
from htm_pytorch.shapes import (
    check_at_least,
    check_beside,
    check_device,
    check_kind,
    check_made,
    check_mask,
    check_tensor,
    may_look_at,
)


class HTMTransformer(nn.Module):
    """A transformer with a memory in every layer (arXiv 2105.14039, figure 1).

    Each layer: causal attention over the last `window` steps -> `HTMBlock` on the layer's own
    memory -> MLP, all pre-norm with skips. A layer's memory holds what its `HTMBlock` gets as
    input; steps can be recalled once their chunk of `mem_chunk_size` steps has closed.

    The state is a value: `y, state = model(x, state)`. Feeding T steps at once equals feeding
    them one by one.

    Args:
        dim: how many numbers an input has, and an output.
        depth: how many layers there are.
        heads: how many heads each attention has, the local one and that to the memory.
        dim_head: how many numbers a query has in each head.
        topk_mems: how many chunks a step recalls in each layer.
        mem_chunk_size: how many steps a chunk holds.
        mem_chunks: how many chunks a layer remembers before it forgets the oldest. With 0 there is
            no memory at all, for a baseline with the same window; then `topk_mems`,
            `mem_chunk_size`, `recency`, `keep_across_episodes` and `detach_memories` mean nothing.
        window: how many steps local attention covers, the current one included.
        mlp_ratio: how many times as wide as `dim` the hidden layer of an MLP is.
        recency: whether the age of chunks counts, too, so that the newest of many like ones can be
            recalled; see `HTMAttention`.
        keep_across_episodes: whether earlier episodes can be recalled, too.
        detach_memories: whether gradients stop at the memories, as in the paper; otherwise they
            flow through the chunks of the current call.
        impl: which implementation of `recall` computes it. Local attention is computed by the
            compiled kernel with "auto" and "native" on the CPU, else by operators of torch. For
            second derivatives of the model take "reference".
        device: where the parameters are made; default torch's.
        dtype: which dtype the parameters have; default torch's.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        *,
        topk_mems: int,
        mem_chunk_size: int,
        mem_chunks: int,
        window: int,
        mlp_ratio: int = 4,
        recency: bool = True,
        keep_across_episodes: bool = False,
        detach_memories: bool = True,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_made(device, dtype)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = {"dim": dim, "depth": depth, "heads": heads, "dim_head": dim_head}
        for name, size in {**sizes, "window": window, "mlp_ratio": mlp_ratio}.items():
            check_at_least(name, size, 1)
        check_impl(impl)
        check_at_least("mem_chunks", mem_chunks, 0)
        check_kind("keep_across_episodes", keep_across_episodes, bool, "a bool")
        check_kind("detach_memories", detach_memories, bool, "a bool")
        self.dim = dim
        self.mem_chunk_size = mem_chunk_size
        self.mem_chunks = mem_chunks
        self.keep_across_episodes = keep_across_episodes
        self.layers = nn.ModuleList(
            Layer(
                HTMBlock(
                    dim,
                    heads,
                    topk_mems,
                    mem_chunk_size,
                    dim_head,
                    recency=recency,
                    detach_memories=detach_memories,
                    impl=impl,
                    **made,
                )
                if mem_chunks
                else None,
                LocalAttention(dim, heads, dim_head, window, impl, **made),
                dim,
                mlp_ratio * dim,
                **made,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, **made)

    def extra_repr(self) -> str:
        """Return what `print` says of it besides its layers."""
        return (
            f"dim={self.dim}, mem_chunk_size={self.mem_chunk_size}, mem_chunks={self.mem_chunks}, "
            f"keep_across_episodes={self.keep_across_episodes}"
        )

    def initial_state(self, batch_size: int) -> TransformerState:
        """Return the state of `batch_size` rows that have seen nothing."""
        check_at_least("batch_size", batch_size, 0)
        like = self.norm.weight
        layers: list[LayerState] = []
        for local in self._windows():
            memory = None
            if self.mem_chunks:
                memory = ChunkedMemory.empty(
                    batch_size,
                    self.mem_chunks,
                    self.mem_chunk_size,
                    self.dim,
                    keep_across_episodes=self.keep_across_episodes,
                    dtype=like.dtype,
                    device=like.device,
                )
            layers.append(LayerState(memory, *local.initial_window(batch_size)))
        return TransformerState(tuple(layers), self._expected(batch_size))

    def load_state(self, path: str | os.PathLike[str]) -> TransformerState:
        """Return the state that `TransformerState.save` wrote, where this model is.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not a state, or not of such a model.
        """
        state = TransformerState.load(path, device=self.norm.weight.device)
        self._check_state(state, state.batch)
        return state

    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        is_first: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
    ) -> tuple[Tensor, TransformerState]:
        """Return the outputs [B, T, D] and the state after the T steps.

        Args:
            x: [B, T, D].
            state: from the previous call; None: `initial_state`. It carries no gradient.
            is_first: [B, T] bool, True where a row starts a new episode.
            mask: [B, T] bool, False for steps that do not exist, as in a padded batch. The row
                goes on without them: outputs and state are those of the row alone. The outputs
                of such steps are zeros.
            at: [B, P] int64, return the outputs of these steps of each row only, [B, P, D]; the
                last layer then computes no others.

        Raises:
            ValueError: names the argument, what came and what was expected.
        """
        y, state, _ = self._run(x, state, is_first, mask, at, with_recall=False)
        return y, state

    def recall(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        is_first: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
    ) -> tuple[Tensor, TransformerState, tuple[Recall, ...]]:
        """Return what `forward` does, and what each layer recalled; see `HTMAttention.recall`.

        Numbers of chunks count the ring's slots first, then the chunks that closed in this call,
        oldest first.
        """
        if not self.mem_chunks:
            raise ValueError("recall: expected a model with a memory, got mem_chunks = 0")
        return self._run(x, state, is_first, mask, at, with_recall=True)

    def _run(
        self,
        x: Tensor,
        state: TransformerState | None,
        is_first: Tensor | None,
        mask: Tensor | None,
        at: Tensor | None,
        *,
        with_recall: bool,
    ) -> tuple[Tensor, TransformerState, tuple[Recall, ...]]:
        check_tensor("x", x, "B T D", D=self.dim)
        check_beside("x", x, self.norm.weight)
        if state is None:
            state = self.initial_state(x.shape[0])
        self._check(x, is_first, mask, at)
        state = self._check_state(state, x.shape[0])
        batch = x.shape[0]
        if x.shape[1] == 1 and is_first is not None and mask is None and may_look_at(x):
            # An agent acts step by step: what need not be told apart inside a call costs less.
            if not is_first.any():
                is_first = None
            elif not self.keep_across_episodes:
                state, is_first = begun(state, is_first[:, 0]), None
        x, is_first, lengths, place = existing(x, is_first, mask)
        asked = None
        if mask is not None and place is not None:
            asked = mask if at is None else mask.gather(1, at)
            at = place if at is None else place.gather(1, at)
        after: list[LayerState] = []
        recalls: list[Recall] = []
        for number, (layer, before) in enumerate(zip(self._layers(), state, strict=True)):
            only = at if number == len(self.layers) - 1 else None
            x, layer_state, recall = layer(x, before, is_first, lengths, only, with_recall)
            if recall is not None and mask is not None and place is not None:
                exists = mask if only is None or asked is None else asked
                recall = in_place(recall, place if only is None else None, exists)
            recalls.extend([] if recall is None else [recall])
            after.append(layer_state)
        y = self.norm(x)
        if asked is not None:
            y = y.masked_fill(~asked[..., None], 0.0)
        made = TransformerState(tuple(after), self._expected(batch))
        return y, made, tuple(recalls)

    def _layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def _windows(self) -> list[LocalAttention]:
        return [cast(LocalAttention, layer.local) for layer in self._layers()]

    def _expected(self, batch: int) -> tuple[Any, ...] | None:
        """Return what a state of `batch` rows must be like, in short."""
        if torch.compiler.is_compiling():
            return None
        like = self.norm.weight
        local = self._windows()[0]
        window = local.window, local.heads, local.dim_head
        memory = self.mem_chunks, self.mem_chunk_size, self.dim, self.keep_across_episodes
        return (batch, len(self.layers), *memory, *window, like.dtype, like.device)

    def _check(
        self, x: Tensor, is_first: Tensor | None, mask: Tensor | None, at: Tensor | None
    ) -> None:
        batch, length, _ = x.shape
        check_mask("is_first", is_first, "B T", x.device, B=batch, T=length)
        check_mask("mask", mask, "B T", x.device, B=batch, T=length)
        if at is None:
            return
        check_tensor("at", at, "B P", B=batch)
        check_device("at", at, x.device)
        if at.dtype != torch.int64:
            raise ValueError(f"at: expected dtype torch.int64, got {at.dtype}")
        if may_look_at(at) and at.numel() and not 0 <= int(at.min()) <= int(at.max()) < length:
            raise ValueError(
                f"at: expected steps 0 to {length - 1}, got {int(at.min())} to {int(at.max())}"
            )

    def _check_state(self, state: object, batch: int) -> TransformerState:
        if isinstance(state, tuple):
            state = TransformerState(state)
        if not isinstance(state, TransformerState) or len(state) != len(self.layers):
            is_state = isinstance(state, TransformerState)
            found = f"one of {len(state)}" if is_state else type(state).__name__
            raise ValueError(
                f"state: expected a TransformerState of {len(self.layers)} layers, got {found}"
            )
        expected = self._expected(batch)
        if expected is not None and state._fits == expected:
            return state
        sizes = {"B": batch, "M": self.mem_chunks, "C": self.mem_chunk_size, "D": self.dim}
        for number, (local, part) in enumerate(zip(self._windows(), state, strict=True)):
            window = local.window_sizes(batch)
            keep = self.keep_across_episodes
            check_layer(f"state[{number}]", part, sizes, window, keep, self.norm.weight)
        return state
