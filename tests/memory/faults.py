"""Errors, or the end of the process, at the places where a stored memory reads and writes."""

import contextlib
import importlib
import os
import pkgutil
import signal
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from htm_pytorch import memory
from htm_pytorch.memory import catalog, folder_log, log_file, table, tail, versions

OURS: tuple[ModuleType, ...] = tuple(
    importlib.import_module(f"htm_pytorch.memory.{found.name}")
    for found in pkgutil.iter_modules(memory.__path__)
)
METHODS: dict[str, tuple[type, str]] = {
    "write": (folder_log.FolderLog, "write"),
    "read": (folder_log.FolderLog, "read"),
    "purge": (log_file.LogFile, "purge"),
    "entry": (tail.Tail, "append"),
    "follow": (tail.Tail, "follow"),
    "set_aside": (tail.Tail, "set_aside"),
    "append": (versions.Versions, "append"),
    "join": (versions.Versions, "join"),
    "without": (versions.Versions, "without"),
    "build_index": (versions.Versions, "build_index"),
    "extend_index": (versions.Versions, "extend_index"),
    "clean": (versions.Versions, "clean"),
    "empty": (versions.Versions, "empty"),
    "extended": (catalog.Catalog, "extended"),
    "rows": (table.Table, "rows"),
    "take": (table.Table, "take"),
}
FUNCTIONS = {
    "sync_file": "sync_file",
    "sync_folder": "sync_folder",
    # Everything of a transaction but for its end.
    "put": "put_changes",
    "sync_data": "sync_data",
    "make": "make",
    "remove_others": "remove_others",
}
SEAMS = (*METHODS, *FUNCTIONS)


class Fault(NamedTuple):
    """An error that is raised at one call of a function, or at that and all later ones."""

    seam: str
    after: bool
    """Whether the function has done its work by then."""
    call: int
    """Counted from 0."""
    stays: bool
    error: type[BaseException]


def everywhere(patch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Put a value in the place of a name in every module of ours that has it."""
    owners = [module for module in OURS if name in vars(module)]
    assert owners, name
    for owner in owners:
        patch.setattr(owner, name, value)


@contextlib.contextmanager
def failing(fault: Fault) -> Iterator[None]:
    """Let the error be raised inside."""

    def strike(call: int) -> None:
        if call == fault.call or (fault.stays and call > fault.call):
            raise fault.error(f"{'after' if fault.after else 'at'} a call of {fault.seam}")

    with pytest.MonkeyPatch.context() as patch:
        _wrap(patch, fault.seam, fault.after, strike)
        yield


def die_at(seam: str, after: bool, call: int) -> None:
    """Let this process be killed at a call of a function, counted from 0."""

    def strike(number: int) -> None:
        if number == call:
            os.kill(os.getpid(), signal.SIGKILL)

    _wrap(pytest.MonkeyPatch(), seam, after, strike)


def _wrap(patch: pytest.MonkeyPatch, seam: str, after: bool, strike: Callable[[int], None]) -> None:
    calls = 0

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            call = calls - 1
            if not after:
                strike(call)
            result = original(*args, **kwargs)
            if after:
                strike(call)
            return result

        return struck

    if seam in METHODS:
        owner, name = METHODS[seam]
        patch.setattr(owner, name, wrapped(getattr(owner, name)))
    else:
        name = FUNCTIONS[seam]
        original = next(vars(module)[name] for module in OURS if name in vars(module))
        everywhere(patch, name, wrapped(original))
