"""The layer beside the plain reference, on the user's machine and at the user's sizes."""

import importlib
from typing import TYPE_CHECKING, Any

from htm_pytorch.check.config import CheckConfig

if TYPE_CHECKING:
    from htm_pytorch.check.report import Comparison, Report
    from htm_pytorch.check.run import check

__all__ = ["CheckConfig", "Comparison", "Report", "check"]

_FILE_OF = {"Comparison": "report", "Report": "report", "check": "run"}


def __getattr__(name: str) -> Any:
    # On first use: what a command line says of `CheckConfig` does not wait for torch.
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
