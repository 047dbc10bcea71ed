"""The compiled kernel: found, loaded, and called with tensors."""

import ctypes
import functools
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent


def _find() -> Path | None:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        capability = torch.backends.cpu.get_cpu_capability()
        level = {"AVX512": "x86_64_v4", "AVX2": "x86_64_v3"}.get(capability)
    else:
        level = "aarch64" if machine in ("aarch64", "arm64") else None
    ending = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = _FOLDER / f"recall-{level}{ending}"
    return path if path.exists() else None


_PATH = _find()
IS_AVAILABLE = _PATH is not None
"""Whether this installation has the kernel and this processor can run it."""
MISSING = (
    f"no kernel for this machine ({platform.machine()}, "
    f"{torch.backends.cpu.get_cpu_capability()}) in {_FOLDER}"
)
"""What is wrong if it is not."""


def refusal(device: torch.device) -> Exception | None:
    """Return why the kernel cannot take what lies on a device; None if it can."""
    if device.type != "cpu":
        return ValueError(f"expects tensors on the CPU, got {device}")
    return None if IS_AVAILABLE else RuntimeError(f"has {MISSING}; use impl='auto'")


@functools.cache
def load() -> ctypes.CDLL:
    """Load the kernel.

    Raises:
        RuntimeError: there is none for this machine.
    """
    if _PATH is None:
        raise RuntimeError(MISSING)
    library = ctypes.CDLL(str(_PATH))
    if not hasattr(library, "structs"):
        raise RuntimeError(f"{_PATH} is of another version of this package: install it again")
    library.structs.restype = ctypes.c_char_p
    library.scratch_peak.restype = _INT
    return library


@functools.cache
def _torch_threads() -> int:
    """Address of the loop of torch's own threads: others would fight them for the cores."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
    path = Path(torch.__file__).parent / "lib" / name.get(sys.platform, "libtorch_cpu.so")
    address = ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, _POINTER).value
    assert address is not None
    return address


_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_TYPES = {"int64_t": _INT, "int32_t": ctypes.c_int32, "double": ctypes.c_double}


@functools.cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """Return the structs that the kernel is called with, by name, laid out as it says."""
    made: dict[str, type[ctypes.Structure]] = {}
    for spelled in load().structs().decode().split(";"):
        name, _, rest = spelled.partition(" ")
        fields: list[tuple[str, Any]] = []
        for field in rest.rstrip(",").split(","):
            kind, _, called = field.strip().rpartition(" ")
            fields.append((called, _POINTER if "*" in kind else made.get(kind) or _TYPES[kind]))
        # Slots, so that no other name is taken in silence.
        made[name] = type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
    return made


NAMES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
STORED = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
"""What steps and summaries may be stored in, for sums in a dtype."""
_NO_MEMORY, _NO_SUCH_CHUNK = 1, 2


def struct(name: str, **fields: Any) -> Any:
    """Return a struct of the kernel; tensors are passed by their addresses and must outlive it."""
    made = structs()[name]()
    for key, value in fields.items():
        setattr(made, key, value.data_ptr() if isinstance(value, Tensor) else value)
    return made


def threads() -> dict[str, Any]:
    """Name the threads that a call may take."""
    return {"parallel": _torch_threads(), "threads": torch.get_num_threads()}


def run(name: str, exact: Tensor, stored: Tensor | None, arguments: dict[str, Any]) -> None:
    """Call a function of the kernel for sums in the dtype of `exact` over what is `stored`.

    Tensors among the arguments are passed by their addresses and must outlive the call; that they
    fit each other is checked before, but for the numbers of chunks, at which the kernel looks.
    """
    function = f"{name}_{NAMES[exact.dtype]}"
    if stored is not None:
        function = f"{function}_{NAMES[stored.dtype]}"
    made = struct("Call", **threads(), **arguments)
    call(function, made, made)
    if made.failed == _NO_SUCH_CHUNK:
        picked = arguments["picked"]
        raise ValueError(
            f"picked: expected numbers of chunks, from 0 to {made.chunks - 1}, or -1, "
            f"got {int(picked.min())} to {int(picked.max())}"
        )


def call(function: str, argument: Any, told: Any) -> None:
    """Call a function of the kernel; `told` is the `Call` that hears of failures.

    Raises:
        MemoryError: there is not enough for scratch.
    """
    getattr(load(), function)(ctypes.byref(argument))
    if told.failed == _NO_MEMORY:
        raise MemoryError(f"{function}: not enough memory for scratch")


def scratch_peak(reset: bool = False) -> int:
    """Return the most bytes the kernel has held beside tensors, since the last reset."""
    return load().scratch_peak(int(reset))


def sizes(picked: Tensor, memory_batch: int, length: int, chunk_size: int) -> dict[str, Any]:
    """Name the sizes of a call over `length` steps a row."""
    return {
        "batch": picked.shape[0],
        "queries": picked.shape[1],
        "k": picked.shape[2],
        "memory_batch": memory_batch,
        "chunks": -(-length // chunk_size),
        "chunk_size": chunk_size,
        "missing": -length % chunk_size,
        "picked": picked,
    }


def by_last(tensor: Tensor) -> Tensor:
    """Return the tensor with its last axis unbroken."""
    return tensor if tensor.stride(-1) == 1 or not tensor.numel() else tensor.contiguous()


def by_head(like: Tensor) -> Tensor:
    """Return an unwritten [B, Q, R, W] with heads apart, as batched matrix products want it."""
    batch, queries, heads, width = like.shape
    return like.new_empty(heads, batch, queries, width).permute(1, 2, 0, 3)


def evenly(rows: Tensor) -> Tensor:
    """Return `rows` [B, Q, R, W] with all queries as far apart, whatever their row of the batch."""
    batch, queries = rows.shape[:2]
    even = 1 in (batch, queries) or rows.stride(0) == queries * rows.stride(1)
    return rows if even and rows.stride(-1) == 1 else rows.contiguous()


def heads(rows: Tensor) -> Any:
    """Say where the rows [B, Q, R, W] of `evenly` or `by_head` lie."""
    # The stride of an axis of one may be anything.
    by_query = rows.stride(0) if rows.shape[1] == 1 else rows.stride(1)
    return struct("Heads", at=rows, by_query=by_query, by_head=rows.stride(2))


def step_mask(mask: Tensor | None, missing: int) -> dict[str, Any]:
    """Name the mask [B, N], `missing` steps into the oldest chunk."""
    if mask is None:
        return {}
    return {"step_mask": mask.data_ptr() - missing, "step_mask_by_batch": mask.stride(0)}


def sorting(arguments: dict[str, Any], queries: int) -> dict[str, Any]:
    """Room to sort the picks of `queries` by their chunk."""
    slots = arguments["memory_batch"] * arguments["chunks"]
    return {
        "starts": torch.empty(slots + 1, dtype=torch.int64, device="cpu"),
        "pairs": torch.empty(queries * arguments["k"], dtype=torch.int64, device="cpu"),
    }
