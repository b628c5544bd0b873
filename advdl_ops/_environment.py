"""Environment variables, of which an empty one counts as none and a wrong one is named; and the CPU's name."""

from __future__ import annotations

import functools
import os
import platform
import warnings
from pathlib import Path


def variable(name: str) -> str | None:
    return os.environ.get(name) or None


def flag(name: str, default: bool) -> bool:
    """``0`` or ``1``; anything else is ignored, and said so once."""
    value = variable(name)
    if value not in ("0", "1", None):
        _warn_once(f"{name} ({value!r}) must be 0 or 1; it is ignored")
    return {"0": False, "1": True}.get(value or "", default)


@functools.cache
def cpu_model() -> str:
    """As the system names it; of a virtual machine it may tell no generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@functools.cache
def _warn_once(what: str) -> None:
    warnings.warn(f"advdl_ops: {what}", RuntimeWarning, stacklevel=4)
