"""`htm completion`: what completes commands, their words and options in a shell."""

import contextlib
import importlib
import io
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
    script = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(script):
        tyro.cli(_any_of(commands), prog="htm", args=arguments, config=options)
    print(_with_words_and_files(script.getvalue()), end="")


_FILES = {
    # In all shells: where no word fits, a folder or file is meant.
    "    return completions\n\n\n": "    return completions or ['__TYRO_COMPLETE_FILES__']\n\n\n",
    # bash: `cur` holds the words before it, too.
    'COMPREPLY=($(compgen -f -- "$cur"))': "local IFS=$'\\n'; compopt -o filenames; "
    'COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))',
    # fish: the word that is being completed is not among its `words`.
    "set -l current (count $words)": "set -l current (count $words); "
    "set -a words (commandline -ct)",
}
"""What is replaced in a script of tyro's so that files are completed."""

COMMAND, WORDS = completion, ("bash", "zsh", "fish")


def main(arguments: list[str]) -> None:
    """Parse and print."""
    tyro.cli(completion, args=arguments, prog="htm completion")


def _with_words_and_files(script: str) -> str:
    """Return a script of tyro's that completes positional arguments, too, as tyro's does not."""
    changes = dict(_FILES)
    for name in cli.COMMANDS:
        known = f"'{name}': {{'description': '{name}', 'options': ["
        words = getattr(_module(name), "WORDS", ())
        # What is completed like a flag takes nothing, and leads into no other command.
        added = (f"{{'flags': ['{w}'], 'description': '{w}', 'type': 'flag'}}, " for w in words)
        changes[known] = known + "".join(added)
    for old, new in changes.items():
        script = script.replace(old, new, 1)
    return script


def _module(name: str) -> Any:
    return importlib.import_module(f"{cli.__name__}.{name}")


def _constructor(name: str) -> Any:
    """Return what takes the arguments of a command, as its file says."""
    module = _module(name)
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
