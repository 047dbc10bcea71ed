"""Results that several programs hold a part of, added up in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from htm_pytorch.ops.triton_kernels.products import Launch, divide_up, power_of_two

WIDTH = 512
"""Numbers of each part that a program adds."""


@triton.jit
def add_parts_kernel(
    parts,
    picked,
    out,
    out_by_batch,
    out_by_query,
    out_by_head,
    queries,
    heads,
    width,
    COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PICKED: tl.constexpr,
):
    """Add the parts of one query; those of picks that are none were not written."""
    x = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    head = tl.program_id(1) % heads
    w = tl.program_id(1) // heads * WIDTH + tl.arange(0, WIDTH)
    there = p < COUNT
    if HAS_PICKED:
        there &= tl.load(picked + x * COUNT + p, there, other=-1) >= 0
    places = parts + ((x * COUNT + p)[:, None] * heads + head) * width + w[None, :]
    part = tl.load(places, there[:, None] & (w < width)[None, :], other=0.0)
    total = tl.sum(part.to(tl.float32), 0)
    out += (x // queries) * out_by_batch + (x % queries) * out_by_query + head * out_by_head
    tl.store(out + w, total.to(out.dtype.element_ty), w < width)


def add_parts(parts: Tensor, out: Tensor, picked: Tensor | None = None) -> None:
    """Write the sums of parts [B * Q, P, H, W] to `out` [B, Q, H, W], with W unbroken in both."""
    count, heads, width = parts.shape[1:]
    wide = min(power_of_two(width), WIDTH)
    constants = {"COUNT": count, "BLOCK_P": power_of_two(count), "WIDTH": wide}
    add_parts_kernel[(len(parts), heads * divide_up(width, wide))](
        parts,
        picked,
        out,
        *out.stride()[:3],
        out.shape[1],
        heads,
        width,
        HAS_PICKED=picked is not None,
        **Launch(constants).options(),
    )
