"""A state as a value: rows, files, trees; what does not fit is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from htm_pytorch import HTMTransformer
from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.files import load_tensors, save_tensors
from htm_pytorch.nn import LayerState, TransformerState

pytestmark = pytest.mark.usefixtures("one_thread")


def build(**changes: Any) -> HTMTransformer:
    sizes = {"dim": 12, "depth": 2, "heads": 3, "dim_head": 5, "topk_mems": 2}
    sizes |= {"mem_chunk_size": 3, "mem_chunks": 4, "window": 4}
    return HTMTransformer(**(sizes | changes))


def normal(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 12)


def used(model: HTMTransformer, batch: int = 3, length: int = 20) -> TransformerState:
    with torch.no_grad():
        return model(normal(batch, length), None, torch.rand(batch, length) < 0.1)[1]


def assert_equal(one: TransformerState, other: TransformerState) -> None:
    ours, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    assert spec == other_spec
    for got, wanted in zip(ours, others, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def assert_goes_on(model: HTMTransformer, one: TransformerState, other: TransformerState) -> None:
    x = normal(one.batch, 7)
    with torch.no_grad():
        got, wanted = model(x, one)[0], model(x, other)[0]
    # Where tensors lie, and so the order of sums, may differ.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_rows_are_chosen_and_joined(keep: bool) -> None:
    model = build(keep_across_episodes=keep)
    state = used(model)
    chosen = torch.tensor([2, 0, 2])
    some = state.select(chosen)
    x = normal(3, 5)
    with torch.no_grad():
        expected = model(x, state)[0][chosen]
        torch.testing.assert_close(model(x[chosen], some)[0], expected, rtol=1e-5, atol=1e-5)
    marked = state.select(torch.tensor([True, False, True]))
    assert_equal(marked, state.select(torch.tensor([0, 2])))
    assert_equal(TransformerState.cat([state.select(torch.tensor([n])) for n in range(3)]), state)
    mapped = pytree.tree_map(lambda part: part[chosen], state)
    assert isinstance(mapped, TransformerState)
    assert_equal(mapped, some)


def test_rows_that_are_reset_have_seen_nothing() -> None:
    model = build()
    state = used(model)
    rows = torch.tensor([True, False, True])
    after = state.reset(rows)
    assert_equal(after.select(~rows), state.select(~rows))
    x = normal(3, 9)
    with torch.no_grad():
        got, fresh = model(x, after)[0], model(x)[0]
        torch.testing.assert_close(got[rows], fresh[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[~rows], model(x, state)[0][~rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_state_is_saved_and_loaded(tmp_path: Path, keep: bool, fresh: bool) -> None:
    pytest.importorskip("safetensors")
    model = build(keep_across_episodes=keep)
    state = model.initial_state(3) if fresh else used(model)
    state.save(tmp_path / "state")
    for loaded in (TransformerState.load(tmp_path / "state"), model.load_state(tmp_path / "state")):
        assert_equal(loaded, state)
        assert_goes_on(model, loaded, state)
    torch.save(state, tmp_path / "pickled")
    # Without leave to run code, which is torch's default.
    pickled = torch.load(tmp_path / "pickled")
    assert_equal(pickled, state)
    assert_goes_on(model, pickled, state)
    with pytest.raises(ValueError, match=r"state\[0\].memory.contents: expected shape"):
        build(mem_chunks=5, keep_across_episodes=keep).load_state(tmp_path / "state")


def test_a_damaged_file_of_a_state_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "state"
    used(build()).save(path)
    tensors, metadata = load_tensors(path, "TransformerState")
    changes: dict[str, tuple[dict[str, Tensor | None], str]] = {
        "lacks": ({"1.values": None}, r"1.values: expected a tensor"),
        "besides": ({"2.keys": torch.ones(1)}, r"has 2 layers and besides \['2.keys'\]"),
        "window": ({"0.filled": torch.full((3,), 4)}, r"0.filled: expected numbers from 0 to 3"),
        "memory": ({"1.memory.next_slot": torch.full((3,), 4)}, "next_slot: expected slots"),
        "dtype": ({"0.keys": tensors["0.keys"].double()}, "0.keys: expected dtype torch.float32"),
    }
    for change, message in changes.values():
        kept = {name: part for name, part in (tensors | change).items() if part is not None}
        save_tensors(path, "TransformerState", kept, **metadata)
        with pytest.raises(MemoryFileError, match=message):
            TransformerState.load(path)


def test_nothing_of_a_state_is_shared() -> None:
    model = build()
    some = used(model).select(torch.tensor([0, 1]))
    for state in (model.initial_state(2), used(model), used(model, 3, 1), some):
        leaves = [leaf for leaf in pytree.tree_leaves(state) if leaf.numel()]
        places = [leaf.untyped_storage().data_ptr() for leaf in leaves]
        assert len(set(places)) == len(places)
        # So that other writers of tensors take them as they are.
        assert all(leaf.is_contiguous() for leaf in leaves)


def test_a_state_is_what_it_was_after_it_was_used() -> None:
    model = build()
    state, x = used(model), normal(3, 8)
    before = [leaf.clone() for leaf in pytree.tree_leaves(state)]
    held = pytree.tree_leaves(state)
    with torch.no_grad():
        first = model(x, state)
        torch.testing.assert_close(model(x, state)[0], first[0], rtol=1e-5, atol=1e-5)
        for _ in range(5):
            first = model(x, first[1])
    for got, leaf, wanted in zip(pytree.tree_leaves(state), held, before, strict=True):
        assert torch.equal(got, wanted) and torch.equal(leaf, wanted)


def test_a_branch_of_a_stream_does_not_disturb_the_other() -> None:
    model = build()
    x = torch.randn(3, 3, 12)
    with torch.no_grad():
        states = [used(model)]
        outputs = []
        for time in range(40):
            y, state = model(x[:, time % 3 : time % 3 + 1], states[-1])
            states.append(state)
            outputs.append(y)
        for time in torch.randperm(40).tolist():
            again = model(x[:, time % 3 : time % 3 + 1], states[time])[0]
            torch.testing.assert_close(again, outputs[time], rtol=1e-5, atol=1e-5)


def test_checkpointed_gradients_read_the_state_again() -> None:
    model = build(depth=1)
    state, x = used(model), normal(3, 8).requires_grad_()
    (expected,) = torch.autograd.grad(model(x, state)[0].square().sum(), x)
    out: Any = checkpoint(lambda x: model(x, state)[0], x, use_reentrant=True)
    out.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_copies_stand_alone() -> None:
    model = build()
    state = used(model)
    for twin in (copy.deepcopy(state), copy.copy(state), pytree.tree_map(torch.clone, state)):
        assert_equal(twin, state)
        assert_goes_on(model, twin, state)


def test_a_state_moves() -> None:
    model = build().double()
    state = used(build()).to(dtype=torch.float64)
    assert {leaf.dtype for leaf in pytree.tree_leaves(state)} == {
        torch.float64,
        torch.int64,
        torch.bool,
    }
    model(torch.randn(3, 2, 12, dtype=torch.float64), state)
    assert state.to("meta")[1].memory.device.type == "meta"
    with pytest.raises(ValueError, match="dtype: expected dtype floating point"):
        state.to(dtype=torch.int64)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(state.detach()))


@pytest.mark.parametrize("of", [lambda state: state, lambda state: state[0].memory])
def test_a_dtype_may_come_alone_as_in_torch(of: Any) -> None:
    given = of(used(build()))
    expected = given.to(dtype=torch.float64)
    for moved in (given.to(torch.float64), given.to("cpu", torch.float64)):
        assert_equal(moved, expected)
    for wrong in ("abacus", 3.5, torch.int64):
        with pytest.raises(ValueError, match=r"^d(evice|type): expected .*, got "):
            given.to(wrong)
    with pytest.raises(ValueError, match=r"^device: expected .*, got torch.float64"):
        given.to(torch.float64, torch.float32)


def test_rows_are_not_taken_by_the_number_of_a_layer() -> None:
    state = used(build())
    assert isinstance(state[1], LayerState) and len(state) == 2
    assert state[1:] == (state[1],)
    for rows in (torch.tensor([1]), torch.tensor(1), [0, 1], True):
        with pytest.raises(TypeError, match=r"expected the number of a layer, got .*select\(rows"):
            state[rows]  # pyright: ignore[reportArgumentType]
    for rows, message in (
        (torch.tensor([3]), r"rows: expected numbers from 0 to 2, got \[3\]"),
        (torch.tensor([-1]), r"rows: expected numbers from 0 to 2, got \[-1\]"),
        (torch.tensor([1.0]), r"rows: expected whole numbers, got torch.float32"),
        (torch.tensor([True]), r"rows: expected shape \[B = 3\], got \[1\]"),
        (torch.tensor(1), r"rows: expected shape \[R\], got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            state.select(rows)


def test_states_of_other_models_are_not_joined() -> None:
    state = used(build())
    with pytest.raises(ValueError, match="states: expected at least one"):
        TransformerState.cat([])
    for other, message in (
        (build(depth=1), r"states\[1\]: expected 2 layers, got 1"),
        (build(window=5), r"states\[1\]\[0\].keys: expected shape"),
        (build(mem_chunks=5), r"memories\[1\].contents: expected shape"),
        (build(keep_across_episodes=True), r"memories\[1\].keep_across_episodes: expected False"),
        (build().double(), r"states\[1\]\[0\].keys: expected dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerState.cat([state, other.initial_state(1)])


def with_memory(layer: LayerState, **changes: Tensor) -> LayerState:
    return layer._replace(memory=layer.memory._replace(**changes))


WRONG: dict[str, tuple[Any, str]] = {
    "keys": (lambda s: s._replace(keys=s.keys[:, :1]), r"keys: expected shape \[B = 2, W = 3"),
    "keys-dtype": (lambda s: s._replace(keys=s.keys.double()), "keys: expected dtype torch.float"),
    "values": (lambda s: s._replace(values=s.values[:1]), r"values: expected shape \[B = 2"),
    "values-none": (lambda s: s._replace(values=None), "values: expected a tensor"),
    "values-device": (lambda s: s._replace(values=s.values.to("meta")), "values: expected device"),
    "filled": (lambda s: s._replace(filled=s.filled[:1]), r"filled: expected shape \[B = 2\]"),
    "filled-floats": (lambda s: s._replace(filled=s.filled.float()), "filled: expected dtype"),
    "filled-beyond": (lambda s: s._replace(filled=s.filled + 9), "filled: expected numbers from 0"),
    "memory": (lambda s: s._replace(memory=s.keys), "expected a LayerState with a ChunkedMemory"),
    "layer": (lambda s: tuple(s), "expected a LayerState with a ChunkedMemory, got tuple"),
}
for _name, _axes in {
    "contents": r"\[B = 2, M = 4, C = 3, D = 12\]",
    "summaries": r"\[B = 2, M = 4, D = 12\]",
    "valid": r"\[B = 2, M = 4\]",
    "open_steps": r"\[B = 2, C = 3, D = 12\]",
    "open_count": r"\[B = 2\]",
    "next_slot": r"\[B = 2\]",
    "first_steps": r"\[B = 2, M = 4\]",
    "episodes": r"\[B = 2, M = 4\]",
    "step_count": r"\[B = 2\]",
    "episode": r"\[B = 2\]",
}.items():
    WRONG[f"memory-{_name}"] = (
        lambda s, name=_name: with_memory(s, **{name: getattr(s.memory, name)[:1]}),
        rf"memory.{_name}: expected shape {_axes}",
    )
    WRONG[f"memory-{_name}-dtype"] = (
        lambda s, name=_name: with_memory(s, **{name: getattr(s.memory, name).to(torch.int32)}),
        rf"memory.{_name}: expected dtype",
    )
for _name in ("open_count", "next_slot", "first_steps", "episodes"):
    WRONG[f"memory-{_name}-beyond"] = (
        lambda s, name=_name: with_memory(s, **{name: getattr(s.memory, name) + 99}),
        rf"memory.{_name}: expected ",
    )


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_are_named(name: str) -> None:
    change, message = WRONG[name]
    model = build(depth=1)
    state = used(model, 2)
    with pytest.raises(ValueError, match=rf"^state\[0\].*{message}"):
        model(normal(2, 3), TransformerState((change(state[0]),)))


def test_a_batch_of_no_rows_goes_through() -> None:
    model = build()
    y, state = model(normal(0, 5))
    assert y.shape == (0, 5, 12) and state.batch == 0
    y, state = model(normal(0, 1), state, torch.ones(0, 1, dtype=torch.bool))
    assert y.shape == (0, 1, 12)
