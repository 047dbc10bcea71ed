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
        self._mutex = threading.Lock()

    @property
    def nbytes(self) -> int:
        """How many bytes the chunks take that are here."""
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
            for step in place_of.keys() & self._slot_of.keys():
                self._slot_of.move_to_end(step)
            new = new[-self.slots :]
            slots: list[int] = []
            for _ in new:
                if not self._free and len(self._slot_of) + len(slots) < self.slots:
                    # The first ones, or those that an interrupt made others lose.
                    used = {*self._slot_of.values(), *slots}
                    self._free = [slot for slot in range(self.slots) if slot not in used]
                slots.append(self._free.pop() if self._free else self._slot_of.popitem(False)[1])
            self._steps[slots] = steps[[place for _, place in new]]
            # Published only when they are filled.
            self._slot_of.update(zip((step for step, _ in new), slots, strict=True))
