"""`HTMTransformer`: streamed = whole, and what must not matter does not."""

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_pytorch import HTMTransformer


def build(**changes: Any) -> HTMTransformer:
    sizes = {"dim": 12, "depth": 2, "heads": 3, "dim_head": 5, "topk_mems": 2}
    sizes |= {"mem_chunk_size": 3, "mem_chunks": 4, "window": 4}
    model = HTMTransformer(**(sizes | changes)).double()
    for layer in model.layers:
        torch.nn.init.normal_(layer.local.distance_bias)
    return model


def leaves(state: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 50),
    st.lists(st.integers(0, 50), max_size=6),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.booleans(),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([(12, 3, 5), (7, 1, 3), (1, 2, 1)]),
)
def test_streamed_equals_whole(
    seed: int,
    length: int,
    cuts: list[int],
    border: float,
    keep: bool,
    chunk_size: int,
    window: int,
    mem_chunks: int,
    widths: tuple[int, int, int],
) -> None:
    torch.manual_seed(seed)
    dim, heads, dim_head = widths
    model = build(
        dim=dim,
        heads=heads,
        dim_head=dim_head,
        mem_chunk_size=chunk_size,
        window=window,
        mem_chunks=mem_chunks,
        keep_across_episodes=keep,
    )
    x = torch.randn(2, length, dim, dtype=torch.float64)
    is_first = torch.rand(2, length) < border
    with torch.no_grad():
        whole, state_whole = model(x, model.initial_state(2), is_first)
        bounds = [0, *sorted(cut for cut in cuts if cut < length), length]
        state, pieces = model.initial_state(2), []
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            y, state = model(x[:, start:end], state, is_first[:, start:end])
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    for one, other in zip(leaves(state), leaves(state_whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 29),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    st.lists(st.integers(1, 29), max_size=6),
    st.sampled_from([0.05, 0.2]),
    st.booleans(),
    st.integers(1, 7),
    st.sampled_from([0, 1, 4]),
)
def test_a_step_that_is_no_number_spoils_what_sees_it_and_nothing_else(
    seed: int,
    place: int,
    value: float,
    cuts: list[int],
    border: float,
    keep: bool,
    window: int,
    mem_chunks: int,
) -> None:
    torch.manual_seed(seed)
    keep = keep and mem_chunks > 0
    model = build(window=window, mem_chunks=mem_chunks, keep_across_episodes=keep)
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    is_first = torch.rand(2, 30) < border
    broken = x.clone()
    broken[0, place] = value
    with torch.no_grad():
        clean, _ = model(x, is_first=is_first)
        whole, _ = model(broken, is_first=is_first)
        state, pieces = model.initial_state(2), []
        for start, end in itertools.pairwise([0, *sorted(cuts), 30]):
            y, state = model(broken[:, start:end], state, is_first[:, start:end])
            pieces.append(y)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(torch.cat(pieces, 1), whole, equal_nan=True)
    assert not whole[0, place].isfinite().any()
    close(whole[1], clean[1])
    close(whole[0, :place], clean[0, :place])
    episodes = is_first[0].cumsum(0)
    later = (episodes > episodes[place]) & (not keep)
    close(whole[0, later], clean[0, later])


@pytest.mark.parametrize("mem_chunks", [0, 4])
def test_compiled_it_spoils_the_same(mem_chunks: int) -> None:
    model, x = build(mem_chunks=mem_chunks), torch.randn(2, 30, 12, dtype=torch.float64)
    is_first = torch.zeros(2, 30, dtype=torch.bool)
    is_first[:, 20] = True
    x[0, 13] = torch.nan
    with torch.no_grad():
        wanted, _ = model(x, model.initial_state(2), is_first)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        y, _ = compiled(x, model.initial_state(2), is_first)
    assert y[0, 13:20].isnan().all() and y[0, 20:].isfinite().all()
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_one_step_at_a_time_equals_500_at_once() -> None:
    model = build()
    x = torch.randn(1, 500, 12, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = model(x, model.initial_state(1))
        state, pieces = model.initial_state(1), []
        for step in x.split(1, 1):
            y, state = model(step, state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


def test_a_step_depends_on_its_window_and_its_memory_and_on_nothing_later() -> None:
    model = build(depth=1, window=2, mem_chunks=2, topk_mems=2, detach_memories=False)
    x = torch.randn(1, 14, 12, dtype=torch.float64, requires_grad=True)
    y, _ = model(x, model.initial_state(1))
    y[0, 10, 0].backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(-1) > 0
    # Step 10: itself and the window (9, 10); chunks 3-5 and 6-8, whose first steps saw step 2.
    assert reached.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_gradients_stop_at_the_memory_by_default() -> None:
    model = build(depth=1, window=1)
    x = torch.randn(1, 14, 12, dtype=torch.float64, requires_grad=True)
    y, state = model(x, model.initial_state(1))
    y[0, 10, 0].backward()
    assert x.grad is not None
    assert (x.grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == [10]
    assert not any(leaf.requires_grad for leaf in leaves(state))


@pytest.mark.parametrize("keep", [False, True])
def test_an_earlier_episode_matters_only_when_it_is_kept(keep: bool) -> None:
    model = build(keep_across_episodes=keep)
    x, other = torch.randn(2, 1, 20, 12, dtype=torch.float64)
    is_first = torch.zeros(1, 20, dtype=torch.bool)
    is_first[0, 10] = True
    other[:, 10:] = x[:, 10:]
    with torch.no_grad():
        one = model(x, model.initial_state(1), is_first)[0][:, 10:]
        two = model(other, model.initial_state(1), is_first)[0][:, 10:]
    if keep:
        assert not torch.allclose(one, two)
    else:
        # Bits may differ: how many chunks are picked, by all, is the shape of a matrix product.
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_another_rows_episode_border_does_not_matter() -> None:
    model = build()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    is_first = torch.zeros(2, 20, dtype=torch.bool)
    without = model(x, model.initial_state(2), is_first)[0]
    is_first[0, 7] = True
    with_border = model(x, model.initial_state(2), is_first)[0]
    torch.testing.assert_close(without[1], with_border[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(without[0], with_border[0])


def test_outputs_at_some_steps_are_those_of_all_steps() -> None:
    model = build()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    at = torch.tensor([[3, 19, 3], [0, 7, 18]])
    whole, state = model(x, model.initial_state(2))
    some, state_some = model(x, model.initial_state(2), at=at)
    expected = whole.gather(1, at[..., None].expand(-1, -1, 12))
    torch.testing.assert_close(some, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(leaves(state), leaves(state_some), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_recall_names_chunks_a_step_could_see() -> None:
    model = build()
    x = torch.randn(1, 20, 12, dtype=torch.float64)
    y, _, recalls = model.recall(x)
    torch.testing.assert_close(y, model(x, model.initial_state(1))[0])
    assert len(recalls) == 2
    for step, chunks in enumerate(recalls[0].chunks[0].tolist()):
        # Slots 0 to 3 are the ring, empty before the call; 4 + j is the j-th chunk closed in it.
        assert all(chunk == -1 or 4 <= chunk < 4 + step // 3 for chunk in chunks)
        assert sum(chunk >= 0 for chunk in chunks) == min(2, step // 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x[..., :5], m.initial_state(2)), r"x: expected shape \[B, T, D = 12\]"),
        (lambda m, x: m(x.float(), m.initial_state(2)), r"x: expected dtype torch.float64"),
        (
            lambda m, x: m(x, m.initial_state(3)),
            r"state\[0\].memory.contents: expected shape \[B = 2",
        ),
        (
            lambda m, x: m(x, m.initial_state(2).layers[:1]),
            r"state: expected a TransformerState of 2 layers, got one of 1",
        ),
        (
            lambda m, x: m(x, [1, 2]),
            r"state: expected a TransformerState of 2 layers, got list",
        ),
        (lambda m, x: m(x, build().float().initial_state(2)), r"state\[0\].*expected dtype"),
        (lambda m, x: m(x, at=torch.tensor([[0], [5]])), r"at: expected steps 0 to 4, got 0 to 5"),
        (lambda m, x: m(x, build(window=9).initial_state(2)), r"state\[0\].keys: expected shape"),
        (lambda m, x: m(x, build(mem_chunks=9).initial_state(2)), r"state\[0\].memory.contents"),
        (lambda m, x: m(x, m.initial_state(2), x[..., 0]), r"is_first: expected dtype torch.bool"),
        (lambda m, x: m(x, m.initial_state(2), at=torch.zeros(3)), r"at: expected shape"),
        (
            lambda m, x: m(x, build(keep_across_episodes=True).initial_state(2)),
            r"state\[0\].memory.keep_across_episodes: expected False, got True",
        ),
        (lambda m, x: build(window=0), r"window: expected an integer >= 1, got 0"),
        (lambda m, x: build(topk_mems=0), r"topk_mems: expected an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        call(model, torch.randn(2, 5, 12, dtype=torch.float64))
