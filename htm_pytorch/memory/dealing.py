"""Which rank holds which chunk: number g lies with rank g % R, as that rank's chunk g // R."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.memory import ring
from htm_pytorch.memory.chunked import ChunkedMemory
from htm_pytorch.memory.home import ExactHome, ScoredHome


def dealt(total: int, ranks: int) -> tuple[int, ...]:
    """Return how many chunks each rank holds, by rank, where `total` are dealt out in turn."""
    return tuple(len(range(rank, total, ranks)) for rank in range(ranks))


def end(sizes: Sequence[int]) -> int:
    """Return the least number above all chunks of ranks that hold so many, in turn or not."""
    ranks = len(sizes)
    return max((rank + 1 + (n - 1) * ranks for rank, n in enumerate(sizes) if n), default=0)


def ages(following: Tensor | None, sizes: Sequence[int], rank: int, device: torch.device) -> Tensor:
    """Return how many chunks closed after each of a rank's, [B, M] int64; B may be 1.

    Args:
        following: the number of the chunk [B] that a ring writes next; None: it is no ring.
        sizes: how many chunks each rank holds, by rank.
        rank: whose chunks these are.
        device: where the result is.
    """
    total = end(sizes)
    following = torch.tensor([total], device=device) if following is None else following
    numbers = torch.arange(sizes[rank], device=device) * len(sizes) + rank
    return ring.ages(following, numbers, total)


def held_before(number: Tensor, rank: int | Tensor, ranks: int) -> Tensor:
    """Return how many of the chunks below `number` a rank holds."""
    return (number - rank + ranks - 1).clamp(min=0) // ranks


def part_of(whole: ChunkedMemory, rank: int, ranks: int) -> ChunkedMemory:
    """Return a copy of a rank's part of a memory."""
    own = slice(rank, None, ranks)
    step_mask = None if whole.step_mask is None else whole.step_mask[:, own].contiguous()
    local = whole._replace(
        contents=whole.contents[:, own].contiguous(),
        summaries=whole.summaries[:, own].contiguous(),
        valid=whole.valid[:, own].contiguous(),
        step_mask=step_mask,
        first_steps=whole.first_steps[:, own].contiguous(),
        episodes=whole.episodes[:, own].contiguous(),
    )
    before = held_before(whole.next_slot, rank, ranks)
    return local._replace(next_slot=before % max(local.chunks, 1))


def next_of_all(slots: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Return the number of the chunk [B] that is written next, None where there is no such.

    Args:
        slots: [R, B] int64, the slot that each rank writes next.
        sizes: how many chunks each rank holds, by rank: dealt out in turn, at least one a rank.
    """
    # The ring stands where every rank has been dealt as many chunks as it says: at one of the R
    # numbers after the one that was rank 0's last. All full with one chunk each says nothing; then
    # the first.
    ranks, total = len(sizes), sum(sizes)
    first = (slots[0] - 1) % sizes[0] * ranks + 1
    number = (first[:, None] + torch.arange(ranks, device=first.device)) % total
    every = torch.arange(ranks, device=first.device)[:, None, None]
    before = held_before(number, every, ranks)
    fits = (before % torch.tensor(sizes, device=first.device)[:, None, None]) == slots[..., None]
    number = number.masked_fill(~fits.all(0), total).amin(1)
    return number if bool((number < total).all()) else None


def own_spans(
    local: ScoredHome | ExactHome,
    chunks: Sequence[int],
    row: int,
    rank: int,
    ranks: int,
    with_newest: bool,
) -> dict[str, list[Any]]:
    """Return what a rank knows of the chunks that all ranks are asked for, as JSON can say it.

    `with_newest`: also where the steps end that it holds before each of them.
    """
    own = {chunk // ranks for chunk in chunks if chunk % ranks == rank}
    valid = local.valid[row]
    held = {number for number in own if number < local.chunks and valid[number]}
    # The chunks of this rank that come before each.
    before = [min(len(range(rank, chunk, ranks)), local.chunks) for chunk in chunks]
    newest = {number - 1 for number in before if number} if with_newest else set()
    asked = torch.tensor(sorted(held | newest), dtype=torch.int64, device="cpu")
    spans = {span.chunk: span for span in local.spans(asked, row)}
    until = {number + 1: span.first_step + span.count for number, span in spans.items()}
    return {
        "missing": [number * ranks + rank for number in own - held],
        "spans": [spans[number]._replace(chunk=number * ranks + rank) for number in held],
        "before": [until.get(number, 0) for number in before],
    }


def asked(chunks: Tensor) -> dict[str, int | torch.dtype | None]:
    """Return what ranks that ask for these chunks must have alike."""
    return {
        "chunks: U": len(chunks),
        "chunks (a checksum)": zlib.crc32(repr(chunks.tolist()).encode()),
    }


def spell(sizes: tuple[int, ...]) -> str:
    """Return how many chunks ranks hold, for an error."""
    return str(list(sizes)) if len(sizes) <= 16 else f"{min(sizes)} to {max(sizes)}"
