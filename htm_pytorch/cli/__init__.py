"""`htm`: parses, calls, prints. Each command is a file, imported when it is called."""

import importlib
import os
import sys

COMMANDS = ("train", "eval", "report", "check", "memory")
_OF_EXTRAS = {
    *("filelock", "gymnasium", "matplotlib", "numpy", "PIL", "safetensors", "tqdm", "tyro"),
    *("lance", "obstore", "pyarrow"),
}
"""Modules that the extras `rl` and `store` bring."""


def train() -> None:
    """Train an agent on a task of ours or on any environment of Gymnasium."""


def eval() -> None:
    """Judge a trained agent on unseen episodes."""


def report() -> None:
    """Show what a trained agent recalled in an unseen episode, as one HTML file."""


def check() -> None:
    """Compare the layer on this machine with the plain reference: output and gradients."""


def memory() -> None:
    """Look after a memory on disk: info, verify, save, compact, index, forget, repair."""


def main() -> None:
    """Run the command line."""
    try:
        import tyro
    except ImportError as error:
        sys.exit(f"htm: needs the extra `rl` or `store`, pip install '.[rl]' ({error})")
    name, *arguments = sys.argv[1:] or [""]
    try:
        if name in ("train", "eval", "report") and not {"", os.getcwd()} & set(sys.path):
            # Environments of the user's own, as `python -m` finds them; nothing is hidden by them.
            sys.path.append(os.getcwd())
        if name in COMMANDS:
            importlib.import_module(f"{__name__}.{name}").main(arguments)
            return
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in (train, eval, report, check, memory)},
            prog="htm",
            description="Agents that remember, the layer, and memories on disk.",
        )
    except ImportError as error:
        # Of any other module, where it was asked for says more than a line of ours.
        if name != "memory" and (error.name or "").partition(".")[0] not in _OF_EXTRAS:
            raise
        sys.exit(f"htm: `htm {name}` needs an extra, pip install '.[rl]' ({error})")
    except (ValueError, OSError) as error:
        sys.exit(f"htm: {error}")
    except KeyboardInterrupt:
        print("htm: stopped; htm train --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
