"""The layer beside the plain reference, on the user's machine and at the user's sizes."""

from typing import TYPE_CHECKING

from htm_pytorch.check.config import CheckConfig
from htm_pytorch.lazy import on_first_use

if TYPE_CHECKING:
    from htm_pytorch.check.report import Comparison, Report
    from htm_pytorch.check.run import check

__all__ = ["CheckConfig", "Comparison", "Report", "check"]

# What a command line says of `CheckConfig` does not wait for torch.
_MODULE_OF = {"Comparison": "report", "Report": "report", "check": "run"}
__getattr__ = on_first_use(__name__, _MODULE_OF)
