"""`htm completion`: what completes commands and options in a shell."""

import importlib
from typing import Annotated, Any, Literal, Union

import tyro

from htm_pytorch import cli


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Print what completes `htm` in a shell.

    bash: eval "$(htm completion bash)" in ~/.bashrc.
    zsh:  htm completion zsh > a folder of $fpath, as _htm.
    fish: htm completion fish > ~/.config/fish/completions/htm.fish

    Args:
        shell: for which shell.
    """
    commands = {name: _constructor(name) for name in cli.COMMANDS}
    arguments = ["--tyro-print-completion", shell]
    options = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    tyro.cli(_any_of(commands), prog="htm", args=arguments, config=options)


COMMAND = completion


def main(arguments: list[str]) -> None:
    """Parse and print."""
    tyro.cli(completion, args=arguments, prog="htm completion")


def _constructor(name: str) -> Any:
    """Return what takes the arguments of a command, as its file says."""
    module = importlib.import_module(f"{cli.__name__}.{name}")
    if (command := getattr(module, "COMMAND", None)) is not None:
        return command

    def nothing() -> None: ...

    def one_of(command: Any) -> None: ...

    if (commands := getattr(module, "COMMANDS", None)) is None:
        return nothing
    one_of.__annotations__["command"] = _any_of(commands)
    return one_of


def _any_of(commands: dict[str, Any]) -> Any:
    named = tyro.conf.subcommand
    # A union made of a list, which `|` cannot.
    return Union[  # noqa: UP007
        tuple(
            Annotated[Any, named(name, prefix_name=False, constructor=command)]
            for name, command in commands.items()
        )
    ]
