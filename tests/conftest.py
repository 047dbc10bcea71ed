"""What holds in every test: a fixed seed, and memory that was never written shows as NaN."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from htm_pytorch.ops import fused_triton

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already.
    torch.set_num_threads(1)

GPU_TESTS = {
    "tests/ops/test_triton.py",
    "tests/nn/test_attention.py",
    "tests/nn/test_on_gpu.py",
    "tests/check/test_check.py",
}
"""The files that have tests for GPUs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-device",
        action="store_true",
        help="if the tests pass, write down that they did on this GPU (see ops/fused_triton.py)",
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.getoption("--record-device") or exitstatus:
        return
    if not torch.cuda.is_available():
        return
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    ran = {
        outcome: {report.nodeid.partition("::")[0] for report in reporter.stats.get(outcome, ())}
        for outcome in ("passed", "skipped")
    }
    # A choice of tests proves nothing, nor do tests that were skipped.
    chosen = config.getoption("keyword") or any("::" in argument for argument in config.args)
    if not chosen and ran["passed"] >= GPU_TESTS and not GPU_TESTS & ran["skipped"]:
        fused_triton.record(torch.device("cuda", torch.cuda.current_device()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: faster, and sums have the same last bits wherever they are made."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def poisoned(make):
    """Wrap a function that returns unwritten memory so that it returns NaN instead."""

    def make_poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if not isinstance(tensor, torch.Tensor):
            return tensor  # Of a library whose own kinds torch makes as well.
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return make_poisoned


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a forgotten write visible: `torch.empty` and its kin return NaN.

    A test marked `compile` keeps the real functions, which the compiler knows.
    """
    if request.node.get_closest_marker("compile"):
        return
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
