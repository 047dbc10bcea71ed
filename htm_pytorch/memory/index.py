"""The engine's vector index over the summaries of a stored memory.

It is asked for the largest products with the query's route vector. That vector holds all
projections (`docs/math.md`), so the index stays right while weights train.
"""

from typing import Any

import torch
from torch import Tensor

NAME = "summaries"
PROBES = 32
"""Lists of the index that a query reads, of sqrt(M) / 2."""
_REFINE = 8
"""Candidates, for each that is asked for, whose summaries are read for exact products."""
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


def add_missing(dataset: Any) -> None:
    """Add the rows that came after the index was built, where there is one."""
    if any(i.name == NAME for i in dataset.describe_indices()):
        dataset.optimize.optimize_indices(index_names=[NAME])


def nearest(dataset: Any, vectors: Tensor, k: int, probes: int) -> tuple[Tensor, Tensor]:
    """Return the rows [X, k] of about the largest products of `vectors` [X, D] and summaries.

    Best first, and the products; -1 and -inf where fewer were found. Rows that are not in the
    index are all compared.
    """
    rows = torch.full((len(vectors), k), -1)
    products = torch.full(rows.shape, -torch.inf)
    if not rows.numel():
        return rows, products
    asked = {
        "column": "summary",
        "q": vectors.numpy(),
        "k": k,
        "metric": "dot",
        "nprobes": probes,
        "refine_factor": _REFINE,
    }
    found = dataset.scanner(columns=["_rowid", "_distance"], nearest=asked).to_table()
    query, address, distance = (
        torch.from_numpy(found[name].to_numpy().copy())
        for name in ("query_index", "_rowid", "_distance")
    )
    # An address is the number of a fragment and a place in it.
    fragments = dataset.get_fragments()
    numbers = [fragment.fragment_id for fragment in fragments]
    lengths = torch.tensor([fragment.count_rows() for fragment in fragments])
    starts = torch.zeros(1 + max(numbers), dtype=torch.int64)
    starts[numbers] = lengths.cumsum(0) - lengths
    address = address.to(torch.int64)
    rank = torch.arange(len(query)) - torch.searchsorted(query, query)
    rows[query, rank] = starts[address >> 32] + (address & 0xFFFFFFFF)
    products[query, rank] = 1 - distance
    return rows, products
