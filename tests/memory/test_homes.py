"""One contract for all homes of a memory: in RAM, on disk, in an object store, on several ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from htm_pytorch import memory
from tests.memory.home_laws import (
    DIM,
    LAWS,
    SIZE,
    Make,
    holds_shared_out,
    in_ram,
    spans_of_parts_elsewhere,
    spans_of_rows_and_rings,
)
from tests.shard_world import World

pytestmark = pytest.mark.usefixtures("one_thread")
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)


@every_law
def test_in_ram(law: Callable[[Make], None]) -> None:
    law(in_ram)


@every_law
@pytest.mark.parametrize("search", ["exact", "index"])
def test_on_disk(law: Callable[[Make], None], search: Any, tmp_path: Path) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    holds_stored(law, search, str(tmp_path), None)


@every_law
@pytest.mark.parametrize("search", ["exact", "index"])
def test_in_an_object_store(
    law: Callable[[Make], None], search: Any, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that most chunks are in a table.
    monkeypatch.setattr("htm_pytorch.memory.stored.GROUP_BYTES", 3 * SIZE * DIM * 4)
    holds_stored(law, search, s3.place(), s3.options)


def holds_stored(law: Callable[[Make], None], search: Any, place: str, options: Any) -> None:
    """A law, over memories in a folder or in a place of an object store."""
    made: list[Any] = []

    def make() -> Any:
        made.append(
            memory.open(
                f"{place}/{len(made)}",
                dim=DIM,
                chunk_size=SIZE,
                search=search,
                cache_bytes=2**10,
                sync=False,
                storage_options=options,
            )
        )
        return made[-1]

    law(make)
    for home in made:
        home.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    world = World(3, tmp_path_factory.mktemp("world"), {"three": [0, 1, 2]})
    yield world
    assert world.close() == [0] * 3


@every_law
def test_shared_out(world: World, law: Callable[[Make], None]) -> None:
    world.run(holds_shared_out, "three", law)


def test_shared_spans_are_those_of_one_process(world: World) -> None:
    errors = world.run(spans_of_rows_and_rings, "three")
    assert errors[0] == errors[1] == errors[2]
    missing, beyond, row, chunks, rows = errors[0]
    assert missing == "chunks: expected chunks that can be recalled, got [1, 5, 6]"
    assert beyond == "chunks: expected numbers from 0 to 6, got [7]"
    assert row == "row: expected an integer from 0 to 1, got 2"
    assert chunks.startswith("chunks (a checksum): expected the same on all ranks")
    assert rows == "row: expected the same on all ranks, got 0 on rank 0 and 1 on rank 1"


def test_shared_spans_of_parts_elsewhere(world: World) -> None:
    world.run(spans_of_parts_elsewhere, "three")
