"""`recall` by Triton kernels on a GPU: when they can serve, and the operators that call them.

Triton is imported by the first call that runs a kernel, not before.
"""

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory, Steps
from htm_pytorch.memory.fading import Fading
from htm_pytorch.ops import native, projected

RECORD = Path(__file__).with_name("proven_devices.json")
"""By compute capability, what `make test-gpu` ran on when it last passed."""
PROVEN = frozenset(json.loads(RECORD.read_text()))
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PREFIX = "triton_"
"""Of the names of the operators."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the tensors that the kernels take."""
MOST_KEPT = 1024
"""Chunks a query: its list of the best must fit on chip."""
MOST_STEPS = 2**31
"""In each row of a memory: their numbers have 32 bits."""


def pick(
    route: Tensor,
    memory: ChunkedMemory | Steps,
    k: int,
    chunk_mask: Tensor | None,
    fading: Fading | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `native.pick` does."""
    return native.pick(route, memory, k, chunk_mask, fading, PREFIX)


def attend(
    probe: Tensor,
    memory: ChunkedMemory | Steps,
    positions: Tensor | None,
    picked: Tensor,
    weights: Tensor,
) -> Tensor:
    """Do what `native.attend` does, in the dtype of `probe`."""
    return native.attend(probe, memory, positions, picked, weights, PREFIX)


def is_installed() -> bool:
    """Whether Triton could be imported."""
    return importlib.util.find_spec("triton") is not None


def refusal(
    device: torch.device, kept: int, steps: int, *tensors: Tensor | None
) -> Exception | None:
    """Return why the kernels cannot take these, in one sentence; None if they can."""
    if device.type != "cuda" and not (device.type == "cpu" and IS_INTERPRETED):
        return ValueError(
            "expects tensors on a CUDA device (or on the CPU, to be interpreted, "
            f"with TRITON_INTERPRET=1 in the environment), got {device}"
        )
    if not is_installed():
        return RuntimeError(
            "needs Triton, which is not installed: from a checkout: pip install '.[triton]'"
        )
    if kept > MOST_KEPT:
        return ValueError(f"expects k <= {MOST_KEPT}, got {kept}")
    if steps >= MOST_STEPS:
        return ValueError(f"expects fewer than {MOST_STEPS} steps, got {steps}")
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return ValueError(f"expects one of {DTYPES}, got {tensor.dtype}")
    return None


def is_proven(device: torch.device) -> bool:
    """Whether the tests have passed on a device of this compute capability."""
    return device.type == "cuda" and bool(PROVEN) and _capability(device) in PROVEN


def _capability(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.major}.{properties.minor}"


def record(device: torch.device) -> None:
    """Write down that the tests have passed on this device."""
    known = json.loads(RECORD.read_text())
    known[_capability(device)] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }
    RECORD.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


# Triton launches on the current device, whatever the tensors' own.


def _pick(*arguments: Any) -> tuple[Tensor, Tensor]:
    from htm_pytorch.ops.triton_kernels.pick import pick

    with torch.cuda.device_of(arguments[0]):
        return pick(*arguments)


def _pick_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from htm_pytorch.ops.triton_kernels.pick_backward import pick_backward

    with torch.cuda.device_of(arguments[0]):
        return pick_backward(*arguments)


def _attend(*arguments: Any) -> Tensor:
    from htm_pytorch.ops.triton_kernels.attend import attend

    with torch.cuda.device_of(arguments[0]):
        return attend(*arguments)


def _attend_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from htm_pytorch.ops.triton_kernels.attend_backward import attend_backward

    with torch.cuda.device_of(arguments[0]):
        return attend_backward(*arguments)


def _attend_projected(*arguments: Any) -> Tensor:
    from htm_pytorch.ops.triton_kernels.projected import attend_projected

    with torch.cuda.device_of(arguments[0]):
        return attend_projected(*arguments)


def _attend_projected_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from htm_pytorch.ops.triton_kernels.projected import attend_projected_backward

    with torch.cuda.device_of(arguments[0]):
        return attend_projected_backward(*arguments)


# Not for CUDA alone: under Triton's interpreter they take tensors on the CPU.
native.register(
    PREFIX,
    _pick,
    _pick_backward,
    _attend,
    _attend_backward,
    device="CompositeExplicitAutograd",
)
projected.register(
    PREFIX, _attend_projected, _attend_projected_backward, device="CompositeExplicitAutograd"
)
