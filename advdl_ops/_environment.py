"""Environment variables (an empty one counts as unset, a wrong one gives a warning), and the CPU's name."""

from __future__ import annotations

import functools
import os
import platform
import warnings
from pathlib import Path


def variable(name: str) -> str | None:
    return os.environ.get(name) or None


def flag(name: str, default: bool) -> bool:
    """A variable that is ``0`` or ``1``. Anything else is ignored, with one warning."""
    value = variable(name)
    if value not in ("0", "1", None):
        _warn_once(f"{name} ({value!r}) must be 0 or 1; it is ignored")
    return {"0": False, "1": True}.get(value or "", default)


@functools.cache
def cpu_model() -> str:
    """The name that the system gives the CPU. On a virtual machine it may not include the generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@functools.cache
def _warn_once(what: str) -> None:
    warnings.warn(f"advdl_ops: {what}", RuntimeWarning, stacklevel=4)
