"""`htm memory`: looks after memories on disk and in object stores."""

import json as json_text
import math
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import tyro

from htm_pytorch.cli import refuse_unknown

if TYPE_CHECKING:
    from htm_pytorch.memory import Span

Path_ = tyro.conf.Positional[str]


def info(path: Path_, json: bool = False) -> None:
    """Say what a memory holds, and how much room it takes.

    Args:
        path: its folder, or its place in an object store.
        json: for programs: everything as one JSON object.
    """
    from htm_pytorch import memory

    with memory.open(path, read_only=True) as stored:
        found = stored.info()
    if json:
        print(json_text.dumps(found, indent=2))
        return
    for name, value in found.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        print(f"{name:30} {value:,}" if is_count else f"{name:30} {value}")


def verify(path: Path_, json: bool = False) -> None:
    """Read everything, and compare it with its checksums.

    Args:
        path: its folder, or its place in an object store.
        json: for programs: the chunks and the problems as one JSON object.
    """
    from htm_pytorch import memory

    with memory.open(path, read_only=True) as stored:
        problems = stored.verify()
        chunks = stored.chunks
    if json:
        print(json_text.dumps({"chunks": chunks, "problems": problems}, indent=2))
        sys.exit(1 if problems else 0)
    if problems:
        print(*problems, sep="\n")
        sys.exit(1)
    print(f"{chunks:,} chunks are as they were stored")


def compact(path: Path_) -> None:
    """Join small files, and delete what has not been needed for an hour.

    Args:
        path: its folder, or its place in an object store.
    """
    from htm_pytorch import memory

    with memory.open(path) as stored:
        stored.compact()
    info(path)


def index(path: Path_) -> None:
    """Make the index that memories opened with search="index" ask, and try it.

    Args:
        path: its folder, or its place in an object store.
    """
    from htm_pytorch import memory

    with memory.open(path) as stored:
        share = stored.build_index().index_recall()
    print(f"of the 8 best chunks of queries like its summaries it finds {share:.1%}")
    info(path)


def save(path: Path_, copy: Path_) -> None:
    """Write a copy, also while another process writes to the memory.

    Args:
        path: its folder, or its place in an object store.
        copy: the folder to be made.
    """
    from htm_pytorch import memory

    with memory.open(path, read_only=True) as stored:
        stored.save(copy)
    with memory.open(copy, read_only=True) as stored:
        print(f"{stored.steps:,} steps are in {copy}")


def show(path: Path_, chunk: int, json: bool = False) -> None:
    """Show what a chunk holds: its steps, when they happened, their keys, and some numbers.

    Args:
        path: its folder, or its place in an object store.
        chunk: its number; negative numbers count from the newest.
        json: for programs: where it comes from, and all numbers, as one JSON object.
    """
    import torch

    from htm_pytorch import memory

    with memory.open(path, read_only=True) as stored:
        number = chunk + stored.chunks if chunk < 0 else chunk
        chosen = torch.tensor([number])
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
    """Keep what can be read of a damaged memory, and set the rest aside.

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
    if report.moved:
        print(f"{report.moved:,} steps had the numbers of others, and are now behind all others")


def forget(
    path: Path_,
    episodes: tuple[int, ...] = (),
    before: float | None = None,
    before_step: int | None = None,
) -> None:
    """Forget some of the past, for good: no byte of it is left in any file.

    Args:
        path: its folder, or its place in an object store.
        episodes: the numbers of episodes.
        before: all steps that happened before this time, in seconds since 1970.
        before_step: all steps with lower numbers.
    """
    from htm_pytorch import memory

    if not episodes and before is None and before_step is None:
        raise ValueError("forget: expected --episodes, --before or --before-step, got none of them")
    with memory.open(path) as stored:
        steps = stored.steps
        stored.forget(episodes=episodes, before=before, before_step=before_step).compact()
        print(f"{steps - stored.steps:,} steps are forgotten; {stored.steps:,} are left")


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
