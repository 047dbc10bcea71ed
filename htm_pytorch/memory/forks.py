"""What becomes of stored memories in a process that is forked: they are open for reading only.

A fork copies neither the threads of an engine nor locks on files. So nothing changes while it
happens, and the child lets go of what belongs to its parent, without closing it.
"""

import contextlib
import os
import weakref
from typing import Any, Protocol


class Watched(Protocol):
    """What must not be in the middle of something when its process is forked."""

    mutex: Any

    def inherit(self) -> None:
        """Go on in the child."""
        ...


_alive: "weakref.WeakSet[Watched]" = weakref.WeakSet()
_held: list[Any] = []


def watch(memory: Watched) -> None:
    """Mind a memory when this process is forked, as long as it is used."""
    _alive.add(memory)


def _before() -> None:
    # Many memories before those among them: the order in which they are always taken.
    for watched in sorted(_alive, key=lambda one: hasattr(one, "names"), reverse=True):
        watched.mutex.acquire()
        _held.append(watched.mutex)


def _in_parent() -> None:
    while _held:
        with contextlib.suppress(RuntimeError):
            _held.pop().release()


def _in_child() -> None:
    _held.clear()
    for watched in list(_alive):
        watched.inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
