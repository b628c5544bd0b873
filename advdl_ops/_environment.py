"""Environment variables: an empty one is as good as none, and what is wrong is said, by the variable's name."""

from __future__ import annotations

import functools
import os
import warnings


def variable(name: str) -> str | None:
    return os.environ.get(name) or None


def flag(name: str, default: bool) -> bool:
    """``0`` or ``1``; anything else is ignored, and said so once."""
    value = variable(name)
    if value not in ("0", "1", None):
        _warn_once(f"{name} ({value!r}) must be 0 or 1; it is ignored")
    return {"0": False, "1": True}.get(value or "", default)


@functools.cache
def _warn_once(what: str) -> None:
    warnings.warn(f"advdl_ops: {what}", RuntimeWarning, stacklevel=4)
