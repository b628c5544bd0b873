"""``optimize(model)``, ``restore(model)`` and ``explain(model)``, see docs/optimize.md.

``advdl_ops`` imports this package when one of them is first accessed.
"""

from .convert import optimize, restore
from .report import explain
from .sync_batchnorm import convert_sync_batchnorm

__all__ = ["convert_sync_batchnorm", "explain", "optimize", "restore"]
