"""Lance, the engine of the table: loaded once, used by one process, its errors in our words."""

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.log import REPAIR

_process: int | None = None
"""The process that used the engine first."""


class ForkedError(RuntimeError):
    """The engine was used before this process was forked, and would stop it now and then."""


def load_engine() -> None:
    """Import the engine, which an interrupt must not do by half: it can be loaded only once.

    Raises:
        ImportError: it is not installed.
    """
    if "lance" in sys.modules:
        return
    failed: list[BaseException] = []

    def load() -> None:
        try:
            importlib.import_module("lance")
        except BaseException as error:
            failed.append(error)

    # In a thread of its own, which no signal reaches.
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    if failed:
        raise ImportError(
            f"memory.open needs the extra `store` ({failed[0]}); from a checkout: pip install "
            "'.[store]'"
        ) from failed[0]


def check_process() -> None:
    """Raise a ForkedError in a fork of the process that used the engine first."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise ForkedError(
            f"memory: process {_process}, of which this is a fork, had read stored chunks before, "
            "and what reads them does not survive a fork; start processes by 'spawn' or "
            "'forkserver' (of a DataLoader: multiprocessing_context), or read nothing before"
        )


def loaded_lance() -> Any:
    """Return the engine's module, for use in this process."""
    import lance

    check_process()
    return lance


def is_damage(error: BaseException) -> bool:
    """Whether an error is the engine's; where it gives up, it raises what is no Exception."""
    if isinstance(error, ForkedError):
        return False
    if isinstance(error, OSError | ValueError | RuntimeError | ArithmeticError | LookupError):
        return True
    return type(error).__module__ == "pyo3_runtime"


def _raise_interrupt(error: BaseException) -> None:
    """Raise a Ctrl-C that the engine has made an error of its own."""
    if isinstance(
        error, ValueError | RuntimeError | OSError
    ) and "External error: KeyboardInterrupt" in str(error):
        raise KeyboardInterrupt from error


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Where the engine reads: say `what` cannot be read, and what to do."""
    try:
        yield
    except MemoryFileError:
        raise
    except BaseException as error:
        _raise_interrupt(error)
        if not is_damage(error):
            raise
        raise MemoryFileError(
            f"{what}: cannot be read ({error}); where the writer has compacted meanwhile, "
            f"`refresh()` or open it again; where a file is damaged, {REPAIR}"
        ) from error


@contextlib.contextmanager
def writing(uri: str) -> Iterator[None]:
    """Where the engine writes: say that the table at `uri` cannot be written."""
    try:
        yield
    except BaseException as error:
        _raise_interrupt(error)
        is_of_the_system = isinstance(error, OSError) and error.errno is not None
        if is_of_the_system or not is_damage(error):
            raise
        raise OSError(f"{uri!r} cannot be written ({error}); nothing was changed") from error
