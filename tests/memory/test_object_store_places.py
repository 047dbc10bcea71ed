"""Where a memory in an object store is, and who may reach it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from htm_pytorch import memory
from tests.memory.in_object_store import DIM, assert_holds, folder_of, made, numbered, opened
from tests.memory.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")


def test_options_come_as_strings(s3: S3Server, place: str) -> None:
    """Of AWS by their names, of connections, and of the table's engine alone."""
    loud = {name.upper(): value for name, value in s3.options.items()}
    short = {name.removeprefix("aws_"): value for name, value in s3.options.items()}
    more = {
        "allow_invalid_certificates": "false",
        "aws_virtual_hosted_style_request": "false",
        "client_retry_timeout": "20",
        "connect_timeout": "4s",
        "download_retry_count": "3",
        "lance_aimd_max_retries": "2",
        "pool_idle_timeout": "3s",
        "pool_max_idle_per_host": "2",
        "timeout": "30 seconds",
        "user_agent": "a test",
    }
    at = 0
    for options in (s3.options, loud, short, {**s3.options, **more}):
        with memory.open(place, dim=DIM, cache_bytes=0, storage_options=options) as held:
            held.append(numbered(at, 40)).flush()
            at += 40
    assert_holds(s3, place, list(range(at)))


def test_options_come_from_the_environment(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("aws_access_key_id", "aws_secret_access_key", "aws_region", "aws_endpoint"):
        monkeypatch.setenv(name.upper(), s3.options[name])
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with memory.open(place, dim=DIM, cache_bytes=0) as held:
        held.append(numbered(0, 40)).flush()
    assert_holds(s3, place, list(range(40)))


def test_credentials_come_from_a_profile(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    lines = ["[default]", "aws_access_key_id = one", "aws_secret_access_key = two"]
    tmp_path.joinpath("credentials").write_text("\n".join(lines))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    options = {n: v for n, v in s3.options.items() if n not in credentials}
    with memory.open(place, dim=DIM, cache_bytes=0, storage_options=options) as held:
        held.append(numbered(0, 40)).flush()
    assert_holds(s3, place, list(range(40)))


credentials = ("aws_access_key_id", "aws_secret_access_key")


def test_what_cannot_be_reached_is_one_sentence(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else boto3 looks for those of the machine it is on.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for read_only in (False, True):
        others: Any = {"read_only": True} if read_only else {"dim": DIM}

        def fails(error: type[Exception], text: str, uri: str, options: Any) -> None:
            with pytest.raises(error, match=text) as raised:
                memory.open(uri, storage_options=options, **others)  # noqa: B023
            said = str(raised.value)
            assert "\n" not in said
            assert said.startswith("uri")
            assert "anything" not in said, "a secret"

        without = {n: v for n, v in s3.options.items() if n not in credentials}
        way_out = (
            "see to credentials, region and endpoint, which come from `storage_options` or the env"
        )
        fails(PermissionError, f"no credentials were found: .*{way_out}", place, without)
        half = {n: v for n, v in s3.options.items() if n != "aws_secret_access_key"}
        fails(ValueError, "storage_options: .*Missing SecretAccessKey", place, half)
        closed = {**s3.options, "aws_endpoint": "http://127.0.0.1:9"}
        fails(OSError, f"storage_options: {place}/journal cannot be .*{way_out}", place, closed)
        safe = {n: v for n, v in s3.options.items() if n != "allow_http"}
        fails(OSError, "an endpoint of http:// needs allow_http", place, safe)
        typo = {**s3.options, "aws_acess_key": "one"}
        fails(ValueError, "storage_options: .*'aws_acess_key' is not valid", place, typo)
        text = "there is no bucket 's3://another', .* make the bucket first, or correct `uri`"
        fails(OSError, text, "s3://another/life", s3.options)
    with pytest.raises(FileNotFoundError, match=f"uri: no memory at '{place}'"):
        opened(s3, place)


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://bucket/life",
        "memory://bucket/life",
        "s3://bucket/a?1",
        "s3://bucket/a#1",
        "s3://bucket/a%201",
        "s3://bucket/a//b",
        "s3://bucket/a/../b",
        "s3://bucket/./b",
    ],
)
def test_log_and_table_would_be_in_two_places(s3: S3Server, uri: str) -> None:
    s3.requests.clear()
    with pytest.raises(ValueError, match=r"^uri: expected a (place without|folder or one of)"):
        made(s3, uri)
    assert s3.requests == []


def test_places_with_odd_names(s3: S3Server, place: str) -> None:
    for name in ("a b", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "a+b&c=d", "~", "life.lance"):
        with made(s3, f"{place}/{name}") as held:
            held.append(numbered(0, 40)).flush()
        assert_holds(s3, f"{place}/{name}/", list(range(40)))
        found = {path.split("/")[2] for path in s3.objects(f"{folder_of(place)}/{name}")}
        assert found == {"journal", "chunks.lance"}


CHILD = """
import os, sys, json, warnings
import torch
from htm_pytorch import memory
warnings.simplefilter("ignore")
place, options = json.loads(sys.argv[1])
held = memory.open(place, storage_options=options, cache_bytes=0)
every = torch.arange(held.chunks)
child = os.fork()
if not child:
    found = []
    for call in (lambda: int(held.fetch(every).contents.sum()), held.refresh, held.info,
                 lambda: memory.open(place, storage_options=options, read_only=True),
                 lambda: held.append(torch.zeros(1, 1, 2))):
        try:
            found.append(str(call()))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    print(json.dumps(found), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0
held.append(torch.zeros(1, 1, 2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_told_rather_than_left_waiting(s3: S3Server, place: str) -> None:
    made(s3, place).append(numbered(0, 40)).close()
    run = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([place, s3.options])],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    fetched, *told, appended = json.loads(run.stdout)
    assert fetched == str(DIM * sum(range(40))) or "'spawn' or 'forkserver'" in fetched
    assert len(told) == 3
    assert all("fork" in said and "'spawn' or 'forkserver'" in said for said in told)
    assert "open for reading only" in appended
    assert opened(s3, place, read_only=True).steps == 41
