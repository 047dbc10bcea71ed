"""`NewestCore`: what was seen last, bound together before a memory takes it in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from htm_pytorch.memory.plan import existing
from htm_pytorch.rl.contract import Core, State, detach, select_rows


class NewestState(NamedTuple):
    """What is carried from call to call."""

    inputs: Tensor
    """[B, N - 1, D], the newest inputs, the last one last."""
    filled: Tensor
    """[B] int64, how many of them the episode has filled."""
    memory: State
    """Of the memory behind."""

    def select(self, rows: Tensor) -> "NewestState":
        """Return a copy of the rows [R] int64."""
        return NewestState(self.inputs[rows], self.filled[rows], select_rows(self.memory, rows))

    def detach(self) -> "NewestState":
        """Return the state cut from the graph."""
        return NewestState(self.inputs.detach(), self.filled, detach(self.memory))


class NewestCore(nn.Module):
    """A memory of x + MLP(the newest N inputs), as a `Core`.

    The summary of a chunk is a mean of its steps, which does not know their order unless each step
    knows something of those before it. An MLP tells "first left, then right" from its reverse,
    which attention to a window, a sum, hardly learns.

    Args:
        core: the memory behind.
        dim: D.
        newest: N, of which the present input is one.
        device: of the parameters.
    """

    def __init__(self, core: nn.Module, dim: int, newest: int, device: Any = None):
        super().__init__()
        self.core, self.dim, self.newest = core, dim, newest
        self.mlp = nn.Sequential(
            nn.Linear(newest * dim, 2 * dim, device=device),
            nn.GELU(),
            nn.Linear(2 * dim, dim, device=device),
        )

    def initial_state(self, batch_size: int) -> NewestState:
        """Return the state of rows that have seen nothing."""
        like = next(self.mlp.parameters())
        return NewestState(
            like.new_zeros(batch_size, self.newest - 1, self.dim).detach(),
            torch.zeros(batch_size, dtype=torch.int64, device=like.device),
            self._behind().initial_state(batch_size),
        )

    def forward(
        self,
        x: Tensor,
        state: NewestState,
        is_first: Tensor,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
    ) -> tuple[Tensor, NewestState]:
        """Return the outputs and the state after all steps, as `Core` says."""
        bound, inputs, filled = self.bind(x, state, is_first, mask)
        y, memory = self._behind()(bound, state.memory, is_first, mask, at=at)
        return y, NewestState(inputs, filled, memory)

    def bind(
        self, x: Tensor, state: NewestState, is_first: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the memory gets [B, T, D], and the newest inputs and their count after it."""
        steps, first, lengths, place = existing(x, is_first, mask)
        length, past = steps.shape[1], self.newest - 1
        since = state.filled[:, None] + torch.arange(length, device=x.device)
        if first is not None and length:
            time = torch.arange(length, device=x.device)
            began = torch.where(first, time, -1).cummax(1).values
            since = torch.where(began < 0, since, time - began)
        every = torch.cat([state.inputs, steps], 1)
        parts = [
            every[:, past - back : past - back + length].where((since >= back)[..., None], 0.0)
            for back in range(1, past + 1)
        ]
        bound = steps + self.mlp(torch.cat([steps, *parts], -1))
        end = torch.full_like(state.filled, length) if lengths is None else lengths
        index = end[:, None] + torch.arange(past, device=x.device)
        inputs = every.detach().gather(1, index[..., None].expand(-1, -1, self.dim))
        filled = state.filled
        if length:
            # One more than the count before the last step that exists.
            last = since.gather(1, (end - 1).clamp(min=0)[:, None])[:, 0] + 1
            filled = torch.where(end > 0, last, filled).clamp(max=past)
        if place is not None:
            bound = bound.gather(1, place[..., None].expand(-1, -1, self.dim))
        return bound, inputs, filled

    def _behind(self) -> Core:
        return self.core  # pyright: ignore[reportReturnType]
