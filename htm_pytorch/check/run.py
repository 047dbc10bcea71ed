"""`check`: is the layer right on this machine, at these shapes?"""

import torch
from torch import Tensor

from htm_pytorch.check.config import CheckConfig
from htm_pytorch.check.problem import Problem
from htm_pytorch.check.report import Comparison, Report
from htm_pytorch.shapes import check_kind

MULTIPLE = 8.0
"""How many times the reference's own error an implementation may err."""
RUNS = 8
"""How many times the reference runs, at most, to show its own error."""


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
        config: what is checked: sizes, dtype, device, implementation; default `CheckConfig()`.

    Returns:
        The report: `ok`, and a table as its string.

    Raises:
        ValueError: the implementation cannot run there. (Wrong sizes are refused by `CheckConfig`.)
    """
    config = CheckConfig() if config is None else config
    check_kind("config", config, CheckConfig, "a CheckConfig")
    small = Problem(config.cut_down())
    _refuse_unless_it_runs(small)
    problem = Problem(config)
    got = problem.values(problem.layer_output)
    impl = config.impl
    if impl == "auto":
        impl = f"auto took {problem.taken()}"
    return Report(
        config=config,
        impl=impl,
        comparisons=tuple(_compare(problem, got)),
        compared=len(problem.clear),
        left_out=int((~problem.clear).sum()),
        gradcheck=small.gradcheck(),
    )


def _compare(problem: "Problem", got: dict[str, Tensor]) -> list[Comparison]:
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


def _refuse_unless_it_runs(problem: Problem) -> None:
    config = problem.config
    try:
        problem.layer_output(problem.leaves())
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"impl: expected one that runs on {config.device}, got {config.impl!r} ({error})"
        ) from error
