"""The public names are one list, and need torch alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import htm_pytorch

PUBLIC = {"ChunkedMemory", "HTMAttention", "HTMBlock", "HTMTransformer", "Recall", "recall"}
# Not numpy: torch imports it where it is there.
OPTIONAL = {
    "gymnasium",
    "lance",
    "matplotlib",
    "pyarrow",
    "rich",
    "safetensors",
    "tensorboard",
    "tensordict",
    "torchrl",
    "tqdm",
    "transformers",
    "triton",
    "tyro",
}

BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
"""

FORWARD = """
import torch
import htm_pytorch

attend = htm_pytorch.HTMAttention(dim=16, heads=2, dim_head=8, topk_mems=2, mem_chunk_size=4)
out = attend(torch.randn(2, 3, 16), torch.randn(2, 21, 16))
out.sum().backward()
assert out.shape == (2, 3, 16), out.shape
assert out.isfinite().all()
"""

# Torch is imported first: what it pulls in by itself is not ours.
LOADED = f"""
import sys
import torch

before = set(sys.modules)
import htm_pytorch

print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & {OPTIONAL!r}))
"""


def run_python(code: str, directory: Path) -> str:
    """Run code in a fresh interpreter that imports the same package as this one."""
    environment = os.environ | {"PYTHONPATH": str(Path(htm_pytorch.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_are_the_documented_ones() -> None:
    assert sorted(htm_pytorch.__all__) == list(htm_pytorch.__all__)
    assert set(htm_pytorch.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(htm_pytorch, name).__doc__


def test_forward_needs_no_optional_package(tmp_path: Path) -> None:
    run_python(BLOCK + FORWARD, tmp_path)


def test_the_block_blocks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ImportError: safetensors is blocked"):
        run_python(BLOCK + "import safetensors.torch", tmp_path)


def test_import_loads_no_optional_package(tmp_path: Path) -> None:
    assert run_python(LOADED, tmp_path) == ""
