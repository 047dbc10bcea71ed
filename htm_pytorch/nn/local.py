"""`LocalAttention`: of an `HTMTransformer`, over the newest steps."""

from typing import Any

import torch
from torch import Tensor, nn

from htm_pytorch.nn.state import LayerState
from htm_pytorch.ops import Impl
from htm_pytorch.ops.window import attend_window


class LocalAttention(nn.Module):
    """Causal attention over a window, with a learned bias for each distance and head."""

    impl: Impl = "auto"
    """Here, too, for modules that were pickled before they had one."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, window: int, impl: Impl = "auto", **made: Any
    ):
        super().__init__()
        self.impl = impl
        self.heads = heads
        self.dim_head = dim_head
        self.window = window
        self.norm = nn.LayerNorm(dim, **made)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **made)
        self.to_out = nn.Linear(heads * dim_head, dim, **made)
        self.distance_bias = nn.Parameter(torch.zeros(heads, window, **made))

    def window_sizes(self, batch: int) -> dict[str, int]:
        """Return the sizes of the keys of a state, by axis."""
        return {"B": batch, "W": self.window - 1, "H": self.heads, "E": self.dim_head}

    def initial_window(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and how many there are, of rows that have seen nothing."""
        like, sizes = self.distance_bias, tuple(self.window_sizes(batch).values())
        keys, values = (torch.zeros(sizes, dtype=like.dtype, device=like.device) for _ in range(2))
        return keys, values, torch.zeros(batch, dtype=torch.int64, device=like.device)

    def forward(
        self, x: Tensor, state: LayerState, is_first: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return what the steps x [B, T, D] attended to, and keys, values and count after them."""
        batch, length, _ = x.shape
        projected = self.to_qkv(self.norm(x)).view(batch, length, 3, self.heads, self.dim_head)
        queries, *new = projected.unbind(2)
        before = state.keys, state.values
        if state.keys.dtype != projected.dtype:
            before = state.keys.to(projected.dtype), state.values.to(projected.dtype)
        if length == 1 and is_first is None and lengths is None:
            keys, values = (torch.cat(parts, 1) for parts in zip(before, new, strict=True))
            attended = self._attend_once(queries, keys, values, state.filled)
            filled = (state.filled + 1).clamp(max=self.window - 1)
        else:
            time = torch.arange(length, device=x.device)
            oldest = -state.filled[:, None].expand(batch, length)
            if is_first is not None and length:
                began = torch.where(is_first, time, -1).cummax(1).values
                oldest = torch.where(began < 0, oldest, began)
            bias, plainly = self.distance_bias, self.impl not in ("auto", "native")
            attended = attend_window(projected, *before, bias, oldest, plainly=plainly)
            end = length if lengths is None else lengths
            filled = state.filled
            if length:
                filled = (end - oldest[:, -1]).clamp(max=self.window - 1)
        keys, values = (
            self._newest(*parts, state.keys.dtype, lengths)
            for parts in zip(before, new, strict=True)
        )
        return self.to_out(attended.flatten(2)), (keys, values, filled)

    def _newest(
        self, old: Tensor, new: Tensor, dtype: torch.dtype, lengths: Tensor | None
    ) -> Tensor:
        """Return the newest window - 1 of old [B, window - 1, H, E] and new ones, on their own."""
        past, length = self.window - 1, new.shape[1]
        if new.requires_grad or old.requires_grad:
            old, new = old.detach(), new.detach()
        if lengths is not None:
            index = lengths[:, None] + torch.arange(past, device=new.device)
            index = index[..., None, None].expand(-1, -1, *new.shape[2:])
            part = torch.cat([old, new], 1).gather(1, index)
        elif length < past:
            part = torch.cat([old[:, length:], new], 1)
        else:
            # On their own, not a view that would hold all steps of the call.
            part = new[:, length - past :].clone(memory_format=torch.contiguous_format)
        return part if part.dtype == dtype else part.to(dtype)

    def _attend_once(self, queries: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> Tensor:
        """One query [B, 1, H, E] against all keys and values [B, window, H, E]."""
        if queries.dtype.itemsize < 4:
            queries = queries.to(torch.float32)
        # Sums of products: for one query they cost less than the layouts that products need.
        scores = torch.add(
            self.distance_bias.flip(1).t(), (queries * keys).sum(3), alpha=self.dim_head**-0.5
        )
        back = torch.arange(self.window - 1, -1, -1, device=keys.device)
        unseen = (back > filled.view(-1, 1)).unsqueeze(2)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(1)
        # Nothing times 0, as it may not be finite.
        values = values.masked_fill(unseen.unsqueeze(3), 0)
        attended = (weights.unsqueeze(3) * values).sum(1, keepdim=True)
        return attended if attended.dtype == values.dtype else attended.to(values.dtype)
