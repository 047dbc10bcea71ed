"""When Triton is taken, and that nothing loads it before. These tests need no Triton."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import htm_pytorch
from htm_pytorch import ChunkedMemory, recall
from htm_pytorch.ops import engines, fused_triton
from htm_pytorch.ops.call import Call
from tests import conftest

ROOT = Path(htm_pytorch.__file__).parents[1]
CUDA = torch.device("cuda", 0)


def arguments(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    memory = ChunkedMemory.from_chunks(torch.zeros(1, 3, 4, 6, dtype=dtype, device=device))
    route = torch.zeros(1, 2, 6, dtype=dtype, device=device)
    return route, route[:, :, None], memory, 2


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(fused_triton, "is_installed", lambda: True)


def test_named_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_triton, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^impl: 'triton' expects tensors on a CUDA .* got cpu$"):
        recall(*arguments(), impl="triton")


def test_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_triton, "IS_INTERPRETED", True)
    monkeypatch.setattr(fused_triton, "is_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"not installed: from a checkout: pip install '.\[tri"):
        recall(*arguments(), impl="triton")


@pytest.mark.usefixtures("hopper")
class TestAuto:
    @staticmethod
    def takes_triton(dtype: torch.dtype = torch.float32) -> bool:
        _, _, memory, _ = arguments(dtype)
        on_gpu: Any = SimpleNamespace(device=CUDA, dtype=dtype)
        call = Call.of(on_gpu, memory, 2, None, None, "auto")
        return engines.choose("auto", call) is engines.TRITON

    def test_not_on_a_device_that_it_was_not_tested_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for proven in ((), ("8.0",)):
            monkeypatch.setattr(fused_triton, "PROVEN", frozenset(proven))
            assert not self.takes_triton()

    def test_on_one_that_it_was_tested_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused_triton, "PROVEN", frozenset({"9.0"}))
        assert self.takes_triton()
        # What it cannot do, others do.
        assert not self.takes_triton(torch.float64)
        monkeypatch.setattr(fused_triton, "is_installed", lambda: False)
        assert not self.takes_triton()

    def test_the_record(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        path.write_text('{"8.0": {}}')
        monkeypatch.setattr(fused_triton, "RECORD", path)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(fused_triton.importlib.metadata, "version", lambda name: "3.9.0")
        fused_triton.record(CUDA)
        known = json.loads(path.read_text())
        assert known.keys() == {"8.0", "9.0"}
        assert known["9.0"] == {"device": "a GPU", "torch": torch.__version__, "triton": "3.9.0"}


def test_the_committed_record_names_devices() -> None:
    for capability, entry in json.loads(fused_triton.RECORD.read_text()).items():
        assert capability.replace(".", "").isdigit()
        assert entry.keys() == {"device", "torch", "triton"}


CPU_ONLY = """
import sys
import torch
from htm_pytorch import HTMAttention

layer = HTMAttention(6, 2, 2, 4, 3)
layer(torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 17, 6)).sum().backward()
print(sorted(name for name in sys.modules if name.partition(".")[0] == "triton"))
"""


def test_the_cpu_never_imports_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CPU_ONLY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


class TestWhenTheDeviceIsRecorded:
    @staticmethod
    def finish(
        monkeypatch: pytest.MonkeyPatch,
        passed: Iterable[str],
        skipped: Iterable[str] = (),
        *,
        exitstatus: int = 0,
        keyword: str = "",
        arguments: tuple[str, ...] = ("tests/ops", "tests/nn"),
    ) -> bool:
        """Whether a session of tests that ended so writes the record."""
        stats = {
            outcome: [SimpleNamespace(nodeid=f"{name}::test[cuda]") for name in names]
            for outcome, names in (("passed", passed), ("skipped", skipped))
        }
        config = SimpleNamespace(
            args=arguments,
            getoption={"--record-device": True, "keyword": keyword}.get,
            pluginmanager=SimpleNamespace(get_plugin=lambda name: SimpleNamespace(stats=stats)),
        )
        recorded: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(fused_triton, "record", recorded.append)
        session: Any = SimpleNamespace(config=config)
        conftest.pytest_sessionfinish(session, exitstatus)
        return bool(recorded)

    def test_only_if_all_have_passed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        files = sorted(conftest.GPU_TESTS)
        assert self.finish(monkeypatch, files)
        assert self.finish(monkeypatch, [*files, "tests/a.py"], ["tests/b.py"])
        assert not self.finish(monkeypatch, files, exitstatus=1)
        assert not self.finish(monkeypatch, files[1:])
        assert not self.finish(monkeypatch, files, files[:1])
        assert not self.finish(monkeypatch, files, keyword="attend")
        chosen = (*files, f"{files[0]}::test")
        assert not self.finish(monkeypatch, files, arguments=chosen)

    def test_these_are_the_files_with_tests_for_gpus(self) -> None:
        marked = {
            str(path.relative_to(ROOT))
            for path in (ROOT / "tests").rglob("test_*.py")
            if re.search(
                r"^ *@pytest.mark.gpu$|marks=pytest.mark.gpu\)|^pytestmark = .pytest.mark.gpu",
                path.read_text(),
                re.M,
            )
        }
        assert marked == conftest.GPU_TESTS
