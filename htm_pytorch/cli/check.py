"""`htm check`: the layer beside the plain reference."""

import sys
from typing import Annotated

import tyro

from htm_pytorch.check import CheckConfig


def compare(config: Annotated[CheckConfig, tyro.conf.arg(name="")]) -> None:
    """Compare the layer on this machine with the plain reference: output and gradients."""
    from htm_pytorch.check import check

    report = check(config)
    print(report)
    if not report.ok:
        sys.exit(1)


COMMAND = compare


def main(arguments: list[str]) -> None:
    """Parse and compare."""
    options = (tyro.conf.FlagCreatePairsOff,)
    tyro.cli(compare, args=arguments, prog="htm check", config=options)
