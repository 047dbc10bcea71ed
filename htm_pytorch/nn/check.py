"""`check`: is the layer right on this machine, at these shapes?"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from htm_pytorch.memory import ChunkedMemory, Steps
from htm_pytorch.nn.attention import HTMAttention
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import Impl, check_impl
from htm_pytorch.ops.reference import htm_attention
from htm_pytorch.shapes import check_at_least

Dtype = Literal["float64", "float32", "bfloat16", "float16"]

MULTIPLE = 8.0
"""How many times the reference's own error an implementation may err."""
RUNS = 8
"""Of the reference, at most, to see its own error."""
COMPARED = 16
"""Queries that are compared: the reference in float64 is slow."""
CLEAR = 8.0
"""How many errors of a score must lie between the last chunk kept and the next."""
CANDIDATES = 32
"""Draws of a compared query, until the chunks it keeps are clear."""
NOISE = 1e-10
"""A true gradient this much smaller than the largest one is what rounding left of zero."""


@dataclass(frozen=True)
class CheckConfig:
    """What is checked. The defaults are the example of the README."""

    batch: int = 1
    """Rows, each with a memory of its own."""
    queries: int = 128
    """Queries a row."""
    steps: int = 20_000
    """Memory steps a row. The oldest chunk is short where mem_chunk_size does not divide them."""
    dim: int = 512
    """Width of queries and memory."""
    heads: int = 8
    """Heads of the attention inside chunks."""
    dim_head: int = 64
    """Width of a head."""
    topk_mems: int = 8
    """Chunks a query keeps."""
    mem_chunk_size: int = 32
    """Steps in a chunk."""
    add_pos_enc: bool = True
    """Whether positions are added to the steps."""
    masked: bool = False
    """Hide a fifth of the steps, which hold NaN then, and of the chunks from each query."""
    chunked: bool = False
    """Give the memory as a ChunkedMemory, not as a tensor."""
    detach_memories: bool = True
    """Whether gradients stop at the memory; where not, its gradient is compared too."""
    dtype: Dtype = "float32"
    """Of queries, memory and parameters."""
    device: str = "cpu"
    """Where the layer runs."""
    impl: Impl = "auto"
    """Which implementation is checked."""
    seed: int = 0
    """Of everything drawn."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the field."""
        for field in dataclasses.fields(self):
            if field.type is int:
                check_at_least(field.name, getattr(self, field.name), int(field.name != "seed"))
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype: expected one of {get_args(Dtype)}, got {self.dtype!r}")
        check_impl(self.impl)
        try:
            torch.zeros(1, dtype=torch.float64, device=self.device).item()
        # A build of torch without CUDA raises an AssertionError.
        except (RuntimeError, TypeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"device: expected one of this machine that knows float64, "
                f"got {self.device!r} ({reason})"
            ) from error

    def cut_down(self) -> "CheckConfig":
        """Return the same in float64 and in sizes that finite differences can go through."""
        size = min(self.mem_chunk_size, 3)
        chunks = min(-(-self.steps // self.mem_chunk_size), 4)
        is_ragged = self.steps % self.mem_chunk_size > 0
        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            queries=min(self.queries, 3),
            steps=chunks * size - int(is_ragged),
            dim=min(self.dim, 4),
            heads=min(self.heads, 2),
            dim_head=min(self.dim_head, 3),
            topk_mems=min(self.topk_mems, 2),
            mem_chunk_size=size,
            dtype="float64",
        )


class Comparison(NamedTuple):
    """One tensor, beside the truth."""

    quantity: str
    """"output" or "gradient of ..."."""
    error: float
    """The largest difference from the truth, over the largest entry of the truth."""
    reference_error: float
    """The same for the reference in the dtype that was asked for, its largest of 1 to 8 runs."""
    ok: bool


class Report(NamedTuple):
    """What `check` found; as a string, a table."""

    config: CheckConfig
    impl: str
    """What was checked; of "auto" also what it took, told by the bits of the output."""
    comparisons: tuple[Comparison, ...]
    compared: int
    """Queries drawn for the comparison."""
    left_out: int
    """Of those, the ones with chunks too near a tie to tell which are to be kept."""
    gradcheck: bool
    """Whether `torch.autograd.gradcheck` accepts the layer at cut-down sizes."""

    @property
    def most_compared(self) -> bool:
        """Whether at least half of the queries drawn were clear enough to be compared."""
        return 2 * self.left_out <= self.compared

    @property
    def ok(self) -> bool:
        """Whether everything is right."""
        return self.gradcheck and self.most_compared and all(c.ok for c in self.comparisons)

    def __str__(self) -> str:
        rows = [("relative to the largest entry", "error", "reference's own", "ok")]
        for name, error, own, ok in self.comparisons:
            rows.append((name, f"{error:.1e}", f"{own:.1e}", _yes(ok)))
        queries = self.config.batch * self.config.queries
        done = f"compared {self.compared - self.left_out} of {queries:,} queries"
        rows.append(
            (f"{done}, {self.left_out} near ties left out", "", "", _yes(self.most_compared))
        )
        rows.append(("gradcheck in float64 at small sizes", "", "", _yes(self.gradcheck)))
        wide, short, long, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        table = [f"{a:{wide}}  {b:>{short}}  {c:>{long}}  {d}" for a, b, c, d in rows]
        return "\n".join([*self._title(), "", *table, "", "passed" if self.ok else "FAILED"])

    def _title(self) -> list[str]:
        c = self.config
        options = {
            "no positions": not c.add_pos_enc,
            "masked": c.masked,
            "chunked": c.chunked,
            "gradients into the memory": not c.detach_memories,
        }
        return [
            f"{self.impl}, {c.dtype} on {c.device}, torch {torch.__version__}, seed {c.seed}",
            f"{c.batch} x {c.queries:,} queries, {c.steps:,} steps, dim {c.dim}, "
            f"{c.heads} heads of {c.dim_head}, {c.topk_mems} chunks of {c.mem_chunk_size}"
            + "".join(f", {name}" for name, holds in options.items() if holds),
        ]


def check(config: CheckConfig | None = None) -> Report:
    """Compare the layer with the plain reference in float64, output and every gradient.

    Inputs are drawn, rounded to the dtype, and given to `HTMAttention`. The truth is
    `ops.reference.htm_attention`, the paper's order with the memory projected plainly, in float64,
    for at most 16 queries spread over all. A gradient is that of the inner product of their
    outputs with a drawn tensor: by the queries, each parameter, and the memory unless detached.

    **What may differ.** No result in a dtype of unit roundoff u is exact, and how far it may be off
    depends on the sizes, on what cancels in a sum, on the way through the graph. All of this is in
    the error of the reference itself when it runs in that dtype on the same inputs. An
    implementation takes the same sums in another order: its errors are other draws of about the
    same size, which grows with the root of the number of roundings. A sum of hundreds of steps one
    by one, where the reference adds up blocks, was seen to cost a factor of 4.6; 8 times the
    reference's error leaves room for 64 times the roundings. A defect, however, stays what it is
    when u shrinks: ask for float32 or float64 to see small ones.

    In a tensor of few entries the reference may be near the truth by luck. Where it seems too
    good, it runs again, up to 7 times, on inputs moved at random by up to u: no implementation
    can be expected to tell such inputs apart. Its largest error counts, and never less than u, the
    last rounding alone. In float64 nothing more exact is left to measure it with; its error is
    then that in float32, times the quotient of the units.

    **Near ties.** If rounding may decide which chunk is kept, both choices are right and the
    outputs differ. So a compared query is drawn again, up to 32 times, until the k-th and the
    (k + 1)-th score differ by 8 times the root-mean-square error of a score in the dtype, which
    the reference measures as well. If none is clear, the query is left out; when most are, the
    check fails.

    Args:
        config: sizes, dtype, device, implementation; default `CheckConfig()`.

    Returns:
        The report: `ok`, and a table as its string.

    Raises:
        ValueError: the implementation cannot run there. (Wrong sizes are refused by `CheckConfig`.)
    """
    config = config or CheckConfig()
    small = _Problem(config.cut_down())
    _refuse_unless_it_runs(small)
    problem = _Problem(config)
    got = problem.values(problem.layer_output)
    impl = config.impl
    if impl == "auto":
        impl = f"auto took {problem.who_gives(got['output'])}"
    return Report(
        config=config,
        impl=impl,
        comparisons=tuple(_compare(problem, got)),
        compared=len(problem.clear),
        left_out=int((~problem.clear).sum()),
        gradcheck=small.gradcheck(),
    )


def _compare(problem: "_Problem", got: dict[str, Tensor]) -> list[Comparison]:
    """Hold each error of the layer to the reference's own; run that until it explains all."""
    truth = problem.truth()
    errors = problem.errors(got, truth)
    rounding = torch.finfo(problem.dtype).eps / 2
    generator = torch.Generator().manual_seed(problem.config.seed)
    largest = dict.fromkeys(errors, 0.0)
    comparisons = []
    for run in range(RUNS):
        values = problem.reference_values(generator if run else None)
        for name, error in problem.errors(values, truth).items():
            largest[name] = max(largest[name], error * problem.shrink)
        comparisons = [
            Comparison(name, error, largest[name], error <= MULTIPLE * max(rounding, largest[name]))
            for name, error in errors.items()
        ]
        if all(comparison.ok for comparison in comparisons):
            break
    return comparisons


class _Problem:
    """Inputs of one setting, drawn on the CPU so that they are the same for every device."""

    def __init__(self, config: CheckConfig):
        self.config = config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        # In what the reference's own error is measured, and what that is in the dtype asked for.
        self.measured = torch.float32 if self.dtype == torch.float64 else self.dtype
        self.shrink = torch.finfo(self.dtype).eps / torch.finfo(self.measured).eps
        self.layer = _layer(config)
        generator = torch.Generator().manual_seed(config.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            # Exact in float32 too, where the reference is measured for float64.
            drawn = torch.randn(*shape, generator=generator) * scale
            return drawn.to(self.measured).to(self.dtype)

        def mask(*shape: int) -> Tensor | None:
            return torch.rand(*shape, generator=generator) < 0.8 if config.masked else None

        batch, queries, steps, dim = config.batch, config.queries, config.steps, config.dim
        self.inputs = {
            "queries": normal(batch, queries, dim),
            "memories": normal(batch, steps, dim),
        }
        for name, parameter in self.layer.named_parameters():
            self.inputs[name] = normal(*parameter.shape, scale=parameter.shape[-1] ** -0.5)
        self.mask = mask(batch, steps)
        self.chunk_mask = mask(batch, queries, -(-steps // config.mem_chunk_size))
        # The compared pairs of row and query, [P] each, from the first to the last.
        total = batch * queries
        pairs = torch.linspace(0, total - 1, min(COMPARED, total)).round().long()
        self.row, self.query = pairs // queries, pairs % queries
        if self.mask is not None:
            self.inputs["memories"][~self.mask] = torch.nan
        if self.chunk_mask is not None and len(pairs) > 1:
            # One that sees nothing: zeros, and no gradient.
            self.chunk_mask[self.row[1], self.query[1]] = False
        self.clear, chunks, kept = self._choose(normal(len(pairs), CANDIDATES, dim))
        self.at, self.exists = self._places(chunks, kept)
        self.cotangent = normal(len(pairs), dim) * self.clear[:, None]

    def _choose(self, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take as queries the first of the candidates [P, X, D] whose kept chunks are clear.

        Returns:
            [P] bool, whether there was one; [P, K] the chunks it keeps; [P, K] bool, False where
            it sees fewer.
        """
        k, found = self.config.topk_mems, []
        for row in self.row.unique():
            here = self.row == row
            scores, allowed = self._scores(row, candidates[here], torch.float64)
            margin = CLEAR * self._score_error(row, candidates[here])
            if self.chunk_mask is not None:
                allowed = allowed & self.chunk_mask[row, self.query[here], None]
            scores = scores.masked_fill(~allowed, -torch.inf)
            best, chunks = scores.topk(min(k + 1, scores.shape[-1]))
            is_clear = torch.ones(best.shape[:2], dtype=torch.bool)
            if best.shape[-1] > k:
                is_clear = best[..., k].isinf() | (best[..., k - 1] - best[..., k] > margin)
            first = torch.arange(len(best)), is_clear.int().argmax(1)
            self.inputs["queries"][row, self.query[here]] = candidates[here][first]
            found.append((is_clear[first], chunks[first][:, :k], best[first][:, :k].isfinite()))
        clear, chunks, kept = (torch.cat(parts) for parts in zip(*found, strict=True))
        return clear, chunks, kept

    def _places(self, chunks: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the steps of the chunks [P, K] lie, [P, K * C], and whether they exist."""
        size = self.config.mem_chunk_size
        at = chunks[..., None] * size + torch.arange(size) - -self.config.steps % size
        exists = (kept[..., None] & (at >= 0)).flatten(1)
        at = at.clamp(min=0).flatten(1)
        return at, exists if self.mask is None else exists & self.mask[self.row[:, None], at]

    def _scores(self, row: Tensor, queries: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the router's scores [P, X, M] in the paper's order, and the valid chunks [M]."""
        steps, mask = self.inputs["memories"][row, None].to(dtype), self.mask
        mask = None if mask is None else mask[row, None]
        size, eps = self.config.mem_chunk_size, self.layer.eps
        memory = Steps(steps, size, mask, eps).chunked()
        asked, keys = (
            linear(x.to(dtype), *(self.inputs[f"{name}.{part}"].to(dtype) for part in _LINEAR))
            for name, x in (("to_summary_queries", queries), ("to_summary_keys", memory.summaries))
        )
        return asked @ keys[0].T * keys.shape[-1] ** -0.5, memory.valid[0]

    def _score_error(self, row: Tensor, queries: Tensor) -> Tensor:
        """Return how much a score is off in the dtype, [P, X]; what all share does not matter."""
        exact, rough = (
            self._scores(row, queries, dtype)[0].double()
            for dtype in (torch.float64, self.measured)
        )
        return (rough - exact).std(-1, correction=0) * self.shrink

    def layer_output(self, inputs: dict[str, Tensor], impl: Impl | None = None) -> Tensor:
        """Return the layer's output [B, Q, D]."""
        device = inputs["queries"].device
        mask, chunk_mask = (
            None if part is None else part.to(device) for part in (self.mask, self.chunk_mask)
        )
        weights = {name: x for name, x in inputs.items() if name not in ("queries", "memories")}
        memory = inputs["memories"]
        if self.config.chunked:
            size, eps = self.config.mem_chunk_size, self.layer.eps
            memory = ChunkedMemory.from_steps(memory, size, mask, borders="newest", eps=eps)
            mask = None
        self.layer.impl = impl or self.config.impl
        arguments = (inputs["queries"], memory, mask, chunk_mask)
        return torch.func.functional_call(self.layer, weights, arguments)

    def plain_output(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the reference's output [B, Q, D], of the compared queries alone.

        Each of them is a row of its own, whose memory is the chunks it keeps: others are not in
        the result, and would cost most of the time.
        """
        config, queries = self.config, inputs["queries"]
        row, query, at, exists = (
            part.to(queries.device) for part in (self.row, self.query, self.at, self.exists)
        )
        steps = inputs["memories"][row[:, None], at].to(queries.dtype)
        steps = steps.masked_fill(~exists[..., None], 0.0)
        size, eps = config.mem_chunk_size, self.layer.eps if config.masked else 0.0
        memory = ChunkedMemory.from_steps(steps, size, exists, borders="newest", eps=eps)
        positions = None
        if config.add_pos_enc:
            positions = sinusoid(size, config.dim, queries.dtype, queries.device)
        outputs = htm_attention(
            queries[row, query, None],
            memory,
            inputs,
            heads=config.heads,
            k=config.topk_mems,
            positions=positions,
        )
        return queries.new_zeros(queries.shape).index_put((row, query), outputs[:, 0])

    def values(
        self,
        function: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor] | None = None,
        cotangent: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the function's output [P, D] for the compared queries, and all gradients."""
        inputs = self._leaves() if inputs is None else inputs
        output = function(inputs)[self.row, self.query]
        leaves = {name: x for name, x in inputs.items() if x.requires_grad}
        cotangent = (self.cotangent if cotangent is None else cotangent).to(output)
        gradients = torch.autograd.grad(
            output, list(leaves.values()), cotangent, materialize_grads=True
        )
        named = zip(leaves, gradients, strict=True)
        return {"output": output.detach()} | {f"gradient of {name}": g for name, g in named}

    def truth(self) -> dict[str, Tensor]:
        """Return the values of the reference in float64; not every device knows that well."""
        return self.values(self.plain_output, self._leaves("cpu", torch.float64))

    def reference_values(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return the values of the reference in the dtype; a generator moves its inputs by u."""
        inputs, cotangent = self._leaves(dtype=self.measured), self.cotangent
        if generator is not None:
            cotangent = self._moved(cotangent, generator)
            inputs = {
                name: self._moved(x.detach(), generator).requires_grad_(x.requires_grad)
                for name, x in inputs.items()
            }
        return self.values(self.plain_output, inputs, cotangent)

    def _moved(self, x: Tensor, generator: torch.Generator) -> Tensor:
        by = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        moved = x.cpu().double() * (1 + torch.finfo(self.measured).eps * by)
        return moved.to(x.device, self.measured)

    def _leaves(
        self, device: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return copies of the inputs, by default as the layer gets them, that take gradients."""
        inputs = {}
        for name, x in self.inputs.items():
            is_wanted = name != "memories" or not self.config.detach_memories
            copy = x.clone().to(device or self.config.device, dtype or self.dtype)
            inputs[name] = copy.requires_grad_(is_wanted)
        return inputs

    def errors(self, values: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
        """Return the largest differences from the truth, relative to its largest entries."""
        everything = max(_largest(true) for true in truth.values()) or 1.0
        errors = {}
        for name, true in truth.items():
            scale = _largest(true)
            scale = scale if scale > NOISE * everything else everything
            difference = values[name].cpu().double() - true
            if name == "output":
                difference = difference[self.clear]
            errors[name] = _largest(difference) / scale
        return errors

    def who_gives(self, output: Tensor) -> str:
        """Return the name of an implementation that gives exactly this output [P, D]."""
        inputs = self._leaves()
        for impl in reversed(get_args(Impl)):
            # "auto" takes "reference" under transforms only, and it may need much memory.
            if impl in ("auto", "reference"):
                continue
            try:
                with torch.no_grad():
                    again = self.layer_output(inputs, impl)[self.row, self.query]
            except (ValueError, RuntimeError):
                continue
            if torch.equal(again, output):
                return impl
        return "one that has no name"

    def gradcheck(self) -> bool:
        """Compare all gradients with finite differences."""
        inputs = self._leaves()

        def function(*tensors: Tensor) -> Tensor:
            return self.layer_output(dict(zip(inputs, tensors, strict=True)))

        return torch.autograd.gradcheck(
            function,
            tuple(inputs.values()),
            atol=1e-7,
            rtol=1e-5,
            # A GPU may take the sums of two calls in two orders.
            nondet_tol=1e-10,
            fast_mode=True,
            raise_exception=False,
        )


_LINEAR = ("weight", "bias")


def _layer(config: CheckConfig) -> HTMAttention:
    # Its own parameters are not used, and their drawing leaves no trace.
    with torch.random.fork_rng(devices=[]):
        return HTMAttention(
            config.dim,
            config.heads,
            config.topk_mems,
            config.mem_chunk_size,
            config.dim_head,
            config.add_pos_enc,
            detach_memories=config.detach_memories,
        )


def _refuse_unless_it_runs(problem: _Problem) -> None:
    config = problem.config
    try:
        problem.layer_output(problem._leaves())
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"impl: expected one that runs on {config.device}, got {config.impl!r} ({error})"
        ) from error


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _yes(ok: bool) -> str:
    return "yes" if ok else "NO"
