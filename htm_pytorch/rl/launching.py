"""Several processes of one command: what their launcher tells them, and how it is called."""

import os
import subprocess
import sys

RESTARTS = 3
"""How often a group whose process was killed goes on from its checkpoint by itself."""


def is_first() -> bool:
    """Say whether this process is the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def restarted() -> bool:
    """Say whether the launcher has made the group again after one of it was gone."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch(processes: int, arguments: list[str]) -> int:
    """Run `htm` with these arguments in so many processes; return what they exit with."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "--max-restarts", str(RESTARTS)),
        *("-m", "htm_pytorch", *arguments),
    ]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.run(command, env=environment, check=False).returncode
