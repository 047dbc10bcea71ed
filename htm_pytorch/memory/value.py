"""`Value`: the parts of a memory in RAM, as one value, and what is written of them."""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from htm_pytorch.memory.fields import AXES
from htm_pytorch.memory.reach import Reach
from htm_pytorch.memory.ring import Ring, Slots, ages


@dataclass(frozen=True, eq=False, repr=False)
class Value:
    """The parts of a `ChunkedMemory`; see there."""

    _ring: Ring
    valid: Tensor
    """[B, M] bool, the chunks that can be recalled."""
    open_steps: Tensor
    """[B, C, D] steps of the chunk that is still open, oldest first, then zeros; or [B, 0, D],
    where the past was given whole and nothing can be appended."""
    open_count: Tensor
    """[B] int64, how many steps the open chunk holds."""
    next_slot: Tensor
    """[B] int64, the slot that the next closed chunk takes."""
    step_count: Tensor
    """[B] int64, how many steps the row was given, those that were dropped or forgotten too."""
    episode: Tensor
    """[B] int64, the episode of the newest step, counted from 0; -1 before the first step."""
    keep_across_episodes: bool = False
    """Whether chunks of earlier episodes stay visible after `is_first`."""
    _is_reach: bool = False
    """Whether it holds what the steps of a call could recall, and is only read."""

    @property
    def contents(self) -> Tensor:
        """[B, M, C, D] steps of the closed chunks; what lies in invalid chunks is never read."""
        return self._ring.share().contents

    @property
    def summaries(self) -> Tensor:
        """[B, M, D], each the mean of a chunk's valid steps."""
        return self._ring.share().summaries

    @property
    def step_mask(self) -> Tensor | None:
        """[B, M, C] bool, the steps that can be recalled; None: every step of a valid chunk."""
        return self._ring.share().step_mask

    @property
    def first_steps(self) -> Tensor:
        """[B, M] int64, the number of each chunk's first step; says nothing of invalid chunks."""
        return self._ring.share().first_steps

    @property
    def episodes(self) -> Tensor:
        """[B, M] int64, the episode of each chunk; says nothing of invalid chunks."""
        return self._ring.share().episodes

    @property
    def ages(self) -> Tensor:
        """[B, M] int64, how many chunks of the ring are newer than each.

        Raises:
            ValueError: it is of `unroll`, where that differs from step to step.
        """
        if self._is_reach:
            raise ValueError(
                "ages: expected to be given beside what the steps of a call could recall, as they "
                "differ from step to step; HTMTransformer does that, or take recency=False"
            )
        slots = torch.arange(self.chunks, device=self.device)
        return ages(self.next_slot, slots, self.chunks)

    @property
    def batch(self) -> int:
        """B, how many rows the memory has."""
        return self.valid.shape[0]

    @property
    def chunks(self) -> int:
        """M, how many closed chunks a row has room for."""
        return self.valid.shape[1]

    @property
    def chunk_size(self) -> int:
        """C, how many steps a chunk has room for."""
        return self._ring.read().contents.shape[2]

    @property
    def dim(self) -> int:
        """D, how many numbers a step has."""
        return self.open_steps.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that steps are stored in."""
        return self.open_steps.dtype

    @property
    def device(self) -> torch.device:
        """The device that all parts lie on."""
        return self.valid.device

    def __repr__(self) -> str:
        """Name the sizes, not the numbers."""
        try:
            sizes = f"batch={self.batch}, chunks={self.chunks}, chunk_size={self.chunk_size}"
        except RuntimeError:
            return f"{type(self).__name__}(given up)"
        kind = f"dim={self.dim}, dtype={self.dtype}, device={self.device}"
        return f"{type(self).__name__}({sizes}, {kind})"

    def _replace(self, **changes: Any) -> Self:
        """Return the memory with other parts, by name; they are not looked at."""
        if not set(changes) & {"contents", "summaries", "step_mask", "first_steps", "episodes"}:
            return self._changed(**changes)
        keep = changes.pop("keep_across_episodes", self.keep_across_episodes)
        parts = self._tensors() | changes
        return self._of({name: part for name, part in parts.items() if part is not None}, keep)

    def _changed(self, **changes: Any) -> Self:
        kept = {name: changes.get(name, getattr(self, name)) for name in _FIELDS}
        return type(self)(**kept)

    @classmethod
    def _of(cls, parts: dict[str, Any], keep: bool) -> Self:
        """Return the memory of these parts, which need not be tensors in a tree of others."""
        slots = Slots(*(parts.get(name) for name in Slots._fields))  # pyright: ignore[reportArgumentType]
        others = {name: parts[name] for name in AXES if name not in Slots._fields}
        return cls(Ring(slots), **others, keep_across_episodes=keep)

    def _tensors(self, slots: Slots | None = None) -> dict[str, Tensor]:
        """Return all parts by name; `slots` are the ring's, where nobody keeps them."""
        held = (self._ring.share() if slots is None else slots)._asdict()
        every = {name: held[name] if name in held else getattr(self, name) for name in AXES}
        return {name: part for name, part in every.items() if part is not None}

    def __copy__(self) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self._tensors(), "keep_across_episodes": self.keep_across_episodes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        other = self._of(state["parts"], state["keep_across_episodes"])
        for name in _FIELDS:
            object.__setattr__(self, name, getattr(other, name))

    def reading(self) -> Self:
        """Return the memory for one who reads it and keeps none of its tensors.

        Its chunks are not shared by that: the next step may be written where they lie. Where
        gradients flow, tensors are kept for the way back, and it is the memory itself.
        """
        if torch.is_grad_enabled() and self._ring.is_donated:
            self._ring.keep()
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self
        return self._changed(_ring=self._ring.lend())

    def _reading(self, found: Reach) -> Self:
        """Return the chunks within reach as a memory that is read."""
        return self._changed(_ring=self._ring.lend(found.slots), valid=found.valid, _is_reach=True)


_FIELDS = tuple(field.name for field in fields(Value))
