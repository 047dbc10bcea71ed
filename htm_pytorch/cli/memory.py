"""`htm memory`: looks after memories on disk and in object stores."""

import contextlib
import json as json_text
import math
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import tyro

from htm_pytorch.cli import refuse_unknown

if TYPE_CHECKING:
    from htm_pytorch.memory import Memories, Span, StoredMemory

Path_ = tyro.conf.Positional[str]


def info(path: Path_, name: str = "", json: bool = False) -> None:
    """Say what a memory holds, and how much room it takes; or a folder of many memories.

    Args:
        path: its folder, or its place in an object store.
        name: of a folder of many memories, which one; default all together.
        json: for programs: everything as one JSON object.
    """
    with _opened(path, name) as stored:
        _print(stored.info(), json)


def verify(path: Path_, json: bool = False) -> None:
    """Read everything, and compare it with its checksums; of many memories that of all.

    Args:
        path: its folder, or its place in an object store.
        json: for programs: the chunks and the problems as one JSON object.
    """
    from htm_pytorch.memory import Memories

    with _opened(path) as stored:
        problems = stored.verify()
        is_many = isinstance(stored, Memories)
        what, count = ("memories", len(stored)) if is_many else ("chunks", stored.chunks)
    if json:
        print(json_text.dumps({what: count, "problems": problems}, indent=2))
        sys.exit(1 if problems else 0)
    if problems:
        print(*problems, sep="\n")
        sys.exit(1)
    print(f"{count:,} {what} are as they were stored")


def compact(path: Path_, dry_run: bool = False) -> None:
    """Join small files, and delete what has not been needed for an hour; of many memories at once.

    Args:
        path: its folder, or its place in an object store.
        dry_run: only say what there is to do.
    """
    with _opened(path, read_only=dry_run) as stored:
        if not dry_run:
            stored.compact()
        _print(stored.to_compact() if dry_run else stored.info())


def index(path: Path_) -> None:
    """Make the index that memories opened with search="index" ask, and try it.

    Args:
        path: its folder, or its place in an object store.
    """
    with _one(path, read_only=False) as stored:
        if not stored.chunks:
            raise ValueError(f"path: expected a memory with chunks, got {path!r} without any")
        share = stored.build_index().index_recall()
        print(f"of the 8 best chunks of queries like its summaries it finds {share:.1%}")
        _print(stored.info())


def save(path: Path_, copy: Path_, name: str = "") -> None:
    """Write a copy, also while another process writes to the memory.

    Args:
        path: its folder, or its place in an object store.
        copy: the folder to be made.
        name: of a folder of many memories, which one.
    """
    from htm_pytorch import memory

    with _one(path, name) as stored:
        stored.save(copy)
    with memory.open(copy, read_only=True) as stored:
        print(f"{stored.steps:,} steps are in {copy}")


def show(path: Path_, chunk: int, name: str = "", json: bool = False) -> None:
    """Show what a chunk holds: its steps, when they happened, their keys, and some numbers.

    Args:
        path: its folder, or its place in an object store.
        chunk: its number; negative numbers count from the newest.
        name: of a folder of many memories, which one.
        json: for programs: where it comes from, and all numbers, as one JSON object.
    """
    import torch

    with _one(path, name) as stored:
        if not -stored.chunks <= chunk < stored.chunks:
            there = f"from {-stored.chunks} to {stored.chunks - 1}" if stored.chunks else "none yet"
            raise ValueError(f"chunk: expected the number of one there is, {there}, got {chunk}")
        number = chunk % stored.chunks
        chosen = torch.tensor([number], device="cpu")
        (span,) = stored.spans(chosen)
        part = stored.fetch(chosen)
    steps = part.contents[0, 0, -span.count :].float()
    if json:
        print(json_text.dumps({**span._asdict(), "steps": steps.tolist()}, indent=2))
        return
    last = span.first_step + span.count - 1
    print(
        f"chunk {number}: steps {span.first_step} to {last}, episode {span.episode}{_times(span)}"
    )
    keys = span.keys or (None,) * span.count
    for place, (key, step) in enumerate(zip(keys, steps, strict=True)):
        few = ", ".join(f"{value:.4g}" for value in step[:6].tolist())
        more = ", ..." if len(step) > 6 else ""
        named = "" if key is None else f"  {key!r}"
        print(f"{span.first_step + place:10}{named}  [{few}{more}]")


def repair(path: Path_) -> None:
    """Keep what can be read of a damaged memory, or of many, and set the rest aside.

    Args:
        path: its folder.
    """
    from htm_pytorch import memory

    report = memory.repair(path)
    if not report.problems:
        print(f"nothing is damaged; it holds {report.steps:,} steps")
        return
    print(*report.problems, sep="\n")
    print(f"now it holds {report.steps:,} steps; what was there before is in {report.set_aside}")
    for start, end in report.lost:
        print(f"lost: steps {start} to {end - 1}")
    for name, ranges in report.lost_of.items():
        for start, end in ranges:
            print(f"lost: steps {start} to {end - 1} of {name!r}")
    for name in report.headless:
        print(f"perhaps lost: the newest steps of {name!r}; how many it had can no longer be read")
    if report.moved:
        print(f"{report.moved:,} steps had the numbers of others, and are now behind all others")


def forget(
    path: Path_,
    episodes: tuple[int, ...] = (),
    before: float | None = None,
    before_step: int | None = None,
    name: str = "",
) -> None:
    """Forget some of the past, for good: no byte of it is left in any file.

    Args:
        path: its folder, or its place in an object store.
        episodes: the numbers of episodes.
        before: all steps that happened before this time, in seconds since 1970.
        before_step: all steps with lower numbers.
        name: of a folder of many memories, which one.
    """
    if not episodes and before is None and before_step is None:
        raise ValueError("forget: expected --episodes, --before or --before-step, got none of them")
    with _one(path, name, read_only=False) as stored:
        steps, end, count = stored.steps, stored.next_step, stored.info()["episodes"]
        stored.forget(episodes=episodes, before=before, before_step=before_step).compact()
        print(f"{steps - stored.steps:,} steps are forgotten; {stored.steps:,} are left")
    unknown = [number for number in episodes if not 0 <= number < count]
    if unknown:
        print(f"no episodes {unknown}: there are {count:,}, counted from 0", file=sys.stderr)
    if before_step is not None and before_step > end:
        told = f"--before-step {before_step:,} is beyond the end, the next step is number {end:,}"
        print(told, file=sys.stderr)


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (info, verify, compact, index, save, show, forget, repair)
}


def main(arguments: list[str]) -> None:
    """Run one of the commands."""
    arguments = arguments or ["--help"]
    if not arguments[0].startswith("-"):
        refuse_unknown(arguments[0], COMMANDS, "htm memory")
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="htm memory",
        description="Look after a memory on disk or in an object store.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


@contextlib.contextmanager
def _opened(
    path: str, name: str = "", *, read_only: bool = True
) -> "Iterator[StoredMemory | Memories]":
    """Open a memory, a folder of many, or with a name one of those."""
    from htm_pytorch import memory
    from htm_pytorch.memory.many import holds_many

    if not holds_many(path):
        if name:
            raise ValueError(f"name: expected none, as {path!r} is no folder of many, got {name!r}")
        with memory.open(path, read_only=read_only) as stored:
            yield stored
        return
    with memory.open_many(path, read_only=read_only) as memories:
        if name and name not in memories:
            raise ValueError(f"name: expected {_names(memories)}, got {name!r}")
        yield memories[name] if name else memories


@contextlib.contextmanager
def _one(path: str, name: str = "", *, read_only: bool = True) -> "Iterator[StoredMemory]":
    """Open one memory alone.

    Raises:
        ValueError: there are many, and no name.
    """
    from htm_pytorch.memory import Memories

    with _opened(path, name, read_only=read_only) as stored:
        if isinstance(stored, Memories):
            raise ValueError(
                f"path: expected one memory, got {path!r} of many; --name takes {_names(stored)}, "
                "where a command has it"
            )
        yield stored


def _names(memories: "Memories") -> str:
    names = memories.names()
    few = ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5)
    return f"one of {len(names):,} names ({few})"


def _print(found: dict[str, Any], json: bool = False) -> None:
    if json:
        print(json_text.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        print(f"{name:{width}} {value:,}" if is_count else f"{name:{width}} {value}")


def _times(span: "Span") -> str:
    if span.first_time is None or span.last_time is None:
        return ""
    if not all(math.isfinite(t) and 0 <= t < 2**33 for t in (span.first_time, span.last_time)):
        return f", times {span.first_time} to {span.last_time}"
    first, last = (
        datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S")
        for moment in (span.first_time, span.last_time)
    )
    return f", {first} to {last} UTC"
