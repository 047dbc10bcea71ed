"""What the blocked way promises: extra memory that grows with neither the memory nor the picks."""

from typing import Any

import pytest
import torch

from htm_pytorch import ChunkedMemory, recall
from htm_pytorch.ops import blocked


def peak_bytes(queries: int, chunks: int, k: int, backward: bool) -> int:
    torch.manual_seed(0)
    memory = ChunkedMemory.from_chunks(torch.randn(1, chunks, 16, 32))
    route = torch.randn(1, queries, 32, requires_grad=backward)
    probe = torch.randn(1, queries, 2, 32, requires_grad=backward)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        context = recall(route, probe, memory, k, impl="blocked")
        if backward:
            context.sum().backward()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("backward", [False, True])
def test_extra_memory_is_bounded(backward: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(blocked, "BUFFER_BYTES", 64 * 1024)
    monkeypatch.setattr(blocked, "SCORE_BYTES", 64 * 1024)
    few = peak_bytes(64, 200, 2, backward)
    # Gathered at once, these picks alone would be 64 * 16 * 16 * 32 * 4 bytes = 2 MiB.
    assert peak_bytes(64, 200, 16, backward) < few + 512 * 1024
    # Scored at once, these chunks alone would be 64 * 6,400 * 4 bytes = 1.6 MiB.
    assert peak_bytes(64, 6_400, 2, backward) < few + 256 * 1024
