"""One contract for all homes of a memory: in RAM, on disk, in an object store, on several ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from htm_pytorch import memory
from tests.memory.home_laws import DIM, LAWS, SIZE, Make, holds_shared_out, in_ram
from tests.shard_world import World

pytestmark = pytest.mark.usefixtures("one_thread")
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)


@every_law
def test_in_ram(law: Callable[[Make], None]) -> None:
    law(in_ram)


@every_law
@pytest.mark.parametrize("search", ["exact", "index"])
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["disk", "object store"])
def test_stored(law: Callable[[Make], None], scheme: str, search: Any, tmp_path: Path) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    made: list[Any] = []

    def make() -> Any:
        made.append(
            memory.open(
                f"{scheme}{tmp_path}/{len(made)}",
                dim=DIM,
                chunk_size=SIZE,
                search=search,
                cache_bytes=2**10,
                sync=False,
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
