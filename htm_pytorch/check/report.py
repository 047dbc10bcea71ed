"""What `check` found: comparisons, and whether all is right."""

from typing import NamedTuple

import torch

from htm_pytorch.check.config import CheckConfig


class Comparison(NamedTuple):
    """One tensor, beside the truth."""

    quantity: str
    """What is compared: "output" or "gradient of ..."."""
    error: float
    """How large the largest difference from the truth is, over the largest entry of the truth."""
    reference_error: float
    """The same for the reference in the dtype that was asked for, its largest of 1 to 8 runs."""
    ok: bool


class Report(NamedTuple):
    """What `check` found; as a string, a table."""

    config: CheckConfig
    impl: str
    """What was checked; of "auto" also what it took."""
    comparisons: tuple[Comparison, ...]
    compared: int
    """How many queries were drawn for the comparison."""
    left_out: int
    """How many of those had chunks too near a tie to tell which are to be kept."""
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


def _yes(ok: bool) -> str:
    return "yes" if ok else "NO"
