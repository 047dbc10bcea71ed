"""The benchmarks for GPUs, where there is none: all that they compare is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import htm_pytorch

ROOT = Path(htm_pytorch.__file__).parents[1]


def run(*options: str, script: str = "gpu.py") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_tune.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    done = run(script=script)
    assert done.returncode == 1
    assert "needs a CUDA device, and there is none here" in done.stderr


@pytest.fixture
def interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install htm-pytorch[triton]")
    pytest.importorskip("numpy", reason="Triton's interpreter needs numpy")


@pytest.mark.usefixtures("interpreter")
def test_dry_run() -> None:
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["acting", "readme", "training"]
    for line in lines:
        assert {"triton", "blocked", "varlen", "flash", "dense"} <= set(line.split())


@pytest.mark.usefixtures("interpreter")
def test_dry_run_of_tuning() -> None:
    done = run("--dry-run", script="gpu_tune.py")
    assert done.returncode == 0, done.stderr
    kernels = [line for line in done.stdout.splitlines() if line.startswith("==")]
    ways = [line for line in done.stdout.splitlines() if not line.startswith("==")]
    assert len(kernels) == 11
    # As it is, and cut in another way, right both times.
    assert len(ways) == 2 * len(kernels)
    assert all(way.endswith("right, not timed") for way in ways), ways
