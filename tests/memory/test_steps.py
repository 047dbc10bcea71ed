"""`Steps`, a past given whole: what it says of itself, and recall of it where it lies."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMAttention
from htm_pytorch.memory import Steps
from htm_pytorch.ops import Impl, RecallImpl, recall, recall_with_weights
from tests.helpers import assert_near, normal, on_cpu, value_and_gradients

FAST = [impl for impl in on_cpu(RecallImpl) if impl != "reference"]
NAMES = ["route", "probe", "positions", "steps"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Sizes(NamedTuple):
    """The letters of `htm_pytorch.shapes`, and what there is besides."""

    B: int = 2
    Q: int = 5
    H: int = 3
    N: int = 18
    C: int = 4
    D: int = 6
    k: int = 3
    shared: bool = False
    positions: bool = True
    mask: float | None = None  # probability that a step may be attended; None: no mask
    seen: float | None = None  # probability that a query may see a chunk
    eps: float = 0.0


class Problem:
    """Inputs of order one, whose softmaxes are not saturated: no gradient is a rounding error."""

    def __init__(self, sizes: Sizes, seed: int = 0):
        torch.manual_seed(seed)
        s = self.sizes = sizes
        rows = 1 if s.shared else s.B
        scale = s.D**-0.5
        self.inputs = [
            scale * normal(s.B, s.Q, s.D),
            scale * normal(s.B, s.Q, s.H, s.D),
            normal(s.C, s.D),
            normal(rows, s.N, s.D),
        ]
        self.mask = None if s.mask is None else torch.rand(rows, s.N) < s.mask
        chunks = -(-s.N // s.C)
        self.chunk_mask = None if s.seen is None else torch.rand(s.B, s.Q, chunks) < s.seen

    def run(
        self, impl: Any, inputs: list[Tensor] | None = None, *, chunked: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        def function(route: Tensor, probe: Tensor, positions: Tensor, steps: Tensor) -> Tensor:
            past = Steps(steps, self.sizes.C, self.mask, self.sizes.eps)
            return recall(
                route,
                probe,
                past.chunked() if chunked else past,
                self.sizes.k,
                positions=positions if self.sizes.positions else None,
                chunk_mask=self.chunk_mask,
                impl=impl,
            )

        return value_and_gradients(function, self.inputs if inputs is None else inputs)


def assert_same(problem: Problem, impl: Any) -> None:
    """Value and gradients are those of the plain way over the same past cut into chunks."""
    value, gradients = problem.run(impl)
    expected, expected_gradients = problem.run("reference", chunked=True)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for name, got, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(
            got, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


CASES = {
    "N-is-1": Sizes(N=1),
    "N-is-C-1": Sizes(N=3),
    "N-is-C": Sizes(N=4),
    "N-is-C+1": Sizes(N=5),
    "N-is-prime": Sizes(N=53, C=7, D=13),
    "N-is-0": Sizes(N=0),
    "N-is-a-multiple": Sizes(N=20),
    "N-is-1-masked": Sizes(N=1, mask=0.5, eps=0.1),
    "N-is-C-1-masked": Sizes(N=3, mask=0.6, eps=1e-5),
    "N-is-C-masked": Sizes(N=4, mask=0.6, eps=0.5),
    "N-is-C+1-masked": Sizes(N=5, mask=0.6, eps=0.5),
    "N-is-prime-masked": Sizes(N=53, C=7, D=13, mask=0.6, eps=1e-5),
    "N-is-0-masked": Sizes(N=0, mask=0.6, eps=0.5),
    "N-is-a-multiple-masked": Sizes(N=20, mask=0.6, eps=0.5),
    "eps-without-mask": Sizes(eps=0.5),
    "mask-that-hides-nothing": Sizes(mask=2.0, eps=0.5),
    "mask-that-hides-all": Sizes(mask=-1.0, eps=0.5),
    "mask-that-hides-whole-chunks": Sizes(N=43, C=3, mask=0.15),
    "shared": Sizes(B=4, shared=True),
    "shared-masked": Sizes(B=4, shared=True, mask=0.6, seen=0.5, eps=0.1),
    "chunks-of-one": Sizes(N=9, C=1),
    "chunks-of-one-masked": Sizes(N=9, C=1, mask=0.6, eps=0.5),
    "k-beyond-the-chunks": Sizes(k=9, mask=0.6),
    "chunk-masks": Sizes(seen=0.5),
    "nothing-seen": Sizes(seen=-1.0),
    "no-positions": Sizes(positions=False, mask=0.6),
    "one-query": Sizes(Q=1, N=41),
    "no-queries": Sizes(Q=0),
    "no-rows": Sizes(B=0),
    "no-rows-shared": Sizes(B=0, shared=True),
    "no-heads": Sizes(H=0),
}


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("name", CASES)
def test_recall_equals_the_reference_over_chunks(impl: Any, name: str) -> None:
    assert_same(Problem(CASES[name]), impl)


def test_native_equals_the_reference_over_chunks_on_any_sizes() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")
    probability = st.sampled_from([None, 2.0, 0.8, 0.3, 0.05, -1.0])

    @st.composite
    def sizes(draw: Any) -> Sizes:
        chunk_size = draw(st.integers(1, 40))
        # Few or many chunks, and borders that fall anywhere.
        length = draw(st.integers(0, 5)) * chunk_size + draw(st.integers(0, chunk_size))
        chunks = -(-length // chunk_size)
        return Sizes(
            B=draw(st.integers(1, 3)),
            Q=draw(st.integers(1, 9)),
            H=draw(st.integers(1, 9)),
            N=length,
            C=chunk_size,
            D=draw(st.integers(1, 70)),
            k=draw(st.integers(1, chunks + 3)),
            shared=draw(st.booleans()),
            positions=draw(st.booleans()),
            mask=draw(probability),
            seen=draw(probability),
            eps=draw(st.sampled_from([0.0, 1e-5, 0.5])),
        )

    @hypothesis.settings(max_examples=50, deadline=None)
    @hypothesis.given(sizes(), st.integers(0, 2**31))
    def search(sizes: Sizes, seed: int) -> None:
        assert_same(Problem(sizes, seed), "native")

    search()


@pytest.mark.parametrize("impl", on_cpu(RecallImpl))
def test_by_hand_a_short_chunk_a_masked_step_and_eps(impl: Any) -> None:
    # Chunks of 2 from the newest end: [_, 2], [4, hidden], [6, 10], in one dimension.
    steps = torch.tensor([[[2.0], [4.0], [float("nan")], [6.0], [10.0]]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, True]])
    past = Steps(steps, 2, mask, eps=0.5)
    summaries = [2 / 1.5, 4 / 1.5, 16 / 2.5]
    inside = [2.0, 4.0, (6 + 10 * math.exp(4)) / (1 + math.exp(4))]
    exponentials = [math.exp(0.3 * summary) for summary in summaries]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for k in (1, 2, 3):
        weights = exponentials[-k:]
        expected = sum(w * value for w, value in zip(weights, inside[-k:], strict=True))
        got = recall(0.3 * one, one[..., None], past, k, impl=impl)
        assert got.item() == pytest.approx(expected / sum(weights), rel=1e-12)


@pytest.mark.parametrize("impl", on_cpu(RecallImpl))
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), torch.finfo(torch.float64).max])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_garbage_in_masked_steps_and_beside_the_steps(
    impl: Any, garbage: float, shared: bool
) -> None:
    problem = Problem(Sizes(N=18, mask=0.6, eps=0.1, shared=shared))
    assert problem.mask is not None
    problem.mask[:, 6:10] = False
    value, gradients = problem.run(impl)
    dirty = problem.inputs[3].masked_fill(~problem.mask[..., None], garbage)
    # What lies before and behind is not the memory's: the oldest chunk lacks two steps.
    beside = torch.full((len(dirty), 3, 6), garbage, dtype=torch.float64)
    around = torch.cat([beside, dirty, beside], 1)
    open_ends = torch.ones(len(dirty), 3, dtype=torch.bool)
    mask = torch.cat([open_ends, problem.mask, open_ends], 1)[:, 3:21]

    def function(route: Tensor, probe: Tensor, positions: Tensor, around: Tensor) -> Tensor:
        past = Steps(around[:, 3:21], 4, mask, 0.1)
        return recall(route, probe, past, 3, positions=positions, impl=impl)

    inputs = [*problem.inputs[:3], around]
    dirty_value, dirty_gradients = value_and_gradients(function, inputs)
    assert_near(dirty_value, value, 1e-13)
    for name, got, wanted in zip(NAMES[:3], dirty_gradients, gradients, strict=False):
        assert_near(got, wanted, 1e-12, name)
    of_steps = dirty_gradients[3]
    assert_near(of_steps[:, 3:21], gradients[3], 1e-12, "steps")
    assert not of_steps[:, 3:21][~problem.mask].any()
    assert not of_steps[:, :3].any()


def test_recall_with_weights_reads_steps() -> None:
    problem = Problem(CASES["N-is-prime-masked"])
    route, probe, positions, steps = problem.inputs
    past = Steps(steps, 7, problem.mask, 1e-5)
    context, recalled = recall_with_weights(route, probe, past, 3, positions=positions)
    expected, expected_recalled = recall_with_weights(
        route, probe, past.chunked(), 3, positions=positions
    )
    assert torch.equal(context, expected)
    for got, wanted in zip(recalled, expected_recalled, strict=True):
        assert torch.equal(got, wanted)
    assert_near(context, problem.run("native")[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_the_best_is_the_best_however_few_bits_steps_have(
    dtype: torch.dtype, wide: torch.dtype, masked: bool
) -> None:
    """Means that differ by less than the dtype of the steps can tell."""
    steps = (torch.randn(2, 400, 16) + 3).to(dtype)
    mask = torch.rand(2, 400) < 0.8 if masked else None
    route, probe = torch.randn(2, 32, 16, dtype=wide), torch.randn(2, 32, 2, 16, dtype=wide)
    exact = Steps(steps.double(), 4, mask)
    expected = recall(route.double(), probe.double(), exact, 1, impl="reference")
    for impl in ("auto", "reference", *FAST):
        out = recall(route, probe, Steps(steps, 4, mask), 1, impl=impl)
        assert_near(out, expected.to(wide), 1e-4 if wide == torch.float32 else 1e-10)
    told, _ = recall_with_weights(route, probe, Steps(steps, 4, mask), 1)
    assert_near(told, expected.to(wide), 1e-4 if wide == torch.float32 else 1e-10)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 18, 20])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_says_of_itself_what_its_chunks_are(length: int, masked: bool) -> None:
    steps = torch.randn(3, length, 5)
    mask = torch.rand(3, length) < 0.6 if masked else None
    past = Steps(steps, 4, mask, 0.25)
    chunked = past.chunked()
    for name in ("batch", "chunks", "chunk_size", "dim", "dtype", "device"):
        assert getattr(past, name) == getattr(chunked, name), name
    assert chunked.chunks == math.ceil(length / 4)
    # Borders from the newest end: whole chunks first, going back.
    exists = torch.ones(3, length, dtype=torch.bool) if mask is None else mask
    for newest in range(1, chunked.chunks + 1):
        end = length - 4 * (newest - 1)
        some = slice(max(end - 4, 0), end)
        here = steps[:, some]
        assert torch.equal(chunked.contents[:, -newest, -here.shape[1] :], here)
        count = exists[:, some].sum(1, keepdim=True)
        total = (here * exists[:, some, None]).sum(1)
        mean = total / (count.clamp(min=1) + (0.25 if masked else 0.0))
        assert_near(chunked.summaries[:, -newest], mean, 4 * torch.finfo(torch.float32).eps)
        assert torch.equal(chunked.valid[:, -newest], count[:, 0] > 0)


def layer_of(impl: Any, **changes: Any) -> HTMAttention:
    torch.manual_seed(1)
    sizes = {"dim": 6, "heads": 3, "topk_mems": 2, "mem_chunk_size": 4, "dim_head": 5}
    return HTMAttention(**(sizes | changes), inner_bias=True, impl=impl).double()


@pytest.mark.parametrize("impl", [impl for impl in on_cpu(Impl) if impl != "reference"])
@pytest.mark.parametrize("name", [name for name in CASES if "N-is" in name or "shared" in name])
def test_layer_equals_the_reference_over_chunks(impl: Any, name: str) -> None:
    sizes = CASES[name]
    problem = Problem(sizes)
    queries, steps = normal(sizes.B, sizes.Q, 6), problem.inputs[3]
    changes = {"dim_memory": sizes.D, "mem_chunk_size": sizes.C, "eps": sizes.eps}
    layer = layer_of(impl, detach_memories=False, **changes)
    plain = layer_of("reference", detach_memories=False, **changes)
    names = list(dict(layer.named_parameters()))

    def ours(queries: Tensor, steps: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        arguments = (queries, steps, problem.mask, problem.chunk_mask)
        return torch.func.functional_call(layer, state, arguments)

    def over_chunks(queries: Tensor, steps: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        memory = Steps(steps, sizes.C, problem.mask, sizes.eps).chunked()
        return torch.func.functional_call(plain, state, (queries, memory, None, problem.chunk_mask))

    inputs = [queries, steps, *layer.parameters()]
    value, gradients = value_and_gradients(ours, inputs)
    expected, expected_gradients = value_and_gradients(over_chunks, inputs)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for name, got, wanted in zip(
        ["queries", "steps", *names], gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(
            got, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("impl", on_cpu(Impl))
def test_layer_stops_gradients_at_the_steps(impl: Any) -> None:
    steps = normal(2, 18, 6).requires_grad_()
    for detach in (True, False):
        layer_of(impl, detach_memories=detach)(normal(2, 5, 6), steps).sum().backward()
        assert (steps.grad is None) == detach
    assert steps.grad is not None
    assert steps.grad.any(-1).any()


def bad_steps() -> dict[str, tuple[Any, str]]:
    steps = torch.zeros(2, 18, 6)
    mask = torch.ones(2, 18, dtype=torch.bool)
    return {
        "steps-rank": (
            Steps(steps[0], 4),
            r"steps: expected shape \[B, N, D\], got \[18, 6\]",
        ),
        "steps-type": (
            Steps([0.0], 4),  # pyright: ignore[reportArgumentType]
            r"steps: expected a tensor \[B, N, D\], got list",
        ),
        "steps-integers": (
            Steps(steps.long(), 4),
            "steps: expected dtype floating point, got torch.int64",
        ),
        "steps-width": (
            Steps(steps[..., :5], 4),
            r"route: expected shape \[B, Q, D = 5\], got \[2, 5, 6\]",
        ),
        "steps-device": (Steps(steps.to("meta"), 4), "memory: expected device cpu, got meta"),
        "steps-batch": (
            Steps(torch.zeros(3, 18, 6), 4),
            "memory: expected batch 1 or 2, got 3",
        ),
        "chunk-size-zero": (Steps(steps, 0), "chunk_size: expected an integer >= 1, got 0"),
        "chunk-size-fraction": (
            Steps(steps, 2.5),  # pyright: ignore[reportArgumentType]
            "chunk_size: expected an integer >= 1, got 2.5",
        ),
        "mask-length": (
            Steps(steps, 4, mask[:, :17]),
            r"mask: expected shape \[B = 2, N = 18\], got \[2, 17\]",
        ),
        "mask-batch": (
            Steps(steps, 4, mask[:1]),
            r"mask: expected shape \[B = 2, N = 18\], got \[1, 18\]",
        ),
        "mask-rank": (
            Steps(steps, 4, mask[..., None]),
            r"mask: expected shape \[B = 2, N = 18\], got \[2, 18, 1\]",
        ),
        "mask-dtype": (
            Steps(steps, 4, mask.float()),
            "mask: expected dtype torch.bool, got torch.float32",
        ),
        "mask-device": (
            Steps(steps, 4, mask.to("meta")),
            "mask: expected device cpu, got meta",
        ),
    }


@pytest.mark.parametrize("name", bad_steps())
def test_errors_name_the_argument_what_came_and_what_was_expected(name: str) -> None:
    past, message = bad_steps()[name]
    route, probe = torch.zeros(2, 5, 6), torch.zeros(2, 5, 3, 6)
    for function in (recall, recall_with_weights):
        with pytest.raises(ValueError, match=f"^{message}$"):
            function(route, probe, past, 2)
