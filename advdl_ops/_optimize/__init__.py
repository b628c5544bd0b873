"""``optimize(model)``, ``restore(model)`` and ``explain(model)``, see docs/optimize.md.

``advdl_ops`` imports this package when one of them is first accessed.
"""

from .convert import optimize, restore
from .report import explain

__all__ = ["explain", "optimize", "restore"]
