"""Any calls of a memory on disk, errors among them, beside a plain list that does the same."""

import contextlib
import copy
import dataclasses
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from htm_pytorch import HTMAttention, memory
from htm_pytorch.memory import MemoryFileError, StoredMemory, folder_log, stored, versions
from htm_pytorch.ops import recall_with_weights
from tests.helpers import assert_near
from tests.memory.any_changes import (
    DIM,
    SIZE,
    Changes,
    appended,
    changes,
    chosen,
    faults,
    searches,
    shares,
)
from tests.memory.faults import Fault, everywhere, failing
from tests.memory.plain_memory import Plain, assert_shows, expected_of, shown_by

pytestmark = pytest.mark.usefixtures("one_thread")

MOST_READERS = 3
FILES_STAY = 12
"""Calls of a writer, after which readers that did not look may miss files."""


@dataclasses.dataclass(eq=False)
class Handle:
    """A memory that is open, and what it must show."""

    memory: StoredMemory
    plain: Plain
    calls: int = 0
    """Of the writer, since this one looked at the disk."""
    purged: bool = False
    """Whether the writer has deleted what was forgotten since then."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except MemoryFileError as error:
            assert "refresh()" in str(error)
            if not self.purged and self.calls <= FILES_STAY:
                raise


class AnyCalls(RuleBasedStateMachine):
    dtype: ClassVar[torch.dtype] = torch.float32
    count: ClassVar[int] = 0
    """Calls of the public interface, in all runs."""

    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        self.changes = Changes(self.dtype)
        self.patch = pytest.MonkeyPatch()
        clock = SimpleNamespace(**{**vars(time), "time": self.changes.now})
        everywhere(self.patch, "time", clock)
        # So that tables, fragments and batches are many.
        chunk = self.changes.form.chunk_bytes
        self.patch.setattr(stored, "GROUP_BYTES", 3 * chunk)
        self.patch.setattr(versions, "MOST_SMALL", 4)
        self.patch.setattr(folder_log, "FULL", 3000)
        self.patch.setattr(folder_log, "WORN", 1500)
        everywhere(self.patch, "SMALL_BYTES", 5 * chunk)
        everywhere(self.patch, "FRAGMENT_BYTES", 8 * chunk)
        everywhere(self.patch, "BATCH_BYTES", 3 * chunk)
        everywhere(self.patch, "COPY_BYTES", 4 * chunk)
        everywhere(self.patch, "PIECE_BYTES", 5 * 4 * SIZE * DIM)
        self.readers: list[Handle] = []
        self.layer = HTMAttention(DIM, topk_mems=3, dim_head=4)

    def open(self, search: str, **options: Any) -> StoredMemory:
        type(self).count += 1
        sizes = {} if options else {"dim": DIM, "chunk_size": SIZE, "dtype": self.dtype}
        return memory.open(
            self.folder / "m", search=search, cache_bytes=4 * 4 * SIZE * DIM, **sizes, **options
        )

    @initialize(search=searches, some=st.lists(appended, max_size=8))
    def make(self, search: str, some: list[dict[str, Any]]) -> None:
        self.writer = Handle(self.open(search), Plain(SIZE))
        self.append_some(some)

    def teardown(self) -> None:
        try:
            # Not where a call has gone wrong already.
            if hasattr(self, "writer") and sys.exc_info()[0] is None:
                self.ends_well()
        finally:
            for handle in (*self.readers, *([self.writer] if hasattr(self, "writer") else [])):
                handle.memory.close()
            self.patch.undo()
            shutil.rmtree(self.folder)

    def ends_well(self) -> None:
        assert_shows(self.writer.memory, self.writer.plain)
        assert self.writer.memory.verify() == []
        self.writer.memory.close()
        assert_shows(self.writer.memory, self.writer.plain)
        with self.open("exact") as again:
            assert_shows(again, self.writer.plain)
            assert again.verify() == []
            self.tell_readers("compact")
            again.compact()
            assert_shows(again, self.writer.plain)
            assert again.verify() == []
        for reader in self.readers:
            with reader.reading():
                assert_shows(reader.memory, reader.plain)
            assert_shows(reader.memory.refresh(), self.writer.plain)

    # What changes a memory.

    def tell_readers(self, name: str) -> None:
        for reader in self.readers:
            reader.calls += 1
            reader.purged |= name == "compact"

    @rule(some=st.lists(appended, min_size=1, max_size=4))
    def append_some(self, some: list[dict[str, Any]]) -> None:
        for arguments in some:
            self.change(("append", arguments))

    @rule(change=changes)
    def change(self, change: tuple[str, dict[str, Any]]) -> None:
        type(self).count += 1
        name, arguments = change
        call = self.changes.call(name, arguments, self.writer.plain)
        self.tell_readers(name)
        call.do(self.writer.memory)
        self.writer.plain = call.after
        held = self.writer.memory
        assert (held.next_step, held.chunks) == (call.after.next_step, call.after.chunks)

    @rule(change=changes, fault=faults)
    def change_with_an_error(self, change: tuple[str, dict[str, Any]], fault: Fault) -> None:
        type(self).count += 1
        name, arguments = change
        before = self.writer.plain
        call = self.changes.call(name, arguments, before)
        self.tell_readers(name)
        raised = False
        with failing(fault):
            try:
                call.do(self.writer.memory)
            except fault.error as error:
                assert "a call of" in str(error)
                raised = True
        shown = shown_by(self.writer.memory)
        possible = [call.after, before] if raised else [call.after]
        right = [plain for plain in possible if expected_of(plain) == shown]
        assert right, f"{shown} is none of {[expected_of(plain) for plain in possible]}"
        self.writer.plain = right[0]

    @rule(search=searches, fault=st.none() | faults)
    def reopen(self, search: str, fault: Fault | None) -> None:
        self.writer.memory.close()
        with pytest.raises(ValueError, match="it was closed"):
            self.writer.memory.append(torch.zeros(1, 1, DIM, dtype=self.changes.form.given))
        assert_shows(self.writer.memory, self.writer.plain)
        with contextlib.ExitStack() as stack:
            if fault is not None:
                stack.enter_context(failing(fault))
                stack.enter_context(contextlib.suppress(fault.error))
            self.writer.memory = self.open(search)
        if self.writer.memory.read_only:
            self.writer.memory = self.open(search)
        assert_shows(self.writer.memory, self.writer.plain)

    # Those beside the writer.

    @precondition(lambda self: len(self.readers) < MOST_READERS)
    @rule(search=searches)
    def open_a_reader(self, search: str) -> None:
        self.readers.append(Handle(self.open(search, read_only=True), self.writer.plain))

    @precondition(lambda self: len(self.readers) in range(1, MOST_READERS))
    @rule(which=st.integers(0, MOST_READERS - 1), pickled=st.booleans())
    def copy_a_reader(self, which: int, pickled: bool) -> None:
        held = self.readers[which % len(self.readers)].memory
        made = pickle.loads(pickle.dumps(held)) if pickled else copy.copy(held)
        assert type(made) is type(held)
        self.readers.append(Handle(made, self.writer.plain))
        with pytest.raises(TypeError, match="is open for writing"):
            copy.copy(self.writer.memory)

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, MOST_READERS - 1), fault=st.none() | faults)
    def refresh(self, which: int, fault: Fault | None) -> None:
        type(self).count += 1
        reader = self.readers[which % len(self.readers)]
        with contextlib.ExitStack() as stack:
            if fault is not None:
                stack.enter_context(failing(fault))
                stack.enter_context(contextlib.suppress(fault.error))
            reader.memory.refresh()
        if fault is not None:
            shown = None
            with reader.reading():
                shown = shown_by(reader.memory)
            assert shown in (None, expected_of(reader.plain), expected_of(self.writer.plain))
        reader.memory.refresh()
        reader.plain, reader.calls, reader.purged = self.writer.plain, 0, False
        assert_shows(reader.memory, reader.plain)

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, MOST_READERS - 1))
    def close_a_reader(self, which: int) -> None:
        self.readers.pop(which % len(self.readers)).memory.close()

    @rule(which=st.integers(0, MOST_READERS), fault=st.none() | faults)
    def save(self, which: int, fault: Fault | None) -> None:
        handle = self.handle(which)
        path = self.folder / "copy"
        with contextlib.ExitStack() as stack:
            if fault is not None:
                stack.enter_context(failing(fault))
                stack.enter_context(contextlib.suppress(fault.error))
            handle.memory.save(path)
        if not path.exists():
            assert fault is not None
            handle.memory.save(path)
        plain = self.writer.plain
        handle.plain, handle.calls, handle.purged = plain, 0, False
        with memory.open(path, cache_bytes=0) as made:
            assert_shows(made, plain)
            assert made.verify() == []
            call = self.changes.append(plain, 3, set(), "some", "each")
            call.do(made)
            made.flush()
            assert_shows(made, call.after)
        with memory.open(path, read_only=True) as made:
            assert_shows(made, call.after)
        shutil.rmtree(path)

    # What is read.

    def handle(self, which: int) -> Handle:
        type(self).count += 1
        handles = [self.writer, *self.readers]
        return handles[which % len(handles)]

    @rule(which=st.integers(0, MOST_READERS))
    def look_at_everything(self, which: int) -> None:
        handle = self.handle(which)
        with handle.reading():
            assert_shows(handle.memory, handle.plain)

    @rule(which=st.integers(0, MOST_READERS), fault=st.none() | faults)
    def fetch(self, which: int, fault: Fault | None) -> None:
        handle = self.handle(which)
        chunks, size = handle.plain.chunks, (6 if handle.plain.chunks else 0,)
        numbers = torch.randint(max(chunks, 1), size, generator=self.changes.seeded())
        if fault is not None:
            with failing(fault), handle.reading(), contextlib.suppress(fault.error):
                handle.memory.fetch(numbers)
        with handle.reading():
            fetched = handle.memory.fetch(numbers)
            for place, number in enumerate(numbers.tolist()):
                expected = [step.value for step in handle.plain.closed[number]]
                found = fetched.contents[0, place, SIZE - len(expected) :]
                assert [tuple(value) for value in found.tolist()] == expected
        with pytest.raises(ValueError, match="chunks: expected numbers"):
            handle.memory.fetch(torch.tensor([chunks]))

    @rule(which=st.integers(0, MOST_READERS), first=shares, last=shares)
    def read(self, which: int, first: float, last: float) -> None:
        handle = self.handle(which)
        start, end = sorted(round(share * (handle.plain.next_step + 1)) for share in (first, last))
        steps = [step for step in handle.plain.held if start <= step.number < end]
        with handle.reading():
            if len(steps) == end - start:
                found = handle.memory.read(start, end)
                assert found.shape == (1, end - start, DIM)
                assert [tuple(v) for v in found[0].tolist()] == [step.value for step in steps]
            else:
                with pytest.raises(ValueError, match="expected steps that are there|refresh"):
                    handle.memory.read(start, end)

    @rule(which=st.integers(0, MOST_READERS), k=st.integers(1, 9))
    def find(self, which: int, k: int) -> None:
        handle = self.handle(which)
        query = torch.randn(2, DIM, generator=self.changes.seeded())
        with handle.reading():
            found = handle.memory.find(query, k)
            if not handle.plain.chunks:
                assert found.chunks.shape == found.scores.shape == (2, 0)
                return
            scores = query.double() @ handle.plain.summaries().T
            self.assert_best(found.chunks, scores, k)
            torch.testing.assert_close(
                found.scores.double(),
                scores.gather(1, found.chunks),
                rtol=self.tolerance,
                atol=self.tolerance,
            )

    @property
    def tolerance(self) -> float:
        return 2e-2 if self.dtype == torch.bfloat16 else 1e-5

    def assert_best(self, chunks: Tensor, scores: Tensor, k: int) -> None:
        """Numbers [Q, K] are those of the k largest scores [Q, M], of those that are finite."""
        kept = min(k, scores.shape[1])
        assert chunks.shape == (len(scores), kept)
        for numbers, row in zip(chunks.tolist(), scores, strict=True):
            there = int(row.isfinite().sum())
            assert numbers[there:] == [-1] * max(kept - there, 0)
            numbers = numbers[:there]
            assert len(set(numbers)) == len(numbers) and -1 not in numbers
            best = row.topk(len(numbers)).values
            torch.testing.assert_close(row[numbers], best, rtol=0, atol=self.tolerance)

    @rule(which=st.integers(0, MOST_READERS), k=st.integers(1, 5), some=chosen)
    def recall(self, which: int, k: int, some: dict[str, Any] | None) -> None:
        handle = self.handle(which)
        plain, home = handle.plain, handle.memory
        mask = [True] * plain.chunks
        if some is not None:
            arguments = self.changes.chosen(plain, some)
            mask = [
                chunk[0].episode in arguments.get("episodes", [chunk[0].episode])
                and chunk[0].time >= arguments.get("since", -torch.inf)
                and chunk[-1].time <= arguments.get("until", torch.inf)
                for chunk in plain.closed
            ]
            home = handle.memory.where(**arguments)
        generator = self.changes.seeded()
        route = torch.randn(1, 3, DIM, generator=generator)
        probe = torch.randn(1, 3, 2, DIM, generator=generator)
        with handle.reading():
            context, recalled = recall_with_weights(route, probe, home, k)
            out = self.layer(route, home)
            if not any(mask):
                assert (context == 0).all() and (out == 0).all()
                return
            scores = route[0].double() @ plain.summaries().T
            scores[:, ~torch.tensor(mask)] = -torch.inf
            chunks = recalled.chunks[0]
            missing = min(k, plain.chunks) - chunks.shape[1]
            chunks = torch.nn.functional.pad(chunks, (0, missing), value=-1)
            self.assert_best(chunks, scores, k)
            if self.dtype == torch.bfloat16:
                return
            ram = plain.in_ram(mask)
            expected, _ = recall_with_weights(route, probe, ram, k)
            assert_near(context, expected, 1e-4)
            assert_near(out, self.layer(route, ram), 1e-4)

    @rule(which=st.integers(0, MOST_READERS))
    def verify(self, which: int) -> None:
        handle = self.handle(which)
        if handle is self.writer or not handle.calls:
            assert handle.memory.verify() == []

    @rule()
    def info(self) -> None:
        handle = self.handle(0)
        info, plain = handle.memory.info(), handle.plain
        steps = len(plain.held)
        assert info["steps"] == steps
        assert info["chunks"] == plain.chunks
        assert info["episodes"] == plain.episode + 1
        assert info["steps of the open chunk"] == len(plain.opened)
        assert info["steps forgotten"] == plain.next_step - steps
        assert info["chunks in the log"] <= 3
        assert repr(handle.memory).count(f"steps={steps}") == 1


class AnyCallsInt8(AnyCalls):
    dtype = torch.int8


class AnyCallsBfloat16(AnyCalls):
    dtype = torch.bfloat16


def run(machine: type[AnyCalls], examples: int, calls: int, random: bool) -> None:
    machine.count = 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=calls,
            derandomize=not random,
            deadline=None,
            database=None,
            phases=[Phase.generate] if random else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=True,
        ),
    )
    print(f"{machine.__name__}: {machine.count} calls")


@pytest.mark.parametrize(
    ("machine", "examples"), [(AnyCalls, 12), (AnyCallsInt8, 3), (AnyCallsBfloat16, 3)]
)
def test_any_calls(machine: type[AnyCalls], examples: int) -> None:
    run(machine, examples, 40, random=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "examples"), [(AnyCalls, 150), (AnyCallsInt8, 30), (AnyCallsBfloat16, 30)]
)
def test_thousands_of_calls(machine: type[AnyCalls], examples: int) -> None:
    run(machine, examples, 60, random=True)
