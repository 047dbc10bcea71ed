"""What is noted of a transformer is what it recalls, and noting it changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from htm_pytorch import HTMTransformer
from htm_pytorch.report import Moment, Recorder
from tests.report.makers import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 30


def run(model: HTMTransformer, x: Tensor, cut: int, **more: Any) -> tuple[Tensor, Any]:
    state, outputs = None, []
    for start in range(0, x.shape[1], cut):
        piece = {name: part[:, start : start + cut] for name, part in more.items()}
        y, state = model(x[:, start : start + cut], state, **piece)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def near(moments: tuple[Moment, ...], others: tuple[Moment, ...]) -> None:
    assert len(moments) == len(others)
    for one, other in zip(moments, others, strict=True):
        assert one.step == other.step
        for layer, same in zip(one.layers, other.layers, strict=True):
            assert [r.chunk for r in layer] == [r.chunk for r in same]
            for a, b in zip(layer, same, strict=True):
                assert a.weight == pytest.approx(b.weight, abs=1e-9)
                assert a.step_weights == pytest.approx(b.step_weights, abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 7, STEPS])
def test_outputs_and_states_are_those_of_a_run_that_nobody_listens_to(cut: int) -> None:
    model, x = make_model(), torch.randn(3, STEPS, 8)
    expected, state = run(model, x, cut)
    with Recorder(model, rows=[2, 0]) as recorder:
        outputs, same = run(model, x, cut)
    assert torch.equal(outputs, expected)
    for layer, other in zip(state, same, strict=True):
        assert layer.memory is not None and other.memory is not None
        assert torch.equal(layer.memory.contents, other.memory.contents)
        assert torch.equal(layer.keys, other.keys)
    assert 0 <= recorder.difference < 1e-5
    assert len(recorder.moments(2)) == len(recorder.moments(0)) == STEPS


def test_gradients_flow_as_without_it() -> None:
    model, x = make_model(detach_memories=False), torch.randn(1, 12, 8, requires_grad=True)
    model(x)[0].sum().backward()
    expected = x.grad
    x.grad = None
    with Recorder(model):
        model(x)[0].sum().backward()
    assert expected is not None and x.grad is not None and torch.equal(x.grad, expected)


@torch.no_grad()
def test_weights_and_chunks_are_those_that_recall_returns() -> None:
    model, x = make_model().double(), torch.randn(2, STEPS, 8, dtype=torch.float64)
    with Recorder(model, rows=[1]) as recorder:
        model(x)
    _, _, recalls = model.recall(x)
    chunks, moments = recorder.chunks(1), recorder.moments(1)
    assert [(s.chunk, s.first_step, s.count) for s in chunks] == [(n, 4 * n, 4) for n in range(7)]
    for step, moment in enumerate(moments):
        assert moment.step == step
        for layer, recall in zip(moment.layers, recalls, strict=True):
            kept = [n for n in recall.chunks[1, step].tolist() if n >= 0]
            # The ring of 5 was empty, so chunks of this call are counted from 5 on.
            assert [r.chunk for r in layer] == [n - 5 for n in kept]
            assert all(4 * r.chunk + 4 <= step for r in layer)
            # The oldest are forgotten.
            assert all(r.chunk >= step // 4 - 5 for r in layer)
            for rank, one in enumerate(layer):
                assert one.weight == pytest.approx(float(recall.chunk_weights[1, step, rank]))
                inside = recall.step_weights[1, step, :, rank].mean(0)
                assert one.step_weights == pytest.approx(inside.tolist())
    assert max(len(layer) for moment in moments for layer in moment.layers) == 2


@torch.no_grad()
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("cut", [1, 5])
def test_pieces_are_noted_like_the_whole(cut: int, keep: bool) -> None:
    """With new episodes, which drop or close a chunk early, and steps that do not exist."""
    model = make_model(keep_across_episodes=keep, mem_chunks=20).double()
    x = torch.randn(2, STEPS, 8, dtype=torch.float64)
    is_first = torch.zeros(2, STEPS, dtype=torch.bool)
    is_first[1, [0, 10, 13]] = True
    mask = torch.ones(2, STEPS, dtype=torch.bool)
    mask[1, [3, 4, 20]] = False
    more = {"is_first": is_first, "mask": mask}
    with Recorder(model, rows=[1]) as whole:
        run(model, x, STEPS, **more)
    with Recorder(model, rows=[1]) as pieces:
        run(model, x, cut, **more)
    assert pieces.chunks(1) == whole.chunks(1)
    near(pieces.moments(1), whole.moments(1))
    assert len(whole.moments(1)) == STEPS - 3
    for moment in whole.moments(1):
        for layer in moment.layers:
            assert sum(one.weight for one in layer) == pytest.approx(float(bool(layer)))
            assert all(sum(one.step_weights) == pytest.approx(1) for one in layer)
    # Without two missing steps, episodes begin at steps 8 and 11.
    spans = [(s.first_step, s.count, s.episode) for s in whole.chunks(1)]
    expected = [(0, 4, 0), (4, 4, 0), (11, 4, 2), (15, 4, 2), (19, 4, 2)]
    if keep:
        expected.insert(2, (8, 3, 1))
    assert [s for s in spans if s[0] < 20] == expected


@torch.no_grad()
def test_only_the_steps_asked_about_are_moments() -> None:
    model, x = make_model().double(), torch.randn(1, STEPS, 8, dtype=torch.float64)
    with Recorder(model) as every:
        model(x)
    with Recorder(model) as some:
        model(x, at=torch.tensor([[9, 29]]))
        model(x, at=torch.zeros(1, 0, dtype=torch.int64))
    near(some.moments(), (every.moments()[9], every.moments()[29]))


@torch.no_grad()
def test_steps_asked_about_among_those_that_do_not_exist() -> None:
    model, x = make_model(mem_chunks=20).double(), torch.randn(2, STEPS, 8, dtype=torch.float64)
    mask = torch.ones(2, STEPS, dtype=torch.bool)
    mask[1, [3, 4, 20]] = False
    with Recorder(model, rows=[1]) as every:
        model(x, mask=mask)
    with Recorder(model, rows=[1]) as some:
        model(x, mask=mask, at=torch.tensor([[0, 1, 2], [20, 19, 25]]))
    moments = every.moments(1)
    near(some.moments(1), (moments[17], moments[22]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    model, x = make_model(depth=1).to(dtype), torch.randn(1, STEPS, 8, dtype=dtype)
    with Recorder(model) as recorder:
        model(x)
    trace = recorder.trace("16 bits")
    assert len(trace.moments) == STEPS
    assert 0 <= recorder.difference < 0.1


@torch.no_grad()
def test_a_stream_that_went_on_before_is_shown_from_where_it_is() -> None:
    model, x = make_model(), torch.randn(1, STEPS, 8)
    _, state = model(x[:, :10])
    with Recorder(model) as recorder:
        model(x[:, 10:], state)
    trace = recorder.trace("late", labels=[str(n) for n in range(20)])
    assert trace.first_step == 10
    assert [moment.step for moment in trace.moments] == list(range(10, 30))
    assert trace.chunks[0].first_step == 0


def test_what_cannot_be_noted_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="model: expected one HTMTransformer with a memory"):
        Recorder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 0 in a HTMTransformer"):
        Recorder(make_model(mem_chunks=0))
    with pytest.raises(ValueError, match="got 2 in a ModuleList"):
        Recorder(nn.ModuleList([model, make_model()]))
    with pytest.raises(ValueError, match=r"rows: expected different numbers of rows, got \[1, 1\]"):
        Recorder(model, rows=[1, 1])
    with (
        Recorder(model, rows=[2]) as recorder,
        pytest.raises(ValueError, match=r"rows: expected rows of a batch of 2, got \[2\]"),
    ):
        model(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"row: expected one of \[2\] that were noted, got 0"):
        recorder.chunks(0)
    with pytest.raises(ValueError, match="moments: expected at least one, got none"):
        recorder.trace("nothing", row=2)


@torch.no_grad()
def test_labels_are_one_a_step() -> None:
    model = make_model()
    with Recorder(model) as recorder:
        model(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="labels: expected one for each of the 6 steps, got 2"):
        recorder.trace("short", labels=["a", "b"])


def test_it_listens_no_more_after_an_error() -> None:
    model = make_model()
    with pytest.raises(KeyError), Recorder(model) as recorder:
        raise KeyError
    model(torch.randn(1, 6, 8))
    assert recorder.moments() == ()


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_in_the_run_is_none_in_what_is_noted(value: float) -> None:
    x = torch.randn(1, 20, 8)
    x[0, 17] = value
    model = make_model()
    with Recorder(model) as recorder:
        y, _ = model(x)
    assert y[0, 17].isnan().any()
    assert recorder.difference < 1e-4


@torch.no_grad()
def test_nan_in_one_of_both_alone_is_an_error(monkeypatch: Any) -> None:
    model, x = make_model(), torch.randn(1, 6, 8)
    true = model.recall

    def other(*given: Any, **named: Any) -> Any:
        y, *rest = true(*given, **named)
        return y.index_fill(1, torch.tensor([2]), float("nan")), *rest

    monkeypatch.setattr(model, "recall", other)
    with Recorder(model), pytest.raises(ValueError, match="got NaN of one of them alone"):
        model(x)


@torch.no_grad()
def test_outputs_that_are_not_those_of_the_run_are_an_error(monkeypatch: Any) -> None:
    model, x = make_model(), torch.randn(1, 6, 8)
    true = model.recall

    def other(*given: Any, **named: Any) -> Any:
        y, *rest = true(*given, **named)
        return y + 1, *rest

    monkeypatch.setattr(model, "recall", other)
    with Recorder(model), pytest.raises(ValueError, match="got a difference of"):
        model(x)
