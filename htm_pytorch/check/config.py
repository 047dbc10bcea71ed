"""`CheckConfig`: what is checked; it says what it is without torch."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Impl = Literal["auto", "reference", "blocked", "native", "projected", "triton"]
"""The names of `htm_pytorch.ops.Impl`, which cannot be asked for without torch."""


@dataclass(frozen=True)
class CheckConfig:
    """What is checked. The defaults are the example of the README."""

    batch: int = 1
    """How many rows there are, each with a memory of its own."""
    queries: int = 128
    """How many queries a row has."""
    steps: int = 20_000
    """How many steps a row has; where mem_chunk_size does not divide them, a chunk is short."""
    dim: int = 512
    """How many numbers a query and a memory step have."""
    heads: int = 8
    """How many heads attend inside chunks."""
    dim_head: int = 64
    """How many numbers a head has."""
    topk_mems: int = 8
    """How many chunks a query keeps."""
    mem_chunk_size: int = 32
    """How many steps a chunk holds."""
    add_pos_enc: bool = True
    """Whether positions are added to the steps."""
    masked: bool = False
    """Hide a fifth of the steps, which hold NaN then, and of the chunks from each query."""
    chunked: bool = False
    """Give the memory as a ChunkedMemory, not as a tensor."""
    detach_memories: bool = True
    """Whether gradients stop at the memory; where not, its gradient is compared too."""
    dtype: Dtype = "float32"
    """The dtype that queries, memory and parameters have."""
    device: str = "cpu"
    """Where the layer runs."""
    impl: Impl = "auto"
    """Which implementation is checked."""
    seed: int = 0
    """What everything that is drawn at random follows from."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the field."""
        # Only where a config is made: to say what it is, a command line needs no torch.
        import torch

        from htm_pytorch.ops import check_impl
        from htm_pytorch.shapes import check_at_least

        for field in dataclasses.fields(self):
            if field.type is int:
                check_at_least(field.name, getattr(self, field.name), int(field.name != "seed"))
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype: expected one of {get_args(Dtype)}, got {self.dtype!r}")
        check_impl(self.impl)
        try:
            torch.zeros(1, dtype=torch.float64, device=self.device).item()
        # A build of torch without CUDA raises an AssertionError.
        except (RuntimeError, TypeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"device: expected one of this machine that knows float64, "
                f"got {self.device!r} ({reason})"
            ) from error

    def cut_down(self) -> "CheckConfig":
        """Return the same in float64 and in sizes that finite differences can go through."""
        size = min(self.mem_chunk_size, 3)
        chunks = min(-(-self.steps // self.mem_chunk_size), 4)
        is_ragged = self.steps % self.mem_chunk_size > 0
        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            queries=min(self.queries, 3),
            steps=chunks * size - int(is_ragged),
            dim=min(self.dim, 4),
            heads=min(self.heads, 2),
            dim_head=min(self.dim_head, 3),
            topk_mems=min(self.topk_mems, 2),
            mem_chunk_size=size,
            dtype="float64",
        )
