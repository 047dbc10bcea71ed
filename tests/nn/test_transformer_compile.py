"""A transformer compiled, exported and mapped: with and without episodes that are kept."""

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from htm_pytorch import ChunkedMemory, HTMTransformer

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("one_thread")]

KEEP = pytest.mark.parametrize("keep", [False, True], ids=["own", "keep"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def build(**changes: Any) -> HTMTransformer:
    sizes = {"dim": 6, "depth": 1, "heads": 2, "dim_head": 3, "topk_mems": 2}
    sizes |= {"mem_chunk_size": 3, "mem_chunks": 4, "window": 3}
    return HTMTransformer(**(sizes | changes)).double()


def normal(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64)


def assert_near(got: Any, wanted: Any) -> None:
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@KEEP
@pytest.mark.parametrize("length", [1, 9], ids=["acting", "learning"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_one_graph_whatever_the_episodes_are(keep: bool, length: int, masked: bool) -> None:
    model = build(keep_across_episodes=keep)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        state = plain = model(normal(2, 11))[1]
        for border in (0.0, 0.2, 1.0, 0.2):
            mask = torch.rand(2, length) < 0.7 if masked else None
            call = normal(2, length), torch.rand(2, length) < border, mask
            y, state = compiled(call[0], state, *call[1:])
            expected, plain = model(call[0], plain, *call[1:])
            assert_near(y, expected)
    if length > 1:
        # What slots of invalid chunks hold says nothing.
        assert_near(model(call[0], state)[0], model(call[0], plain)[0])
    # The state before the first call was made by a model that was not compiled.
    assert counter.frame_count <= 2


@KEEP
def test_a_compiled_stream_equals_the_plain_one_and_is_compiled_once(keep: bool) -> None:
    model = build(keep_across_episodes=keep)
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        state, plain = model.initial_state(2), model.initial_state(2)
        for _ in range(30):
            call = normal(2, 1), torch.rand(2, 1) < 0.1
            y, state = step(call[0], state, call[1])
            expected, plain = model(call[0], plain, call[1])
            assert_near(y, expected)
        assert counter.frame_count == 1
        # From one to the other, in both directions.
        for _ in range(4):
            call = normal(2, 1), torch.rand(2, 1) < 0.1
            y, state = model(call[0], state, call[1])
            expected, plain = step(call[0], plain, call[1])
            assert_near(y, expected)
    assert counter.frame_count <= 2


@KEEP
def test_gradients_of_a_compiled_call_are_the_plain_ones(keep: bool) -> None:
    model = build(keep_across_episodes=keep, detach_memories=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, is_first = normal(2, 9).requires_grad_(), torch.rand(2, 9) < 0.2
    state = model(normal(2, 11))[1]
    inputs = [x, *model.parameters()]
    results = [
        torch.autograd.grad(function(x, state, is_first)[0].sin().sum(), inputs)
        for function in (compiled, model)
    ]
    assert_near(*results)


@KEEP
@torch.no_grad()
def test_a_donated_state_is_written_where_it_lies(keep: bool) -> None:
    model = build(keep_across_episodes=keep)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # With all that episodes need: the structure stays.
    start = model(normal(2, 11), is_first=torch.rand(2, 11) < 0.2)[1]
    state, plain = start.select(torch.arange(2)).donate(), start
    place = state[0].memory.contents.data_ptr()
    for border in (0.0, 0.2, 1.0, *[0.2] * 9):
        x, is_first = normal(2, 1), torch.rand(2, 1) < border
        before = state
        y, state = compiled(x, state, is_first)
        expected, plain = model(x, plain, is_first)
        assert_near(y, expected)
        assert state[0].memory.contents.data_ptr() == place
    assert counter.frame_count == 1
    assert_near(model(x, state)[0], model(x, plain)[0])
    with pytest.raises(RuntimeError, match="^this memory was donated"):
        model(x, before)


@KEEP
@pytest.mark.parametrize("length", [1, 9])
def test_an_exported_model_takes_the_state_that_it_is_given(keep: bool, length: int) -> None:
    model = build(keep_across_episodes=keep, depth=2).eval()
    with torch.no_grad():
        used = model(normal(2, 14))[1]
        example = normal(2, length), model.initial_state(2), torch.zeros(2, length).bool()
        program = torch.export.export(model, example)
        for state in (used, model.initial_state(2), model(normal(2, 40))[1]):
            x, is_first = normal(2, length), torch.rand(2, length) < 0.2
            got = program.module()(x, state, is_first)
            wanted = model(x, state, is_first)
            assert_near(got[0], wanted[0])
            after = normal(2, 5)
            assert_near(model(after, got[1])[0], model(after, wanted[1])[0])


@KEEP
# By torch 2.11 itself, of what it reads.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_an_exported_model_is_written_and_read(keep: bool) -> None:
    model = build(keep_across_episodes=keep).eval()
    file = io.BytesIO()
    with torch.no_grad():
        state = model(normal(2, 14))[1]
        torch.export.save(torch.export.export(model, (normal(2, 4), state)), file)
        file.seek(0)
        program = torch.export.load(file).module()
        x = normal(2, 4)
        assert_near(program(x, state)[0], model(x, state)[0])


@KEEP
@pytest.mark.parametrize("bordered", [False, True])
def test_gradients_of_each_sample(keep: bool, bordered: bool) -> None:
    model = build(keep_across_episodes=keep)
    parameters = {name: part.detach() for name, part in model.named_parameters()}
    x, is_first = normal(3, 14), torch.rand(3, 14) < 0.15

    def loss(parameters: dict[str, Tensor], x: Tensor, is_first: Tensor) -> Tensor:
        call = (x[None], None, is_first[None]) if bordered else (x[None],)
        return functional_call(model, parameters, call)[0].square().sum()

    with warnings.catch_warnings():
        # torch says that it maps some of its own backward passes by a loop.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        got = vmap(grad(loss), (None, 0, 0))(parameters, x, is_first)
    for row in range(3):
        wanted = grad(loss)(parameters, x[row], is_first[row])
        for name, part in wanted.items():
            torch.testing.assert_close(got[name][row], part, rtol=1e-9, atol=1e-9)


@KEEP
def test_a_memory_is_mapped_over_rows(keep: bool) -> None:
    memory = ChunkedMemory.empty(4, 3, 2, 6, keep_across_episodes=keep, dtype=torch.float64)
    memory = memory.append(normal(4, 5))
    steps, is_first = normal(4, 7), torch.rand(4, 7) < 0.2

    def append(row: ChunkedMemory, steps: Tensor, is_first: Tensor) -> ChunkedMemory:
        one = pytree.tree_map(lambda part: part[None], row)
        return pytree.tree_map(lambda part: part[0], one.append(steps[None], is_first[None]))

    mapped = vmap(append)(memory, steps, is_first)
    wanted = memory.append(steps, is_first)
    for name in ("valid", "open_count", "next_slot", "step_count", "episode"):
        assert torch.equal(getattr(mapped, name), getattr(wanted, name)), name
    assert_near(mapped.contents[mapped.valid], wanted.contents[wanted.valid])
    assert_near(mapped.open_steps, wanted.open_steps)
