"""`LocalAttention`: of an `HTMTransformer`, over the newest steps."""

from typing import Any

import torch
from torch import Tensor, nn

from htm_pytorch.nn.state import LayerState
from htm_pytorch.ops import masked_softmax
from htm_pytorch.shapes import may_look_at


class LocalAttention(nn.Module):
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
            attended = self._attend(queries, *_told(keys, values), oldest)
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
        unseen = (back > filled.view(-1, 1)).unsqueeze(2)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(1)
        # Nothing times 0, as it may not be finite.
        values = values.masked_fill(unseen.unsqueeze(3), 0)
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


def _told(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, T, H, E] of steps of which one that is not finite spoils no other.

    A weight of 0 times what is not finite is no 0: where a value is not, it becomes 0, and its key
    NaN for those who see it.
    """
    if may_look_at(values) and values.detach().sum().isfinite():
        return keys, values
    is_broken = ~values.isfinite().flatten(2).all(2)[..., None, None]
    return keys.masked_fill(is_broken, torch.nan), values.masked_fill(is_broken, 0)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and softmaxes over numbers of `dtype`."""
    return torch.promote_types(dtype, torch.float32)
