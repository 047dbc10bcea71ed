"""Several processes of one command: what their launcher tells them, and how it is called."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESTARTS = 3
"""How often a group whose process was killed goes on from its checkpoint by itself."""
_STATUS = "HTM_STATUS_FILE"
"""Variable of the file where a process that ends by itself leaves what it exits with."""


def is_first() -> bool:
    """Say whether this process is the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def restarted() -> bool:
    """Say whether the launcher has made the group again after one of it was gone."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def note_end(error: BaseException, status: int) -> None:
    """Tell the launcher that an error ended this process, and what it exits with.

    Not so where another process is gone: that one knows why, or was killed.
    """
    path = os.environ.get(_STATUS)
    if path is not None and not isinstance(error, ConnectionError):
        with contextlib.suppress(OSError):
            Path(path).write_text(str(status))


def launch(processes: int, arguments: list[str]) -> int:
    """Run `htm` with these arguments in so many processes; return what they exit with.

    Where one was killed, the group goes on from the checkpoint; where one ended by an error, it
    would come again, and the group ends.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "--max-restarts", "0"),
        *("-m", "htm_pytorch", *arguments),
    ]
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {_STATUS: str(status)}
        code = 0
        for _ in range(RESTARTS + 1):
            code = subprocess.run(command, env=environment, check=False).returncode
            if not code or code == 130 or status.exists():
                break
            print("htm: a process was killed; the group goes on", file=sys.stderr)
            command = [*command, *(() if "--resume" in command else ("--resume",))]
        return int(status.read_text()) if code and status.exists() else code
