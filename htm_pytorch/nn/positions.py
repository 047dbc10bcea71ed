"""The fixed positions of the steps of a chunk."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.shapes import may_look_at


def positions_of(dim: int, chunk_size: int, like: Tensor) -> Tensor:
    """Return `sinusoid` [C, D] in the dtype and on the device of `like`."""
    arguments = chunk_size, dim, like.dtype, like.device
    # Kept where they are asked for again and again, by who takes step after step; not what stands
    # for a tensor while something is traced.
    keeps = may_look_at(like) and type(like) is Tensor
    keeps = keeps and not torch._C._len_torch_dispatch_stack()
    return _kept_sinusoid(*arguments) if keeps else sinusoid(*arguments)


@functools.lru_cache(maxsize=64)
def _kept_sinusoid(*arguments: Any) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return sinusoid(*arguments).contiguous()


def sinusoid(length: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the fixed positions [C, D]: the newest step, last, is 0; sines, then cosines."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    back = torch.arange(length - 1, -1, -1, dtype=exact, device=device)
    pairs = torch.arange(0, dim, 2, dtype=exact, device=device)
    angles = back[:, None] * torch.exp(pairs * (-math.log(10000.0) / dim))
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :dim].to(dtype)
