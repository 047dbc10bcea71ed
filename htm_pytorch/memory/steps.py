"""`Steps`: a past that is given whole, read in chunks where it lies."""

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.whole import cut
from htm_pytorch.shapes import (
    check_at_least,
    check_floating,
    check_mask,
    check_not_negative,
    check_tensor,
)


class Steps(NamedTuple):
    """N steps in chunks of C, the borders counted from the newest end; nothing is copied.

    Where N is no multiple of C the oldest chunk is short. Unlike in a `ChunkedMemory`, summaries
    are not held: whoever needs them takes the means.
    """

    steps: Tensor
    """[B, N, D], the N steps of each row, which come oldest first."""
    chunk_size: int
    """How many steps a chunk holds, C."""
    mask: Tensor | None = None
    """[B, N] bool, False for steps that must never be attended nor averaged."""
    eps: float = 0.0
    """A summary is the sum of its steps over (count + eps)."""

    def check(self) -> None:
        """Raise a ValueError unless the parts fit each other."""
        check_tensor("steps", self.steps, "B N D")
        check_floating("steps", self.steps)
        check_at_least("chunk_size", self.chunk_size, 1)
        check_not_negative("eps", self.eps)
        batch, length, _ = self.steps.shape
        check_mask("mask", self.mask, "B N", self.steps.device, B=batch, N=length)

    @property
    def batch(self) -> int:
        """How many rows there are, B."""
        return self.steps.shape[0]

    @property
    def chunks(self) -> int:
        """How many chunks there are, M."""
        return -(-self.steps.shape[1] // self.chunk_size)

    @property
    def dim(self) -> int:
        """How many numbers a step has, D."""
        return self.steps.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the steps have."""
        return self.steps.dtype

    @property
    def device(self) -> torch.device:
        """The device that the steps are on."""
        return self.steps.device

    def chunked(self, dtype: torch.dtype = torch.float32) -> ChunkedMemory:
        """Return the same past with its summaries; a short chunk is padded, by a copy.

        Args:
            dtype: that summaries have at least. Rounded to fewer bits, others may be the best.
        """
        slots, valid = cut(
            self.steps,
            self.chunk_size,
            self.mask,
            borders="newest",
            eps=self.eps,
            is_copy=False,
            dtype=torch.promote_types(dtype, self.dtype),
        )
        step_count = slots.first_steps.new_full((self.batch,), self.steps.shape[1])
        return ChunkedMemory._closed(slots, valid, step_count, room=0, is_own=False)


torch.serialization.add_safe_globals([Steps])
