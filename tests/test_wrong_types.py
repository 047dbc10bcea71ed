"""What is of a wrong type is refused by the name of the argument, wherever users give something."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, HTMTransformer, recall
from htm_pytorch.memory import Span, Steps
from htm_pytorch.nn import TransformerState
from htm_pytorch.ops import attend
from htm_pytorch.report import Moment, Recorder, Trace, trace_memory, write_report

MODEL = HTMTransformer(
    dim=8, depth=1, heads=2, dim_head=4, topk_mems=1, mem_chunk_size=2, mem_chunks=3, window=2
)
LAYER = HTMAttention(dim=8, heads=2, dim_head=4, topk_mems=1, mem_chunk_size=2)
MEMORY = ChunkedMemory.empty(batch=1, chunks=3, chunk_size=2, dim=8)
QUERIES = torch.zeros(1, 2, 8)
TRACE = Trace("t", (Span(0, 0, 2, 0),), (Moment(None, ((),)),))
ANYTHING = (1, 1.5, "text", [1], {}, torch.zeros(2), nn.Linear(2, 2), object())
NO_TENSOR = tuple(value for value in ANYTHING if not isinstance(value, torch.Tensor))
NO_LIST = (1, 1.5, nn.Linear(2, 2), object())


NO_SIZE = ("2", 0, -1, 1.5, None, True)
NO_EPS = ("0", -1.0, float("nan"), float("inf"), None, True)
NO_BOOL = ("no", 0, None)
NESTED = torch.nested.nested_tensor([torch.zeros(2, 8)], layout=torch.jagged)


def plain_model(**options: Any) -> HTMTransformer:
    sizes = {"topk_mems": 1, "mem_chunk_size": 2, "mem_chunks": 0, "window": 2}
    return HTMTransformer(dim=8, depth=1, **(sizes | options))


def recall_of(memory: Any) -> torch.Tensor:
    return recall(QUERIES, QUERIES[:, :, None], memory, 1)


def attended(**options: Any) -> Any:
    projections = torch.zeros(2, 1, 4, 8)
    return attend(QUERIES, torch.zeros(1, 2, 1, 4), projections, MEMORY, 1, **options)


def memory_of(layer: Any = LAYER, memory: Any = MEMORY, **more: Any) -> Trace:
    return trace_memory(layer, QUERIES, memory, "t", **more)


def traced(**changes: Any) -> Trace:
    return Trace(**{"title": "t", "chunks": (), "moments": TRACE.moments} | changes)


REFUSED: dict[str, tuple[Callable[[Any], object], str, tuple[Any, ...]]] = {
    "block's width": (lambda v: HTMBlock(v, topk_mems=1), "dim", ("8", 8.0, None, [8])),
    "model's width": (
        lambda v: HTMTransformer(v, depth=1, topk_mems=1, mem_chunk_size=2, mem_chunks=3, window=2),
        "dim",
        ("8", 8.0, None, [8]),
    ),
    "model's heads, without a memory": (lambda v: plain_model(heads=v), "heads", NO_SIZE),
    "model's heads' width": (lambda v: plain_model(dim_head=v), "dim_head", NO_SIZE),
    "model's implementation": (lambda v: plain_model(impl=v), "impl", ("nonsense", None, 1)),
    "eps": (lambda v: HTMAttention(8, eps=v), "eps", NO_EPS),
    "eps of a past": (lambda v: ChunkedMemory.from_steps(QUERIES, 2, eps=v), "eps", NO_EPS),
    "eps of steps": (lambda v: recall_of(Steps(QUERIES, 2, None, v)), "eps", NO_EPS),
    "positions": (lambda v: HTMAttention(8, add_pos_enc=v), "add_pos_enc", NO_BOOL),
    "router's bias": (lambda v: HTMAttention(8, router_bias=v), "router_bias", NO_BOOL),
    "inner bias": (lambda v: HTMAttention(8, inner_bias=v), "inner_bias", NO_BOOL),
    "recency": (lambda v: HTMAttention(8, recency=v), "recency", NO_BOOL),
    "episodes": (
        lambda v: ChunkedMemory.empty(1, 3, 2, 8, keep_across_episodes=v),
        "keep_across_episodes",
        NO_BOOL,
    ),
    "memory's dtype": (
        lambda v: ChunkedMemory.empty(1, 3, 2, 8, dtype=v),
        "dtype",
        ("float32", 1, torch.int64),
    ),
    "memory's device": (lambda v: ChunkedMemory.empty(1, 3, 2, 8, device=v), "device", ("x", 1.5)),
    "lengths": (
        lambda v: MEMORY.reach(QUERIES, lengths=v),
        "lengths",
        (*NO_TENSOR, torch.ones(1), torch.ones(2).long(), torch.tensor([3]), torch.tensor([-1])),
    ),
    "scale": (lambda v: attended(scale=v), "scale", ("1", [1], QUERIES)),
    "queries": (lambda v: LAYER(v, MEMORY), "queries", (*NO_TENSOR, QUERIES.to_sparse(), NESTED)),
    "steps": (lambda v: LAYER(QUERIES, v), "memories", (1, "a", QUERIES.to_sparse(), NESTED)),
    "states": (TransformerState.cat, "states", (1, nn.Linear(2, 2), [1], ["a"], [MEMORY])),
    "memories": (ChunkedMemory.cat, "memories", (1, nn.Linear(2, 2), [1], ["a"], [LAYER])),
    "rows that begin": (MEMORY.begin, "rows", NO_TENSOR),
    "recorder's model": (Recorder, "model", ANYTHING),
    "recorder's rows": (lambda v: Recorder(MODEL, v), "rows", (*NO_LIST, "0", [0.5], ["a"], None)),
    "layer": (lambda v: memory_of(layer=v), "layer", (*ANYTHING, None, MODEL)),
    "memory": (lambda v: memory_of(memory=v), "memory", (*ANYTHING, None)),
    "labels": (lambda v: memory_of(labels=v), "labels", (*NO_LIST, "ab", [1, 2])),
    "labels of steps": (lambda v: memory_of(steps=v), "steps", (*NO_LIST, "ab", [1, 2])),
    "title": (lambda v: traced(title=v), "title", (None, *ANYTHING[:2])),
    "chunks": (lambda v: traced(chunks=v), "chunks", (*NO_LIST, "text", [1], [(0, 0, 2, 0)])),
    "moments": (lambda v: traced(moments=v), "moments", (*NO_LIST, "text", [1])),
    "seen": (lambda v: traced(steps=v), "steps", (*NO_LIST, "text", ["a"])),
    "frames": (lambda v: traced(frames=v), "frames", NO_TENSOR),
    "trace": (lambda v: write_report(v, "no.html"), "trace", (*ANYTHING, None)),
    "bytes": (lambda v: write_report(TRACE, "no.html", most_bytes=v), "most_bytes", ("9", 0, 1.5)),
}


def refused(function: Callable[[Any], object], name: str, wrong: tuple[Any, ...]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{name}(\[\d+\])?: expected "):
            function(value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_of_a_wrong_type_is_refused_by_name(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*REFUSED[case])
    assert not list(tmp_path.iterdir())


def test_labels_and_rows_of_a_recorder() -> None:
    with Recorder(MODEL) as recorder:
        MODEL(torch.randn(1, 6, 8))
    refused(lambda v: recorder.trace("t", labels=v), "labels", (*NO_LIST, "abcdef", [1] * 6))
    refused(lambda v: recorder.trace("t", frames=v), "frames", NO_TENSOR)
    refused(recorder.moments, "row", (None, [0], {}, "0", 0.5))


def test_agents_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium", reason="the extra `rl` is not installed")
    pytest.importorskip("matplotlib", reason="the extra `rl` is not installed")
    from htm_pytorch.report import Scene, draw_moment, film_moments, measure, trace_agent
    from htm_pytorch.rl import TrainConfig, evaluate, make_agent, train
    from htm_pytorch.rl.making import make_environments

    monkeypatch.chdir(tmp_path)
    config = TrainConfig().replace(dim=8, heads=2)
    made = make_environments(config, 1)
    spaces = made.observation_space, made.action_space
    agent = make_agent(config, *spaces)
    any_agent: Any = agent
    refused(lambda v: make_agent(v, *spaces), "config", (*ANYTHING, None))
    refused(lambda v: make_agent(config, *spaces, v), "parts", ANYTHING)
    refused(train, "config", (*ANYTHING, None))
    refused(lambda v: evaluate("no", v), "episodes", ANYTHING[1:])
    refused(lambda v: evaluate("no", patience=v), "patience", ANYTHING[1:])
    refused(lambda v: trace_agent(v, config), "agent", (*ANYTHING, None))
    refused(lambda v: trace_agent(any_agent, v), "config", (*ANYTHING, None))
    refused(lambda v: trace_agent(any_agent, config, scene=v), "scene", ANYTHING)
    refused(lambda v: measure(any_agent, config, 1, v), "scene", (*ANYTHING, None))
    refused(lambda v: measure(any_agent, config, v, Scene()), "episodes", (0, *ANYTHING[1:]))
    refused(lambda v: draw_moment(v, "a.png"), "trace", (*ANYTHING, None))
    refused(lambda v: draw_moment(TRACE, "a.png", v), "number", (None, *ANYTHING))
    refused(lambda v: draw_moment(TRACE, "a.png", best=v), "best", (-1, *ANYTHING[1:]))
    refused(lambda v: film_moments(v, "a.gif"), "trace", (*ANYTHING, None))
    refused(lambda v: film_moments(TRACE, "a.gif", layer=v), "layer", (None, *ANYTHING))
    assert not list(tmp_path.iterdir())


def test_stored_memories(tmp_path: Path) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    from htm_pytorch import memory

    steps = torch.zeros(1, 2, 8)
    with memory.open(tmp_path / "one", dim=8, chunk_size=2) as one:
        refused(lambda v: one.append(steps, keys=v), "keys", NO_LIST)
        refused(lambda v: one.append(steps, times=v), "times", ("text", [1.0, 2.0], *NO_LIST[2:]))
        for name in ("since", "until"):
            wrong = ("text", [1.0], torch.zeros(2), *NO_LIST[2:])
            refused(lambda v, name=name: one.where(**{name: v}), name, wrong)
        refused(lambda v: one.forget(before=v), "before", ("text", [1.0], *NO_LIST[2:]))
        refused(lambda v: one.index_recall(k=v), "k", (0, *ANYTHING[1:]))
        assert one.steps == 0
    with memory.open_many(tmp_path / "many", dim=8, chunk_size=2) as many:
        for function in (lambda v: many.append(v, steps), many.rows):
            refused(function, "names", (None, "ann", *NO_LIST))
        assert len(many) == 0
