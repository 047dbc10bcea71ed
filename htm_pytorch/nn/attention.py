"""`HTMAttention`: the projections around `recall`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from htm_pytorch.memory import ChunkedMemory, Home, ShardedMemory, Steps
from htm_pytorch.memory.home import is_home
from htm_pytorch.nn.affine import Affine, affine_of, check_unhooked, check_width, weight_of
from htm_pytorch.nn.positions import positions_of
from htm_pytorch.ops import Impl, Recall, Recency, attend, attend_with_weights, check_impl
from htm_pytorch.ops.places import together
from htm_pytorch.ops.recency import check_ages
from htm_pytorch.shapes import (
    check_at_least,
    check_beside,
    check_device,
    check_floating,
    check_kind,
    check_made,
    check_mask,
    check_not_negative,
    check_tensor,
)

CEILING, SHARPNESS = 3.0, 2.0
"""What a layer with recency begins with: its ceiling, and by what weights of the router are larger;
newest-of-many is learned from there (`docs/log.md`, 2026-11-27)."""
NO_CEILING = 1e4
"""Far above all products; not infinite, which optimizers with weight decay would make no number."""
Memories = Tensor | ChunkedMemory | Home
"""What a layer attends to."""


class HTMAttention(nn.Module):
    """Hierarchical attention over a memory cut into chunks (arXiv 2105.14039, section 3).

    Each query scores one summary per chunk, keeps its `topk_mems` best chunks, attends with
    `heads` heads inside each of them, and mixes the results by the softmax of their scores.
    Parameters and call fit the package `htm-pytorch` 0.0.4, whose checkpoints load.

    Args:
        dim: how many numbers a query has.
        heads: how many heads attend inside each chunk.
        topk_mems: how many chunks each query keeps.
        mem_chunk_size: how many steps a chunk holds, of memories given as a tensor.
        dim_head: how many numbers a query has in each head.
        add_pos_enc: whether a fixed sinusoid is added to the steps of a chunk, counted back from
            its newest.
        eps: a summary under a mask is the sum of its steps over (count + eps).
        dim_memory: how many numbers a memory step has; default `dim`.
        dim_features: how many numbers the router compares, and the output has; default `dim`.
        router_bias: whether the projections that score summaries have biases.
        inner_bias: whether the projections to queries, keys and values have biases.
        recency: whether the age of chunks counts, too, so that the newest of many like ones can be
            recalled: each query says how much (`ops.Recency`). Weights of a layer without it can
            be loaded, and then nothing changes.
        detach_memories: whether gradients stop at the memory, as in the paper.
        impl: which implementation of `recall` computes it.
        device: where the parameters are made; default torch's.
        dtype: which dtype the parameters have; default torch's.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        topk_mems: int = 2,
        mem_chunk_size: int = 32,
        dim_head: int = 64,
        add_pos_enc: bool = True,
        eps: float = 1e-5,
        *,
        dim_memory: int | None = None,
        dim_features: int | None = None,
        router_bias: bool = True,
        inner_bias: bool = False,
        recency: bool = False,
        detach_memories: bool = True,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dim_memory = dim if dim_memory is None else dim_memory
        dim_features = dim if dim_features is None else dim_features
        sizes = {
            "dim": dim,
            "heads": heads,
            "topk_mems": topk_mems,
            "mem_chunk_size": mem_chunk_size,
            "dim_head": dim_head,
            "dim_memory": dim_memory,
            "dim_features": dim_features,
        }
        for name, size in sizes.items():
            check_at_least(name, size, 1)
        check_impl(impl)
        check_made(device, dtype)
        check_not_negative("eps", eps)
        flags = {
            "add_pos_enc": add_pos_enc,
            "router_bias": router_bias,
            "inner_bias": inner_bias,
            "recency": recency,
            "detach_memories": detach_memories,
        }
        for name, flag in flags.items():
            check_kind(name, flag, bool, "a bool")
        self.dim = dim
        self.dim_memory = dim_memory
        self.dim_features = dim_features
        self.topk_mems = topk_mems
        self.mem_chunk_size = mem_chunk_size
        self.add_pos_enc = add_pos_enc
        self.eps = eps
        self.detach_memories = detach_memories
        self.impl: Impl = impl
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.to_summary_queries = nn.Linear(dim, dim_features, bias=router_bias, **made)
        self.to_summary_keys = nn.Linear(dim_memory, dim_features, bias=router_bias, **made)
        self.attn = StepProjections(
            dim, dim_memory, dim_features, heads, dim_head, inner_bias, **made
        )
        self.recency = recency
        if recency:
            self.to_recency = nn.Linear(dim, 2, **made)
            self._begin_recency()
        self.register_load_state_dict_pre_hook(_fit_state)

    def extra_repr(self) -> str:
        """Return what `print` says of it besides its projections."""
        return (
            f"dim={self.dim}, heads={self.attn.heads}, topk_mems={self.topk_mems}, "
            f"mem_chunk_size={self.mem_chunk_size}, dim_head={self.attn.dim_head}, "
            f"add_pos_enc={self.add_pos_enc}, recency={self.recency}, "
            f"detach_memories={self.detach_memories}, impl={self.impl!r}"
        )

    @torch.no_grad()
    def _begin_recency(self) -> None:
        """Let no age count at first, below a ceiling that hardly shows."""
        nn.init.zeros_(self.to_recency.weight)
        self.to_recency.bias.copy_(self.to_recency.bias.new_tensor([CEILING, 0.0]))
        # What is looked for has to rise far above the rest before its age can matter.
        for part in (self.to_summary_queries, self.to_summary_keys):
            part.weight.mul_(SHARPNESS)

    def forward(
        self,
        queries: Tensor,
        memories: Memories,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
        *,
        ages: Tensor | None = None,
    ) -> Tensor:
        """Return the attended memory [B, Q, D].

        Args:
            queries: [B, Q, D].
            memories: [B, N, D], oldest first, any N, cut into chunks from the newest end; or a
                memory, in RAM or elsewhere; or, on all ranks, a `ShardedMemory`. Batch 1 is shared
                by all queries without a copy.
            mask: [B, N] bool, False for steps of a tensor that do not exist.
            chunk_attn_mask: [B, Q, M] bool, the chunks that each query may see.
            ages: [B, Q, M] int64, how many chunks closed after each, as each query sees it; B and
                Q may be 1. None: as the memory orders its chunks. It counts with `recency` alone.

        A query that sees no chunk gets exactly zeros.

        Raises:
            ValueError: names the argument, what came and what was expected.
        """
        asked = self._ask(queries, memories, mask, chunk_attn_mask, ages)
        attended, seen = attend(**asked.arguments, impl=self.impl)
        return self._answer(asked, attended, seen)

    def recall(
        self,
        queries: Tensor,
        memories: Memories,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
        *,
        ages: Tensor | None = None,
    ) -> tuple[Tensor, Recall]:
        """Return what `forward` does, and which chunks and steps were recalled, with their weights.

        It is computed plainly, and gathers all that it reports: for looking at, not for speed.

        Raises:
            ValueError: as for `forward`; or hooks would change what `forward` returns.
        """
        check_unhooked(self, HTMAttention)
        asked = self._ask(queries, memories, mask, chunk_attn_mask, ages)
        attended, recalled = attend_with_weights(**asked.arguments)
        seen = (recalled.chunks >= 0).any(-1)
        return self._answer(asked, attended, seen), recalled

    def _ask(
        self,
        queries: Tensor,
        memories: Memories,
        mask: Tensor | None,
        chunk_attn_mask: Tensor | None,
        ages: Tensor | None,
    ) -> "_Asked":
        with together(memories):
            self.check_queries(queries)
            memory = self._memory(queries, memories, mask)
            sizes = {"B": queries.shape[0], "Q": queries.shape[1], "M": memory.chunks}
            check_mask("chunk_attn_mask", chunk_attn_mask, "B Q M", queries.device, **sizes)
            if ages is not None:
                check_ages("ages", ages, queries, memory.chunks)
            recency = None
            if self.recency:
                made = self.to_recency(queries)
                ceiling, decay = check_width("to_recency", self.to_recency, made, 2).unbind(-1)
                recency = Recency(ceiling, decay, ages)
            summary_keys = affine_of(
                "to_summary_keys",
                self.to_summary_keys,
                (self.dim_memory, self.dim_features),
                queries,
            )
            keys_values = self.attn.keys_values(self.dim_memory, queries)
            made = self.to_summary_queries(queries)
            check_width("to_summary_queries", self.to_summary_queries, made, self.dim_features)
            route = made @ summary_keys.weight
            step_queries = self.attn.queries(queries)
            positions = None
            if self.add_pos_enc:
                positions = positions_of(self.dim_memory, memory.chunk_size, step_queries)
            arguments = {
                "route": route * self.dim_features**-0.5,
                "queries": step_queries,
                "projections": self.attn.by_head(keys_values.weight),
                "memory": memory,
                "k": self.topk_mems,
                "positions": positions,
                "chunk_mask": chunk_attn_mask,
                "recency": recency,
            }
        return _Asked(arguments, keys_values.bias, summary_keys.bias)

    def _answer(self, asked: "_Asked", attended: Tensor, seen: Tensor) -> Tensor:
        attended = self.attn.output(attended, asked.step_bias)
        attended = torch.where(seen[..., None], attended, 0.0)
        if asked.summary_bias is not None and torch.is_grad_enabled():
            # It cancels in the softmax, but DDP wants a gradient for it: zeros.
            attended = attended + asked.summary_bias[:0].sum()
        return attended

    def check_queries(self, queries: Tensor) -> None:
        """Raise a ValueError unless the queries [B, Q, D] fit the layer."""
        check_tensor("queries", queries, "B Q D", D=self.dim)
        weight = weight_of(self.to_summary_queries)
        if weight is not None:
            check_beside("queries", queries, weight)

    def _memory(
        self, queries: Tensor, memories: Memories, mask: Tensor | None
    ) -> ChunkedMemory | Home | Steps:
        batch = queries.shape[0]
        if not isinstance(memories, Tensor):
            if mask is not None:
                raise ValueError(f"mask: expected None beside a {type(memories).__name__}")
            if not (isinstance(memories, ChunkedMemory) or is_home(memories)):
                kind = type(memories).__name__
                raise ValueError(f"memories: expected a tensor or a memory, got {kind}")
            if memories.dim != self.dim_memory:
                raise ValueError(f"memories: expected width {self.dim_memory}, got {memories.dim}")
            if memories.batch not in (1, batch):
                raise ValueError(f"memories: expected batch 1 or {batch}, got {memories.batch}")
            if not isinstance(memories, ChunkedMemory | ShardedMemory):
                return memories
            if memories.device != queries.device:
                raise ValueError(
                    f"memories: expected device {queries.device}, got {memories.device}"
                )
            return memories.detach() if self.detach_memories else memories
        check_tensor("memories", memories, "B N D", D=self.dim_memory)
        check_floating("memories", memories)
        check_device("memories", memories, queries.device)
        if memories.shape[0] not in (1, batch):
            raise ValueError(f"memories: expected batch 1 or {batch}, got {memories.shape[0]}")
        steps = memories.detach() if self.detach_memories else memories
        return Steps(steps, self.mem_chunk_size, mask, self.eps)


class _Asked(NamedTuple):
    """What is asked of `attend`, and the biases that are added to its answer."""

    arguments: dict[str, Any]
    step_bias: Tensor | None
    summary_bias: Tensor | None


class StepProjections(nn.Module):
    """The projections of the attention inside chunks, each applied on the query's side."""

    def __init__(
        self,
        dim: int,
        dim_memory: int,
        dim_out: int,
        heads: int,
        dim_head: int,
        bias: bool,
        **made: Any,
    ):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=bias, **made)
        self.to_kv = nn.Linear(dim_memory, 2 * inner, bias=bias, **made)
        self.to_out = nn.Linear(inner, dim_out, **made)

    def queries(self, queries: Tensor) -> Tensor:
        """W_q^h q: [B, Q, H, E]."""
        made = self.to_q(queries)
        check_width("attn.to_q", self.to_q, made, self.heads * self.dim_head)
        return made.unflatten(-1, (self.heads, -1))

    def keys_values(self, dim_memory: int, like: Tensor) -> Affine:
        """W_k above W_v, and b_k above b_v."""
        sizes = dim_memory, 2 * self.heads * self.dim_head
        return affine_of("attn.to_kv", self.to_kv, sizes, like)

    def by_head(self, weight: Tensor) -> Tensor:
        """W_k^h and W_v^h: [2, H, E, D]."""
        return weight.unflatten(0, (2, self.heads, -1))

    def output(self, attended: Tensor, bias: Tensor | None) -> Tensor:
        """W_o concat_h(attended_h + b_v^h) + b_o: [B, Q, D], with b_v the second half of `bias`."""
        attended = attended.flatten(2)
        if bias is not None:
            attended = attended + bias.chunk(2)[1]
        return self.to_out(attended)


def _fit_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # Positions are computed here; the package `htm-pytorch` 0.0.4 saved their frequencies.
    state_dict.pop(f"{prefix}pos_emb.inv_freqs", None)
    if not (isinstance(module, HTMAttention) and module.recency):
        return
    names = [name for name in state_dict if name.startswith(prefix)]
    known = [state_dict[n] for n in names if n.startswith(f"{prefix}to_summary_queries.")]
    if known and not any(name.startswith(f"{prefix}to_recency.") for name in names):
        # Weights from before ages counted: none do, and no product comes near the ceiling.
        state_dict[f"{prefix}to_recency.weight"] = known[0].new_zeros(2, module.dim)
        state_dict[f"{prefix}to_recency.bias"] = known[0].new_tensor([NO_CEILING, 0.0])
