"""What the blocked way promises: extra memory that grows with neither the memory nor the picks."""

from typing import Any

import pytest
import torch

from benchmarks.harness import peak_allocation
from htm_pytorch import ChunkedMemory, recall
from htm_pytorch.ops import blocked


def peak_bytes(queries: int, chunks: int, k: int, backward: bool) -> int:
    torch.manual_seed(0)
    memory = ChunkedMemory.from_chunks(torch.randn(1, chunks, 16, 32))
    route = torch.randn(1, queries, 32, requires_grad=backward)
    probe = torch.randn(1, queries, 2, 32, requires_grad=backward)

    def run() -> None:
        context = recall(route, probe, memory, k, impl="blocked")
        if backward:
            context.sum().backward()

    return peak_allocation(run)


@pytest.mark.parametrize("backward", [False, True])
def test_extra_memory_is_bounded(backward: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(blocked, "BUFFER_BYTES", 64 * 1024)
    monkeypatch.setattr(blocked, "SCORE_BYTES", 64 * 1024)
    few = peak_bytes(64, 200, 2, backward)
    # Gathered at once, these picks alone would be 64 * 16 * 16 * 32 * 4 bytes = 2 MiB.
    assert peak_bytes(64, 200, 16, backward) < few + 512 * 1024
    # Scored at once, these chunks alone would be 64 * 6,400 * 4 bytes = 1.6 MiB.
    assert peak_bytes(64, 6_400, 2, backward) < few + 256 * 1024
