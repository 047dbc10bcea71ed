"""One memory on disk among threads, processes, forks, copies and spellings of its place."""

import copy
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention, memory
from htm_pytorch.memory import MemoryFileError, StoredMemory, lance_access, stored, versions
from htm_pytorch.memory.lance_access import ForkedError
from tests.memory.on_disk import DIM, SIZE, assert_holds, child, elsewhere, look, make, steps_from

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:lance is not fork-safe"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

EPISODE = 3 * SIZE + 1
"""Steps in each, so that the last chunk of each is a short one."""
KEPT = 40 * EPISODE
"""Steps that are not forgotten, at least."""
WINDOW = 2 * EPISODE


def append(held: StoredMemory, count: int) -> None:
    """Store the next steps, whose values, keys, times and episodes say which they are."""
    first = held.next_step
    numbers = torch.arange(first, first + count)
    keys = [f"key {n}" for n in numbers.tolist()]
    begins = numbers[None] % EPISODE == 0
    held.append(steps_from(first, count), begins, keys=keys, times=numbers.double())


def in_ram(first: int, last: int) -> ChunkedMemory:
    """The chunks of some whole episodes."""
    contents, is_step = [], []
    for begin in range(first, last, EPISODE):
        for start in range(begin, begin + EPISODE, SIZE):
            count = min(SIZE, begin + EPISODE - start)
            missing = torch.zeros(SIZE - count, DIM)
            contents.append(torch.cat([missing, steps_from(start, count)[0]]))
            is_step.append(torch.arange(SIZE) >= SIZE - count)
    return ChunkedMemory.from_chunks(torch.stack(contents)[None], torch.stack(is_step)[None])


class Reader:
    """Asks one memory all that can be asked, beside its writer, and knows the right answers."""

    def __init__(self, held: StoredMemory, least: Callable[[], int], seed: int):
        self.held = held
        self.least = least
        """How many steps are there for certain."""
        self.answers = 0
        self.late = 0
        self._draw = torch.Generator().manual_seed(seed)
        # Weighed in float64; see `_is_clear` for what is chosen.
        self._layer = HTMAttention(DIM, heads=2, topk_mems=3, dim_head=4, dtype=torch.float64)

    def ask(self) -> None:
        """Ask one question; whoever is behind a compaction is told so, and refreshes."""
        asks = self.fetch, self.spans, self.read, self.find, self.recall, self.recall_all
        try:
            asks[self.number(len(asks))]()
            self.answers += 1
        except MemoryFileError as error:
            assert "compacted meanwhile" in str(error), error
            self.late += 1
            self.held.refresh()
        except ValueError as error:
            # Forgotten since it was looked up.
            assert str(error).startswith(("chunks: expected", "first, last: expected")), error
            self.late += 1

    def number(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._draw))

    def some(self, count: int) -> Tensor:
        chosen = torch.randint(self.held.chunks, (count,), generator=self._draw)
        return chosen.unique()

    def fetch(self) -> None:
        fetched = self.held.fetch(self.some(9))
        contents = fetched.contents[0]
        is_step = torch.ones(contents.shape[:2], dtype=torch.bool)
        if fetched.step_mask is not None:
            is_step = fetched.step_mask[0]
        first = contents[:, -1, 0] - is_step.sum(1) + 1
        for start, chunk, mask in zip(first.int().tolist(), contents, is_step, strict=True):
            assert torch.equal(chunk[mask], steps_from(start, int(mask.sum()))[0])
            assert not chunk[~mask].any()
            assert start % EPISODE % SIZE == 0
        assert (first.diff() > 0).all()

    def spans(self) -> None:
        for span in self.held.spans(self.some(5)):
            numbers = range(span.first_step, span.first_step + span.count)
            assert span.keys == tuple(f"key {n}" for n in numbers)
            assert (span.first_time, span.last_time) == (numbers[0], numbers[-1])
            assert span.episode == span.first_step // EPISODE

    def read(self) -> None:
        last = self.held.next_step
        assert last >= self.least()
        first = last - 1 - self.number(KEPT - 1)
        assert torch.equal(self.held.read(first, last), steps_from(first, last - first))

    def find(self) -> None:
        """The newest chunks have the largest numbers, and so the largest products."""
        least = self.least()
        found = self.held.find(torch.eye(DIM)[:1], 3)
        (scores,) = found.scores.tolist()
        assert scores == sorted(scores, reverse=True)
        assert scores[0] >= least - 2 * SIZE
        assert found.chunks[0].diff().lt(0).all()

    def recall(self) -> None:
        """From episodes of which we know that they are there, and closed."""
        newest = (self.least() - 1) // EPISODE
        last = (newest - self.number(KEPT // 2 // EPISODE)) * EPISODE
        first = last - WINDOW
        view = self.held.where(since=first, until=last - 1)
        if self.number(2):
            view = self.held.where(episodes=range(first // EPISODE, last // EPISODE))
        queries = torch.randn(2, 3, DIM, generator=self._draw, dtype=torch.float64)
        memory = in_ram(first, last)
        with torch.no_grad():
            clear = self._is_clear(queries, memory)
            expected, got = self._layer(queries, memory), self._layer(queries, view)
        assert clear.any()
        torch.testing.assert_close(got[clear], expected[clear])

    def _is_clear(self, queries: Tensor, memory: ChunkedMemory) -> Tensor:
        """Whether roundings of float32, in which a stored memory chooses, leave the choice [B, Q].

        Of 48,000 queries two were nearly tied once the steps had numbers around 18,000.
        """
        route = self._layer._ask(queries, memory, None, None, None).arguments["route"]
        summaries = memory.summaries.double().mT
        best = (route @ summaries).topk(4).values
        # Terms are far larger than their sum where chunks are nearly tied.
        terms = (route.abs() @ summaries.abs()).amax(-1)
        return best[..., 2] - best[..., 3] > 1e-6 * terms

    def recall_all(self) -> None:
        queries = torch.randn(2, 3, DIM, generator=self._draw, dtype=torch.float64)
        with torch.no_grad():
            assert self._layer(queries, self.held).isfinite().all()


class Writer:
    """Changes a memory in all ways that leave its newest steps."""

    def __init__(self, held: StoredMemory):
        self.held = held
        append(held, 2 * KEPT)
        self.acknowledged = held.next_step
        self._draw = torch.Generator().manual_seed(0)
        self._calls = 0

    def least(self) -> int:
        return self.acknowledged

    def change(self) -> None:
        append(self.held, 1 + int(torch.randint(30, (), generator=self._draw)))
        self.acknowledged = self.held.next_step
        self._calls += 1
        if self._calls % 7 == 0:
            self.held.flush()
        if self._calls % 40 == 0:
            self.held.compact()
        if self._calls % 60 == 0:
            episodes = (self.acknowledged - 2 * KEPT) // EPISODE
            self.held.forget(before_step=episodes * EPISODE)


def until(end: float, call: Callable[[], None]) -> Future[None]:
    """Do it again and again in another thread."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            while time.monotonic() < end:
                call()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def read_elsewhere(path: Path, pipe: Connection, seed: int) -> None:
    """Be a reading process that refreshes, until a number comes that is no number of steps."""
    torch.set_num_threads(1)
    least = 2 * KEPT
    try:
        reader = Reader(look(path), lambda: least, seed)
        # What is only imported when it is first used takes long.
        for _ in range(20):
            reader.ask()
        pipe.send("ready")
        while True:
            while pipe.poll():
                said = pipe.recv()
                if said < 0:
                    pipe.send((reader.answers, reader.late))
                    return
                least = said
            reader.held.refresh()
            for _ in range(5):
                reader.ask()
    except BaseException:
        pipe.send(traceback.format_exc())


def read_beside_a_writer(path: Path, seconds: float, threads: int, processes: int) -> None:
    writer = Writer(make(path))
    readers = [Reader(writer.held, writer.least, seed) for seed in range(threads)]
    with ExitStack() as stack:
        pipes = [
            stack.enter_context(child(read_elsewhere, path, seed))[1] for seed in range(processes)
        ]

        def change() -> None:
            writer.change()
            # Slow enough for whoever must first look what came.
            time.sleep(0.002)
            for pipe in pipes:
                pipe.send(writer.acknowledged)

        for pipe in pipes:
            said = pipe.recv()
            assert said == "ready", said
        end = time.monotonic() + seconds
        running = [until(end, reader.ask) for reader in readers]
        running.append(until(end, change))
        for done in running:
            done.result(timeout=seconds + 60)
        for pipe in pipes:
            pipe.send(-1)
            said = pipe.recv()
            assert isinstance(said, tuple), said
            answers, late = said
            assert answers > late
    assert all(reader.answers > 10 * reader.late for reader in readers)
    assert writer.held.verify() == []
    writer.held.close()
    with look(path) as held:
        assert held.next_step == writer.acknowledged
        assert held.verify() == []


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "GROUP_BYTES", 50 * SIZE * DIM * 4)
    monkeypatch.setattr(versions, "MOST_SMALL", 4)


@pytest.mark.usefixtures("small")
def test_threads_and_a_process_read_beside_a_writer(tmp_path: Path) -> None:
    read_beside_a_writer(tmp_path / "m", 3, threads=3, processes=1)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_threads_and_processes_read_beside_a_writer_for_a_minute(tmp_path: Path) -> None:
    read_beside_a_writer(tmp_path / "m", 60, threads=4, processes=2)


@pytest.mark.usefixtures("small")
def test_what_two_threads_append_is_there_once(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        counts = [0, 0]

        def append_as(number: int) -> None:
            count = 1 + counts[number] % 5
            values = torch.arange(counts[number], counts[number] + count).float()
            steps = torch.stack([values, torch.full_like(values, number)], 1)
            held.append(steps.repeat(1, DIM // 2)[None], times=0.0)
            counts[number] += count

        end = time.monotonic() + 0.5
        both = [until(end, lambda number=number: append_as(number)) for number in range(2)]
        for done in both:
            done.result(timeout=60)
    with look(tmp_path / "m") as held:
        assert held.steps == held.next_step == sum(counts)
        steps = held.read(0, held.steps)[0]
        for number, count in enumerate(counts):
            assert steps[steps[:, 1] == number, 0].tolist() == list(range(count))
        assert held.verify() == []


def test_threads_may_hand_a_memory_on(tmp_path: Path) -> None:
    held = elsewhere(lambda: make(tmp_path / "m").append(steps_from(0, 21)).flush())
    assert_holds(held.append(steps_from(21, 2)), 23)
    elsewhere(held.close)
    with make(tmp_path / "m") as held:
        elsewhere(lambda: held.append(steps_from(23, 20)))
        assert_holds(held, 43)
        with pytest.raises(BlockingIOError, match="this process has"):
            elsewhere(lambda: make(tmp_path / "m"))
    elsewhere(lambda: make(tmp_path / "m").close())


# Forks.


def in_fork(call: Callable[[], Any]) -> Any:
    """Return what a fork of this process gives for it, or what it raised."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        try:
            theirs.send(call())
        except BaseException as error:
            theirs.send(error)

    process = context.Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(30), "the fork hangs"
        return ours.recv()
    finally:
        process.kill()
        process.join()


def test_a_writer_is_for_reading_only_in_a_fork(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        held.append(steps_from(0, 11))
        refused = in_fork(lambda: held.append(steps_from(11, 1)))
        assert isinstance(refused, ValueError)
        parent = f"process {os.getpid()}, of which this is a fork, writes to it"
        assert f"open for reading only ({parent})" in str(refused)
        for call in (held.flush, held.compact, lambda: held.forget(before_step=2)):
            assert isinstance(in_fork(call), ValueError)
        # Nor is it another way around the lock.
        assert isinstance(in_fork(lambda: make(tmp_path / "m")), BlockingIOError)
        assert in_fork(lambda: held.read(0, 11).tolist()) == steps_from(0, 11).tolist()
        assert in_fork(held.close) is None
        with pytest.raises(BlockingIOError):
            make(tmp_path / "m")
        assert_holds(held.append(steps_from(11, 30)).flush(), 41)
    assert_holds(look(tmp_path / "m"), 41)


def test_a_fork_sees_what_its_parent_appends_when_it_refreshes(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        held.append(steps_from(0, 5))
        begun = multiprocessing.get_context("fork").Event()
        stored_more = multiprocessing.get_context("fork").Event()

        def follow() -> list[Any]:
            begun.set()
            assert stored_more.wait(20)
            before = held.steps
            return [before, held.refresh().steps, held.read(0, 14)[0, :, 0].tolist()]

        found = []
        asking = threading.Thread(target=lambda: found.append(in_fork(follow)))
        asking.start()
        assert begun.wait(20)
        held.append(steps_from(5, 9))
        stored_more.set()
        asking.join(30)
        assert found == [[5, 14, list(range(14))]]
        assert_holds(held, 14)


def test_a_fork_that_cannot_use_the_engine_says_so(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        held.append(steps_from(0, 40)).flush().append(steps_from(40, 9))
        assert in_fork(lambda: held.read(40, 49).shape) == (1, 9, DIM)
        assert in_fork(lambda: held.valid.tolist()) == held.valid.tolist()
        reopened = in_fork(lambda: look(tmp_path / "m").read(0, 4))
        summaries = in_fork(lambda: held.summaries)
        for refused in (in_fork(lambda: held.fetch(torch.tensor([0]))), summaries, reopened):
            assert isinstance(refused, ForkedError)
            assert isinstance(refused, RuntimeError)
            assert "does not survive a fork; start processes by 'spawn'" in str(refused)
            assert "\n" not in str(refused)
        assert_holds(held.append(steps_from(49, 7)), 56)


def test_a_fork_amid_the_calls_of_other_threads_does_not_hang(tmp_path: Path) -> None:
    with make(tmp_path / "m") as held:
        held.append(steps_from(0, 3))
        end = time.monotonic() + 1
        calls = held.verify, held.refresh, lambda: held.append(steps_from(held.steps, 3))
        running = [until(end, call) for call in calls]
        forks = 0
        while time.monotonic() < end - 0.1:
            before = held.steps
            seen = in_fork(lambda: [held.steps, held.refresh().steps, held.verify()])
            assert isinstance(seen, list), seen
            assert before <= seen[0] <= seen[1]
            assert seen[2] == []
            forks += 1
        for done in running:
            done.result(timeout=30)
        assert forks
        assert_holds(held, 3)


def make_elsewhere(path: Path, pipe: Connection, steps: int) -> None:
    make(path).append(steps_from(0, steps)).flush().close()
    pipe.send(steps)


def read_stored_in_fork(path: Path, pipe: Connection) -> None:
    """Fork before the engine was used."""
    try:
        # What the server has imported is not used.
        assert lance_access._process is None
        pipe.send(in_fork(lambda: look(path).read(0, 40).tolist()))
    except BaseException as error:
        pipe.send(error)


def test_a_fork_reads_what_is_stored_where_its_parent_had_read_nothing(tmp_path: Path) -> None:
    with child(make_elsewhere, tmp_path / "m", 40) as (_, pipe):
        assert pipe.recv() == 40
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    # Not a daemon: it has a child.
    process = context.Process(target=read_stored_in_fork, args=(tmp_path / "m", theirs))
    process.start()
    theirs.close()
    assert ours.recv() == steps_from(0, 40).tolist()
    process.join(30)


# Copies.


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda held: pickle.loads(pickle.dumps(held)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_reader_is_a_reader(tmp_path: Path, how: str) -> None:
    with make(tmp_path / "m") as writer:
        writer.append(steps_from(0, 40)).flush().append(steps_from(40, 9))
        first = look(tmp_path / "m")
        second = COPIES[how](first)
        writer.append(steps_from(49, 3))
        assert second.read_only
        assert_holds(first, 49)
        assert_holds(second.refresh(), 52)
        second.close()
        assert_holds(first.refresh(), 52)
        third = COPIES[how](look(tmp_path / "m", search="index", cache_bytes=0))
        assert type(third) is memory.IndexedMemory
        assert third.steps == 52


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_writer_is_refused(tmp_path: Path, how: str) -> None:
    with make(tmp_path / "m").append(steps_from(0, 9)) as held:
        with pytest.raises(TypeError, match=r"share .* among threads, or .*read_only=True"):
            COPIES[how](held)
        assert_holds(held.append(steps_from(9, 9)), 18)
    # Closed, it is for reading only.
    assert_holds(COPIES[how](held), 18)


# Spellings.


def test_one_folder_is_one_memory_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    path = folder / "m"
    spellings: list[Any] = [
        path,
        str(path),
        f"{path}/",
        f"{path}/../m",
        path.as_uri(),
        f"file:{path}",
        f"FILE://localhost{path}",
        "~/m",
        Path("~/m"),
        "m",
        "./m",
        "../link/m",
        tmp_path / "link" / "m",
    ]
    with make(path) as held:
        held.append(steps_from(0, 9))
        for spelled in spellings:
            with pytest.raises(BlockingIOError, match="this process has"):
                make(spelled)
            with look(spelled) as reader:
                assert reader.uri == str(path)
                assert_holds(reader, 9)
    for count, spelled in enumerate(spellings):
        with make(spelled) as held:
            assert_holds(held.append(steps_from(held.steps, 1)), 10 + count)
    assert [entry.name for entry in folder.iterdir()] == ["m"]


def test_a_place_in_an_object_store_is_not_a_path() -> None:
    for path in (Path("s3://bucket/name"), Path("gs://bucket/name")):
        with pytest.raises(ValueError, match="as a str.*dropped a slash"):
            memory.open(path, dim=DIM)
    assert not Path("s3:").exists()
