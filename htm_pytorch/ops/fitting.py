"""Whether what the operators of the compiled kernel get fits together: it reads by address."""

import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.ops import operators
from htm_pytorch.shapes import check_at_least


def check_source(route: Tensor, source: Tensor, step_mask: Tensor | None, size: int) -> int:
    """Return how many chunks are scored, if the tensors fit each other."""
    operators.check_axes("route", route, 3)
    operators.check_axes("source", source, 3)
    check_at_least("chunk_size", size, 1)
    batch, _, dim = route.shape
    rows, length, _ = source.shape
    operators.check("route", route, route.shape, *kernels.STORED)
    rows = rows if rows == 1 else batch
    operators.check("source", source, (rows, length, dim), *kernels.STORED[route.dtype])
    operators.check("step_mask", step_mask, (rows, length), torch.bool)
    return -(-length // size)


def check_inside(
    probe: Tensor,
    steps: Tensor,
    step_mask: Tensor | None,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
) -> None:
    """Raise a ValueError unless the tensors fit each other."""
    operators.check_axes("probe", probe, 4)
    operators.check_axes("steps", steps, 3)
    check_at_least("chunk_size", chunk_size, 1)
    width, (rows, length, _) = probe.shape[3], steps.shape
    operators.check("probe", probe, probe.shape, *kernels.STORED)
    rows = rows if rows == 1 else len(probe)
    operators.check("steps", steps, (rows, length, width), *kernels.STORED[probe.dtype])
    operators.check("step_mask", step_mask, (rows, length), torch.bool)
    operators.check("positions", positions, (chunk_size, width), probe.dtype)
    check_picks(probe, picked, weights)


def check_picks(queries: Tensor, picked: Tensor, weights: Tensor) -> None:
    """Raise a ValueError unless picks and their weights fit the queries."""
    operators.check_axes("picked", picked, 3)
    shape = (*queries.shape[:2], picked.shape[2])
    operators.check("picked", picked, shape, torch.int64)
    operators.check("weights", weights, shape, queries.dtype)


def check_projected(
    queries: Tensor,
    projected: Tensor,
    step_mask: Tensor | None,
    picked: Tensor,
    weights: Tensor,
    chunk_size: int,
    owners: int,
) -> None:
    """Raise a ValueError unless the tensors fit each other."""
    check_at_least("chunk_size", chunk_size, 1)
    operators.check_axes("queries", queries, 4)
    heads, width = queries.shape[2:]
    length = len(projected) // chunk_size * chunk_size
    operators.check("queries", queries, queries.shape, *kernels.STORED)
    stored = kernels.STORED[queries.dtype]
    operators.check("projected", projected, (length, 2, heads, width), *stored)
    operators.check("step_mask", step_mask, (length,), torch.bool)
    check_picks(queries, picked, weights)
    if owners not in (1, len(queries)):
        raise ValueError(f"owners: expected 1 or {len(queries)}, got {owners}")
