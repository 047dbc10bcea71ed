"""README.md and docs/: their python runs, their links lead somewhere, their commands parse."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *ROOT.glob("*.md"),
        *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
    )
}
FENCE = re.compile(r"^```(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHAPE = re.compile(r"^ *(\w+).* = .*# (\([\d, ]+\))$", re.MULTILINE)
NEEDS = {
    "gymnasium": "gymnasium",
    ".save(": "safetensors",
    "train(": "matplotlib",
    "memory.open": "lance",
    "torchrl": "torchrl",
    "transformers": "transformers",
}


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The blocks of a language, and the lines that they begin on."""
    found = (match for match in FENCE.finditer(text) if match[1] == language)
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found]


RUN = [page for page, text in PAGES.items() if blocks(text, "python")]


@pytest.mark.parametrize("page", RUN)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom; each block of the README also by itself."""
    text = PAGES[page]
    for word, package in NEEDS.items():
        if any(word in block for _, block in blocks(text, "python")):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for line, block in blocks(text, "python"):
        if page == "README.md":
            names = {}
        exec(compile("\n" * line + block, ROOT / page, "exec"), names)
        for name, shape in SHAPE.findall(block):
            assert str(tuple(names[name].shape)) == shape, f"{page}, the block of line {line}"


def test_python_and_the_shapes_in_its_comments_are_found() -> None:
    assert len(RUN) >= 7 and "README.md" in RUN
    every = [block for text in PAGES.values() for _, block in blocks(text, "python")]
    assert len(every) == sum(text.count("```python") for text in PAGES.values())
    assert sum(len(SHAPE.findall(block)) for block in every) >= 10


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Also to a heading of a page, by the name that GitHub and the site give it."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(FENCE, "", PAGES[page])):
        place, _, heading = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(slug, headings), f"{page}: {link}"


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_site() -> None:
    index = PAGES["docs/index.md"]
    listed = {
        f"docs/{line}.md"
        for _, directive in blocks(index, "{toctree}")
        for line in directive.split()
    }
    pages = {page for page in PAGES if page.startswith("docs/")} - {"docs/index.md"}
    assert pages <= listed


def test_every_public_name_is_documented_once() -> None:
    pytest.importorskip("gymnasium")
    pattern = re.compile(r"^\.\. auto\w+:: (\S+)\.(\w+)(?:\(\))?$", re.MULTILINE)
    documented: dict[str, int] = {}
    for page, text in PAGES.items():
        for _, name in pattern.findall(text):
            key = f"{Path(page).stem}.{name}"
            documented[key] = documented.get(key, 0) + 1
    assert set(documented.values()) == {1}
    at_top = set(importlib.import_module("htm_pytorch").__all__)
    for part in ("htm_pytorch", "memory", "nn", "ops", "rl", "envs", "report", "check"):
        module = part if part == "htm_pytorch" else f"htm_pytorch.{part}"
        names = set(importlib.import_module(module).__all__)
        wanted = names if part == "htm_pytorch" else names - at_top
        assert {key.split(".")[1] for key in documented if key.startswith(f"{part}.")} == wanted


COMMANDS = [
    (page, command)
    for page, text in PAGES.items()
    for _, block in blocks(text, "bash")
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("htm train ")
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_options_of_htm_train_exist(page: str, command: str) -> None:
    pytest.importorskip("tyro")
    train = importlib.import_module("htm_pytorch.cli.train")

    assert train.parse(shlex.split(command, comments=True)[2:]).env
