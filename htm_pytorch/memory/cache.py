"""The chunks of a stored memory that were used last."""

from collections import OrderedDict

import torch
from torch import Tensor

from htm_pytorch.memory.table import Format


class ChunkCache:
    """Decoded chunks of a table, by their numbers; those that were not used for longest go."""

    def __init__(self, form: Format, slots: int):
        self.slots = slots
        self._steps = torch.empty(slots, form.chunk_size, form.dim, dtype=form.given)
        self._slot_of: OrderedDict[int, int] = OrderedDict()

    def read(self, numbers: list[int], out: Tensor) -> list[int]:
        """Copy these chunks to `out`; return the places of those that are not here."""
        places = [place for place, number in enumerate(numbers) if number in self._slot_of]
        slots = [self._slot_of[numbers[place]] for place in places]
        for place in places:
            self._slot_of.move_to_end(numbers[place])
        if len(places) == len(numbers):
            torch.index_select(self._steps, 0, torch.tensor(slots, dtype=torch.int64), out=out)
            return []
        if places:
            out[places] = self._steps[slots]
        return [place for place, number in enumerate(numbers) if number not in self._slot_of]

    def write(self, numbers: list[int], steps: Tensor) -> None:
        """Keep chunks that are not here, instead of those that were not used for longest."""
        if not self.slots:
            return
        # Two slots for one chunk would leave one of them to be given to another chunk as well.
        place_of = {number: place for place, number in enumerate(numbers)}
        kept = list(place_of.items())[-self.slots :]
        slots: list[int] = []
        for number, _ in kept:
            full = len(self._slot_of) == self.slots
            slot = self._slot_of.popitem(last=False)[1] if full else len(self._slot_of)
            self._slot_of[number] = slot
            slots.append(slot)
        self._steps[slots] = steps[[place for _, place in kept]]
