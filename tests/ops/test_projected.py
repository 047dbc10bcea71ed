"""`attend` with the kept chunks projected once: its blocks, its sharing, what must not leak."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.memory import Steps
from htm_pytorch.ops import Impl, attend, attend_with_weights, projected
from tests.helpers import (
    assert_near,
    memory_of,
    normal,
    on_cpu,
    relative_error,
    rounding,
    value_and_gradients,
)

IMPLS = on_cpu(Impl)
NAMES = ["route", "queries", "projections", "positions", "past", "summaries"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Sizes(NamedTuple):
    """The letters of `htm_pytorch.shapes`, and what there is besides."""

    B: int = 2
    Q: int = 5
    H: int = 3
    M: int = 7
    C: int = 4
    D: int = 6
    E: int = 5
    k: int = 3
    shared: bool = False
    positions: bool = True
    missing: int | None = None  # of the oldest chunk; None: the memory is in chunks
    steps: float | None = None  # probability that a step may be attended; None: no mask
    valid: float | None = None  # probability that a chunk is valid
    seen: float | None = None  # probability that a query may see a chunk


class Problem:
    """Inputs of order one, whose softmaxes are not saturated: no gradient is a rounding error."""

    def __init__(self, sizes: Sizes, seed: int = 0):
        torch.manual_seed(seed)
        s = self.sizes = sizes
        rows = 1 if s.shared else s.B
        scale = s.D**-0.5
        contents = normal(rows, s.M, s.C, s.D)
        if s.missing is not None:
            contents = contents.flatten(1, 2)[:, s.missing :]
        self.inputs = [
            scale * normal(s.B, s.Q, s.D),
            normal(s.B, s.Q, s.H, s.E),
            scale * normal(2, s.H, s.E, s.D),
            normal(s.C, s.D),
            contents,
            normal(rows, s.M, s.D),
        ]

        def chance(probability: float | None, *shape: int) -> Tensor | None:
            return None if probability is None else torch.rand(*shape) < probability

        self.step_mask = chance(s.steps, *contents.shape[:-1])
        self.valid = chance(s.valid, rows, s.M)
        self.chunk_mask = chance(s.seen, s.B, s.Q, s.M)

    def memory(self, past: Tensor, summaries: Tensor) -> ChunkedMemory | Steps:
        if self.sizes.missing is not None:
            return Steps(past, self.sizes.C, self.step_mask, 0.1)
        return memory_of(past, summaries, self.valid, self.step_mask)

    def attend(self, impl: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        route, queries, projections, positions, past, summaries = inputs
        return attend(
            route,
            queries,
            projections,
            self.memory(past, summaries),
            self.sizes.k,
            positions=positions if self.sizes.positions else None,
            chunk_mask=self.chunk_mask,
            impl=impl,
        )

    def run(self, impl: Any, inputs: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        return value_and_gradients(
            lambda *some: self.attend(impl, *some)[0], self.inputs if inputs is None else inputs
        )


def assert_same(problem: Problem, impl: Any = "projected") -> None:
    value, gradients = problem.run(impl)
    expected, expected_gradients = problem.run("reference")
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for name, got, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(
            got, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    seen, expected_seen = (problem.attend(i, *problem.inputs)[1] for i in (impl, "reference"))
    assert torch.equal(seen, expected_seen)


# More queries than stay in cache at a time, and more of a chunk than are taken together.
MANY = Sizes(B=2, Q=2115, H=2, M=4, C=3, D=4, E=3, k=2)

CASES = {
    "plain": Sizes(),
    "all-sizes-one": Sizes(1, 1, 1, 1, 1, 1, 1, 1),
    "primes": Sizes(3, 7, 5, 13, 11, 17, 19, 2),
    "one-query": Sizes(B=4, Q=1),
    "one-query-one-head": Sizes(B=4, Q=1, H=1),
    "one-chunk-for-all": Sizes(B=3, Q=70, M=1, k=1),
    "one-chunk-for-all-shared": Sizes(B=3, Q=70, M=1, k=1, shared=True),
    "k-beyond-the-chunks": Sizes(k=12),
    "masked": Sizes(steps=0.5, valid=0.8, seen=0.6),
    "masked-shared": Sizes(B=3, shared=True, steps=0.5, valid=0.8, seen=0.6),
    "chunks-without-a-step": Sizes(C=2, steps=0.3),
    "steps": Sizes(missing=0),
    "steps-ragged": Sizes(missing=3),
    "steps-ragged-shared": Sizes(B=3, missing=1, shared=True),
    "steps-masked": Sizes(missing=2, steps=0.6, seen=0.7),
    "steps-fewer-than-a-chunk": Sizes(M=1, missing=3, k=2),
    "no-steps": Sizes(M=0, missing=0),
    "no-chunks": Sizes(M=0),
    "no-queries": Sizes(Q=0),
    "no-rows": Sizes(B=0),
    "no-rows-shared": Sizes(B=0, shared=True),
    "nothing-seen": Sizes(seen=-1.0),
    "nothing-valid": Sizes(valid=-1.0),
    "some-see-nothing": Sizes(Q=20, seen=0.1),
    "no-positions": Sizes(positions=False, steps=0.6),
    "many": MANY,
    "many-shared": MANY._replace(shared=True),
    "many-that-disagree": MANY._replace(B=3, seen=0.3, steps=0.8),
    "many-that-disagree-shared": MANY._replace(B=3, seen=0.3, steps=0.8, shared=True),
    "as-many-as-in-reach": MANY._replace(Q=2048),
    "one-more-than-in-reach": MANY._replace(Q=2049),
    "as-many-as-are-taken-together": Sizes(Q=64, M=2, k=2, H=2),
    "one-more-than-are-taken-together": Sizes(Q=65, M=2, k=2, H=2),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    assert_same(Problem(CASES[name]))


@pytest.mark.parametrize("impl", ["projected", "auto"])
def test_equals_the_reference_on_any_sizes(impl: Any) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")
    probability = st.sampled_from([None, 0.8, 0.3, 0.05, -1.0])

    @st.composite
    def sizes(draw: Any) -> Sizes:
        chunks, chunk_size = draw(st.integers(0, 8)), draw(st.integers(1, 20))
        by_step = chunks > 0 and draw(st.booleans())
        return Sizes(
            B=draw(st.integers(1, 3)),
            Q=draw(st.integers(1, 9)),
            H=draw(st.integers(1, 5)),
            M=chunks,
            C=chunk_size,
            D=draw(st.integers(1, 20)),
            E=draw(st.integers(1, 20)),
            k=draw(st.integers(1, chunks + 3)),
            shared=draw(st.booleans()),
            positions=draw(st.booleans()),
            missing=draw(st.integers(0, chunk_size - 1)) if by_step else None,
            steps=draw(probability),
            valid=draw(probability),
            seen=draw(probability),
        )

    @hypothesis.settings(max_examples=50, deadline=None)
    @hypothesis.given(sizes(), st.integers(0, 2**31))
    def search(sizes: Sizes, seed: int) -> None:
        assert_same(Problem(sizes, seed), impl)

    search()


def gaps(part: Tensor) -> Tensor:
    """The same entries with others between them, along every axis."""
    for axis in range(part.ndim):
        other = torch.full_like(part, float("nan") if part.is_floating_point() else True)
        part = torch.stack([part, other], axis + 1).select(axis + 1, 0)
    return part


def turned(part: Tensor) -> Tensor:
    """The same entries, the first axis lying innermost."""
    return part.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)


def swapped(part: Tensor) -> Tensor:
    """The same entries, rows of the batch inside of queries."""
    return part.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


@pytest.mark.parametrize("layout", [gaps, turned, swapped], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("kind", ["chunks", "steps"])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(B=4, Q=1, H=1)], ids=["plain", "one-query"])
@pytest.mark.parametrize("impl", ["projected", "auto"])
def test_strides_do_not_matter(
    impl: Any, sizes: Sizes, kind: str, layout: Callable[[Tensor], Tensor]
) -> None:
    missing = 2 if kind == "steps" else None
    problem = Problem(sizes._replace(missing=missing, steps=0.8, valid=0.8, seen=0.8))
    cotangent = normal(*problem.inputs[1].shape)
    expected = value_and_gradients(
        lambda *some: problem.attend("reference", *some)[0], problem.inputs, cotangent
    )
    for name in ("step_mask", "valid", "chunk_mask"):
        mask = getattr(problem, name)
        assert torch.equal(layout(mask), mask)
        setattr(problem, name, layout(mask))
    got = value_and_gradients(
        lambda *some: problem.attend(impl, *(layout(part) for part in some))[0],
        problem.inputs,
        layout(cotangent),
    )
    assert_near(got[0], expected[0], 1e-12)
    for name, gradient, wanted in zip(NAMES, got[1], expected[1], strict=True):
        assert_near(gradient, wanted, 1e-11, name)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_any_number_of_threads_gives_the_same_bits(
    shared: bool, count: int, threads: Callable[[int], None]
) -> None:
    problem = Problem(Sizes(B=3, Q=150, H=5, M=40, C=9, shared=shared, seen=0.7))
    # Keys and values go through torch's own products, which are exact for whole numbers alone.
    for name in ("projections", "positions", "past"):
        problem.inputs[NAMES.index(name)].round_()
    inputs = [part.float() for part in problem.inputs]
    value, gradients = problem.run("projected", inputs)
    threads(count)
    again, gradients_again = problem.run("projected", inputs)
    assert torch.equal(again, value)
    # The gradients of the others are such products of anything.
    for name in ("route", "queries", "summaries"):
        at = NAMES.index(name)
        assert torch.equal(gradients_again[at], gradients[at]), name


WIDTHS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tails_of_vectors(dtype: torch.dtype, width: int) -> None:
    # Also of the projected keys and values, which are of the dtype of the projections.
    number = WIDTHS.index(width)
    chunk_size = WIDTHS[(number + 5) % len(WIDTHS)]
    sizes = Sizes(2, 6, number % 9 + 1, 5, chunk_size, 16, width, 2, seen=0.9)
    problem = Problem(sizes)
    # Scores far apart, so that no rounding changes which chunks are kept.
    problem.inputs[0] *= 0.05
    problem.inputs[0][..., 0] = 1.0
    problem.inputs[5][..., 0] = torch.stack([torch.randperm(5) for _ in range(2)]) - 2.0
    inputs = [part.to(dtype) for part in problem.inputs]
    truth, true_gradients = problem.run("reference", [part.double() for part in inputs])
    plain, plain_gradients = problem.run("reference", inputs)
    got, gradients = problem.run("projected", inputs)
    unit = torch.finfo(dtype).eps
    for name, value, low, true in zip(
        ["attended", *NAMES],
        [got, *gradients],
        [plain, *plain_gradients],
        [truth, *true_gradients],
        strict=True,
    ):
        assert value.dtype == dtype, name
        plain_error, chance = relative_error(low, true), rounding(dtype)
        assert plain_error < 16 * unit + chance, name
        assert relative_error(value, true) <= 8 * max(plain_error, unit) + chance, name


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_another_dtype(dtype: torch.dtype, stored: torch.dtype) -> None:
    problem = Problem(Sizes(steps=0.8))
    problem.inputs[0] *= 0.05
    problem.inputs[0][..., 0] = 1.0
    problem.inputs[5][..., 0] = torch.stack([torch.randperm(7) for _ in range(2)]) - 3.0
    dtypes = [*(4 * [dtype]), stored, stored]
    inputs = [part.to(kind) for part, kind in zip(problem.inputs, dtypes, strict=True)]
    truth, true_gradients = problem.run("reference", [part.double() for part in inputs])
    for impl in IMPLS:
        got, gradients = problem.run(impl, inputs)
        for name, value, true, kind in zip(
            ["attended", *NAMES],
            [got, *gradients],
            [truth, *true_gradients],
            [dtype, *dtypes],
            strict=True,
        ):
            assert value.dtype == kind, f"{impl} {name}"
            unit = max(torch.finfo(kind).eps, torch.finfo(dtype).eps)
            assert relative_error(value, true) <= 32 * unit + rounding(dtype), f"{impl} {name}"


GARBAGE = [float("nan"), float("inf"), torch.finfo(torch.float64).max]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", ["chunks", "steps"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_garbage_does_not_leak(shared: bool, kind: str, garbage: float) -> None:
    missing = 2 if kind == "steps" else None
    problem = Problem(Sizes(Q=3, M=12, k=2, steps=0.6, shared=shared, missing=missing))
    assert problem.step_mask is not None
    # The same chunks for all: the others are never to be read, masked or not.
    problem.chunk_mask = torch.zeros(2, 3, 12, dtype=torch.bool)
    problem.chunk_mask[:, :, 3:7] = True
    seen = torch.zeros(12, 4, dtype=torch.bool)
    seen[3:7] = True
    seen = seen.flatten()[missing:] if kind == "steps" else seen
    unseen = ~(problem.step_mask & seen)
    value, gradients = problem.run("projected")
    dirty = [part.clone() for part in problem.inputs]
    dirty[4][unseen] = garbage
    dirty[5][:, :3] = dirty[5][:, 7:] = garbage
    dirty_value, dirty_gradients = problem.run("projected", dirty)
    assert_near(dirty_value, value, 1e-13)
    for name, got, wanted in zip(NAMES, dirty_gradients, gradients, strict=True):
        assert_near(got, wanted, 1e-12, name)
        assert got.any() or (kind == "steps" and name == "summaries"), name
    assert not dirty_gradients[4][unseen].any()


@pytest.mark.parametrize("which", ["route", "queries", "cotangent"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_nan_of_a_query_stays_with_it(shared: bool, which: str) -> None:
    problem = Problem(Sizes(Q=9, H=2, M=6, shared=shared, steps=0.7))
    assert problem.step_mask is not None
    value, _ = problem.run("projected")
    inputs = [part.clone().requires_grad_() for part in problem.inputs]
    cotangent = normal(*value.shape)
    with torch.no_grad():
        for part in [inputs[NAMES.index(which)]] if which != "cotangent" else [cotangent]:
            part[1, 4, ..., 2] = float("nan")
    dirty, _ = problem.attend("projected", *inputs)
    others = torch.ones(2, 9, dtype=torch.bool)
    others[1, 4] = False
    # Not the same bits: how many chunks are picked is the shape of a matrix product.
    assert_near(dirty[others], value[others], 1e-13)
    if which != "cotangent":
        assert dirty[1, 4].isnan().all()
    gradients = torch.autograd.grad(dirty, inputs, cotangent)
    for name in ("route", "queries"):
        gradient = gradients[NAMES.index(name)]
        assert gradient[others].isfinite().all(), name
        assert gradient[1, 4].isnan().any(), name
    masked = gradients[NAMES.index("past")][~problem.step_mask]
    assert torch.equal(masked, torch.zeros_like(masked))


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_that_are_huge_or_no_numbers(impl: Any) -> None:
    # One dimension: the sums have one order. Products beyond the largest number are infinite.
    for big in (1e4, 1e200):
        contents = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64).view(1, 2, 2, 1)
        memory = ChunkedMemory.from_chunks(contents * big)
        route = torch.full((1, 2, 1), 1 / big, dtype=torch.float64)
        queries = torch.tensor([big, -big], dtype=torch.float64).view(1, 2, 1, 1)
        projections = torch.ones(2, 1, 1, 1, dtype=torch.float64)
        got, _ = attend(route, queries, projections, memory, 2, impl=impl)
        expected, _ = attend_with_weights(route, queries, projections, memory, 2)
        torch.testing.assert_close(got, expected, equal_nan=True)
        assert got.isnan().any() == (big > 1e100)


class TestSizesThatDoNotFit:
    """`attend` refuses them as `recall` does, whichever way it would go."""

    CHANGES = {
        "more-queries": ({"queries": torch.zeros(2, 6, 3, 5)}, ".*"),
        "more-rows": ({"queries": torch.zeros(3, 5, 3, 5)}, ".*"),
        "rank": ({"queries": torch.zeros(2, 5, 15)}, ".*"),
        "dtype": (
            {
                "queries": torch.zeros(2, 5, 3, 5, dtype=torch.float64),
                "projections": torch.zeros(2, 3, 5, 6, dtype=torch.float64),
            },
            ".*: expected dtype torch.float32, got torch.float64",
        ),
        "heads": (
            {"projections": torch.zeros(2, 4, 5, 6)},
            r"projections: expected shape \[P = 2, H = 3, E = 5, D = 6\], got \[2, 4, 5, 6\]",
        ),
        "parts": (
            {"projections": torch.zeros(1, 3, 5, 6)},
            r"projections: expected shape \[P = 2, H = 3, E = 5, D = 6\], got \[1, 3, 5, 6\]",
        ),
    }

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("name", CHANGES)
    def test_raises(self, name: str, impl: Any) -> None:
        changes, message = self.CHANGES[name]
        arguments: dict[str, Any] = {
            "route": torch.zeros(2, 5, 6),
            "queries": torch.zeros(2, 5, 3, 5),
            "projections": torch.zeros(2, 3, 5, 6),
            "memory": ChunkedMemory.from_chunks(torch.zeros(2, 4, 3, 6)),
            "k": 2,
            "impl": impl,
        }
        assert attend(**arguments)[0].shape == (2, 5, 3, 5)
        with pytest.raises(ValueError, match=f"^{message}$"):
            attend(**(arguments | changes))


def test_is_cheaper_counts_the_chunks() -> None:
    # Many queries, few chunks: once is cheaper. The same queries over as many chunks: not.
    memory = ChunkedMemory.from_chunks(torch.randn(1, 4096, 8, 64))
    queries = torch.randn(1, 4096, 2, 16)
    same = torch.zeros(1, 4096, 2, dtype=torch.int64)
    same[..., 1] = 1
    assert projected.is_cheaper(queries, memory, same)
    different = torch.stack([torch.arange(4096), torch.arange(4096).roll(1)], -1)[None]
    assert not projected.is_cheaper(queries, memory, different)
    nothing = torch.full((1, 4096, 2), -1)
    projected.is_cheaper(queries, memory, nothing)


@pytest.mark.parametrize("kind", ["chunks", "steps"])
def test_auto_is_right_whichever_way_it_goes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Sizes(Q=40, M=4, steps=0.8, missing=2 if kind == "steps" else None))
    expected, expected_gradients = problem.run("reference")
    for cheaper in (True, False):
        monkeypatch.setattr(projected, "is_cheaper", lambda *_, cheaper=cheaper: cheaper)
        value, gradients = problem.run("auto")
        assert_near(value, expected, 1e-12)
        for name, got, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
            assert_near(got, wanted, 1e-10, name)


@pytest.mark.compile
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> None:
        torch.compiler.reset()

    def test_over_one_chunk_shared_by_all(self) -> None:
        layer = HTMAttention(6, 2, 2, 4, 3, impl="projected", detach_memories=False).double()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        queries, memories = normal(2, 5, 6), normal(1, 4, 6)
        parameters = list(layer.parameters())
        results = []
        for function in (layer, compiled):
            leaves = [queries.clone().requires_grad_(), memories.clone().requires_grad_()]
            value = function(*leaves)
            loss = value.square().sum()
            results.append([value, *torch.autograd.grad(loss, [*leaves, *parameters])])
        for got, wanted in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)

    def test_over_chunks_with_garbage_in_those_not_kept(self) -> None:
        layer = HTMAttention(6, 2, 2, 4, 3, impl="projected", detach_memories=False).double()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        queries, contents = normal(2, 5, 6), normal(1, 7, 4, 6)
        valid = torch.tensor([[True, False, True, True, False, True, False]])
        parameters = list(layer.parameters())
        results = []
        for function, filling in ((layer, 0.0), (compiled, float("nan"))):
            filled = contents.clone()
            filled[~valid] = filling
            filled.requires_grad_()
            summaries = filled.detach().mean(2)
            memory = ChunkedMemory.from_chunks(filled, valid, summaries=summaries, copy=False)
            value = function(queries, memory)
            loss = value.square().sum()
            results.append([value, *torch.autograd.grad(loss, [filled, *parameters])])
        for got, wanted in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
