"""Processes that learn as one: what is learned depends on the environments of all of them."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch.memory.files import load_tensors
from htm_pytorch.rl import launching
from htm_pytorch.rl.checkpoint import KIND
from htm_pytorch.rl.processes import World

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

OPTIONS: dict[str, Any] = {
    "num-envs": 8,
    "minibatches": 2,
    "steps": 16,
    "frames": 8 * 16 * 6,
    "checkpoint-every": 2,
    "dim": 16,
    "heads": 2,
    "mem-chunk-size": 4,
    "window": 4,
    "eval-episodes": 8,
}
FLAGS = ["--normalize-rewards", "--normalize-observations"]


def start(run_dir: Path, *more: str) -> "subprocess.Popen[str]":
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    walk = "tests.rl.worlds:Test/Walk-v0"
    return subprocess.Popen(
        [sys.executable, "-m", "htm_pytorch", "train", walk, *options, *FLAGS]
        + [f"--run-dir={run_dir}", *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(run_dir: Path) -> list[dict[str, float]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in found]


def assert_learned_the_same(run_dir: Path, other: Path) -> None:
    """Up to the order of sums."""
    for row, expected in zip(rows(run_dir), rows(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    ours, theirs = (
        load_tensors(path / "checkpoint.safetensors", KIND)[0] for path in (run_dir, other)
    )
    for name, part in ours.items():
        if name.startswith("agent"):
            torch.testing.assert_close(part, theirs[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    out, err = (process := start(run_dir)).communicate(timeout=300)
    assert process.returncode == 0, err
    return run_dir


def test_two_processes_learn_what_one_does(alone: Path, tmp_path: Path) -> None:
    out, err = (process := start(tmp_path / "run", "--processes=2")).communicate(timeout=300)
    assert process.returncode == 0, err
    assert len([line for line in out.splitlines() if line.startswith("return ")]) == 1
    assert_learned_the_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_the_group_goes_on_when_one_is_killed(alone: Path, tmp_path: Path) -> None:
    """The second of two processes ends itself once, without a word, in the middle."""
    code = """
import os, signal, sys
from htm_pytorch.rl import learner
from htm_pytorch.cli import main

learn, calls = learner.Learner.learn, 0

def once_killed(*given):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(*given)

learner.Learner.learn = once_killed
main()
"""
    (tmp_path / "command.py").write_text(code)
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + ["--max-restarts=1", str(tmp_path / "command.py"), "train"]
        + ["tests.rl.worlds:Test/Walk-v0", *options, *FLAGS, f"--run-dir={tmp_path}/run"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_learned_the_same(tmp_path / "run", alone)


def test_the_group_ends_with_the_error_of_one(tmp_path: Path) -> None:
    """An error would come again; only where a process was killed does the group go on."""
    odd = ["tests.rl.test_received:Test/Odd-v0", "--env-args", "fault=value", "late=20"]
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    done = subprocess.run(
        [sys.executable, "-m", "htm_pytorch", "train", *odd, *options]
        + [f"--run-dir={tmp_path}/run", "--processes=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "htm: env: Test/Odd-v0 raised a ValueError in its step: no such move" in done.stderr
    assert "goes on" not in done.stderr


def test_what_a_group_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file in which a process says that it ended by itself, and how often it is called."""
    calls: list[list[str]] = []
    planned: list[Any] = []

    def run(command: list[str], env: dict[str, str]) -> int:
        calls.append(command)
        ends = planned[min(len(calls), len(planned)) - 1]
        monkeypatch.setenv("HTM_STATUS_FILE", env["HTM_STATUS_FILE"])
        if isinstance(ends, BaseException):
            launching.note_end(ends, 2)
        return int(ends != 0)

    monkeypatch.setattr(launching, "_run", run)
    killed, gone = "killed", ConnectionError("another process is gone")
    for plan, code, count in (
        ([0], 0, 1),
        ([ValueError("no such move")], 2, 1),
        ([killed, gone, 0], 0, 3),
        ([killed, ValueError("no such move")], 2, 2),
        ([killed], 1, launching.RESTARTS + 1),
    ):
        calls.clear()
        planned[:] = plan
        assert launching.launch(2, ["train", "ballet"]) == code
        assert len(calls) == count
        assert ["--resume" in command for command in calls] == [False] + [True] * (count - 1)
        assert all(command.count("--resume") <= 1 for command in calls)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nobody_is_left_of_a_group_that_is_ended(how: signal.Signals, tmp_path: Path) -> None:
    """By whoever ends the command alone, as a scheduler does."""
    options = [f"--{name}={value}" for name, value in (OPTIONS | {"frames": 10**9}).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "htm_pytorch", "train", "tests.rl.worlds:Test/Walk-v0", *options]
        + [f"--run-dir={tmp_path}/run", "--processes=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = tmp_path / "run/metrics.csv"
    try:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        process.send_signal(how)
        code = process.wait(60)
        assert code == (128 + how if how == signal.SIGTERM else -how)
        # A group is gone when nobody of it can be asked.
        wait_until(lambda: not is_there(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(is_so: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_environments_are_shared_evenly() -> None:
    parts = [World(rank, 4).rows(12) for rank in range(4)]
    assert [list(part) for part in parts] == [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(4)]
    with pytest.raises(ValueError, match="num_envs: expected a multiple of the 4 processes, got 6"):
        World(0, 4).rows(6)


def test_one_process_sends_nothing() -> None:
    world = World()
    part = torch.ones(3)
    assert world.sum(part) is part and world.gather([1, 2]) == [1, 2]
    world.wait()
