"""One suite over all memories of an agent: streamed = whole, padded = alone, gradients, sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch.rl.config import MemoryConfig
from htm_pytorch.rl.contract import detach, select_rows
from htm_pytorch.rl.cores import count_parameters, make_core
from htm_pytorch.rl.newest import NewestCore
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, LENGTH, DIM = 4, 23, 12
SIZES: dict[str, Any] = {
    "dim": DIM,
    "heads": 2,
    "mem_chunk_size": 3,
    "mem_chunks": 3,
    "window": 3,
}
KINDS = ("htm", "window", "transformer", "gru", "lstm", "none")


CORES = [(kind, depth, 1) for kind in KINDS for depth in (1, 2)]
BOUND = [("htm", 1, 4), ("lstm", 1, 2), ("none", 1, 9)]


@pytest.fixture(params=CORES + BOUND, ids=str)
def core(request: pytest.FixtureRequest) -> Any:
    kind, depth, newest = request.param
    config = MemoryConfig(memory=kind, depth=depth, newest=newest, **SIZES)
    return make_core(config).double()


def made(seed: int, first: float, exists: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, LENGTH, DIM, generator=generator, dtype=torch.float64)
    is_first = torch.rand(BATCH, LENGTH, generator=generator) < first
    return x, is_first, torch.rand(BATCH, LENGTH, generator=generator) < exists


CASES = {
    "one episode": (0.0, 1.0),
    "many episodes": (0.3, 1.0),
    "padded": (0.2, 0.6),
    "hardly any steps": (0.2, 0.1),
}
cases = pytest.mark.parametrize(("first", "exists"), CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("seed", [0, 1])
def test_streamed_is_whole(core: Any, first: float, exists: float, seed: int) -> None:
    x, is_first, mask = made(seed, first, exists)
    given = None if exists == 1 else mask
    whole, end = core(x, core.initial_state(BATCH), is_first, given)
    assert whole.shape == x.shape
    state, start, pieces = core.initial_state(BATCH), 0, []
    generator = torch.Generator().manual_seed(seed)
    while start < LENGTH:
        stop = start + int(torch.randint(1, 8, (), generator=generator))
        part = None if given is None else given[:, start:stop]
        y, state = core(x[:, start:stop], state, is_first[:, start:stop], part)
        pieces.append(y)
        start = stop
    assert_near(torch.cat(pieces, 1), whole, 1e-12)
    # And the state is the same, too: what follows is.
    more, none = torch.randn(BATCH, 5, DIM, dtype=torch.float64), is_first[:, :5] & False
    assert_near(core(more, state, none)[0], core(more, end, none)[0], 1e-12)


@cases
def test_a_row_is_as_alone(core: Any, first: float, exists: float) -> None:
    x, is_first, mask = made(3, first, exists)
    together, end = core(x, core.initial_state(BATCH), is_first, mask)
    for row in range(BATCH):
        here = mask[row]
        assert not together[row, ~here].any()
        rows = slice(row, row + 1)
        alone, state = core(x[rows, here], core.initial_state(1), is_first[rows, here])
        assert_near(together[rows, here], alone, 1e-12)
        more, none = torch.randn(1, 5, DIM, dtype=torch.float64), is_first[rows, :5] & False
        selected = select_rows(end, torch.tensor([row]))
        assert_near(core(more, selected, none)[0], core(more, state, none)[0], 1e-12)


@cases
def test_outputs_at_some_steps_are_those_of_all(core: Any, first: float, exists: float) -> None:
    x, is_first, mask = made(4, first, exists)
    at = torch.randint(LENGTH, (BATCH, 7))
    whole, _ = core(x, core.initial_state(BATCH), is_first, mask)
    some, _ = core(x, core.initial_state(BATCH), is_first, mask, at=at)
    assert_near(some, whole.gather(1, at[..., None].expand(-1, -1, DIM)), 1e-12)
    none, state = core(x, core.initial_state(BATCH), is_first, mask, at=at[:, :0])
    assert none.shape == (BATCH, 0, DIM)


def test_nothing_passes_from_one_episode_to_the_next(core: Any) -> None:
    x, is_first, _ = made(5, 0.0, 1.0)
    is_first[:, 11] = True
    before, _ = core(x, core.initial_state(BATCH), is_first)
    x[:, :11] = torch.randn(BATCH, 11, DIM, dtype=torch.float64)
    after, _ = core(x, core.initial_state(BATCH), is_first)
    assert_near(after[:, 11:], before[:, 11:], 1e-12)


@cases
def test_gradients_are_those_of_rows_alone(core: Any, first: float, exists: float) -> None:
    x, is_first, mask = made(6, first, exists)
    x.requires_grad_()
    weights = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    together, _ = core(x, core.initial_state(BATCH), is_first, mask)
    owners = [x, *core.parameters()]
    got = torch.autograd.grad((together * weights).sum(), owners, materialize_grads=True)
    total = together.new_zeros(())
    for row in range(BATCH):
        here, rows = mask[row], slice(row, row + 1)
        alone, _ = core(x[rows, here], core.initial_state(1), is_first[rows, here])
        total = total + (alone * weights[rows, here]).sum()
    expected = torch.autograd.grad(total, owners, materialize_grads=True)
    for one, other in zip(got, expected, strict=True):
        assert_near(one, other, 1e-10)


def test_the_state_is_a_value(core: Any) -> None:
    """What acts may write where the state lies, but what was kept of it stays."""
    x, is_first, _ = made(7, 0.1, 1.0)
    with torch.no_grad():
        _, state = core(x, core.initial_state(BATCH), is_first)
        kept = select_rows(detach(state), torch.arange(BATCH))
        expected, _ = core(x, state, is_first)
        for step in range(5):
            _, state = core(x[:, step : step + 1], state, is_first[:, step : step + 1])
        assert_near(core(x, kept, is_first)[0], expected, 1e-12)


def test_the_mean_of_what_is_bound_knows_the_order() -> None:
    core = make_core(MemoryConfig(newest=2, **SIZES)).double()
    assert isinstance(core, NewestCore)
    x, none, _ = made(8, 0.0, 1.0)
    there, _, _ = core.bind(x, core.initial_state(BATCH), none, None)
    back, _, _ = core.bind(x.flip(1), core.initial_state(BATCH), none, None)
    assert_near(x.mean(1), x.flip(1).mean(1), 1e-12)
    assert (there.mean(1) - back.mean(1)).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dim", [32, 64, 200])
def test_parameters_are_as_many_as_the_papers(kind: Any, depth: int, dim: int) -> None:
    config = MemoryConfig(memory=kind, depth=depth, dim=dim, heads=4)
    count = count_parameters(config)
    paper = count_parameters(MemoryConfig(depth=depth, dim=dim, heads=4))
    assert abs(count / paper - 1) < 0.1
    assert count == sum(p.numel() for p in make_core(config).parameters())


def test_a_tensor_alone_is_a_state() -> None:
    state = torch.arange(6.0).reshape(3, 2).requires_grad_()
    assert select_rows(state, torch.tensor([2, 0])).tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert not detach(state).requires_grad
