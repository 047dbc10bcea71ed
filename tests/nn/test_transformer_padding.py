"""Steps that do not exist: a row of a padded batch is the row alone, wherever its padding lies."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from htm_pytorch import HTMTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 23
ROWS = 4


def build(**changes: Any) -> HTMTransformer:
    sizes = {"dim": 8, "depth": 2, "heads": 2, "dim_head": 3, "topk_mems": 2}
    sizes |= {"mem_chunk_size": 3, "mem_chunks": 3, "window": 4}
    return HTMTransformer(**(sizes | changes)).double()


def padded(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with garbage where no step is, which steps there are, and where episodes begin."""
    x = torch.randn(ROWS, LENGTH, 8, dtype=torch.float64)
    lengths = torch.tensor([LENGTH, 0, 1, 14])
    time = torch.arange(LENGTH)
    mask = {
        "right": time < lengths[:, None],
        "left": time >= LENGTH - lengths[:, None],
        "anywhere": torch.rand(ROWS, LENGTH) < 0.6,
        "all": torch.ones(ROWS, LENGTH, dtype=torch.bool),
    }[kind]
    # The mark of a step that does not exist counts for nothing.
    is_first = torch.rand(ROWS, LENGTH) < 0.15
    return x.masked_fill(~mask[..., None], torch.nan), mask, is_first


def assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["right", "left", "anywhere", "all"])
@pytest.mark.parametrize("cut", [0, 1, 9])
def test_outputs_and_state_of_a_row_are_those_of_the_row_alone(
    keep: bool, kind: str, cut: int
) -> None:
    model = build(keep_across_episodes=keep)
    x, mask, is_first = padded(kind)
    after = torch.randn(ROWS, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        # In two calls, the first of which may be empty.
        one, state = model(x[:, :cut], None, is_first[:, :cut], mask[:, :cut])
        two, state = model(x[:, cut:], state, is_first[:, cut:], mask[:, cut:])
        y = torch.cat([one, two], 1)
        later = model(after, state)[0]
        assert not y[~mask].any()
        for row in range(ROWS):
            here, some = slice(row, row + 1), mask[row]
            alone, state_alone = model(x[here, some], None, is_first[here, some])
            assert_near(y[here, some], alone)
            assert_near(later[here], model(after[here], state_alone)[0])
            ours = pytree.tree_leaves(state.select(torch.tensor([row])))
            for got, wanted in zip(ours, pytree.tree_leaves(state_alone), strict=True):
                assert_near(got, wanted)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_those_of_the_rows_alone(detach: bool) -> None:
    model = build(detach_memories=detach)
    x, mask, is_first = padded("anywhere")
    parameters = list(model.parameters())
    leaf = x.clone().requires_grad_()
    loss = model(leaf, None, is_first, mask)[0].sin().sum()
    got = torch.autograd.grad(loss, [leaf, *parameters])
    alone = x.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(ROWS):
        some = mask[row]
        here = slice(row, row + 1)
        total = total + model(alone[here, some], None, is_first[here, some])[0].sin().sum()
    wanted = torch.autograd.grad(total, [alone, *parameters])
    for one, other in zip(got, wanted, strict=True):
        assert_near(one, other)
    assert not got[0][~mask].any()


def test_outputs_at_some_steps_and_what_was_recalled() -> None:
    model = build()
    x, mask, is_first = padded("anywhere")
    at = torch.randint(LENGTH, (ROWS, 4))
    y, state, recalls = model.recall(x, None, is_first, mask)
    assert_near(y, model(x, None, is_first, mask)[0])
    some, state_some, some_recalls = model.recall(x, None, is_first, mask, at=at)
    assert_near(some, y.gather(1, at[..., None].expand(-1, -1, 8)))
    for one, other in zip(pytree.tree_leaves(state), pytree.tree_leaves(state_some), strict=True):
        assert_near(one, other)
    for recall in recalls:
        assert (recall.chunks[~mask] == -1).all() and not recall.chunk_weights[~mask].any()
        assert not recall.step_weights[~mask].any()
    chunks = recalls[-1].chunks.gather(1, at[..., None].expand(-1, -1, 2))
    assert torch.equal(some_recalls[-1].chunks, chunks)
    for row in range(ROWS):
        here, exists = slice(row, row + 1), mask[row]
        *_, alone = model.recall(x[here, exists], None, is_first[here, exists])
        for ours, wanted in zip(recalls, alone, strict=True):
            assert torch.equal(ours.chunks[here, exists], wanted.chunks)
            assert_near(ours.step_weights[here, exists], wanted.step_weights)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(ROWS, 3).bool(), r"mask: expected shape \[B = 4, T = 23\], got \[4, 3\]"),
        (torch.ones(ROWS, LENGTH), "mask: expected dtype torch.bool, got torch.float32"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(padded("all")[0], mask=mask)
