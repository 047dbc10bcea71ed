"""The chunks of a stored memory that were used last."""

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from htm_pytorch.memory.formats import CPU, Format


class ChunkCache:
    """Decoded chunks by the numbers of their first steps; those not used for longest go.

    Several threads may read and write it.
    """

    def __init__(self, form: Format, slots: int):
        self.slots = slots
        sizes = slots, form.chunk_size, form.dim
        self._steps = torch.empty(sizes, dtype=form.given, device=CPU)
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        self._free: list[int] = []
        self._begun = 0
        self._mutex = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of the chunks that are here."""
        return len(self._slot_of) * self._steps[:1].nbytes

    def read(self, first_steps: list[int], out: Tensor) -> list[int]:
        """Copy these chunks to `out`; return the places of those that are not here."""
        with self._mutex:
            slots: list[int] = []
            places: list[int] = []
            for place, first_step in enumerate(first_steps):
                slot = self._slot_of.get(first_step)
                if slot is not None:
                    self._slot_of.move_to_end(first_step)
                    slots.append(slot)
                    places.append(place)
            if len(places) == len(first_steps):
                index = torch.tensor(slots, dtype=torch.int64, device=CPU)
                torch.index_select(self._steps, 0, index, out=out)
                return []
            if places:
                out[places] = self._steps[slots]
        here = set(places)
        return [place for place in range(len(first_steps)) if place not in here]

    def write(self, first_steps: list[int], steps: Tensor) -> None:
        """Keep chunks that are not here, instead of those that were not used for longest."""
        if not self.slots:
            return
        place_of = {first_step: place for place, first_step in enumerate(first_steps)}
        with self._mutex:
            # Two slots for one chunk would leave one of them to be given to another chunk as well;
            # and another thread may have fetched it meanwhile.
            new = [(step, p) for step, p in place_of.items() if step not in self._slot_of]
            new = new[-self.slots :]
            slots: list[int] = []
            try:
                for _ in new:
                    if self._free:
                        slots.append(self._free.pop())
                    elif self._begun < self.slots:
                        # An interrupt between the two may lose a slot, but not give it twice.
                        self._begun += 1
                        slots.append(self._begun - 1)
                    else:
                        slots.append(self._slot_of.popitem(last=False)[1])
                self._steps[slots] = steps[[place for _, place in new]]
                # Published only when they are filled.
                self._slot_of.update(zip((step for step, _ in new), slots, strict=True))
            except BaseException:
                self._free += set(slots) - set(self._slot_of.values())
                raise
