"""What more than one file of these tests asks for."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 server with one bucket."""
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    pytest.importorskip("moto", reason="the extra `dev` is not installed")
    from tests.memory.s3_server import S3Server

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def place(s3: Any) -> Iterator[str]:
    """A place in an object store where there is nothing, and whose server fails no longer."""
    from tests.memory.in_object_store import no_fault

    yield s3.place()
    s3.fault = no_fault


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few chunks become a version of the table."""
    from tests.memory.in_object_store import GROUP

    monkeypatch.setattr("htm_pytorch.memory.stored.GROUP_BYTES", GROUP)
