"""`check` passes what is right and fails what is slightly wrong; both are tried here."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.check import CheckConfig, Comparison, Report, check, config, run
from htm_pytorch.check.problem import Problem
from htm_pytorch.ops import Impl, blocked, native, projected, reference
from tests.helpers import on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

IMPLS = on_cpu(Impl)
DTYPES = ["float64", "float32", "bfloat16", "float16"]
PARAMETERS = [
    "to_summary_queries.weight",
    "to_summary_queries.bias",
    "to_summary_keys.weight",
    "to_summary_keys.bias",
    "attn.to_q.weight",
    "attn.to_kv.weight",
    "attn.to_out.weight",
    "attn.to_out.bias",
]


def small(**changes: Any) -> CheckConfig:
    sizes = {"batch": 2, "queries": 5, "steps": 62, "dim": 16, "heads": 2, "dim_head": 8}
    return CheckConfig(**(sizes | {"topk_mems": 3, "mem_chunk_size": 4} | changes))


def wrong(report: Report) -> set[str]:
    return {comparison.quantity for comparison in report.comparisons if not comparison.ok}


CASES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "whole-chunks": {"steps": 64},
    "masked": {"masked": True, "detach_memories": False},
    "memory": {"detach_memories": False},
    "chunked": {"chunked": True, "detach_memories": False},
    "chunked-masked": {"chunked": True, "masked": True},
    "no-positions": {"add_pos_enc": False},
    "more-queries-than-compared": {"queries": 40, "steps": 200},
    "one-query": {"batch": 1, "queries": 1},
    "acting": {"batch": 4, "queries": 1, "heads": 1},
    "k-is-1: the router has no gradient": {"topk_mems": 1},
    "fewer-chunks-than-k": {"steps": 7, "topk_mems": 5},
    "one-step": {"steps": 1},
    "chunks-of-one-step": {"mem_chunk_size": 1},
}


def assert_passes(config: CheckConfig) -> None:
    report = check(config)
    assert report.ok, f"\n{report}"
    memories = [] if config.detach_memories else ["memories"]
    assert [comparison.quantity for comparison in report.comparisons] == [
        "output",
        *(f"gradient of {name}" for name in ["queries", *memories, *PARAMETERS]),
    ]
    unit = torch.finfo(getattr(torch, config.dtype)).eps
    assert max(comparison.error for comparison in report.comparisons) < 64 * unit
    assert report.compared == min(config.batch * config.queries, 16)
    assert report.left_out == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("changes", CASES.values(), ids=[name.split(":")[0] for name in CASES])
def test_passes_what_is_right(changes: dict[str, Any], impl: Any) -> None:
    assert_passes(small(impl=impl, **changes))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_passes_every_dtype(masked: bool, dtype: Any, impl: Any) -> None:
    assert_passes(small(impl=impl, dtype=dtype, masked=masked, detach_memories=False))


def scaled(context: Tensor, by: float) -> Tensor:
    return context * (1 + by)


def scaled_on_the_way_back(context: Tensor, by: float) -> Tensor:
    return context + by * (context - context.detach())


def break_attention(
    monkeypatch: pytest.MonkeyPatch, impl: str, change: Callable[[Tensor], Tensor]
) -> None:
    """Let `change` spoil what the engine of this name returns."""
    module, name = {
        "reference": (reference, "recall"),
        "blocked": (blocked, "recall"),
        "native": (native, "attend"),
        "projected": (projected, "attend"),
    }[impl]
    right = getattr(module, name)

    def spoilt(*arguments: Any) -> Any:
        result = right(*arguments)
        if isinstance(result, Tensor):
            return change(result)
        return change(result[0]), *result[1:]

    monkeypatch.setattr(module, name, spoilt)


ENGINES = ["reference", "blocked", "native", "projected"]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(("dtype", "by"), [("float32", 1e-3), ("float64", 1e-12)])
class TestFails:
    def test_a_value_that_is_slightly_wrong(
        self, monkeypatch: pytest.MonkeyPatch, impl: Any, dtype: Any, by: float
    ) -> None:
        break_attention(monkeypatch, impl, lambda context: scaled(context, by))
        report = check(small(impl=impl, dtype=dtype))
        assert {"output", "gradient of attn.to_out.weight"} <= wrong(report)
        assert "gradient of attn.to_out.bias" not in wrong(report)
        output = report.comparisons[0]
        assert output.error == pytest.approx(by, rel=0.5)
        assert output.reference_error < by / 50
        # Value and gradients are wrong alike: only a comparison shows it.
        assert report.gradcheck
        assert not report.ok

    def test_a_gradient_that_is_slightly_wrong(
        self, monkeypatch: pytest.MonkeyPatch, impl: Any, dtype: Any, by: float
    ) -> None:
        break_attention(monkeypatch, impl, lambda context: scaled_on_the_way_back(context, by))
        report = check(small(impl=impl, dtype=dtype, detach_memories=False))
        names = ["queries", "memories", "attn.to_q.weight", "attn.to_kv.weight"]
        assert {f"gradient of {name}" for name in names} <= wrong(report)
        assert not {"output", "gradient of attn.to_out.weight"} & wrong(report)
        assert report.gradcheck == (by < 1e-4)
        assert not report.ok


def break_blocked(monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, ...]]) -> None:
    """Let `change` spoil the arguments: route, probe, memory, k, positions, chunk mask, fading."""
    right = blocked.recall
    monkeypatch.setattr(blocked, "recall", lambda *arguments: right(*change(*arguments)))


def test_fails_a_chunk_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    break_blocked(monkeypatch, lambda r, p, memory, k, *rest: (r, p, memory, k - 1, *rest))
    assert "output" in wrong(check(small(impl="blocked", dtype="bfloat16")))


def test_fails_positions_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    break_blocked(monkeypatch, lambda r, p, memory, k, _, *rest: (r, p, memory, k, None, *rest))
    assert "output" in wrong(check(small(impl="blocked")))
    assert check(small(impl="blocked", add_pos_enc=False)).ok


def test_fails_a_chunk_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    break_blocked(monkeypatch, lambda r, p, memory, k, x, *_: (r, p, memory, k, x, None))
    assert "output" in wrong(check(small(impl="blocked", masked=True)))
    assert check(small(impl="blocked")).ok


def test_fails_a_masked_step_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    break_blocked(
        monkeypatch, lambda r, p, memory, *rest: (r, p, memory._replace(step_mask=None), *rest)
    )
    report = check(small(impl="blocked", masked=True))
    assert "output" in wrong(report)
    # NaN lay behind the mask.
    assert report.comparisons[0].error != report.comparisons[0].error
    assert "nan" in str(report)


def test_fails_a_memory_without_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    break_blocked(monkeypatch, lambda r, p, memory, *rest: (r, p, memory.detach(), *rest))
    report = check(small(impl="blocked", detach_memories=False))
    assert wrong(report) == {"gradient of memories"}
    assert not report.gradcheck
    assert check(small(impl="blocked")).ok


def test_fails_sums_in_less_than_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    break_attention(monkeypatch, "blocked", lambda context: context.to(torch.float16).to(context))
    assert "output" in wrong(check(small(impl="blocked")))
    # In bfloat16 that is more than enough.
    assert not wrong(check(small(impl="blocked", dtype="bfloat16")))


def test_a_reference_that_is_right_by_luck_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Problem.plain_output

    # Right for the inputs as they were drawn; as far off as the layer for any near them.
    def lucky(self: Any, inputs: dict[str, Tensor]) -> Tensor:
        as_drawn = all(torch.equal(x, self.inputs[name].to(x)) for name, x in inputs.items())
        return scaled(right(self, inputs), 0.0 if as_drawn else 1e-3)

    monkeypatch.setattr(Problem, "plain_output", lucky)
    break_attention(monkeypatch, "blocked", lambda context: scaled(context, 1e-3))
    config = small(impl="blocked")
    report = check(config)
    assert report.ok, f"\n{report}"
    assert report.comparisons[0].reference_error == pytest.approx(1e-3, rel=0.01)
    monkeypatch.setattr(run, "RUNS", 1)
    assert "output" in wrong(check(config))


@pytest.mark.parametrize("impl", ["blocked", "native"])
@pytest.mark.parametrize("chunked", [False, True])
def test_says_what_auto_took(monkeypatch: pytest.MonkeyPatch, chunked: bool, impl: Any) -> None:
    monkeypatch.setattr(kernels, "IS_AVAILABLE", impl == "native")
    assert check(small(chunked=chunked)).impl == f"auto took {impl}"
    assert check(small(impl=impl)).impl == impl


def test_the_names_of_implementations_are_those_of_the_layer() -> None:
    assert get_args(config.Impl) == get_args(Impl)


def test_near_ties_are_left_out_and_most_of_them_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_doubt(rows: int) -> None:
        # A score of these rows may be off by any amount.
        monkeypatch.setattr(
            Problem,
            "_score_error",
            lambda _, row, queries: queries.new_full(
                queries.shape[:2], 0.0 if row >= rows else 1e9
            ),
        )

    # An engine that is wrong for the first row alone.
    def spoil_the_first_row(context: Tensor) -> Tensor:
        return torch.cat([context[:1] * 2, context[1:]])

    break_attention(monkeypatch, "blocked", spoil_the_first_row)
    config = small(impl="blocked", detach_memories=False)
    assert {"output", "gradient of queries", "gradient of memories"} <= wrong(check(config))
    in_doubt(rows=1)
    report = check(config)
    assert (report.compared, report.left_out) == (10, 5)
    # Half of them are compared, which is enough, and right; the others count nowhere.
    assert not wrong(report) and report.most_compared
    in_doubt(rows=2)
    report = check(config)
    assert (report.compared, report.left_out) == (10, 10)
    assert not wrong(report) and not report.most_compared and not report.ok


def test_clear_queries_are_looked_for() -> None:
    # So near are 64 scores in bfloat16 that most draws are not clear; what is compared is.
    problem = Problem(small(steps=512, topk_mems=16, mem_chunk_size=8, dtype="bfloat16"))
    assert problem.clear.all()
    for row in (0, 1):
        queries = problem.inputs["queries"][row, None]
        number = torch.tensor(row)
        scores = problem._scores(number, queries, torch.float64)[0].sort(descending=True).values
        gap = scores[..., 15] - scores[..., 16]
        assert (gap > 8 * problem._score_error(number, queries)).all()


def test_the_same_seed_is_the_same_check_and_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (check(small(seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first.comparisons != other.comparisons


def test_as_a_string_it_is_an_aligned_table() -> None:
    comparisons = (
        Comparison("output", 1.234e-7, 2e-7, True),
        Comparison("gradient of queries", 0.5, 2e-7, False),
    )
    config = CheckConfig(queries=2000, masked=True, add_pos_enc=False)
    report = Report(config, "auto took blocked", comparisons, 16, 9, True)
    title, sizes, *table = str(report).splitlines()
    assert title == f"auto took blocked, float32 on cpu, torch {torch.__version__}, seed 0"
    assert sizes == (
        "1 x 2,000 queries, 20,000 steps, dim 512, 8 heads of 64, 8 chunks of 32, "
        "no positions, masked"
    )
    assert table == [
        "",
        "relative to the largest entry                        error  reference's own  ok",
        "output                                             1.2e-07          2.0e-07  yes",
        "gradient of queries                                5.0e-01          2.0e-07  NO",
        "compared 7 of 2,000 queries, 9 near ties left out                            NO",
        "gradcheck in float64 at small sizes                                          yes",
        "",
        "FAILED",
    ]
    right = report._replace(comparisons=comparisons[:1], left_out=8)
    assert right.ok and str(right).endswith("\n\npassed")
    assert not right._replace(gradcheck=False).ok


def test_the_default_is_the_example_of_the_readme() -> None:
    c = CheckConfig()
    assert (c.batch, c.queries, c.steps, c.dim) == (1, 128, 20_000, 512)
    assert (c.heads, c.dim_head, c.topk_mems, c.mem_chunk_size) == (8, 64, 8, 32)
    assert c.dtype == "float32" and c.impl == "auto" and c.detach_memories and c.add_pos_enc


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 64}, {"steps": 12, "mem_chunk_size": 3}),
        ({"steps": 62}, {"steps": 11, "mem_chunk_size": 3}),
        ({"steps": 3}, {"steps": 2, "mem_chunk_size": 3}),
        ({"steps": 3, "mem_chunk_size": 1}, {"steps": 3, "mem_chunk_size": 1}),
        ({"batch": 1, "queries": 1, "dim": 2}, {"batch": 1, "queries": 1, "dim": 2}),
        ({"masked": True, "chunked": True}, {"masked": True, "chunked": True}),
        ({"dtype": "bfloat16", "impl": "blocked"}, {"dtype": "float64", "impl": "blocked"}),
    ],
    ids=str,
)
def test_cut_down_keeps_what_is_special(changes: Any, expected: dict[str, Any]) -> None:
    cut = dataclasses.asdict(small(**changes).cut_down())
    assert {name: cut[name] for name in expected} == expected
    assert cut["steps"] <= 12 and cut["dim"] <= 4 and cut["queries"] <= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "^batch: expected an integer >= 1, got 0$"),
        ({"queries": 0}, "^queries: expected an integer >= 1, got 0$"),
        ({"steps": 0}, "^steps: expected an integer >= 1, got 0$"),
        ({"dim": 1.5}, "^dim: expected an integer >= 1, got 1.5$"),
        ({"heads": -1}, "^heads: expected an integer >= 1, got -1$"),
        ({"dim_head": True}, "^dim_head: expected an integer >= 1, got True$"),
        ({"topk_mems": 0}, "^topk_mems: expected an integer >= 1, got 0$"),
        ({"mem_chunk_size": 0}, "^mem_chunk_size: expected an integer >= 1, got 0$"),
        ({"seed": -1}, "^seed: expected an integer >= 0, got -1$"),
        ({"dtype": "int64"}, r"^dtype: expected one of \('float64', .*\), got 'int64'$"),
        ({"impl": "fastest"}, r"^impl: expected one of \('auto', .*\), got 'fastest'$"),
        ({"device": "abacus"}, "^device: expected one of this machine .*, got 'abacus' "),
        ({"device": "meta"}, "^device: expected one of this machine .*, got 'meta' "),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"^device: expected one of this machine .*, got 'cuda' "):
        CheckConfig(device="cuda")


def test_an_implementation_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("no kernel here")

    monkeypatch.setattr(native, "pick", missing)
    expected = r"^impl: expected one that runs on cpu, got 'native' \(no kernel here\)$"
    with pytest.raises(ValueError, match=expected):
        check(small(impl="native"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(dtype: Any, masked: bool) -> None:
    report = check(small(device="cuda", dtype=dtype, masked=masked, detach_memories=False))
    assert report.ok, f"\n{report}"
