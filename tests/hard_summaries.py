"""Summaries that are hard to tell apart, or to code."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def noise(chunks: int, dim: int) -> Tensor:
    return torch.randn(chunks, dim)


def walk(chunks: int, dim: int) -> Tensor:
    return torch.randn(chunks, dim).cumsum(0)


def far_off(chunks: int, dim: int) -> Tensor:
    return torch.randn(chunks, dim) + 1e4 * torch.randn(dim)


def equal(chunks: int, dim: int) -> Tensor:
    return torch.randn(dim).expand(chunks, -1).clone()


def nearly_equal(chunks: int, dim: int) -> Tensor:
    return torch.randn(dim) + 1e-6 * torch.randn(chunks, dim)


def of_two(chunks: int, dim: int) -> Tensor:
    return torch.randn(2, dim)[torch.randint(2, (chunks,))]


def of_all_scales(chunks: int, dim: int) -> Tensor:
    return torch.randn(chunks, dim) * 10.0 ** torch.randint(-38, 19, (chunks, 1))


def dwarfed(chunks: int, dim: int) -> Tensor:
    summaries = torch.randn(chunks, dim)
    summaries[:, 0] *= 1e6
    return summaries


def one_outlier(chunks: int, dim: int) -> Tensor:
    summaries = torch.randn(chunks, dim)
    summaries[torch.randint(chunks, ())] *= 1e20
    return summaries


def no_numbers(chunks: int, dim: int) -> Tensor:
    summaries = torch.randn(chunks, dim)
    for value in math.nan, math.inf, -math.inf:
        summaries[torch.randint(chunks, (2,)), torch.randint(dim, (2,))] = value
    return summaries


def huge(chunks: int, dim: int) -> Tensor:
    """Finite, unlike sums of products with them."""
    return torch.randn(chunks, dim).sign() * 3e38 * (torch.rand(chunks, 1) < 0.1)


def tiny(chunks: int, dim: int) -> Tensor:
    return torch.randn(chunks, dim) * 1e-29


def zeros(chunks: int, dim: int) -> Tensor:
    return torch.zeros(chunks, dim)


def subnormal(chunks: int, dim: int) -> Tensor:
    return torch.randn(chunks, dim) * 1e-39


KINDS: list[Callable[[int, int], Tensor]] = [
    noise,
    walk,
    far_off,
    equal,
    nearly_equal,
    of_two,
    of_all_scales,
    dwarfed,
    one_outlier,
    no_numbers,
    huge,
    tiny,
    zeros,
    subnormal,
]
