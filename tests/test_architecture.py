"""Imports inside the package go one way."""

import ast
from pathlib import Path

import pytest

import htm_pytorch

PACKAGE = "htm_pytorch"
ROOT = Path(htm_pytorch.__file__).parent

# { shapes, kernels } <- memory <- ops <- nn <- { check, integrations, rl <- report <- tasks },
# those <- cli, and envs <- tasks; lazy <- those whose names are imported when they are asked for.
# "__init__" is the public list.
MAY_IMPORT: dict[str, set[str]] = {
    "lazy": set(),
    "shapes": set(),
    "kernels": set(),
    "memory": {"shapes", "kernels"},
    "ops": {"shapes", "kernels", "memory"},
    "nn": {"shapes", "kernels", "memory", "ops"},
    "__init__": {"lazy", "shapes", "memory", "ops", "nn"},
    "check": {"lazy", "shapes", "kernels", "memory", "ops", "nn", "__init__"},
    "integrations": {"shapes", "memory", "ops", "nn"},
    "envs": set(),
    "rl": {"lazy", "shapes", "memory", "ops", "nn", "__init__"},
    "report": {"lazy", "shapes", "memory", "ops", "nn", "__init__", "rl"},
    "tasks": {"shapes", "memory", "ops", "nn", "__init__", "envs", "rl", "report"},
    "cli": {"memory", "check", "rl", "report", "tasks", "__init__"},
    "__main__": {"cli"},
}


def part_of(path: Path) -> str:
    """`nn/attention.py` belongs to `nn`, `cli.py` to `cli`."""
    return path.parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """Return the parts of the package that a file imports, those inside functions included."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: relative import; write it absolute")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".")[1:] for name in names if name.split(".")[0] == PACKAGE]
    # `from htm_pytorch import recall` takes a name from the public list, not a part.
    return {part[0] if part and part[0] in MAY_IMPORT else "__init__" for part in parts}


def wrong_imports(part: str, source: str) -> set[str]:
    return imported_parts(source) - MAY_IMPORT[part] - {part}


@pytest.mark.parametrize(
    "path", sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py")), ids=str
)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{path}: add the part {part!r} to the table, in its place"
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not wrong_imports(part, source), f"{path} ({part}) may import {MAY_IMPORT[part]}"


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("memory", "import htm_pytorch.nn.attention", {"nn"}),
        ("ops", "from htm_pytorch.nn import HTMAttention", {"nn"}),
        ("nn", "from htm_pytorch import rl", {"rl"}),
        ("nn", "from htm_pytorch import HTMAttention", {"__init__"}),
        ("envs", "def reset():\n    from htm_pytorch.rl import agent", {"rl"}),
        ("cli", "from htm_pytorch import memory, ops, rl", {"ops"}),
        ("rl", "from htm_pytorch.envs import ballet", {"envs"}),
        ("tasks", "from htm_pytorch.envs import ballet\nimport htm_pytorch_extra", set()),
    ],
)
def test_a_wrong_import_is_found(part: str, source: str, wrong: set[str]) -> None:
    assert wrong_imports(part, source) == wrong


def module_of(path: Path) -> str:
    """`nn/attention.py` is `htm_pytorch.nn.attention`."""
    return ".".join((PACKAGE, *path.with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path.relative_to(ROOT)): path for path in ROOT.rglob("*.py")}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else str(node.module) for name in inside}
    return names & MODULES.keys()


def test_no_file_is_imported_by_what_it_imports() -> None:
    left = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    kernels = ("kernels", "ops/triton_kernels")
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in ROOT.rglob("*.py")
    }
    assert not {k: n for k, n in lengths.items() if n > 400 and not k.startswith(kernels)}


def test_training_names_no_task() -> None:
    """Whatever is special about a task is in its file."""
    from htm_pytorch.tasks import TASKS

    for path in (ROOT / "rl").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for task in (*TASKS, "dancer", "minigrid", "popgym"):
            assert task not in source.lower(), f"{path} names {task}"


def names_used(source: str) -> set[str]:
    """Return the modules that a file imports, and what it calls by a dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
    return names


RUNS_CODE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load"}
RUNS_CODE |= {"np.load", "numpy.load", "eval", "exec", "yaml.load"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_that_is_read_can_run_code(path: Path) -> None:
    """SECURITY.md promises it."""
    assert not names_used(path.read_text(encoding="utf-8")) & RUNS_CODE


def test_what_would_run_code_is_found() -> None:
    source = "import pickle\nfrom torch import load\nx = eval(y)"
    assert names_used(source) & RUNS_CODE == {"pickle", "torch.load", "eval"}


def test_a_relative_import_is_found() -> None:
    with pytest.raises(ValueError, match="line 2: relative import"):
        imported_parts("import torch\nfrom .attention import HTMAttention")
