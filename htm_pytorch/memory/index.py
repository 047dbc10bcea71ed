"""The engine's vector index over the summaries of a stored memory.

It is asked for the largest products with the query's route vector. That vector holds all
projections (`docs/math.md`), so the index stays right while weights train.
"""

from typing import Any

import torch
from torch import Tensor

from htm_pytorch.memory.formats import CPU

NAME = "summaries"
PROBES = 32
"""Lists of the index that a query reads, of sqrt(M) / 2."""
_REFINE = 8
"""Candidates, for each that is asked for, whose summaries are read for the products themselves."""
_WIDE = 128
"""From this width on, two bits a number tell summaries apart (RaBitQ, arXiv 2405.12497)."""


def build(dataset: Any, dim: int) -> Any:
    """Index all rows of a Lance dataset; return the dataset of the new version."""
    kind = {"index_type": "IVF_SQ"}
    if dim >= _WIDE and dim % 8 == 0:
        kind = {"index_type": "IVF_RQ", "num_bits": 2}
    lists = max(1, round(dataset.count_rows() ** 0.5 / 2))
    return dataset.create_index(
        "summary", name=NAME, metric="dot", num_partitions=lists, replace=True, **kind
    )


def length(dataset: Any) -> int:
    """Return how many rows are in the index."""
    return sum(i.num_rows_indexed for i in dataset.describe_indices() if i.name == NAME)


def add_missing(dataset: Any) -> Any:
    """Add the rows that came after the index was built, where there is one; return the dataset."""
    if exists(dataset):
        dataset.optimize.optimize_indices(index_names=[NAME])
    return dataset


def drop(dataset: Any) -> Any:
    """Remove the index; return the dataset."""
    dataset.drop_index(NAME)
    return dataset


def exists(dataset: Any) -> bool:
    """Whether there is an index."""
    return any(i.name == NAME for i in dataset.describe_indices())


def nearest(
    dataset: Any, vectors: Tensor, k: int, probes: int, condition: str | None
) -> tuple[Tensor, Tensor]:
    """Return the chunks [X, k] of about the largest products of `vectors` [X, D] and summaries.

    Chunks are named by their first steps. Best first, and the products; -1 and -inf where fewer
    were found. Rows that are not in the index are all compared, and those that do not fulfil the
    SQL `condition` are left out before the search.
    """
    first_steps = torch.full((len(vectors), k), -1, device=CPU)
    products = torch.full(first_steps.shape, -torch.inf, dtype=torch.float32, device=CPU)
    if not first_steps.numel():
        return first_steps, products
    asked = {
        "column": "summary",
        "q": vectors.float().numpy(),
        "k": k,
        "metric": "dot",
        "nprobes": probes,
        "refine_factor": _REFINE,
    }
    found = dataset.scanner(
        columns=["first_step", "_distance"],
        nearest=asked,
        filter=condition,
        prefilter=condition is not None,
    ).to_table()
    query, first_step, distance = (
        torch.from_numpy(found[name].to_numpy().copy())
        for name in ("query_index", "first_step", "_distance")
    )
    rank = torch.arange(len(query), device=CPU) - torch.searchsorted(query, query)
    first_steps[query, rank] = first_step
    products[query, rank] = 1 - distance
    return first_steps, products
