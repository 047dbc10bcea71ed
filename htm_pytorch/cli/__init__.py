"""`htm`: parses, calls, prints. Each command is a file, imported when it is called.

All of them exit with 0; or with 1 where they failed, or found something wrong; with 2 where the
arguments are wrong, or name what is not there; 130 after Ctrl-C, 141 when nobody reads any more.
"""

import difflib
import importlib
import io
import itertools
import os
import select
import shutil
import sys
from collections.abc import Iterable

COMMANDS = {
    "train": "Train an agent on a task of ours or on any environment of Gymnasium.",
    "eval": "Judge a trained agent on unseen episodes.",
    "report": "Show what a trained agent recalled in an unseen episode, as one HTML file.",
    "check": "Compare the layer on this machine with the plain reference: output and gradients.",
    "memory": "Look after a memory: info, verify, save, show, compact, index, forget, repair.",
    "info": "Say what is installed here, and what `auto` takes on each device.",
    "completion": "Print what completes `htm` in bash, zsh or fish.",
}
"""The files of this folder, and what each does."""

_LEAST_COLUMNS = 40
_NEEDS_NO_EXTRA = {"info"}
_OF_EXTRAS = {
    *("filelock", "gymnasium", "matplotlib", "numpy", "PIL", "safetensors", "tqdm", "tyro"),
    *("lance", "obstore", "pyarrow"),
}
"""Modules that the extras `rl` and `store` bring."""


def main() -> None:
    """Run the command line: data to stdout, messages to stderr, the status that shells expect."""
    _have_streams()
    arguments = sys.argv[1:]
    is_debugging = "--debug" in arguments
    if is_debugging:
        arguments.remove("--debug")
    name = arguments[0] if arguments else ""
    try:
        try:
            _run(arguments)
        finally:
            # Here, since at exit nobody could be silent about a reader that has gone.
            sys.stdout.flush()
    except KeyboardInterrupt:
        if is_debugging:
            raise
        how = "; the same command with --resume goes on from the last checkpoint, if there is one"
        how = how if name == "train" else ""
        print(f"htm: stopped{how}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            sys.exit(141)
        if is_debugging or not (told := _told(name, error)):
            raise
        print(f"htm: {told}", file=sys.stderr)
        sys.exit(status_of(error))


def status_of(error: BaseException) -> int:
    """Return what the command exits with that ends by this error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if _is_usage(error) else 1


def refuse_unknown(name: str, commands: Iterable[str], prog: str) -> None:
    """Exit with status 2 unless there is such a command, and name the one that was meant."""
    if name in commands:
        return
    near = difflib.get_close_matches(name, commands, 1)
    meant = (
        f"did you mean `{prog} {near[0]}`?" if near else f"`{prog} --help` lists those there are"
    )
    print(f"{prog}: no command {name!r}; {meant}", file=sys.stderr)
    sys.exit(2)


def _run(arguments: list[str]) -> None:
    name, *rest = arguments or ["--help"]
    for before, empty in itertools.pairwise(("htm", *arguments)):
        if not empty or (empty.startswith("--") and empty.endswith("=")):
            raise ValueError(
                f"{(empty or before).strip('-=')}: expected something, got nothing in "
                f"{before!r} {empty!r}; is a shell variable unset?"
            )
    if name in ("-h", "--help"):
        print(_help())
        return
    if name == "--version":
        from htm_pytorch import __version__

        print(f"htm_pytorch {__version__}")
        return
    refuse_unknown(name, COMMANDS, "htm")
    if name not in _NEEDS_NO_EXTRA:
        try:
            import tyro  # noqa: F401
        except ImportError as error:
            sys.exit(f"htm: needs the extra `rl` or `store`, pip install '.[rl]' ({error})")
    if shutil.get_terminal_size().columns < _LEAST_COLUMNS:
        # In fewer, what draws the help does not end.
        os.environ["COLUMNS"] = str(_LEAST_COLUMNS)
    if name in ("train", "eval", "report"):
        if not {"", os.getcwd()} & set(sys.path):
            # Environments of the user's own, as `python -m` finds them; nothing is hidden by them.
            sys.path.append(os.getcwd())
        _hush_pygame()
    importlib.import_module(f"{__name__}.{name}").main(rest)


def _have_streams() -> None:
    """Let nothing be lost for want of an output, or of a letter in its encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Closed by whoever has started this.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _hush_pygame() -> None:
    """Let environments made with pygame not greet, nor look for a display that is not there."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def _help() -> str:
    """Return what there is; by hand, since nothing else could be as quick."""
    return "\n".join(
        (
            "usage: htm [-h] [--version] COMMAND [options]",
            "",
            "Agents that remember, the layer, and memories on disk.",
            "",
            *(f"  {name:12} {does}" for name, does in COMMANDS.items()),
            "",
            "`htm COMMAND --help` says what it takes; --debug shows where an error comes from.",
            "exit status: 0; 1 where it failed or found something wrong; 2 for wrong arguments.",
        )
    )


def _told(name: str, error: Exception) -> str:
    """Return an error as a line for the user; nothing if a traceback says more."""
    if isinstance(error, ImportError):
        # Of any other module, where it was asked for says more than a line of ours.
        if name != "memory" and (error.name or "").partition(".")[0] not in _OF_EXTRAS:
            return ""
        return f"`htm {name}` needs an extra, pip install '.[rl]' ({error})"
    return str(error) if isinstance(error, ValueError | OSError) else ""


def _is_usage(error: BaseException) -> bool:
    """Say whether it is the arguments that are wrong.

    Of the kinds of ValueError that is the plain one; an OSError without a number is our own.
    """
    if isinstance(error, FileNotFoundError | FileExistsError):
        return error.errno is None
    return type(error) is ValueError


def _has_no_reader() -> bool:
    """Say whether it is the output that nobody reads any more, and let go of it."""
    poll = getattr(select, "poll", None)
    if poll is None:
        return False
    waiting = poll()
    waiting.register(sys.stdout, 0)
    if not waiting.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
