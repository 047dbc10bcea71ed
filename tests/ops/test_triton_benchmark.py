"""The benchmark for GPUs, where there is none: its rivals are right, and it says what it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import htm_pytorch

ROOT = Path(htm_pytorch.__file__).parents[1]


def run(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 1
    assert "needs a CUDA device, and there is none here" in done.stderr


def test_dry_run() -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install htm-pytorch[triton]")
    pytest.importorskip("numpy", reason="Triton's interpreter needs numpy")
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["acting", "readme", "training"]
    for line in lines:
        assert {"triton", "blocked", "varlen", "dense"} <= set(line.split())
