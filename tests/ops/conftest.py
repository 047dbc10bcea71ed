"""Threads that are set and come back, and fences around what operators write."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Put what an operator may write between numbers that must stay; they are looked at by a call.

    A read beyond an end would need a sanitizer to be seen.
    """
    fence, mark = 1024, 77
    fenced: list[Tensor] = []

    def between_fences(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            plain = make(*arguments, **options)
            room = torch.full((plain.numel() + 2 * fence,), mark, dtype=plain.dtype)
            fenced.append(room)
            return room[fence:-fence].view(plain.shape).copy_(plain)

        return made

    def look() -> None:
        rooms = fenced.copy()
        fenced.clear()
        for room in rooms:
            assert (room[:fence] == mark).all(), "written before the beginning"
            assert (room[-fence:] == mark).all(), "written behind the end"

    for owner, name in ((torch, "empty"), (torch, "zeros"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, between_fences(getattr(owner, name)))
    monkeypatch.setattr(Tensor, "new_empty", between_fences(Tensor.new_empty))
    yield look
    look()
