"""The command `htm`, run in the process of a test."""

import sys

import pytest

from htm_pytorch import cli


def htm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Run the command in this process and return what it exits with; a line stands for 1."""
    monkeypatch.setattr(sys, "argv", ["htm", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
        sys.exit(0)
    return left.value.code


def assert_line(
    capsys: pytest.CaptureFixture[str], status: object, message: str, expected: int = 2
) -> None:
    """Hold what was printed to stderr to one line of `htm`, with the message; and its status."""
    printed = capsys.readouterr().err
    assert printed.startswith("htm: ") and printed.count("\n") == 1
    assert message in printed
    assert status == expected
