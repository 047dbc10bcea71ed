"""`Versions`: all versions of the table of a stored memory; its writer makes new ones.

Every change makes a new version. Which one counts is said by the log: a version that it does not
name never was.
"""

import datetime
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.memory import index, pins
from htm_pytorch.memory.files import MemoryFileError, sync_folder
from htm_pytorch.memory.formats import CPU, Chunks, Format
from htm_pytorch.memory.lance_access import is_damage, loaded_lance, reading, writing
from htm_pytorch.memory.log import Head, Pin, Pinned, Range
from htm_pytorch.memory.object_store import Objects
from htm_pytorch.memory.place import Place
from htm_pytorch.memory.rows import encoded, facts_of, form_of, joined, schema
from htm_pytorch.memory.table import Table, synced

FRAGMENT_BYTES = 256 * 2**20
"""About how many bytes of contents a fragment has after `compact`."""
SMALL_BYTES = 32 * 2**20
"""A fragment of fewer bytes is joined with others when there are `MOST_SMALL` such."""
MOST_SMALL = 32
_FOLDER = "chunks.lance"
_KEEP = datetime.timedelta(hours=1)
"""Files that are no longer needed stay so long, for readers that have not refreshed."""
_MOST_VERSIONS = 64
"""Of more versions than that no files stay, however new they are."""


class Versions:
    """All versions of a table, in a folder or an object store; the writer makes new ones."""

    def __init__(self, place: Place, sync: bool):
        self.uri = f"{place.uri}/{_FOLDER}"
        self._options = place.storage_options
        self._folder = None if place.folder is None else place.folder / _FOLDER
        self._objects = None
        if place.folder is None:
            self._objects = Objects(place.uri, place.storage_options)
        self._sync = sync
        # Of none is it known at first: whoever wrote before may not have waited for the disk.
        self._synced: set[str] = set()
        self._right: set[str] = set()
        """Files of an index that were compared with their checksums."""

    @property
    def exists(self) -> bool:
        """Whether there is any version."""
        if self._folder is not None:
            return self._folder.exists()
        try:
            loaded_lance().dataset(self.uri, storage_options=self._options)
        except (ValueError, OSError) as error:
            if "not found" in str(error).lower():
                return False
            raise
        return True

    def open(
        self,
        head: Head,
        pin: Pin | None,
        end_of: Callable[[str], bytes | None] | None,
        with_index: bool,
    ) -> Table:
        """Open the version that a head names, and compare it with what the log keeps of it.

        `end_of` gives what the log keeps of the ends of files, to put right those that are damaged;
        None: nothing is changed. An index is compared where it is used.

        Raises:
            MemoryFileError: it is damaged, or no longer there.
        """
        pinned = head.table
        assert pinned is not None
        if self._folder is not None and pin is not None:
            pins.check(self._folder, pinned.version, pin, end_of)
        damaged = self.damaged_indices(pin, anew=False) if with_index else ()
        if damaged:
            raise MemoryFileError(damaged[0])
        with reading(f"version {pinned.version} of {self.uri!r}"):
            dataset = loaded_lance().dataset(
                self.uri, version=pinned.version, storage_options=self._options
            )
            rows = dataset.count_rows()
        generation = facts_of(dataset).get("generation", "")
        if (generation, rows) != (head.generation, pinned.rows):
            raise MemoryFileError(
                f"{self.uri!r} holds {rows} chunks of {generation!r}, expected {pinned.rows} of "
                f"{head.generation!r}: it is not the table of this memory"
            )
        return Table(dataset, head.form, pinned, pin)

    def damaged_indices(self, pin: Pin | None, *, anew: bool = True) -> list[str]:
        """Say which files of an index are damaged; without `anew`, of those not yet found right."""
        if self._folder is None or pin is None:
            return []
        return pins.damaged_indices(self._folder, pin, set() if anew else self._right)

    def newest(self) -> tuple[Table, dict[str, str]]:
        """Return the newest version, and what it says of itself.

        Raises:
            MemoryFileError: it cannot be read, or is of another program.
        """
        with reading(repr(self.uri)):
            dataset = loaded_lance().dataset(self.uri, storage_options=self._options)
            facts = facts_of(dataset)
        try:
            form = form_of(facts)
            if facts["htm_pytorch"] not in ("1", "2"):
                raise ValueError(f"format {facts['htm_pytorch']!r}")
        except (KeyError, ValueError, AttributeError) as error:
            raise MemoryFileError(
                f"{self.uri!r} is not the table of a memory of this format ({error!r})"
            ) from error
        with reading(repr(self.uri)):
            numbers = dataset.to_table(columns=["first_step", "steps"])
            first = joined(numbers["first_step"], torch.int64)
            ends = first + joined(numbers["steps"], torch.int32)
        end, rows = int(ends.max()) if len(ends) else 0, len(ends)
        pinned = Pinned(dataset.version, end, rows, 0, rows)
        return Table(dataset, form, pinned, None), facts

    def readable(self, wanted: int | None) -> Any:
        """Return the engine's table of version `wanted`, or of the newest that can be read."""
        assert self._folder is not None
        manifests = (self._folder / "_versions").glob("*.manifest")
        found = sorted(filter(None, map(pins.version_of, manifests)), reverse=True)
        for version in [wanted, *found] if wanted is not None else found:
            try:
                dataset = loaded_lance().dataset(self.uri, version=version)
                dataset.count_rows()
                return dataset
            except BaseException as error:
                if not is_damage(error):
                    raise
        return None

    def widen(self, base: Table) -> Table:
        """Return the version of a table of format 1 with the columns of today's, empty."""
        import pyarrow as pa

        columns = schema(base.form)
        with writing(self.uri):
            dataset = self._on_top(base)
            new = [columns.field(n) for n in columns.names if n not in dataset.schema.names]
            if new:
                dataset.add_columns(pa.schema(new))
            dataset.update_schema_metadata({"htm_pytorch": "2"})
        pinned = base.pinned._replace(version=dataset.version)
        return self._done(dataset, base.form, pinned, None, None)

    def append(self, base: Table | None, head: Head, chunks: Chunks) -> Table:
        """Return the version that has the chunks of `base` and, behind them, new ones.

        Raises:
            OSError: it cannot be written; then there is none.
            ValueError: the new ones do not come after the others.
        """
        import pyarrow as pa

        form = head.form
        end = base.pinned.end if base else 0
        ends = [end, *(chunks.first_steps + chunks.counts).tolist()]
        if any(
            first < last for first, last in zip(chunks.first_steps.tolist(), ends, strict=False)
        ):
            raise ValueError("chunks: expected them in the order of their steps")
        reader = pa.RecordBatchReader.from_batches(
            schema(form, head.generation), encoded(chunks, form, head.generation)
        )
        with writing(self.uri):
            if base is None:
                self._set_all_aside()
                mode = "overwrite" if self.exists else "create"
                dataset = loaded_lance().write_dataset(
                    reader, self.uri, mode=mode, storage_options=self._options
                )
            else:
                dataset = self._on_top(base)
                dataset.insert(reader, mode="append")
        rows = base.pinned.rows if base else 0
        order = None
        if base is not None and base.order is not None:
            order = torch.cat([base.order, torch.arange(rows, rows + chunks.length, device=CPU)])
        layout = base.pinned.layout if base else 0
        unchecked = base.pinned.unchecked if base else 0
        pinned = Pinned(dataset.version, ends[-1], rows + chunks.length, layout, unchecked)
        return self._done(dataset, form, pinned, base, order)

    def build_index(self, base: Table) -> Table:
        """Return the version with an index of the summaries, instead of the one there was."""
        return self._indexed(base, lambda dataset: index.build(dataset, base.form.dim))

    def is_scattered(self, base: Table) -> bool:
        """Whether there are so many small fragments that they are better joined."""
        fragments = base.dataset.get_fragments()
        if len(fragments) < MOST_SMALL:
            return False
        small = max(2, SMALL_BYTES // base.form.chunk_bytes)
        return sum(fragment.count_rows() < small for fragment in fragments) >= MOST_SMALL

    def join(self, base: Table, fragment_bytes: int) -> Table:
        """Return the version with fragments of about that size, without rows that were deleted."""
        rows = max(2, fragment_bytes // base.form.chunk_bytes)
        base = self._without_damaged_index(base)
        with writing(self.uri):
            dataset = self._on_top(base)
            dataset.optimize.compact_files(
                target_rows_per_fragment=rows, materialize_deletions_threshold=0.0
            )
        pinned = base.pinned._replace(version=dataset.version, layout=base.pinned.layout + 1)
        return self._done(dataset, base.form, pinned, base, None)

    def drop_index(self, base: Table) -> Table:
        """Return the version without an index."""
        return self._indexed(base, index.drop)

    def extend_index(self, base: Table) -> Table:
        """Return the version whose index has all chunks, where there is an index."""
        return self._indexed(self._without_damaged_index(base), index.add_missing)

    def _without_damaged_index(self, base: Table) -> Table:
        """Return the version without its index, where that is damaged: the engine would read it."""
        damaged = self.damaged_indices(base.pin, anew=False)
        if not damaged:
            return base
        warnings.warn(f"{self.uri!r}: {damaged[0]}; this one is dropped", stacklevel=2)
        return self.drop_index(base)

    def _indexed(self, base: Table, change: Callable[[Any], Any]) -> Table:
        """Return the version with the same rows and another index."""
        with writing(self.uri):
            dataset = change(self._on_top(base))
        pinned = base.pinned._replace(version=dataset.version)
        return self._done(dataset, base.form, pinned, base, base.order)

    def without(
        self, base: Table, gaps: Sequence[Range], instead: Chunks, generation: str
    ) -> Table:
        """Return the version without the chunks that begin in `gaps`, and with others `instead`.

        The others are what is left of some of them; they lie behind all rows.
        """
        import pyarrow as pa

        conditions = [f"(first_step >= {start} AND first_step < {end})" for start, end in gaps]
        reader = pa.RecordBatchReader.from_batches(
            schema(base.form, generation), encoded(instead, base.form, generation)
        )
        with writing(self.uri):
            dataset = self._on_top(base)
            if conditions:
                dataset.delete(" OR ".join(conditions))
            if instead.length:
                dataset.insert(reader, mode="append")
            rows, unchecked = dataset.count_rows(), dataset.count_rows("numbers IS NULL")
        pinned = Pinned(dataset.version, base.pinned.end, rows, base.pinned.layout + 1, unchecked)
        return self._done(dataset, base.form, pinned, base, None)

    def is_indexed(self, base: Table) -> bool:
        """Whether there is an index."""
        return index.exists(base.dataset)

    def clean(self, base: Table | None, everything: bool, others: Sequence[str] = ()) -> None:
        """Delete files that are not needed: for an hour, or, `everything`, at all.

        In an object store, where another writer may have begun, those that `others` gave.
        """
        if everything and self._objects is not None:
            self._objects.delete(others)
            return
        if not self.exists:
            return
        dataset = loaded_lance().dataset(self.uri, storage_options=self._options)
        if base is not None and dataset.version != base.pinned.version:
            dataset = self._on_top(base)
        with writing(self.uri):
            if everything:
                now = datetime.timedelta(0)
                dataset.cleanup_old_versions(older_than=now, delete_unverified=True)
                self._sync_folders()
            else:
                dataset.cleanup_old_versions(older_than=_KEEP)
                dataset.cleanup_old_versions(retain_versions=_MOST_VERSIONS)

    def _sync_folders(self) -> None:
        """Wait until the disk knows that files are gone, before the log says that they are."""
        if self._folder is not None and self._sync:
            for root, _, _ in os.walk(self._folder):
                sync_folder(Path(root))

    def others(self, base: Table | None) -> list[str]:
        """Return the objects, in an object store, that a version does not need.

        They may be deleted when a log that was written after this names that version: whoever else
        has begun to use one of them can write to that log no more.
        """
        if self._objects is None:
            return []
        return [f"{_FOLDER}/{name}" for name in self._unneeded(base)]

    def to_compact(self, base: Table | None) -> dict[str, int]:
        """Return what there is to be joined, added to the index and, some time, deleted."""
        joined = unindexed = 0
        if base is not None:
            from lance.optimize import Compaction

            rows = max(2, FRAGMENT_BYTES // base.form.chunk_bytes)
            options: Any = {"target_rows_per_fragment": rows, "materialize_deletions_threshold": 0}
            with reading(repr(self.uri)):
                plan = Compaction.plan(base.dataset, options)
                joined = sum(len(task.fragments) for task in plan.tasks)
            if self.is_indexed(base):
                unindexed = base.length - base.info()["chunks in the index"]
        return {
            "fragments to be joined": joined,
            "chunks to be added to the index": unindexed,
            "bytes that no reader of now needs": sum(self._unneeded(base).values()),
        }

    def _unneeded(self, base: Table | None) -> dict[str, int]:
        """Return the files, by their places in the table, that a version does not need."""
        needed = () if base is None else base.needs()
        return {name: size for name, size in self._sizes().items() if not name.startswith(needed)}

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of all files, by their places in the table."""
        if self._objects is not None:
            found = self._objects.sizes(_FOLDER)
            return {name.removeprefix(f"{_FOLDER}/"): size for name, size in found.items()}
        assert self._folder is not None
        return {name: pins.size(self._folder / name) for name in pins.files(self._folder)}

    def empty(self, head: Head) -> None:
        """Make a version without chunks, so that the files of all others can be deleted."""
        if self._folder is not None and self.exists:
            table = schema(head.form, head.generation).empty_table()
            with writing(self.uri):
                self._set_all_aside()
                loaded_lance().write_dataset(
                    table, self.uri, mode="overwrite", storage_options=self._options
                )

    def size(self) -> int:
        """Return the bytes of all files, also of those that are no longer needed."""
        return sum(self._sizes().values())

    def _on_top(self, base: Table) -> Any:
        """Return the engine's table at this version, which is made the newest one again.

        There are newer ones where a call did not end, or where another writer was at work.
        """
        if self._folder is not None:
            self._set_aside(base.pinned.version)
        dataset = base.dataset.checkout_version(base.pinned.version)
        if dataset.latest_version != dataset.version:
            dataset.restore()
        return dataset

    def _set_all_aside(self) -> None:
        """Do so with all that cannot be read, where no version counts yet."""
        if self._folder is not None and self._folder.exists():
            self._set_aside(0)

    def _set_aside(self, version: int) -> None:
        """Move what newer versions are said to be, where it cannot be read, out of the way."""
        assert self._folder is not None
        for path in (self._folder / "_versions").glob("*.manifest"):
            newer = pins.version_of(path)
            if newer is None or newer <= version:
                continue
            try:
                loaded_lance().dataset(self.uri, version=newer)
            except BaseException as error:
                if not is_damage(error):
                    raise
                pins.set_aside(path)

    def _done(
        self, dataset: Any, form: Format, pinned: Pinned, base: Table | None, order: Tensor | None
    ) -> Table:
        """Wait until the disk has all files of a version."""
        if self._folder is None:
            return Table(dataset, form, pinned, None, order)
        if self._sync:
            self._synced = synced(self._folder, self._synced)
        pin = pins.pin(self._folder, dataset, base.pin if base is not None else None)
        return Table(dataset, form, pinned, pin, order)
