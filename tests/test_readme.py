"""The python of README.md runs as it stands, each block by itself."""

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NEEDS = {"gymnasium": "gymnasium", ".save(": "safetensors", "memory.open": "lance"}
SHAPE = re.compile(r"^ *(\w+).* = .*# (\([\d, ]+\))$", re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word, package in NEEDS.items():
        if word in block:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    for name, shape in SHAPE.findall(block):
        assert str(tuple(names[name].shape)) == shape


def test_blocks_and_the_shapes_in_their_comments_are_found() -> None:
    assert len(BLOCKS) == README.count("```python") == 9
    assert sum(len(SHAPE.findall(block)) for block in BLOCKS) == 5


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (root / link).exists(), link
