"""What an agent asks of its memory: one contract.

A core has `dim`, `initial_state(batch)`, and `y, state = core(x, state, is_first, mask, at=at)`:

* x [B, T, D], is_first [B, T] bool where a row begins an episode, with nothing of what it saw;
* mask [B, T] bool, False for steps that do not exist: the row goes on without them; None: all do;
* y [B, T, D], or with at [B, P] int64 the outputs of these steps alone, [B, P, D];
* the state is a value: a tree of tensors with the rows first, as `torch.utils._pytree` sees it, or
  something with `select(rows)` and `detach()`. Steps one by one give what they give at once.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

State = Any


class Core(Protocol):
    """What an agent asks of its memory."""

    def initial_state(self, batch_size: int) -> State:
        """Return the state of rows that have seen nothing."""
        ...

    def __call__(
        self,
        x: Tensor,
        state: State,
        is_first: Tensor,
        mask: Tensor | None = None,
        *,
        at: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Return the outputs and the state after all steps."""
        ...


def select_rows(state: State, rows: Tensor) -> State:
    """Return a copy of some rows [R] int64 of a state."""
    if _selects(state):
        return state.select(rows)
    return pytree.tree_map(lambda part: part.index_select(0, rows), state)


def check_state(state: State, rows: int) -> None:
    """Refuse a state whose rows cannot be told apart.

    Raises:
        ValueError: says what it is.
    """
    if _selects(state):
        return
    for part in pytree.tree_leaves(state):
        if not isinstance(part, Tensor) or part.shape[:1] != (rows,):
            raise ValueError(f"{described(part)} in it")


def described(value: object) -> str:
    """Return of which type and shape something is."""
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + ("" if shape is None else f" of shape {list(shape)}")


def detach(state: State) -> State:
    """Return a state cut from the graph."""
    if hasattr(state, "detach"):
        return state.detach()
    return pytree.tree_map(torch.Tensor.detach, state)


def _selects(state: State) -> bool:
    # A tensor alone is a tree, too; its own `select` is another one.
    return hasattr(state, "select") and not isinstance(state, Tensor)
