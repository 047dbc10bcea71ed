"""Processes that share a memory: started once, they run one function after another."""

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.conftest import poisoned

PATIENCE = 120
"""Seconds until a test gives up on a process."""


class World:
    """`ranks` processes with gloo; `groups` says which ranks form a process group, by name."""

    def __init__(self, ranks: int, folder: Path, groups: dict[str, list[int]]):
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(ranks)]
        self._pipes = [mine for mine, _ in pairs]
        self._groups = groups
        arguments = (ranks, str(folder / "store"), groups)
        self.processes = [
            context.Process(target=_serve, args=(theirs, rank, *arguments), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self.processes, pairs, strict=True):
            process.start()
            theirs.close()

    def run(self, case: Callable[..., Any], group: str, *args: Any) -> list[Any]:
        """Call `case(process group, *args)` on the ranks of a group; return what each returned.

        None stands for a process that has gone.
        """
        members = self._groups[group]
        for rank in members:
            self._pipes[rank].send((case, group, args))
        answers = [self._answer(rank) for rank in members]
        failures = [
            f"rank {r}:\n{text}" for r, (text, _) in zip(members, answers, strict=True) if text
        ]
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]

    def _answer(self, rank: int) -> tuple[str, Any]:
        if not self._pipes[rank].poll(PATIENCE):
            return f"no answer within {PATIENCE} s", None
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return "", None

    def close(self) -> list[int | None]:
        """End all processes; return their exit codes, None for one that had to be killed."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send(None)
        codes = []
        for process in self.processes:
            process.join(20)
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes


def _serve(pipe: Any, rank: int, ranks: int, store: str, members: dict[str, list[int]]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(0, 60)
    )
    groups = {name: dist.new_group(ranks) for name, ranks in members.items()}
    # As in the tests' own process: what was never written shows as NaN.
    torch.empty = poisoned(torch.empty)
    torch.empty_like = poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)
    while (message := pipe.recv()) is not None:
        case, group, args = message
        torch.manual_seed(0)
        try:
            pipe.send(("", case(groups[group], *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()
