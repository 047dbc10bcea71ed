"""`HTMTransformer`: layers that attend to the recent past and recall the far past."""

from typing import Literal, NamedTuple, cast, overload

import torch
from torch import Tensor, nn

from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.nn.attention import HTMBlock
from htm_pytorch.ops import Impl, Recall, masked_softmax
from htm_pytorch.shapes import (
    check_at_least,
    check_beside,
    check_device,
    check_mask,
    check_tensor,
    may_look_at,
)


class LayerState(NamedTuple):
    """What one layer carries from call to call."""

    memory: ChunkedMemory
    keys: Tensor
    """[B, window - 1, H, E] keys of the newest steps."""
    values: Tensor
    """[B, window - 1, H, E] their values."""
    filled: Tensor
    """[B] int64, how many of them the episode has filled."""


TransformerState = tuple[LayerState, ...]


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
    ):
        super().__init__()
        sizes = {"depth": depth, "mem_chunks": mem_chunks, "window": window, "mlp_ratio": mlp_ratio}
        for name, size in sizes.items():
            check_at_least(name, size, 1)
        self.dim = dim
        self.mem_chunk_size = mem_chunk_size
        self.mem_chunks = mem_chunks
        self.keep_across_episodes = keep_across_episodes
        self.layers = nn.ModuleList(
            _Layer(
                HTMBlock(
                    dim,
                    heads,
                    topk_mems,
                    mem_chunk_size,
                    dim_head,
                    detach_memories=detach_memories,
                    impl=impl,
                ),
                _LocalAttention(dim, heads, dim_head, window),
                mlp_ratio * dim,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def initial_state(self, batch_size: int) -> TransformerState:
        """Return the state of `batch_size` rows that have seen nothing."""
        check_at_least("batch_size", batch_size, 1)
        like = self.norm.weight
        memory = ChunkedMemory.empty(
            batch_size,
            self.mem_chunks,
            self.mem_chunk_size,
            self.dim,
            keep_across_episodes=self.keep_across_episodes,
            dtype=like.dtype,
            device=like.device,
        )
        return tuple(
            LayerState(memory, *layer.local.initial_window(batch_size)) for layer in self._layers()
        )

    @overload
    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        is_first: Tensor | None = None,
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
        *,
        at: Tensor | None = None,
        return_recall: Literal[True],
    ) -> tuple[Tensor, TransformerState, tuple[Recall, ...]]: ...

    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        is_first: Tensor | None = None,
        *,
        at: Tensor | None = None,
        return_recall: bool = False,
    ) -> tuple[Tensor, TransformerState] | tuple[Tensor, TransformerState, tuple[Recall, ...]]:
        """Return the outputs [B, T, D] and the state after the T steps.

        Args:
            x: [B, T, D].
            state: from the previous call; None: `initial_state`. It carries no gradient.
            is_first: [B, T] bool, True where a row starts a new episode.
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
        self._check(x, state, is_first, at)
        after: list[LayerState] = []
        recalls: list[Recall] = []
        for number, (layer, before) in enumerate(zip(self._layers(), state, strict=True)):
            last = number == len(self.layers) - 1
            x, layer_state, recall = layer(x, before, is_first, at if last else None, return_recall)
            after.append(layer_state)
            recalls.extend([] if recall is None else [recall])
        y = self.norm(x)
        return (y, tuple(after), tuple(recalls)) if return_recall else (y, tuple(after))

    def _layers(self) -> "list[_Layer]":
        return cast("list[_Layer]", list(self.layers))

    def _check(
        self, x: Tensor, state: TransformerState, is_first: Tensor | None, at: Tensor | None
    ) -> None:
        batch, length, _ = x.shape
        check_mask("is_first", is_first, "B T", x.device, B=batch, T=length)
        if at is not None:
            check_tensor("at", at, "B P", B=batch)
            check_device("at", at, x.device)
            if at.dtype != torch.int64:
                raise ValueError(f"at: expected dtype torch.int64, got {at.dtype}")
            if may_look_at(at) and at.numel() and not 0 <= int(at.min()) <= int(at.max()) < length:
                raise ValueError(
                    f"at: expected steps 0 to {length - 1}, got {int(at.min())} to {int(at.max())}"
                )
        if not isinstance(state, tuple) or len(state) != len(self.layers):
            raise ValueError(
                f"state: expected a tuple of {len(self.layers)} layers' states, got "
                f"{f'{len(state)} of them' if isinstance(state, tuple) else type(state).__name__}"
            )
        for number, (layer, part) in enumerate(zip(self._layers(), state, strict=True)):
            sizes = {"B": batch, "M": self.mem_chunks, "C": self.mem_chunk_size, "D": self.dim}
            name = f"state[{number}]"
            check_tensor(f"{name}.memory.contents", part.memory.contents, "B M C D", **sizes)
            check_beside(f"{name}.memory.contents", part.memory.contents, self.norm.weight)
            if part.memory.keep_across_episodes != self.keep_across_episodes:
                raise ValueError(
                    f"{name}.memory.keep_across_episodes: expected {self.keep_across_episodes}, "
                    f"got {part.memory.keep_across_episodes}"
                )
            window = layer.local.window_sizes(batch)
            check_tensor(f"{name}.keys", part.keys, "B W H E", **window)


class _Layer(nn.Module):
    def __init__(self, htm: HTMBlock, local: "_LocalAttention", dim_hidden: int):
        super().__init__()
        self.local = local
        self.htm = htm
        dim = htm.attn.dim
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim_hidden), nn.GELU(), nn.Linear(dim_hidden, dim)
        )

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        is_first: Tensor | None,
        at: Tensor | None,
        return_recall: bool,
    ) -> tuple[Tensor, LayerState, Recall | None]:
        attended, window = self.local(x, state, is_first)
        x = x + attended
        flows = not self.htm.attn.detach_memories
        steps = (x if flows else x.detach()).to(state.memory.contents.dtype)
        read, visible, memory = state.memory.unroll(steps, is_first)
        if at is not None:
            x = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
            visible = visible.gather(1, at[..., None].expand(-1, -1, visible.shape[2]))
        if return_recall:
            x, recall = self.htm(x, read, chunk_attn_mask=visible, return_recall=True)
        else:
            x, recall = self.htm(x, read, chunk_attn_mask=visible), None
        return x + self.mlp(x), LayerState(memory.detach(), *window), recall


class _LocalAttention(nn.Module):
    """Causal attention over a window, with a learned bias for each distance and head."""

    def __init__(self, dim: int, heads: int, dim_head: int, window: int):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.distance_bias = nn.Parameter(torch.zeros(heads, window))

    def window_sizes(self, batch: int) -> dict[str, int]:
        return {"B": batch, "W": self.window - 1, "H": self.heads, "E": self.dim_head}

    def initial_window(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.to_qkv.weight.new_zeros(*self.window_sizes(batch).values())
        return keys, keys, torch.zeros(batch, dtype=torch.int64, device=keys.device)

    def forward(
        self, x: Tensor, state: LayerState, is_first: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        batch, length, _ = x.shape
        past = self.window - 1
        queries, keys, values = (
            self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        )
        keys = torch.cat([state.keys.to(keys.dtype), keys], 1)
        values = torch.cat([state.values.to(values.dtype), values], 1)
        time = torch.arange(length, device=x.device)
        oldest = -state.filled[:, None].expand(batch, length)
        if is_first is not None and length:
            began = torch.where(is_first, time, -1).cummax(1).values
            oldest = torch.where(began < 0, oldest, began)
        kept = keys.shape[1] - past
        count = state.filled if not length else (length - oldest[:, -1]).clamp(max=past)
        window = (keys[:, kept:].detach(), values[:, kept:].detach(), count)
        attended = self._attend(queries, keys, values, oldest)
        return self.to_out(attended.flatten(2)), window

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
        scores = scores + self.distance_bias[:, distance.clamp(0, past)]
        attended = torch.einsum(
            "bnhqk,bnhek->bnqhe", masked_softmax(scores, mask[:, :, None]), values
        )
        return attended.flatten(1, 2)[:, :length]
