"""`Ring`: the closed chunks of a memory, and how they are written, with and without a copy."""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.memory.codes import MOST_DIM, Codes, RingCodes
from htm_pytorch.shapes import is_seen, is_transformed, may_look_at

CODED_NUMBERS = 2**18
"""Numbers of summaries, of all rows, from which on codes of them pay; see docs/performance.md."""
CODED_KEPT = 2**13
"""Numbers of a row's summaries for each chunk that a query keeps, from which on they do."""

CODED_WRITTEN = 2**21
"""Numbers of summaries times steps of a chunk, of all rows, from which on codes of a ring pay that
is written to: those of a stretch are found anew each time that a chunk closes."""
CODED_STEPS = 2**10
"""Steps of a row from which on they do."""
CODED_AFTER = 4
"""How often summaries are scored before they are coded, which takes as long as some reads."""

_mutex = threading.RLock()


def _renew() -> None:
    """Make a new lock in a forked child, where the thread that held the old one is not."""
    global _mutex
    _mutex = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def alone() -> contextlib.AbstractContextManager[Any]:
    """Where chunks are written, or lent to be read: one thread at a time."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _mutex


def ages(next_slot: Tensor, slots: Tensor, room: int) -> Tensor:
    """Return how many chunks of a ring are newer than those at the slots [M], [B, M] int64.

    `next_slot` [B] is the one that is written next, of `room` slots.
    """
    return (next_slot[:, None] - 1 - slots) % max(room, 1)


class Slots(NamedTuple):
    """What M slots hold; or X chunks that are written to some of them."""

    contents: Tensor  # [B, M, C, D]
    summaries: Tensor  # [B, M, D]
    step_mask: Tensor | None  # [B, M, C]
    first_steps: Tensor  # [B, M]
    episodes: Tensor  # [B, M]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Slots":
        """Return what `function` makes of each part that there is."""
        return Slots(*(None if part is None else function(part) for part in self))  # pyright: ignore[reportArgumentType]

    def beside(self, others: "Slots", function: Callable[[Tensor, Tensor], Tensor]) -> "Slots":
        """Return what `function` makes of each part and that of the others."""
        pairs = zip(self, others, strict=True)
        made = (None if a is None or b is None else function(a, b) for a, b in pairs)
        return Slots(*made)  # pyright: ignore[reportArgumentType]


def copied(part: Tensor) -> Tensor:
    """Return a copy that shares nothing, laid out plainly."""
    return part.clone(memory_format=torch.contiguous_format)


class Ring:
    """The slots of closed chunks: a value, though writing costs what is written, not what is held.

    Chunks are written where they lie. What they replace is kept by the ring as it was before,
    which puts it back, in a copy, if it is read again; it is gone with the last memory that could.
    All is copied instead where others may hold the tensors, since they gave or got them, where
    somebody is reading them at that moment, in another thread, and where gradients flow.
    """

    def __init__(
        self,
        slots: Slots,
        used: int | None = None,
        *,
        is_own: bool = False,
        is_donated: bool = False,
    ):
        self._slots: Slots | None = slots
        self.used = used
        """Slots from this one on were never written; None: nobody knows of any."""
        self.is_donated = is_donated
        """Whether it may be written where it lies, whoever has taken its tensors out since."""
        self._is_kept = False
        self._is_own = is_own
        self._head: Slots | None = None
        self._newer: tuple[Ring, Tensor, Slots] | None = None
        self._oldest: weakref.ref[Ring] | None = None
        self._replaced = 0
        self._lent: list[weakref.ref[Ring]] = []
        self._lender: Ring | None = None
        self._codes: RingCodes | None = None
        self._times_scored = 0
        self._is_given_back = False

    def lend(self, slots: Slots | None = None) -> "Ring":
        """Return what the slots hold, or these of them, as a ring that is only read.

        As long as it lives, nothing is written over what it holds, unless it is given back.
        """
        with alone():
            held = self.read()
            ring = Ring(held if slots is None else slots)
            if slots is None or slots is held or slots is self._head:
                ring._lender = self
            if not torch.compiler.is_compiling():
                lent = [other for other in self._lent if other() is not None]
                self._lent = [*lent, weakref.ref(ring)]
        return ring

    def give_back(self, ring: "Ring") -> None:
        """Say that nobody reads any more what was lent."""
        ring._lender, ring._is_given_back = None, True
        if not torch.compiler.is_compiling():
            self._lent = [other for other in self._lent if other() not in (None, ring)]

    def read(self) -> Slots:
        """Return what the slots hold, for one who keeps no part of it."""
        slots = self._slots
        if slots is None:
            with alone():
                if self._slots is None:
                    self._restore()
                slots = self._slots
                assert slots is not None
        return slots

    def donate(self) -> "Ring":
        """Return the ring for one who may write where it lies; this one is gone.

        What others may hold already is copied first.
        """
        with alone():
            held, is_free = self.read(), self._is_own and not self._is_lent() and not self._is_kept
            if not is_free or _is_inference(held):
                with torch.no_grad(), torch.inference_mode(False):
                    held = held.map(copied)
            ring = Ring(held, self.used, is_own=True, is_donated=True)
            self._give_up()
        return ring

    def with_slots(self, slots: Slots) -> "Ring":
        """Return a ring of slots of which some may be these; donated, if this one is."""
        ring = Ring(slots, is_donated=self.is_donated)
        ring.keep()
        return ring

    def keep(self) -> None:
        """Say that somebody goes on reading what the slots hold, as autograd does."""
        self.share()
        if self.is_donated:
            self._is_kept = True

    def free(self) -> None:
        """Take a copy of what somebody else goes on reading."""
        if self._is_kept:
            self._slots, self._head, self._codes = self.read().map(copied), None, None
            self._is_kept = False

    def _is_lent(self) -> bool:
        return any(other() is not None for other in self._lent)

    def _give_up(self) -> None:
        self._slots, self._head, self._codes = None, None, None

    def codes(self, k: int, queries: int) -> Codes | None:
        """Return the codes of the summaries, for so many queries a row that keep k chunks each.

        None where they do not pay, and the first times: summaries that are scored once need none.
        """
        if not is_seen() or self._is_given_back:
            return None
        with alone():
            ring = self if self._lender is None else self._lender
            slots = self._slots
            if (
                ring._slots is None
                or slots is None
                or not _may_be_coded(slots, k, queries, is_written=ring.used is not None)
            ):
                return None
            # What others hold they may write to, which nobody hears of in inference mode.
            version = None
            if not ring._is_own:
                if slots.summaries.is_inference():
                    return None
                version = slots.summaries._version
            ring._times_scored += 1
            if ring._codes is None:
                if ring._times_scored < CODED_AFTER:
                    return None
                batch, _, dim = slots.summaries.shape
                ring._codes = RingCodes(batch, ring._slots.summaries.shape[1], dim)
            return ring._codes.of(slots.summaries, version)

    def head(self, count: int | None) -> Slots:
        """Return what the first `count` slots hold, or all, for one who keeps no part of it."""
        slots = self.read()
        if count is None:
            return slots
        if self._head is None or self._head.contents.shape[1] != count:
            self._head = slots.map(lambda part: part[:, :count])
        return self._head

    def share(self) -> Slots:
        """Return what the slots hold, for anybody; whoever writes next has to copy it."""
        slots = self.read()
        if not torch.compiler.is_compiling():
            self._is_own = False
        return slots

    def write(self, at: Tensor, is_new: Tensor, chunks: Slots) -> "Ring":
        """Return the ring with `chunks` [B, X, ...] at the slots `at` [B, X] where `is_new`.

        The slots of a row differ.
        """
        with alone():
            return self._write(at, is_new, chunks)

    def _write(self, at: Tensor, is_new: Tensor, chunks: Slots) -> "Ring":
        held = self.read()
        chunks = chunks.beside(held, _like)
        if self.is_donated:
            write = self._write_over if self._may_write_over(held) else self._copy
            return write(held, at, is_new, chunks)
        if not self._may_write(held, chunks) or self._is_held_too_long(at.shape[1]):
            return self._copy(held, at, is_new, chunks)
        total, used = held.contents.shape[1], self.used
        rows = torch.arange(len(at), device=at.device)[:, None]
        places = (rows * total + at).flatten()
        new = chunks.map(lambda part: part.flatten(0, 1))
        if at.device.type == "cpu":
            chosen = is_new.flatten().nonzero()[:, 0]
            places, new = places[chosen], new.map(lambda part: part[chosen])
        replaced = held.map(lambda part: part.flatten(0, 1).index_select(0, places))
        if at.device.type == "cpu":
            used = None if used is None else max(used, _largest(places % total) + 1)
        else:
            # Nobody waits to see which are new: the others are written as they were.
            new = new.beside(replaced, lambda part, old: _choose(is_new.flatten(), part, old))
            used = None
        _put(held, places, new)
        newer = Ring(held, used, is_own=True)
        newer._oldest, newer._replaced = self._oldest, self._replaced + at.shape[1]
        newer._times_scored, newer._codes, self._codes = self._times_scored, self._codes, None
        if newer._codes is not None:
            newer._codes.forget(places // total, places % total)
        self._slots, self._head, self._newer = None, None, (newer, places, replaced)
        return newer

    def _write_over(self, held: Slots, at: Tensor, is_new: Tensor, chunks: Slots) -> "Ring":
        rows = torch.arange(len(at), device=at.device)[:, None]

        def put(old: Tensor, new: Tensor) -> Tensor:
            # With no view between, a compiler sees that nothing has to be copied.
            return old.index_put_((rows, at), _choose(is_new, new, old[rows, at]))

        is_own = not torch.compiler.is_compiling()
        newer = Ring(
            held.beside(chunks, put), self._used_after(at, is_new), is_own=is_own, is_donated=True
        )
        if is_own and self._is_own and self._codes is not None:
            self._codes.forget(rows.expand_as(at).flatten(), at.flatten())
            newer._codes = self._codes
        newer._times_scored = self._times_scored
        self._give_up()
        return newer

    def _copy(self, held: Slots, at: Tensor, is_new: Tensor, chunks: Slots) -> "Ring":
        def put(old: Tensor, new: Tensor) -> Tensor:
            index = at.view(*at.shape, *(1,) * (old.ndim - 2)).expand(-1, -1, *old.shape[2:])
            return old.scatter(1, index, _choose(is_new, new, old.gather(1, index)))

        used, is_own = self._used_after(at, is_new), not torch.compiler.is_compiling()
        return Ring(held.beside(chunks, put), used, is_own=is_own, is_donated=self.is_donated)

    def _used_after(self, at: Tensor, is_new: Tensor) -> int | None:
        # A compiler must not look at a number that changes: it would compile again.
        if not may_look_at(at) or self.used is None:
            return None
        return max(self.used, _largest(at.masked_fill(~is_new, -1)) + 1)

    def _may_write_over(self, held: Slots) -> bool:
        if self._is_kept or torch.is_grad_enabled() or is_transformed():
            return False
        if not torch.compiler.is_compiling() and self._is_lent():
            return False
        return _is_writable(held)

    def _may_write(self, held: Slots, chunks: Slots) -> bool:
        if not (is_seen() and self._is_own):
            return False
        if self._is_lent() or not _is_writable(held):
            return False
        parts = (held.contents, held.summaries, chunks.contents, chunks.summaries)
        return not any(part.requires_grad for part in parts)

    def _is_held_too_long(self, more: int) -> bool:
        """Whether somebody holds a ring so old that what was replaced since fills another."""
        if self._slots is None:
            return False
        if self._oldest is None or self._replaced + more > self._slots.contents.shape[1]:
            if self._oldest is not None and self._oldest() is not None:
                return True
            self._oldest, self._replaced = weakref.ref[Ring](self), 0
        return False

    def _restore(self) -> None:
        replaced: list[tuple[Tensor, Slots]] = []
        ring: Ring = self
        while ring._newer is not None:
            ring, places, before = ring._newer
            replaced.append((places, before))
        if ring._slots is None:
            raise RuntimeError(
                "this memory was donated, or one that was written where it lay, and is gone: go "
                "on with what donate() or the next call returned, or copy it before (select_rows, "
                "of a state select)"
            )
        with torch.no_grad(), torch.inference_mode(False):
            slots = ring._slots.map(copied)
            for places, before in reversed(replaced):
                _put(slots, places, before)
        self._slots, self._newer, self._is_own = slots, None, True
        self._oldest, self._replaced = None, 0


def _may_be_coded(slots: Slots, k: int, queries: int, *, is_written: bool) -> bool:
    summaries, size = slots.summaries, slots.contents.shape[2]
    batch, chunks, dim = summaries.shape
    numbers = batch * chunks * dim
    # One query waits for what is read, many for arithmetic, of which each look costs more.
    harder = 1 if queries == 1 else 4 if queries < 32 else 8
    return (
        kernels.IS_AVAILABLE
        and numbers >= CODED_NUMBERS
        and chunks * dim >= CODED_KEPT * k * harder
        and (not is_written or numbers * size >= CODED_WRITTEN)
        and (not is_written or chunks * size >= CODED_STEPS)
        and dim <= MOST_DIM
        and summaries.device.type == "cpu"
        and summaries.dtype in kernels.STORED[torch.float32]
        and summaries.stride(2) == 1
    )


def _is_writable(held: Slots) -> bool:
    if _is_inference(held) and not torch.is_inference_mode_enabled():
        return False
    return all(part is None or part.is_contiguous() for part in held)


def _is_inference(held: Slots) -> bool:
    """Whether it was made in inference mode; a compiler cannot ask."""
    return not torch.compiler.is_compiling() and held.contents.is_inference()


def _put(slots: Slots, places: Tensor, chunks: Slots) -> None:
    """Write `chunks` [X, ...] at the `places` [X] among the slots of all rows."""
    for part, new in zip(slots, chunks, strict=True):
        if part is not None and new is not None:
            part.flatten(0, 1).index_copy_(0, places, new)


def _like(new: Tensor, old: Tensor) -> Tensor:
    return new if new.dtype == old.dtype else new.to(old.dtype)


def _choose(is_new: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return new.where(is_new.view(*is_new.shape, *(1,) * (new.ndim - is_new.ndim)), old)


def _largest(slots: Tensor) -> int:
    return int(slots.max()) if slots.numel() else -1
