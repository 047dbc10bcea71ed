"""Whatever torch's default device is: tensors say where they are made."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import htm_pytorch

ROOT = Path(htm_pytorch.__file__).parent
MAKE = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"}
MAKE |= {"randn", "randperm", "tensor", "zeros"}

# Every machine has the meta device. Constants that are kept are made under it, too.
SCRIPT = """
import sys
import torch

from htm_pytorch import ChunkedMemory, HTMAttention, HTMTransformer, memory

cpu = torch.device("cpu")
with cpu:
    x, past = torch.randn(2, 3, 16), torch.randn(2, 61, 16)
    layer = HTMAttention(16, 2, 2, 4, 8, recency=True, detach_memories=False)
    sizes = dict(topk_mems=2, mem_chunk_size=4, mem_chunks=8, window=4)
    model = HTMTransformer(16, 1, 2, 8, **sizes)
    is_first = torch.rand(2, 61) < 0.1
torch.set_default_device("meta")
past.requires_grad_()
for impl in ("auto", "blocked", "reference", "projected"):
    layer.impl = impl
    layer(x, past).sum().backward()
layer.impl = "auto"
layer(x, ChunkedMemory.from_steps(past, 4)).sum().backward()
model(past, None, is_first)[0].sum().backward()
with torch.no_grad():
    _, state = model(past, None, is_first)
    for _ in range(9):
        _, state = model(x[:, :1], state)
if len(sys.argv) > 1:
    place, one = sys.argv[1], past[:1].detach()
    with memory.open(place, dim=16, chunk_size=4) as held:
        held.append(one)
        held.flush()
        held.append(one[:, :7])
        assert layer(x[:1], held).device == cpu
    with memory.open(place, read_only=True) as held:
        assert layer(x[:1], held).device == cpu
        assert held.verify() == []
"""


@pytest.mark.parametrize("stored", [False, True])
def test_nothing_is_made_on_it(stored: bool, tmp_path: Path) -> None:
    if stored:
        pytest.importorskip("lance", reason="needs the extra: store")
    place = [str(tmp_path / "memory")] if stored else []
    run = [sys.executable, "-c", SCRIPT, *place]
    done = subprocess.run(run, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["check", "kernels", "memory", "nn", "ops", "report"])
def test_every_tensor_says_where_it_is_made(part: str) -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / part).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in MAKE) == ("torch", True)
        and not {keyword.arg for keyword in node.keywords} & {"device", None}
    ]
    assert not silent
