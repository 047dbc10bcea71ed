"""The python of the pages in docs runs as it stands, the blocks of a page one after another."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {
    "torchrl.md": ("torchrl", "gymnasium"),
    "training_sequence_models.md": (),
    "transformers.md": ("transformers", "lance"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    page = (DOCS / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("```python") > 0
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", NEEDS)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", (DOCS / name).read_text("utf-8")):
        assert (DOCS / link).exists(), link
