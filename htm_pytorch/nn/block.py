"""`HTMBlock`: attention to a memory between a norm and a skip."""

from typing import Literal

import torch
from torch import Tensor, nn

from htm_pytorch.nn.affine import check_unhooked
from htm_pytorch.nn.attention import HTMAttention, Memories
from htm_pytorch.ops import Impl, Recall
from htm_pytorch.ops.places import together
from htm_pytorch.shapes import check_at_least, check_made


class HTMBlock(nn.Module):
    """x + HTMAttention(LayerNorm(x), memory), as in figure 1(c) of arXiv 2105.14039.

    Args:
        dim: how many numbers a query has, and the output.
        heads: how many heads attend inside each chunk.
        topk_mems: how many chunks each query keeps.
        mem_chunk_size: how many steps a chunk holds, of memories given as a tensor.
        dim_head: how many numbers a query has in each head.
        add_pos_enc: whether a fixed sinusoid is added to the steps of a chunk.
        eps: a summary under a mask is the sum of its steps over (count + eps).
        residual: "input" adds x (the paper), "normed" adds LayerNorm(x) (the package
            `htm-pytorch` 0.0.4, for its checkpoints).
        dim_memory: how many numbers a memory step has; default `dim`.
        dim_features: must be `dim`, since the queries are added to the output; default `dim`.
        router_bias: whether the projections that score summaries have biases.
        inner_bias: whether the projections to queries, keys and values have biases.
        recency: whether the age of chunks counts, too; see `HTMAttention`.
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
        residual: Literal["input", "normed"] = "input",
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
        check_made(device, dtype)
        if residual not in ("input", "normed"):
            raise ValueError(f"residual: expected 'input' or 'normed', got {residual!r}")
        check_at_least("dim", dim, 1)
        self.residual = residual
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = HTMAttention(
            dim,
            heads,
            topk_mems,
            mem_chunk_size,
            dim_head,
            add_pos_enc,
            eps,
            dim_memory=dim_memory,
            dim_features=dim_features,
            router_bias=router_bias,
            inner_bias=inner_bias,
            recency=recency,
            detach_memories=detach_memories,
            impl=impl,
            device=device,
            dtype=dtype,
        )
        if self.attn.dim_features != dim:
            raise ValueError(
                f"dim_features: expected dim = {dim} for the skip, got {self.attn.dim_features}"
            )

    def extra_repr(self) -> str:
        """Return what `print` says of it besides its parts."""
        return f"residual={self.residual!r}"

    def forward(
        self,
        queries: Tensor,
        memories: Memories,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
        *,
        ages: Tensor | None = None,
    ) -> Tensor:
        """Return the queries with what they recalled added, [B, Q, D]; see `HTMAttention`."""
        skip, normed = self._normed(queries, memories)
        return skip + self.attn(normed, memories, mask, chunk_attn_mask, ages=ages)

    def recall(
        self,
        queries: Tensor,
        memories: Memories,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
        *,
        ages: Tensor | None = None,
    ) -> tuple[Tensor, Recall]:
        """Return what `forward` does, and what was recalled; see `HTMAttention.recall`."""
        check_unhooked(self, HTMBlock)
        skip, normed = self._normed(queries, memories)
        attended, recalled = self.attn.recall(normed, memories, mask, chunk_attn_mask, ages=ages)
        return skip + attended, recalled

    def _normed(self, queries: Tensor, memories: Memories) -> tuple[Tensor, Tensor]:
        with together(memories):
            self.attn.check_queries(queries)
            normed = self.norm(queries)
        return queries if self.residual == "input" else normed, normed
