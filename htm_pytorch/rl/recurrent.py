"""Memories beside the paper's: GRU and LSTM, whose rows may begin episodes anywhere, and none."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class RecurrentCore(nn.Module):
    """GRU or LSTM of any width between a projection and a skip: y = LayerNorm(x + W h).

    The state carries no gradient from call to call.

    Args:
        kind: nn.GRU or nn.LSTM.
        dim: D.
        depth: layers.
        width: of a layer.
        device: of the parameters.
    """

    def __init__(
        self, kind: type[nn.RNNBase], dim: int, depth: int, width: int, device: Any = None
    ):
        super().__init__()
        self.dim, self.depth, self.width = dim, depth, width
        self.parts = 2 if issubclass(kind, nn.LSTM) else 1
        options: dict[str, Any] = {"batch_first": True, "device": device}
        self.rnn = kind(dim, width, depth, **options)  # pyright: ignore[reportArgumentType]
        self.out = nn.Linear(width, dim, device=device)
        self.norm = nn.LayerNorm(dim, device=device)

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return zeros [B, layers, width]: what is hidden and, of an LSTM, its cells."""
        like = self.out.weight
        return tuple(
            like.new_zeros(batch_size, self.depth, self.width).detach() for _ in range(self.parts)
        )

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        is_first: Tensor,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the outputs and the state after all steps, as `Core` says."""
        whole = mask is None or bool(mask.all())
        if whole and x.shape[1] and not bool(is_first[:, 1:].any()):
            before = tuple(part.masked_fill(is_first[:, :1, None], 0.0) for part in state)
            hidden, after = self._run(x, before)
        else:
            hidden, after = self._run_segments(x, state, is_first, mask)
        if at is not None:
            x, hidden = (
                part.gather(1, at[..., None].expand(-1, -1, part.shape[2])) for part in (x, hidden)
            )
        y = self.norm(x + self.out(hidden))
        if mask is not None:
            exists = mask if at is None else mask.gather(1, at)
            y = y.masked_fill(~exists[..., None], 0.0)
        return y, after

    def _run(self, x: Any, state: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        before = tuple(part.transpose(0, 1).contiguous() for part in state)
        hidden, after = self.rnn(x, before if self.parts == 2 else before[0])
        after = after if self.parts == 2 else (after,)
        return hidden, tuple(part.detach().transpose(0, 1) for part in after)

    def _run_segments(
        self, x: Tensor, state: tuple[Tensor, ...], is_first: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run what rows have of each episode as sequences of their own, alike ones at once.

        One by one they would take as many calls as there are steps at which some row begins, and
        packed sequences take a call of the library for each step.
        """
        batch, length, _ = x.shape
        exists = torch.ones_like(is_first) if mask is None else mask
        number = (is_first & exists).cumsum(1)
        step = exists.flatten().nonzero()[:, 0]
        if not len(step):
            return x.new_zeros(batch, length, self.width), state
        keys = torch.arange(batch, device=x.device)[:, None] * (length + 1) + number
        segments, sizes = keys.flatten()[step].unique_consecutive(return_counts=True)
        offsets = sizes.cumsum(0) - sizes
        row = segments.div(length + 1, rounding_mode="floor")
        goes_on = (segments % (length + 1) == 0)[:, None, None]
        before = tuple(part[row] * goes_on for part in state)
        flat, found, where = x.flatten(0, 1), [], []
        for chosen in _alike(sizes):
            inside, steps = _places(sizes[chosen], offsets[chosen], step)
            hidden, _ = self._run(flat[steps], tuple(part[chosen] for part in before))
            found.append(hidden[inside])
            where.append(steps[inside])
        hidden = x.new_zeros(batch * length, self.width).to(found[0].dtype)
        hidden = hidden.index_copy(0, torch.cat(where), torch.cat(found))
        last = torch.cat([row[1:] != row[:-1], row.new_ones(1).bool()]).nonzero()[:, 0]
        with torch.no_grad():
            _, steps = _places(sizes[last], offsets[last], step)
            packed = pack_padded_sequence(flat[steps], sizes[last].cpu(), True, False)
            _, after = self._run(packed, tuple(part[last] for part in before))
        state = tuple(
            old.detach().index_copy(0, row[last], new.to(old.dtype))
            for old, new in zip(state, after, strict=True)
        )
        return hidden.view(batch, length, self.width), state


def _alike(sizes: Tensor) -> list[Tensor]:
    """Return groups [S'] of sequences, in none of which one is over twice as long as another."""
    order = sizes.argsort(descending=True, stable=True)
    sorted_sizes = sizes[order].tolist()
    groups: list[Tensor] = []
    start = 0
    for place, size in enumerate([*sorted_sizes, 0]):
        if place > start and 2 * size < sorted_sizes[start]:
            groups.append(order[start:place])
            start = place
    return groups


def _places(sizes: Tensor, offsets: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of [S, L] are steps of the sequences, and what they are in `step`."""
    time = torch.arange(int(sizes.max()), device=sizes.device)
    inside = time < sizes[:, None]
    return inside, step[(offsets[:, None] + time).clamp(max=len(step) - 1)]


class NoMemory(nn.Module):
    """What is seen now alone, through as many parameters: y = LayerNorm(x + MLPs).

    Args:
        dim: D.
        depth: MLPs.
        width: of their hidden layers.
        device: of the parameters.
    """

    def __init__(self, dim: int, depth: int, width: int, device: Any = None):
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(dim, device=device),
                nn.Linear(dim, width, device=device),
                nn.GELU(),
                nn.Linear(width, dim, device=device),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, device=device)

    def initial_state(self, batch_size: int) -> tuple[()]:
        """Return nothing."""
        return ()

    def forward(
        self,
        x: Tensor,
        state: tuple[()],
        is_first: Tensor,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
    ) -> tuple[Tensor, tuple[()]]:
        """Return the outputs, as `Core` says."""
        if at is not None:
            x = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        for layer in self.layers:
            x = x + layer(x)
        y = self.norm(x)
        if mask is not None:
            exists = mask if at is None else mask.gather(1, at)
            y = y.masked_fill(~exists[..., None], 0.0)
        return y, state
