"""Fused layers for PyTorch with the parameters and ``state_dict`` keys of ``torch.nn``."""

import importlib
from typing import Any

from . import _library
from . import _schemas as _schemas

_library.load()

from . import _flops, functional, nn  # noqa: E402
from .backend import (  # noqa: E402
    get_backend,
    get_convolution,
    get_weight_check,
    use_backend,
    use_convolution,
    use_weight_check,
)

_flops.register_when_needed()

__version__ = "0.1.0"
__all__ = [
    "convert_sync_batchnorm", "explain", "fit_memory", "functional", "get_backend", "get_convolution",
    "get_weight_check", "memory_report", "models", "nn", "optimize", "restore", "set_lean", "tune", "use_backend",
    "use_convolution", "use_weight_check",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported at the first access, so that `import advdl_ops` stays fast.
    if name == "models":
        return importlib.import_module(".models", __name__)
    if name == "set_lean":
        return importlib.import_module("._lean.models", __name__).set_lean
    if name == "memory_report":
        return importlib.import_module("._lean.report", __name__).memory_report
    if name == "fit_memory":
        return importlib.import_module("._lean.fit", __name__).fit_memory
    if name == "tune":
        return importlib.import_module("._tune", __name__).tune
    if name in ("convert_sync_batchnorm", "explain", "optimize", "restore"):
        return getattr(importlib.import_module("._optimize", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
