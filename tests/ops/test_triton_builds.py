"""Every Triton kernel in the main shapes, compiled for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import htm_pytorch

pytest.importorskip("triton", reason="needs Triton: pip install htm-pytorch[triton]")
pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton without NVIDIA's assembler")

ROOT = Path(htm_pytorch.__file__).parents[1]


SHAPES = [
    *("readme", "agent", "small"),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("large", "long", "heads")),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_fits(shape: str, tmp_path: Path) -> None:
    out = tmp_path / "builds.json"
    script = [sys.executable, "benchmarks/triton_builds.py", "--shape", shape, "--jobs", "1"]
    done = subprocess.run(
        [*script, "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # A process of its own: in this one, kernels may be interpreted.
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(ROOT)},
    )
    assert out.exists(), done.stderr
    builds = json.loads(out.read_text())
    # Forward and backward, both dtypes, both architectures.
    assert len(builds) >= 15 * 4
    assert {build["sm"] for build in builds} == {80, 90}
    assert not [build for build in builds if not build["fits"]]
    assert done.returncode == 0
