"""Every implementation of `recall` against the plain one: values, gradients, what must not leak."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, Recall
from htm_pytorch.ops import RecallImpl, Recency, blocked, recall, recall_with_weights
from tests.helpers import (
    assert_near,
    memory_of,
    on_cpu,
    relative_error,
    rounding,
    value_and_gradients,
)

IMPLS = on_cpu(RecallImpl)
FAST = [impl for impl in IMPLS if impl != "reference"]
NAMES = ["route", "probe", "positions", "contents", "summaries"]


class Sizes(NamedTuple):
    """The letters of `htm_pytorch.shapes`, and what there is besides."""

    B: int = 2
    Q: int = 5
    H: int = 3
    M: int = 7
    C: int = 4
    D: int = 6
    k: int = 3
    shared: bool = False
    positions: bool = True
    steps: float = 1.0  # probability that a step may be attended
    valid: float = 1.0  # probability that a chunk is valid
    seen: float = 1.0  # probability that a query may see a chunk
    ages: str = ""  # that count: "of now", "for all", or "for each" query; none do


CASES = {
    "all-sizes-one: every axis is squeezable": Sizes(1, 1, 1, 1, 1, 1, 1),
    "primes: nothing divides anything": Sizes(3, 7, 5, 13, 11, 17, 2),
    "one-chunk: the outer softmax is 1": Sizes(M=1, k=1),
    "k-is-1: the router has no gradient": Sizes(k=1),
    "k-is-M: no selection": Sizes(k=7),
    "k-beyond-M: clamped": Sizes(k=12),
    "chunks-of-one-step: the inner softmax is 1": Sizes(C=1),
    "one-head: as the router": Sizes(H=1),
    "acting: one query, many chunks": Sizes(Q=1, M=40, k=4),
    "more-queries-than-steps: training on a short past": Sizes(Q=33, M=3, C=2),
    "batch-1: a row of its own": Sizes(B=1),
    "shared: batch 1 read by all": Sizes(B=4, shared=True),
    "shared-masked: batch 1, masks of the reader": Sizes(B=4, shared=True, steps=0.7, seen=0.5),
    "step-masks: ragged chunks": Sizes(steps=0.5),
    "valid: a ring that is not full": Sizes(valid=0.5),
    "chunk-masks: queries disagree": Sizes(seen=0.5),
    "fewer-than-k: some see one chunk or none": Sizes(seen=0.15, k=4),
    "all-masked-steps: nothing to attend anywhere": Sizes(steps=0.0),
    "all-invalid: an empty ring": Sizes(valid=0.0),
    "all-forbidden: nothing to see": Sizes(seen=0.0),
    "every-mask-at-once": Sizes(steps=0.7, valid=0.7, seen=0.7),
    "no-positions": Sizes(positions=False),
    "no-positions-masked": Sizes(positions=False, steps=0.6, seen=0.6),
    "M-is-0: empty memory": Sizes(M=0),
    "Q-is-0: nobody asks": Sizes(Q=0),
    "M-and-Q-are-0": Sizes(M=0, Q=0),
    "H-is-0: no heads": Sizes(H=0),
    "ages: the newer of two like ones": Sizes(M=13, ages="of now"),
    "ages-of-each: as a stream is read": Sizes(Q=33, M=13, seen=0.6, ages="for each"),
    "ages-of-each-shared": Sizes(B=4, M=40, shared=True, valid=0.8, ages="for each"),
    "ages-shared-masked": Sizes(B=4, M=40, shared=True, steps=0.7, ages="for all"),
    "ages-all-masks": Sizes(Q=1, M=40, k=12, steps=0.7, valid=0.7, seen=0.7, ages="of now"),
    "ages-of-nothing": Sizes(M=0, ages="of now"),
    "ages-forbidden": Sizes(seen=0.0, ages="for all"),
}


class Problem:
    """Inputs of one size, the same for a seed whatever the dtype."""

    def __init__(self, sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def chance(probability: float, *shape: int) -> Tensor | None:
            if probability == 1.0:
                return None
            return torch.rand(*shape, generator=generator) < probability

        b, q, h, m, c, d, self.k, *_ = sizes
        rows = 1 if sizes.shared else b
        self.sizes = sizes
        self.inputs = [
            normal(b, q, d),
            normal(b, q, h, d),
            normal(c, d),
            normal(rows, m, c, d),
            normal(rows, m, d),
        ]
        self.step_mask = chance(sizes.steps, rows, m, c)
        self.valid = chance(sizes.valid, rows, m)
        self.chunk_mask = chance(sizes.seen, b, q, m)
        self.to_recency = normal(2, d)
        shape = {"": None, "of now": None, "for all": (1, 1, m), "for each": (b, q, m)}[sizes.ages]
        self.ages = None if shape is None else torch.randint(50, shape, generator=generator)

    def recency(self, route: Tensor) -> Recency | None:
        """Made of the route, whose gradients then hold those of ceilings and decays."""
        if not self.sizes.ages:
            return None
        both = route.double() @ self.to_recency.double().to(route.device).mT
        # As any dtype can say them, so that all have the same.
        both = both + (both.detach().bfloat16().double() - both.detach())
        ceiling, decay = both.to(route.dtype).unbind(-1)
        return Recency(ceiling, decay, self.ages)

    def memory(self, contents: Tensor, summaries: Tensor) -> ChunkedMemory:
        return memory_of(contents, summaries, self.valid, self.step_mask)

    def positions(self, positions: Tensor) -> Tensor | None:
        return positions if self.sizes.positions else None

    def run(self, impl: Any, inputs: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        def function(
            route: Tensor, probe: Tensor, positions: Tensor, contents: Tensor, summaries: Tensor
        ) -> Tensor:
            return recall(
                route,
                probe,
                self.memory(contents, summaries),
                self.k,
                positions=self.positions(positions),
                chunk_mask=self.chunk_mask,
                recency=self.recency(route),
                impl=impl,
            )

        return value_and_gradients(function, self.inputs if inputs is None else inputs)

    def allowed(self) -> Tensor:
        """[B, Q, M] the chunks each query may keep."""
        s = self.sizes
        allowed = torch.ones(s.B, s.Q, s.M, dtype=torch.bool)
        for mask in (None if self.valid is None else self.valid[:, None], self.chunk_mask):
            allowed = allowed if mask is None else allowed & mask
        return allowed

    def recalled(self) -> tuple[Tensor, Recall]:
        route, probe, positions, contents, summaries = self.inputs
        return recall_with_weights(
            route,
            probe,
            self.memory(contents, summaries),
            self.k,
            positions=self.positions(positions),
            chunk_mask=self.chunk_mask,
            recency=self.recency(route),
        )


def assert_same(problem: Problem, impl: Any, tolerance: float) -> None:
    value, gradients = problem.run(impl)
    expected, expected_gradients = problem.run("reference")
    assert value.dtype == expected.dtype
    assert_near(value, expected, tolerance, "context")
    for name, got, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert_near(got, wanted, tolerance, name)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("sizes", CASES.values(), ids=[name.split(":")[0] for name in CASES])
def test_equals_the_reference(impl: Any, sizes: Sizes) -> None:
    assert_same(Problem(sizes), impl, 1e-10)


@pytest.mark.parametrize("sizes", CASES.values(), ids=[name.split(":")[0] for name in CASES])
def test_blocked_in_the_smallest_pieces(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    # One query a block, k chunks scored at a time: the sizes above fit into one block otherwise.
    monkeypatch.setattr(blocked, "BUFFER_BYTES", 1)
    monkeypatch.setattr(blocked, "SCORE_BYTES", 1)
    assert_same(Problem(sizes), "blocked", 1e-10)


@pytest.mark.parametrize("impl", FAST)
def test_equals_the_reference_on_any_sizes(impl: Any) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")
    size = st.integers(1, 6)
    probability = st.sampled_from([1.0, 0.8, 0.4, 0.1, 0.0])

    @hypothesis.settings(max_examples=100, deadline=None)
    @hypothesis.given(
        st.builds(
            Sizes,
            B=st.integers(1, 3),
            Q=st.integers(0, 6),
            H=size,
            M=st.integers(0, 8),
            C=size,
            D=size,
            k=st.integers(1, 9),
            shared=st.booleans(),
            positions=st.booleans(),
            steps=probability,
            valid=probability,
            seen=probability,
            ages=st.sampled_from(["", "of now", "for all", "for each"]),
        ),
        st.integers(0, 2**31),
    )
    def search(sizes: Sizes, seed: int) -> None:
        assert_same(Problem(sizes, seed), impl, 1e-10)

    search()


PRECISION_CASES = {
    "plain": Sizes(2, 9, 4, 8, 16, 32, 3),
    "masked": Sizes(2, 9, 4, 8, 16, 32, 3, steps=0.7, seen=0.8),
    "shared": Sizes(3, 9, 4, 8, 16, 32, 3, shared=True),
    "ages": Sizes(2, 9, 4, 8, 16, 32, 3, ages="of now"),
}


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("sizes", PRECISION_CASES.values(), ids=PRECISION_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_the_reference(impl: Any, sizes: Sizes, dtype: torch.dtype) -> None:
    low = Problem(sizes, dtype=dtype)
    # The truth for the rounded inputs, so that only the computation is measured.
    exact = Problem(sizes)
    exact.inputs = [part.double() for part in low.inputs]
    exact.to_recency = low.to_recency
    assert torch.equal(low.recalled()[1].chunks, exact.recalled()[1].chunks)
    truth = exact.run("reference")
    expected, got = low.run("reference"), low.run(impl)
    for name, number in zip(["context", *NAMES], range(6), strict=True):
        true, plain, fast = (
            run[0] if number == 0 else run[1][number - 1] for run in (truth, expected, got)
        )
        assert fast.dtype == dtype, name
        unit = torch.finfo(dtype).eps
        plain_error = relative_error(plain, true)
        # The plain one rounds at least once; a few roundings more are no defect.
        chance = rounding(dtype)
        assert plain_error <= 16 * unit + chance, name
        assert relative_error(fast, true) <= 4 * max(plain_error, unit / 2) + chance, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_softmaxes_are_not_accumulated_in_half_precision(
    impl: Any, dtype: torch.dtype
) -> None:
    # 4,096 equal logits: in half precision, the sum of the weights would miss by a lot.
    contents = torch.full((1, 2, 4096, 3), 0.5, dtype=dtype)
    query = torch.ones(1, 1, 3, dtype=dtype)
    context = recall(query, query[:, :, None], ChunkedMemory.from_chunks(contents), 2, impl=impl)
    assert torch.equal(context, torch.full_like(context, 0.5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("query_dtype", "memory_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_memory_of_another_dtype(
    impl: Any, query_dtype: torch.dtype, memory_dtype: torch.dtype
) -> None:
    problem = Problem(CASES["every-mask-at-once"])
    dtypes = [query_dtype, query_dtype, query_dtype, memory_dtype, memory_dtype]
    problem.inputs = [p.to(dtype) for p, dtype in zip(problem.inputs, dtypes, strict=True)]
    value, gradients = problem.run(impl)
    assert value.dtype == query_dtype
    assert [gradient.dtype for gradient in gradients] == dtypes
    expected, expected_gradients = problem.run(impl, [part.double() for part in problem.inputs])
    chance = rounding(query_dtype)
    assert_near(value, expected, 8 * torch.finfo(query_dtype).eps + chance)
    for name, got, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        # The slack of the cotangent, which is rounded to the dtype of the value.
        unit = max(torch.finfo(got.dtype).eps, torch.finfo(query_dtype).eps)
        assert_near(got, wanted, 8 * unit + chance, name)


GARBAGE = [float("nan"), float("inf"), float("-inf"), torch.finfo(torch.float64).max]


def assert_clean(problem: Problem, impl: Any, garbage: float, where: dict[str, Tensor]) -> None:
    """What lies at `where`, a mask over contents or summaries, must not matter in any way."""
    value, gradients = problem.run(impl)
    dirty = [part.clone() for part in problem.inputs]
    for name, places in where.items():
        assert places.any()
        dirty[NAMES.index(name)][places] = garbage
    dirty_value, dirty_gradients = problem.run(impl, dirty)
    assert_near(dirty_value, value, 1e-12, "context")
    for name, got, wanted in zip(NAMES, dirty_gradients, gradients, strict=True):
        assert_near(got, wanted, 1e-12, name)
        if name in where:
            assert not got[where[name]].any(), name
        assert got.any(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
class TestGarbage:
    def test_in_masked_steps(self, impl: Any, garbage: float, shared: bool) -> None:
        problem = Problem(Sizes(steps=0.6, shared=shared))
        assert problem.step_mask is not None
        assert_clean(problem, impl, garbage, {"contents": ~problem.step_mask})

    def test_in_invalid_chunks(self, impl: Any, garbage: float, shared: bool) -> None:
        problem = Problem(Sizes(valid=0.6, shared=shared))
        assert problem.valid is not None
        invalid = ~problem.valid
        assert_clean(problem, impl, garbage, {"contents": invalid, "summaries": invalid})

    def test_in_chunks_that_every_query_is_forbidden(
        self, impl: Any, garbage: float, shared: bool
    ) -> None:
        problem = Problem(Sizes(seen=0.7, shared=shared))
        assert problem.chunk_mask is not None
        problem.chunk_mask[:, :, 2] = False
        rows = 1 if shared else 2
        forbidden = torch.zeros(rows, 7, dtype=torch.bool)
        forbidden[:, 2] = True
        assert_clean(problem, impl, garbage, {"contents": forbidden, "summaries": forbidden})

    def test_in_contents_of_chunks_that_were_not_kept(
        self, impl: Any, garbage: float, shared: bool
    ) -> None:
        problem = Problem(Sizes(M=12, shared=shared, k=2))
        chunks = problem.recalled()[1].chunks
        kept = torch.zeros(2, 12, dtype=torch.bool)
        kept.scatter_(1, chunks.flatten(1), True)
        unkept = ~(kept.any(0, keepdim=True) if shared else kept)
        assert_clean(problem, impl, garbage, {"contents": unkept})

    def test_reaches_only_the_queries_that_keep_it(
        self, impl: Any, garbage: float, shared: bool
    ) -> None:
        # A chunk that some keep, some are forbidden, and some may see but do not keep.
        problem = Problem(Sizes(Q=9, k=2, shared=shared))
        problem.chunk_mask = torch.ones(2, 9, 7, dtype=torch.bool)
        problem.chunk_mask[:, :3, 2] = False
        keeps = (problem.recalled()[1].chunks == 2).any(-1)
        assert keeps.any()
        assert not keeps[:, :3].any()
        assert not keeps[:, 3:].all()
        dirty = [part.clone() for part in problem.inputs]
        dirty[NAMES.index("contents")][:, 2] = garbage

        value, gradients = problem.run(impl)
        dirty_value, dirty_gradients = problem.run(impl, dirty)
        assert_near(dirty_value[~keeps], value[~keeps], 1e-12, "context")
        for name in ("route", "probe"):
            got, wanted = (part[NAMES.index(name)] for part in (dirty_gradients, gradients))
            assert_near(got[~keeps], wanted[~keeps], 1e-12, name)
        if garbage != garbage:
            assert dirty_value[keeps].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(impl: Any) -> None:
    problem = Problem(Sizes(seen=0.5))
    assert problem.chunk_mask is not None
    problem.chunk_mask[0, 1] = problem.chunk_mask[1, 4] = False
    blind = ~problem.chunk_mask.any(-1)
    value, gradients = problem.run(impl)
    assert not value[blind].any()
    assert value[~blind].any(-1).all()
    for name in ("route", "probe"):
        gradient = gradients[NAMES.index(name)]
        assert not gradient[blind].any()
        assert gradient[~blind].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_only_inputs_that_need_gradients_get_them(impl: Any) -> None:
    problem = Problem(Sizes())
    route, probe, positions, contents, summaries = problem.inputs
    route.requires_grad_()
    memory = problem.memory(contents, summaries)
    context = recall(route, probe, memory, 2, positions=positions, impl=impl)
    context.sum().backward()
    assert route.grad is not None
    assert contents.grad is None
    with torch.no_grad():
        assert not recall(route, probe, memory, 2, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_not_changed_and_may_have_any_strides(impl: Any) -> None:
    problem = Problem(Sizes(steps=0.7, seen=0.7))
    before = [part.clone() for part in problem.inputs]
    value, gradients = problem.run(impl)
    for name, part, old in zip(NAMES, problem.inputs, before, strict=True):
        assert torch.equal(part, old), name
    strided = [part.transpose(0, -1).contiguous().transpose(0, -1) for part in problem.inputs]
    # Only the views differ: `run` clones, and a clone keeps the strides of dense tensors.
    assert not strided[0].clone().is_contiguous()
    strided_value, strided_gradients = problem.run(impl, strided)
    assert_near(strided_value, value, 1e-12)
    for name, got, wanted in zip(NAMES, strided_gradients, gradients, strict=True):
        assert_near(got, wanted, 1e-12, name)


@pytest.mark.parametrize("sizes", CASES.values(), ids=[name.split(":")[0] for name in CASES])
def test_what_was_recalled(sizes: Sizes) -> None:
    problem = Problem(sizes)
    context, recalled = problem.recalled()
    b, q, h, m, c, _, k, *_ = sizes
    kept_chunks = min(k, m)
    assert recalled.chunks.shape == (b, q, kept_chunks)
    assert recalled.chunks.dtype == torch.int64
    assert recalled.chunk_weights.shape == (b, q, kept_chunks)
    assert recalled.step_weights.shape == (b, q, h, kept_chunks, c)

    # As many chunks as may be seen, the best ones first, each once, and -1 in the other places.
    allowed = problem.allowed()
    kept = recalled.chunks >= 0
    assert torch.equal(kept.sum(-1), allowed.sum(-1).clamp(max=k))
    assert (recalled.chunks[~kept] == -1).all()
    scores = torch.einsum("bqd,bmd->bqm", problem.inputs[0], problem.inputs[4])
    recency = problem.recency(problem.inputs[0])
    if recency is not None:
        ages = torch.arange(m).flip(0) if recency.ages is None else recency.ages
        above = torch.nn.functional.softplus(scores - recency.ceiling[..., None])
        limited = scores - (1 - 2**-10) * above
        scores = limited - recency.decay[..., None] * (1 + ages).log()
    scores = scores.masked_fill(~allowed, -torch.inf)
    for row in range(b):
        for query in range(q):
            order = scores[row, query].argsort(descending=True).tolist()
            best = [j for j in order if allowed[row, query, j]][:k]
            assert recalled.chunks[row, query][kept[row, query]].tolist() == best

    total = recalled.chunk_weights.sum(-1)
    torch.testing.assert_close(total, allowed.any(-1).double())
    assert not recalled.chunk_weights[~kept].any()
    assert (recalled.chunk_weights.diff(dim=-1) <= 0).all()

    row = torch.arange(problem.inputs[3].shape[0])[:, None, None]
    index = recalled.chunks.clamp(min=0)
    steps = problem.inputs[3][row, index]
    usable = kept[..., None].expand(b, q, kept_chunks, c)
    if problem.step_mask is not None:
        usable = usable & problem.step_mask[row, index]
    usable = usable[:, :, None].expand(recalled.step_weights.shape)
    assert not recalled.step_weights[~usable].any()
    torch.testing.assert_close(recalled.step_weights.sum(-1), usable.any(-1).double())

    if sizes.positions:
        steps = steps + problem.inputs[2]
    again = torch.einsum(
        "bqk,bqhkc,bqkcd->bqhd", recalled.chunk_weights, recalled.step_weights, steps
    )
    assert_near(context, again, 1e-12)
    assert_near(context, problem.run("reference")[0], 1e-12)


def test_steps_of_a_kept_chunk_compete_only_with_each_other() -> None:
    # By hand: two chunks of two steps in one dimension, logits 0 and ln 3.
    steps = torch.tensor([[[[0.0], [1.0]], [[5.0], [7.0]]]], dtype=torch.float64)
    summaries = torch.tensor([[[0.0], [2.0]]], dtype=torch.float64)
    log3 = torch.tensor(3.0, dtype=torch.float64).log()
    memory = ChunkedMemory.from_chunks(steps, summaries=summaries)
    route, probe = (log3 / 2).view(1, 1, 1), log3.view(1, 1, 1, 1)
    context, recalled = recall_with_weights(route, probe, memory, 2)
    assert recalled.chunks.tolist() == [[[1, 0]]]
    torch.testing.assert_close(recalled.chunk_weights, torch.tensor([[[0.75, 0.25]]]).double())
    expected = [[0.1, 0.9], [0.25, 0.75]]
    torch.testing.assert_close(recalled.step_weights[0, 0, 0], torch.tensor(expected).double())
    torch.testing.assert_close(context.item(), 0.75 * (0.5 + 6.3) + 0.25 * 0.75)


def bad_inputs() -> dict[str, tuple[dict[str, Any], str]]:
    contents = torch.zeros(2, 4, 3, 6)
    memory = ChunkedMemory.from_chunks(contents)
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    return {
        "route-rank": (
            {"route": torch.zeros(2, 6)},
            r"^route: expected shape \[B, Q, D = 6\], got \[2, 6\]$",
        ),
        "route-width": (
            {"route": torch.zeros(2, 5, 7)},
            r"^route: expected shape \[B, Q, D = 6\], got \[2, 5, 7\]$",
        ),
        "route-integers": (
            {"route": torch.zeros(2, 5, 6, dtype=torch.int64)},
            r"^route: expected dtype floating point, got torch.int64$",
        ),
        "route-type": (
            {"route": [0.0]},
            r"^route: expected a tensor \[B, Q, D = 6\], got list$",
        ),
        "probe-rank": (
            {"probe": torch.zeros(2, 5, 6)},
            r"^probe: expected shape \[B = 2, Q = 5, H, D = 6\], got \[2, 5, 6\]$",
        ),
        "probe-queries": (
            {"probe": torch.zeros(2, 4, 3, 6)},
            r"^probe: expected shape \[B = 2, Q = 5, H, D = 6\], got \[2, 4, 3, 6\]$",
        ),
        "probe-dtype": (
            {"probe": torch.zeros(2, 5, 3, 6, dtype=torch.float64)},
            r"^probe: expected dtype torch.float32, got torch.float64$",
        ),
        "probe-device": (
            {"probe": torch.zeros(2, 5, 3, 6, device="meta")},
            r"^probe: expected device cpu, got meta$",
        ),
        "memory-type": (
            {"memory": contents},
            r"^memory: expected a ChunkedMemory, Steps or another Home, got Tensor$",
        ),
        "memory-batch": (
            {"memory": ChunkedMemory.from_chunks(torch.zeros(3, 4, 3, 6))},
            r"^memory: expected batch 1 or 2, got 3$",
        ),
        "memory-device": (
            {"memory": ChunkedMemory.from_chunks(contents.to("meta"))},
            r"^memory: expected device cpu, got meta$",
        ),
        "k-zero": ({"k": 0}, r"^k: expected an integer >= 1, got 0$"),
        "k-fraction": ({"k": 1.5}, r"^k: expected an integer >= 1, got 1.5$"),
        "k-bool": ({"k": True}, r"^k: expected an integer >= 1, got True$"),
        "positions-length": (
            {"positions": torch.zeros(4, 6)},
            r"^positions: expected shape \[C = 3, D = 6\], got \[4, 6\]$",
        ),
        "positions-integers": (
            {"positions": torch.zeros(3, 6, dtype=torch.int64)},
            r"^positions: expected dtype floating point, got torch.int64$",
        ),
        "positions-device": (
            {"positions": torch.zeros(3, 6, device="meta")},
            r"^positions: expected device cpu, got meta$",
        ),
        "mask-shape": (
            {"chunk_mask": mask[:, :, :3]},
            r"^chunk_mask: expected shape \[B = 2, Q = 5, M = 4\], got \[2, 5, 3\]$",
        ),
        "mask-rank": (
            {"chunk_mask": mask[:, 0]},
            r"^chunk_mask: expected shape \[B = 2, Q = 5, M = 4\], got \[2, 4\]$",
        ),
        "mask-dtype": (
            {"chunk_mask": mask.float()},
            r"^chunk_mask: expected dtype torch.bool, got torch.float32$",
        ),
        "mask-device": (
            {"chunk_mask": mask.to("meta")},
            r"^chunk_mask: expected device cpu, got meta$",
        ),
        "impl": (
            {"impl": "fastest"},
            r"^impl: expected one of \('auto', .*'reference'.*\), got 'fastest'$",
        ),
        "good": ({"memory": memory, "chunk_mask": mask}, ""),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_errors_name_the_argument_what_came_and_what_was_expected(name: str) -> None:
    changes, message = bad_inputs()[name]
    arguments: dict[str, Any] = {
        "route": torch.zeros(2, 5, 6),
        "probe": torch.zeros(2, 5, 3, 6),
        "memory": ChunkedMemory.from_chunks(torch.zeros(2, 4, 3, 6)),
        "k": 2,
    }
    if not message:
        assert recall(**(arguments | changes)).shape == (2, 5, 3, 6)
        return
    with pytest.raises(ValueError, match=message):
        recall(**(arguments | changes))
    changes.pop("impl", None)
    if changes:
        with pytest.raises(ValueError, match=message):
            recall_with_weights(**(arguments | changes))
