"""What can still be read of many memories in one file, as logs of a new file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from htm_pytorch.memory import carved
from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.formats import Format
from htm_pytorch.memory.log import Contents, Head, Range, Record, merged, missing, new_generation
from htm_pytorch.memory.log_file import says_many
from htm_pytorch.memory.open_chunk import Batch
from htm_pytorch.memory.salvage_log import salvaged_rows


def is_of_many(path: Path) -> bool:
    """Whether a file is one of many memories, as far as that can still be told."""
    if not path.is_file():
        return False
    said = says_many(path)
    return any(name for name, _ in carved.blobs(path.read_bytes())) if said is None else said


class Rebuilt(NamedTuple):
    """What was made of a file."""

    logs: dict[str, Contents]
    """Of all memories, by name."""
    lost: dict[str, tuple[Range, ...]]
    """Which steps are lost, of those that lost some."""
    headless: tuple[str, ...]
    """Those whose heads are lost, which alone say how many steps there were."""


def rebuilt(path: Path) -> Rebuilt:
    """Return what can be made of a file.

    Raises:
        MemoryFileError: no head can be read, which alone says what they hold.
    """
    found = salvaged_rows(path, is_of_many=True)
    forms = [one.head.form for rows in found.values() for one in rows.heads + rows.carved_heads]
    if not forms:
        raise MemoryFileError(
            f"{str(path)!r}: nothing in it says what its memories hold; nothing of it can be read, "
            "and nothing was deleted"
        )
    logs: dict[str, Contents] = {"": Contents(Head.first(forms[0]), [])}
    lost: dict[str, tuple[Range, ...]] = {}
    headless: list[str] = []
    for name, rows in sorted(found.items()):
        if name:
            head, _, records = rows.newest(name)
            if head is None:
                headless.append(name)
            logs[name], gone = _rebuilt_one(head, records, forms[0])
            lost |= {name: gone} if gone else {}
    return Rebuilt(logs, lost, tuple(headless))


def _rebuilt_one(
    before: Head | None, records: Sequence[Record], form: Format
) -> tuple[Contents, tuple[Range, ...]]:
    head = before if before is not None else Head.first(form)
    kept: list[Record] = []
    held: list[Range] = []
    at, episode, time = 0, head.episode, head.time
    for record in records:
        whole = Batch.of([record], form)
        batch = whole.since(at)
        first, last = batch.first_step, batch.first_step + len(batch.stored)
        # What is forgotten may have left a copy where nothing leads to.
        if first >= last or any(start <= first and last <= end for start, end in head.forgotten):
            continue
        kept.append(record if batch is whole else batch.record()._replace(closes=record.closes))
        held.append((first, last))
        at = last
        episode = max(episode, batch.episode + sum(border > 0 for border in batch.borders))
        if not torch.isnan(batch.times[-1]):
            time = max(float(batch.times[-1]), float("-inf") if time is None else time)
    steps = max(head.steps, at)
    lost = tuple(missing([*held, *head.gaps], steps))
    if kept and at != steps:
        # What comes next does not follow.
        kept[-1] = kept[-1]._replace(closes=True)
    after = head._replace(
        generation=new_generation(),
        sequence=head.sequence + 1,
        steps=steps,
        episode=episode,
        time=time,
        lost=merged((*head.lost, *lost)),
    )
    return Contents(after, kept), lost
