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
