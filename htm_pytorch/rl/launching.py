"""Several processes of one command: what their launcher tells them, and how it is called."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESTARTS = 3
"""How often a group whose process was killed goes on from its checkpoint by itself."""
PATIENCE = 30
"""Seconds that a group has to end when it is asked to."""
_LAUNCHER = "HTM_LAUNCHER"
"""Variable of the number of the process that launched the group."""
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


def follow_launcher() -> None:
    """End this process when the one that launched its group is gone, whatever ended it."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or os.name != "posix":
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and _lives(int(launcher)):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def launch(processes: int, arguments: list[str]) -> int:
    """Run `htm` with these arguments in so many processes; return what they exit with.

    Where one was killed, the group goes on from the checkpoint; where one ended by an error, it
    would come again, and the group ends. It also ends with this process.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "--max-restarts", "0"),
        *("-m", "htm_pytorch", *arguments),
    ]
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        told = {_STATUS: str(status), _LAUNCHER: str(os.getpid())}
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | told
        code = _run(command, environment)
        for _ in range(RESTARTS):
            if not code or code == 130 or status.exists():
                break
            print("htm: a process was killed; the group goes on", file=sys.stderr)
            command = [*command, *(() if "--resume" in command else ("--resume",))]
            code = _run(command, environment)
        return int(status.read_text()) if code and status.exists() else code


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; a signal that asks this process to end is passed on before."""

    def end(signum: int, _: object) -> None:
        raise SystemExit(128 + signum)

    asked = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {one: signal.signal(one, end) for one in asked}
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        process.wait()
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
