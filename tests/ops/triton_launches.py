"""Launches that were interpreted, compiled for a GPU that need not be here.

The interpreter takes what a compiler refuses. So the tests note what they launch, and this, run as
`python -m tests.ops.triton_launches FILE` where kernels are not interpreted, compiles it.
"""

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
HOPPER = 90


class Launch(NamedTuple):
    """What Triton specialises a kernel by: of tensors the dtype, of numbers what divides them."""

    module: str
    kernel: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]


def _special(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if isinstance(argument, int) and argument != 1:
        return 16 if argument % 16 == 0 else 3
    return argument


@contextmanager
def noted(seen: dict[Launch, str]) -> Iterator[None]:
    """Add every launch that is interpreted in here, with the test that was the first to make it."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        special = tuple(_special(argument) for argument in arguments)
        launch = Launch(self.fn.__module__, self.fn.__name__, special, tuple(keywords.items()))
        seen.setdefault(launch, os.environ.get("PYTEST_CURRENT_TEST", ""))
        return run(self, *arguments, grid=grid, warmup=warmup, **keywords)

    InterpretedFunction.run = note
    try:
        yield
    finally:
        InterpretedFunction.run = run


def compile_all(seen: dict[Launch, str], folder: Path) -> str:
    """Compile them in a process of its own; return what was wrong with any."""
    path = folder / "launches.pickle"
    path.write_bytes(pickle.dumps(seen))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_launches", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=kept,
    )
    return done.stdout if done.returncode == 1 else done.stderr if done.returncode else ""


def _compile(launch: Launch) -> str:
    """Return what is wrong, in one line."""
    from benchmarks.triton_builds import SHARED_LIMIT, compiled

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    arguments = [
        torch.empty(1, dtype=argument, device="meta")
        if isinstance(argument, torch.dtype)
        else argument
        for argument in launch.arguments
    ]
    try:
        shared = compiled(kernel, arguments, dict(launch.keywords), HOPPER).metadata.shared
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[-1]}"
    return f"{shared} bytes of shared memory" if shared > SHARED_LIMIT[HOPPER] else ""


if __name__ == "__main__":
    launches = pickle.loads(Path(sys.argv[1]).read_bytes())
    wrong = False
    for launch, test in launches.items():
        if problem := _compile(launch):
            wrong = True
            print(launch.kernel, launch.keywords, test, problem, sep=" | ")
    sys.exit(wrong)
