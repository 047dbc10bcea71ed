"""What the kernels share: matrix products, which steps there are, picks sorted by their chunk."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def dot(a, b, TYPE: tl.constexpr):
    """Multiply matrices in `TYPE`, with sums in float32."""
    return add_dot(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a, b, TYPE)


@triton.jit
def add_dot(total, a, b, TYPE: tl.constexpr):
    """Return total + a b. Of float32, three TensorFloat32 products keep 22 bits of the factors."""
    a, b = a.to(TYPE), b.to(TYPE)
    if INTERPRETED:
        if tl.float32 == TYPE:
            return total + _dot_tf32x3(a, b)
        # There, products of bfloat16 are wrong without a word (Triton 3.9, torch 2.13).
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _dot_tf32x3(a, b):
    """Multiply as tensor cores do, where the interpreter would keep all bits of the factors."""
    a_large, b_large = _tf32(a, 1 << 12), _tf32(b, 1 << 12)
    small = tl.dot(_tf32(a - a_large, 0), b_large) + tl.dot(a_large, _tf32(b - b_large, 0))
    # Infinity minus itself.
    small = tl.where(small == small, small, 0.0)
    return tl.dot(a_large, b_large) + small


@triton.jit
def _tf32(x, ROUND: tl.constexpr):
    """Keep 10 bits of the fraction: nearest, or cut off if `ROUND` is 0."""
    bits = (x.to(tl.int32, bitcast=True) + ROUND) & -(1 << 13)
    # The bits of NaN may carry over into the sign.
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def there_in_chunk(
    step_mask, chunk, start, missing, C: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Say which steps of a tile exist and may be attended; where no chunk was kept (-1), none."""
    c = start + tl.arange(0, BLOCK_C)
    n = chunk * C + c - missing
    there = (c < C) & (n >= 0)
    if HAS_MASK:
        there &= tl.load(step_mask + n, there, other=0) != 0
    return there


class Launch(NamedTuple):
    """What a kernel is compiled with: its constants, and how it is spread over a processor."""

    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def options(self) -> dict[str, Any]:
        """Return all as keyword arguments of a launch."""
        # Triton 3.9 warns where fusing is left to it, and its next version decides otherwise.
        compiled = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**self.constants, **compiled, "enable_fp_fusion": True}


def common_type(*dtypes: torch.dtype) -> Any:
    """Return the type that products of such tensors are taken in."""
    return TYPES[dtypes[0]] if len(set(dtypes)) == 1 else tl.float32


def power_of_two(size: int, least: int = 1) -> int:
    """Return the first power of two that is not less than either."""
    return max(1 << (size - 1).bit_length(), least)


def divide_up(size: int, by: int) -> int:
    """Return how many pieces of `by` cover `size`. Triton's own takes 3 microseconds a call."""
    return -(-size // by)


def processors(tensor: Tensor) -> int:
    """Return how many programs run side by side at least."""
    if tensor.device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def capability(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability of the device; a Hopper GPU's where there is none."""
    if tensor.device.type != "cuda":
        return 9, 0
    return torch.cuda.get_device_capability(tensor.device)


def by_last(tensor: Tensor) -> Tensor:
    """Return the tensor with its last axis unbroken."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Sorted(NamedTuple):
    """Picks in the order of their chunks, and of queries within a chunk."""

    pairs: Tensor
    """int32, query * K + rank, over all rows of the batch."""
    starts: Tensor
    """[slots + 1] int32, where in `pairs` each chunk of each row of the memory begins."""


def sort_picks(picked: Tensor, memory_batch: int, chunks: int) -> Sorted:
    """Sort picks [B, Q, K] by chunk, without looking at them from outside the device."""
    slots = memory_batch * chunks
    row = torch.arange(picked.shape[0], device=picked.device)[:, None, None]
    at = picked + row * chunks if memory_batch > 1 else picked
    order = torch.where(picked < 0, slots, at).flatten().to(torch.int32).sort(stable=True)
    borders = torch.arange(slots + 1, device=picked.device, dtype=torch.int32)
    starts = torch.searchsorted(order.values, borders, out_int32=True)
    return Sorted(order.indices.to(torch.int32), starts)
