"""The python of docs/report.md runs as it stands, each block by itself."""

import re
from pathlib import Path
from typing import Any

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "memory.open" in block:
        pytest.importorskip("lance")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "report.md", "exec"), names)
    (page,) = tmp_path.glob("*.html")
    assert page.name in block and page.stat().st_size < 60_000


def test_all_blocks_are_found() -> None:
    assert len(BLOCKS) == TEXT.count("```python") == 3
