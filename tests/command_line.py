"""The command `htm`, run in the process of a test."""

import sys

import pytest

from htm_pytorch import cli


def htm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Run the command in this process and return what it exits with."""
    monkeypatch.setattr(sys, "argv", ["htm", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
        sys.exit(0)
    return left.value.code
