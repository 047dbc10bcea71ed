"""`HTMTransformer(mem_chunks=0)`: the baseline that has a window and no memory."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from htm_pytorch import HTMTransformer
from htm_pytorch.nn import TransformerState


def make(**changes: int) -> HTMTransformer:
    sizes = {"topk_mems": 2, "mem_chunk_size": 4, "mem_chunks": 0, "window": 5} | changes
    return HTMTransformer(12, 2, 2, 6, **sizes)  # pyright: ignore[reportArgumentType]


def test_it_has_no_parameters_of_a_memory() -> None:
    names = dict(make().named_parameters())
    assert not any(".htm." in name for name in names)
    remembering = dict(make(mem_chunks=3).named_parameters())
    assert set(names) == {name for name in remembering if ".htm." not in name}
    assert make().initial_state(2)[0].memory is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 11), max_size=4))
def test_streamed_is_whole(seed: int, cuts: list[int]) -> None:
    torch.manual_seed(seed)
    model, x, is_first = make(), torch.randn(3, 11, 12), torch.rand(3, 11) < 0.2
    mask = torch.rand(3, 11) < 0.8
    whole, after = model(x, None, is_first, mask)
    state, parts = model.initial_state(3), []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 11], strict=True):
        some = slice(begin, end)
        y, state = model(x[:, some], state, is_first[:, some], mask[:, some])
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    for layer, other in zip(state, after, strict=True):
        torch.testing.assert_close(layer.filled, other.filled)
        # Rows behind `filled` mean nothing.
        seen = torch.arange(layer.keys.shape[1]) >= layer.keys.shape[1] - layer.filled[:, None]
        torch.testing.assert_close(layer.keys[seen], other.keys[seen])


def test_only_the_window_is_seen() -> None:
    model = make().double()
    x = torch.randn(1, 12, 12, dtype=torch.float64, requires_grad=True)
    y, _ = model(x)
    (grad,) = torch.autograd.grad(y[0, 11, 0], x)
    # Two layers of five steps reach eight steps back.
    assert not grad[0, :3].any() and grad[0, 3:].any(-1).all()


def test_its_state_has_leaves_that_are_tensors() -> None:
    model, x = make(), torch.randn(3, 7, 12)
    _, state = model(x)
    held = pytree.tree_leaves(state)
    assert len(held) == 6 and all(isinstance(leaf, torch.Tensor) for leaf in held)
    same = pytree.tree_map(lambda part: part[[0, 2]], state)
    assert isinstance(same, TransformerState) and same.batch == 2
    torch.testing.assert_close(model(x[[0, 2]], same)[0], model(x, state)[0][[0, 2]])
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(state)]
    assert paths == [f"[{layer}][{part}]" for layer in range(2) for part in range(3)]


def test_it_compiles() -> None:
    model, x = make(), torch.randn(3, 7, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    state = state_eager = model.initial_state(3)
    for _ in range(2):
        y, state = compiled(x, state)
        wanted, state_eager = model(x, state_eager)
        torch.testing.assert_close(y, wanted)
    assert isinstance(state, TransformerState)


def test_its_state_is_a_value(tmp_path: Path) -> None:
    model, x = make(), torch.randn(3, 7, 12)
    _, state = model(x)
    state.save(tmp_path / "state")
    loaded = model.load_state(tmp_path / "state")
    chosen = TransformerState.cat(
        [loaded.select(torch.tensor([2])), state.select(torch.tensor([0]))]
    )
    chosen = chosen.reset(torch.tensor([False, True])).detach()
    assert chosen.batch == 2 and "no memory" in repr(chosen)
    step = torch.randn(2, 1, 12)
    y, _ = model(step, chosen)
    alone, _ = model(step[:1], state.select(torch.tensor([2])))
    fresh, _ = model(step[1:])
    torch.testing.assert_close(y, torch.cat([alone, fresh]))


def test_states_are_of_their_model() -> None:
    without, remembering = make(), make(mem_chunks=3)
    x = torch.zeros(1, 1, 12)
    with pytest.raises(ValueError, match=r"state\[0\]: expected a LayerState with no memory"):
        without(x, remembering.initial_state(1))
    with pytest.raises(ValueError, match=r"state\[0\]: expected a LayerState with a ChunkedMemory"):
        remembering(x, without.initial_state(1))
    with pytest.raises(
        ValueError, match="recall: expected a model with a memory, got mem_chunks = 0"
    ):
        without.recall(x)
