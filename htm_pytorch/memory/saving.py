"""A copy of a stored memory in a folder, as of one moment."""

import os
import shutil
from pathlib import Path

from htm_pytorch.memory import answers, entries
from htm_pytorch.memory.files import sync_folder
from htm_pytorch.memory.log import Contents
from htm_pytorch.memory.log_file import LogFile
from htm_pytorch.memory.place import Place, mark
from htm_pytorch.memory.state import State
from htm_pytorch.memory.versions import Versions

COPY_BYTES = 64 * 2**20
"""How many bytes of contents are copied at a time."""


def save(now: State, target: Path) -> None:
    """Write a copy of a memory to a folder that is not there yet; it is there whole or not."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    versions = Versions(Place(str(partial), partial, None), sync=True)
    form, table = now.head.form, None
    head = now.head._replace(table=None, purge=False)
    piece = max(1, COPY_BYTES // form.chunk_bytes)
    for start in range(0, now.in_table, piece):
        chunks = answers.whole(now, start, min(start + piece, now.in_table))
        table = versions.append(table, head, chunks)
    head = head._replace(table=table and table.pinned)
    records = entries.records_of(now.unflushed.chunks) + now.open_chunk.records()
    logs = {"": Contents(head, records, table.pin if table else None)}
    LogFile.create(partial / "journal", logs).close()
    mark(partial, sync=True)
    os.rename(partial, target)
    sync_folder(target.parent)
