"""What a stored memory must hold, as plain Python, and what one shows of itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory


class Step(NamedTuple):
    number: int
    value: tuple[float, ...]
    episode: int
    time: float
    key: str | None


Chunk = tuple[Step, ...]


class Plain(NamedTuple):
    """A value: each call returns another one."""

    size: int
    closed: tuple[Chunk, ...] = ()
    opened: Chunk = ()
    next_step: int = 0
    episode: int = -1
    time: float = -torch.inf

    @property
    def held(self) -> list[Step]:
        return [step for chunk in (*self.closed, self.opened) for step in chunk]

    @property
    def chunks(self) -> int:
        return len(self.closed)

    def append(
        self,
        values: list[list[float]],
        begins: list[bool],
        times: list[float],
        keys: list[str | None],
    ) -> "Plain":
        closed, opened, episode = list(self.closed), list(self.opened), self.episode
        number = self.next_step
        for value, is_first, time, key in zip(values, begins, times, keys, strict=True):
            episode = max(episode + is_first, 0)
            if is_first and opened:
                closed.append(tuple(opened))
                opened = []
            opened.append(Step(number, tuple(value), episode, time, key))
            if len(opened) == self.size:
                closed.append(tuple(opened))
                opened = []
            number += 1
        last = times[-1] if times else self.time
        return Plain(self.size, tuple(closed), tuple(opened), number, episode, last)

    def without(self, is_gone: Callable[[Step], bool]) -> "Plain":
        parts = [
            tuple(step for step in chunk if not is_gone(step))
            for chunk in (*self.closed, self.opened)
        ]
        return self._replace(closed=tuple(filter(None, parts[:-1])), opened=parts[-1])

    def in_ram(self, mask: list[bool] | None = None) -> ChunkedMemory:
        """The chunks, where `mask` says so, as a memory in RAM."""
        width = len(self.held[0].value) if self.held else 1
        contents = torch.zeros(1, self.chunks, self.size, width)
        is_step = torch.zeros(1, self.chunks, self.size, dtype=torch.bool)
        for number, chunk in enumerate(self.closed):
            contents[0, number, self.size - len(chunk) :] = torch.tensor(
                [step.value for step in chunk]
            )
            is_step[0, number, self.size - len(chunk) :] = mask is None or mask[number]
        return ChunkedMemory.from_chunks(contents, is_step)

    def summaries(self) -> Tensor:
        """[M, D] float64."""
        means = [
            torch.tensor([s.value for s in c], dtype=torch.float64).mean(0) for c in self.closed
        ]
        return torch.stack(means)


class Shown(NamedTuple):
    """All that can be seen of a memory but for what its open chunk will say when it is closed."""

    next_step: int
    steps: int
    spans: list[tuple[Any, ...]]
    values: list[tuple[float, ...]]


def expected_of(plain: Plain) -> Shown:
    spans = []
    for number, chunk in enumerate(plain.closed):
        keys = tuple(step.key for step in chunk)
        spans.append(
            (
                number,
                chunk[0].number,
                len(chunk),
                chunk[0].episode,
                chunk[0].time,
                chunk[-1].time,
                keys if any(key is not None for key in keys) else (),
            )
        )
    held = plain.held
    return Shown(plain.next_step, len(held), spans, [step.value for step in held])


def shown_by(memory: Any) -> Shown:
    every = torch.arange(memory.chunks)
    spans = []
    for span in memory.spans(every):
        has_key = any(key is not None for key in span.keys)
        spans.append((*span[:6], span.keys if has_key else ()))
    fetched = memory.fetch(every)
    valid = fetched.valid[..., None].expand(fetched.contents.shape[:3])
    is_step = valid if fetched.step_mask is None else fetched.step_mask
    assert is_step.sum(2)[0].tolist() == [span[2] for span in spans]
    assert memory.episodes.tolist() == [span[3] for span in spans]
    values = fetched.contents[is_step].tolist()
    opened = memory.info()["steps of the open chunk"]
    values += memory.read(memory.next_step - opened, memory.next_step)[0].tolist()
    return Shown(memory.next_step, memory.steps, spans, [tuple(value) for value in values])


def assert_shows(memory: Any, plain: Plain) -> None:
    """The memory holds just what it must, and nothing of it is damaged."""
    shown, expected = shown_by(memory), expected_of(plain)
    for name, a, b in zip(Shown._fields, shown, expected, strict=True):
        assert a == b, f"{name}: {a} is not {b}"
    if hasattr(memory, "summaries"):
        assert memory.valid.tolist() == [[True] * plain.chunks]
        if plain.chunks:
            torch.testing.assert_close(memory.summaries[0].double(), plain.summaries())
    contents = memory.fetch(torch.arange(memory.chunks)).contents.flatten(0, 1)
    for number, chunk in enumerate(plain.closed):
        missing = contents[number, : plain.size - len(chunk)]
        assert (missing == 0).all(), "what was forgotten lies beside the rest of its chunk"
