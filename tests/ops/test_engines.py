"""Who computes: whoever is named, or the first of the tuple that can."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, kernels
from htm_pytorch.ops import Impl, RecallImpl, attend, engines, recall
from htm_pytorch.ops.call import Call
from tests.helpers import assert_near, normal


def call_of(impl: str = "named", k: int = 3) -> Call:
    memory = ChunkedMemory.from_chunks(normal(2, 7, 4, 6))
    return Call.of(normal(2, 5, 6), memory, k, normal(4, 6), torch.rand(2, 5, 7) < 0.8, impl)


def test_names_are_those_that_can_be_asked_for() -> None:
    names = {engine.name for engine in engines.ENGINES}
    assert names | {"auto"} == set(get_args(RecallImpl))
    assert names | {"auto", "projected"} == set(get_args(Impl))
    assert len(names) == len(engines.ENGINES)


@pytest.mark.parametrize("engine", engines.ENGINES, ids=lambda engine: engine.name)
def test_each_computes_what_the_reference_does_or_says_why_not(engine: engines.Engine) -> None:
    call, probe = call_of(), normal(2, 5, 3, 6)
    error = engine.refuses(call)
    if error is not None:
        with pytest.raises(type(error), match=f"^impl: '{engine.name}' "):
            engines.choose(engine.name, call)
        return
    assert engines.choose(engine.name, call) is engine
    context, chunks = engine.recall(call, probe)
    expected, expected_chunks = engines.ENGINES[-1].recall(call, probe)
    assert_near(context, expected, 1e-12)
    assert torch.equal(chunks, expected_chunks)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of("auto")
    assert engines.choose("auto", call).name == ("native" if kernels.IS_AVAILABLE else "blocked")
    monkeypatch.setattr(kernels, "IS_AVAILABLE", False)
    assert engines.choose("auto", call).name == "blocked"
    taken: list[str] = []

    def run(route: Tensor) -> Tensor:
        taken.append(engines.choose("auto", call).name)
        return route

    torch.vmap(run)(normal(2, 3))
    assert taken == ["reference"]


class Stranger:
    """Everybody's first chunk."""

    name = "stranger"
    projects = False
    transforms = False

    def refuses(self, call: Call) -> Exception | None:
        return None if call.k == 1 else ValueError(f"expects k = 1, got {call.k}")

    def recall(self, call: Call, probe: Tensor, picks: Any = None) -> tuple[Tensor, Tensor]:
        first = call.chunked.contents[:, 0].mean(1)
        chunks = torch.zeros(*probe.shape[:2], 1, dtype=torch.int64)
        return first[:, None, None].expand_as(probe), chunks


def test_another_one_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", (Stranger(), *engines.ENGINES))
    memory = ChunkedMemory.from_chunks(normal(2, 7, 4, 6))
    route, probe = normal(2, 5, 6), normal(2, 5, 3, 6)
    context = recall(route, probe, memory, 1)
    assert torch.equal(context[1, 4, 2], memory.contents[1, 0].mean(0))
    eye = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)
    attended, seen = attend(route, probe, eye, memory, 1)
    assert_near(attended, context, 1e-14)
    assert seen.all()
    # It leaves what it cannot do to others, and says so where it is named.
    assert_near(
        recall(route, probe, memory, 2), recall(route, probe, memory, 2, impl="reference"), 1e-12
    )
    with pytest.raises(ValueError, match="^impl: 'stranger' expects k = 1, got 2$"):
        engines.choose("stranger", call_of(k=2))
