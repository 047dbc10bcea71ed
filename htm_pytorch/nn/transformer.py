"""`HTMTransformer`: layers that attend to the recent past and recall the far past."""

import os
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.memory.plan import existing
from htm_pytorch.nn.attention import HTMBlock
from htm_pytorch.nn.layer import Layer
from htm_pytorch.nn.state import LayerState, TransformerState, check_layer, in_place
from htm_pytorch.ops import Impl, Recall, masked_softmax
from htm_pytorch.shapes import (
    check_at_least,
    check_beside,
    check_device,
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
        dim: width of inputs and outputs.
        depth: layers.
        heads: heads of both kinds of attention.
        dim_head: width of a head.
        topk_mems: chunks a step recalls in each layer.
        mem_chunk_size: steps in a chunk.
        mem_chunks: chunks a layer remembers; then it forgets the oldest.
        window: steps that local attention covers, the current one included.
        mlp_ratio: hidden width of the MLP over `dim`.
        keep_across_episodes: recall earlier episodes too.
        detach_memories: stop gradients at the memories, as the paper does; False lets them flow
            through the chunks of the current call.
        impl: which implementation of `recall` computes it.
        device: of the parameters.
        dtype: of the parameters.
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
        keep_across_episodes: bool = False,
        detach_memories: bool = True,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = {"depth": depth, "mem_chunks": mem_chunks, "window": window, "mlp_ratio": mlp_ratio}
        for name, size in sizes.items():
            check_at_least(name, size, 1)
        self.dim = dim
        self.mem_chunk_size = mem_chunk_size
        self.mem_chunks = mem_chunks
        self.keep_across_episodes = keep_across_episodes
        self.layers = nn.ModuleList(
            Layer(
                mem_chunks,
                HTMBlock(
                    dim,
                    heads,
                    topk_mems,
                    mem_chunk_size,
                    dim_head,
                    detach_memories=detach_memories,
                    impl=impl,
                    **made,
                ),
                _LocalAttention(dim, heads, dim_head, window, **made),
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

    @overload
    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        is_first: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
        return_recall: Literal[False] = False,
    ) -> tuple[Tensor, TransformerState]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        is_first: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
        return_recall: Literal[True],
    ) -> tuple[Tensor, TransformerState, tuple[Recall, ...]]: ...

    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        is_first: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
        return_recall: bool = False,
    ) -> tuple[Tensor, TransformerState] | tuple[Tensor, TransformerState, tuple[Recall, ...]]:
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
            return_recall: also return what each layer recalled. Chunk indices count the ring's
                slots first, then the chunks that closed in this call, oldest first.

        Raises:
            ValueError: names the argument, what came and what was expected.
        """
        check_tensor("x", x, "B T D", D=self.dim)
        check_beside("x", x, self.norm.weight)
        if state is None:
            state = self.initial_state(x.shape[0])
        self._check(x, is_first, mask, at)
        state = self._check_state(state, x.shape[0])
        batch = x.shape[0]
        x, is_first, lengths, place = existing(x, is_first, mask)
        asked = None
        if mask is not None and place is not None:
            asked = mask if at is None else mask.gather(1, at)
            at = place if at is None else place.gather(1, at)
        after: list[LayerState] = []
        recalls: list[Recall] = []
        for number, (layer, before) in enumerate(zip(self._layers(), state, strict=True)):
            only = at if number == len(self.layers) - 1 else None
            x, layer_state, recall = layer(x, before, is_first, lengths, only, return_recall)
            if recall is not None and mask is not None and place is not None:
                exists = mask if only is None or asked is None else asked
                recall = in_place(recall, place if only is None else None, exists)
            recalls.extend([] if recall is None else [recall])
            after.append(layer_state)
        y = self.norm(x)
        if asked is not None:
            y = y.masked_fill(~asked[..., None], 0.0)
        made = TransformerState(tuple(after), self._expected(batch))
        return (y, made, tuple(recalls)) if return_recall else (y, made)

    def _layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def _windows(self) -> "list[_LocalAttention]":
        return [cast(_LocalAttention, layer.local) for layer in self._layers()]

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


class _LocalAttention(nn.Module):
    """Causal attention over a window, with a learned bias for each distance and head."""

    def __init__(self, dim: int, heads: int, dim_head: int, window: int, **made: Any):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.window = window
        self.norm = nn.LayerNorm(dim, **made)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **made)
        self.to_out = nn.Linear(heads * dim_head, dim, **made)
        self.distance_bias = nn.Parameter(torch.zeros(heads, window, **made))

    def window_sizes(self, batch: int) -> dict[str, int]:
        return {"B": batch, "W": self.window - 1, "H": self.heads, "E": self.dim_head}

    def initial_window(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        like, sizes = self.distance_bias, tuple(self.window_sizes(batch).values())
        keys, values = (torch.zeros(sizes, dtype=like.dtype, device=like.device) for _ in range(2))
        return keys, values, torch.zeros(batch, dtype=torch.int64, device=like.device)

    def forward(
        self, x: Tensor, state: LayerState, is_first: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        batch, length, _ = x.shape
        projected = self.to_qkv(self.norm(x)).view(batch, length, 3, self.heads, self.dim_head)
        queries, keys, values = projected.unbind(2)
        if state.keys.dtype == keys.dtype:
            before = state.keys, state.values
        else:
            before = state.keys.to(keys.dtype), state.values.to(keys.dtype)
        keys, values = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)
        if length == 1 and is_first is None and lengths is None:
            attended = self._attend_once(queries, keys, values, state.filled)
            filled = (state.filled + 1).clamp(max=self.window - 1)
        else:
            time = torch.arange(length, device=x.device)
            oldest = -state.filled[:, None].expand(batch, length)
            if is_first is not None and length:
                began = torch.where(is_first, time, -1).cummax(1).values
                oldest = torch.where(began < 0, oldest, began)
            attended = self._attend(queries, keys, values, oldest)
            end = length if lengths is None else lengths
            filled = state.filled
            if length:
                filled = (end - oldest[:, -1]).clamp(max=self.window - 1)
        window = self._newest(keys, state.keys, lengths), self._newest(values, state.keys, lengths)
        return self.to_out(attended.flatten(2)), (*window, filled)

    def _newest(self, part: Tensor, like: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the newest window - 1 of `part` [B, window - 1 + T, H, E], on their own."""
        past = self.window - 1
        if part.requires_grad:
            part = part.detach()
        if lengths is None:
            # On their own, not a view that would hold all steps of the call.
            part = part[:, part.shape[1] - past :].clone(memory_format=torch.contiguous_format)
        else:
            index = lengths[:, None] + torch.arange(past, device=part.device)
            part = part.gather(1, index[..., None, None].expand(-1, -1, *part.shape[2:]))
        return part if part.dtype == like.dtype else part.to(like.dtype)

    def _attend_once(self, queries: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> Tensor:
        """One query [B, 1, H, E] against all keys and values [B, window, H, E]."""
        if queries.dtype.itemsize < 4:
            queries = queries.to(torch.float32)
        # Sums of products: for one query they cost less than the layouts that products need.
        scores = torch.add(
            self.distance_bias.flip(1).t(), (queries * keys).sum(3), alpha=self.dim_head**-0.5
        )
        back = torch.arange(self.window - 1, -1, -1, device=keys.device)
        seen = (back <= filled.view(-1, 1)).unsqueeze(2)
        weights = torch.where(seen, scores, -torch.inf).softmax(1)
        attended = (weights.unsqueeze(3) * values).sum(1, keepdim=True)
        return attended if attended.dtype == values.dtype else attended.to(values.dtype)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, oldest: Tensor) -> Tensor:
        """Blocks of queries against the keys in their reach: linear in T.

        Args: queries [B, T, H, E], keys and values [B, window - 1 + T, H, E], and the oldest
        time [B, T] each query may see.
        """
        length, past = queries.shape[1], self.window - 1
        if not length:
            return queries
        block = min(self.window, length)
        missing = -length % block
        blocks = (length + missing) // block
        pad = torch.nn.functional.pad
        queries = pad(queries, (0, 0, 0, 0, 0, missing)).unflatten(1, (blocks, block))
        keys, values = (
            pad(part, (0, 0, 0, 0, 0, missing)).unfold(1, block + past, block)
            for part in (keys, values)
        )
        oldest = pad(oldest, (0, missing)).unflatten(1, (blocks, block))
        query = torch.arange(block, device=queries.device)
        key = torch.arange(block + past, device=queries.device)
        distance = query[:, None] + past - key
        near = (distance >= 0) & (distance <= past)
        start = torch.arange(blocks, device=queries.device)[:, None, None] * block
        mask = near & (start + key - past >= oldest[..., None])
        scores = torch.einsum("bnqhe,bnhek->bnhqk", queries * self.dim_head**-0.5, keys)
        scores = scores.to(_exact(scores.dtype)) + self.distance_bias[:, distance.clamp(0, past)]
        weights = masked_softmax(scores, mask[:, :, None]).to(values.dtype)
        attended = torch.einsum("bnhqk,bnhek->bnqhe", weights, values)
        return attended.flatten(1, 2)[:, :length]


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and softmaxes over numbers of `dtype`."""
    return torch.promote_types(dtype, torch.float32)
