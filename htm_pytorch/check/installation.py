"""`installation`: what is installed, which devices there are, and what `auto` takes on them."""

import importlib.metadata
import json
import platform
import re
import urllib.parse
from pathlib import Path
from typing import Any

import torch

import htm_pytorch
from htm_pytorch import kernels
from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.ops.call import Call
from htm_pytorch.ops.engines import ENGINES

_FOLDER = Path(htm_pytorch.__file__).parent
_OF_DEVELOPMENT = {"bench", "dev", "docs"}
_REQUIRED = re.compile(r"([\w.-]+).*;.*\bextra == ['\"]([\w-]+)['\"]")


def installation() -> dict[str, Any]:
    """Return what is installed, which devices there are, and who computes `recall` on each."""
    return {
        "htm_pytorch": {"version": htm_pytorch.__version__, "folder": str(_FOLDER)},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads()},
        "kernel": {
            "is_there": kernels.IS_AVAILABLE,
            "missing": None if kernels.IS_AVAILABLE else kernels.MISSING,
        },
        "devices": {device: _chosen(device) for device in _devices()},
        "extras": _extras(),
        "others": _others(),
    }


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(f"cuda:{number}" for number in range(count)), *mps]


def _chosen(device: str) -> dict[str, Any]:
    """Say whom `auto` takes for float32 on a device, and why not those who come before."""
    memory = ChunkedMemory.empty(1, 1, 1, 1, device=device)
    call = Call.of(torch.zeros(1, 1, 1, device=device), memory, 1, None, None, "auto")
    refused: dict[str, str] = {}
    for engine in ENGINES:
        error = engine.refuses(call)
        if error is None:
            name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
            return {"name": name, "auto": engine.name, "refused": refused}
        refused[engine.name] = str(error)
    raise AssertionError("the reference refuses nothing")


def _extras() -> dict[str, dict[str, str | None]]:
    """Return the packages of each extra and their versions, None where one is missing."""
    try:
        required = importlib.metadata.requires("htm-pytorch") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, str | None]] = {}
    for line in required:
        found = _REQUIRED.match(line)
        if found is None or found[2] in _OF_DEVELOPMENT:
            continue
        try:
            version = importlib.metadata.version(found[1])
        except importlib.metadata.PackageNotFoundError:
            version = None
        extras.setdefault(found[2], {})[found[1]] = version
    return extras


def _others() -> list[dict[str, str]]:
    """Return the distributions that would be imported by the same name, from another folder."""
    others: dict[str, dict[str, str]] = {}
    for distribution in importlib.metadata.distributions():
        folder = _folder_of(distribution)
        if folder is not None and folder.resolve() != _FOLDER.resolve():
            name = distribution.metadata["Name"]
            found = {"name": name, "version": distribution.version, "folder": str(folder)}
            others.setdefault(str(folder), found)
    return list(others.values())


def _folder_of(distribution: importlib.metadata.Distribution) -> Path | None:
    """Return where a distribution has its package of our name; None if it has none."""
    for file in distribution.files or ():
        if file.as_posix() == "htm_pytorch/__init__.py":
            return Path(str(distribution.locate_file(file))).parent
    if re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower() != "htm-pytorch":
        return None
    # One in a checkout lists no file of the package.
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    place = urllib.parse.urlparse(origin)
    folder = Path(urllib.parse.unquote(place.path)) / "htm_pytorch"
    return folder if place.scheme == "file" and folder.is_dir() else None
