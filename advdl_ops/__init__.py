"""Fused layers for PyTorch: drop-in for ``torch.nn``, one kernel where stock PyTorch runs several."""

from . import _schemas as _schemas
from . import _library

_library.load()

from . import functional, nn  # noqa: E402
from .backend import get_backend, use_backend  # noqa: E402

__version__ = "0.1.0"
__all__ = ["functional", "get_backend", "nn", "use_backend"]
