"""Loads the native libraries; if one cannot be loaded, says why once, and ``reference`` serves in its place."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

_LIB_DIR = Path(__file__).parent / "lib"

# device type -> None if its kernels are loaded, else why not.
_status: dict[str, str | None] = {}


def _load_cpu() -> str | None:
    path = _LIB_DIR / "libadvdl_ops_cpu.so"
    if not path.exists():
        return "the CPU library was not built (python setup.py build_ext --inplace)"
    return _load(path)


def _load_cuda() -> str | None:
    # No call into CUDA here: it would initialise the driver at import, after which no forked child can use it.
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    path = _LIB_DIR / "libadvdl_ops_cuda.so"
    if not path.exists():
        return "the CUDA library was not built (nvcc was not found, or ADVDL_OPS_CUDA=0)"
    return _load(path)


@functools.cache
def unsupported_gpu(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, or ``None``. Called with a tensor there, so CUDA is up already."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= (8, 0):
        return None
    return f"GPU {index} is of compute capability {capability[0]}.{capability[1]}, kernels need 8.0 or later"


def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


def native(device_type: str) -> bool:
    """Whether the kernels for ``device_type`` ("cpu", "cuda") are loaded."""
    return _status.get(device_type, "") is None


def status() -> dict[str, str | None]:
    """For "cpu" and "cuda": ``None`` where the kernels are loaded, else the reason why not."""
    return dict(_status)


def load() -> None:
    """Load what this machine can use. Called once, by ``import advdl_ops``."""
    _status["cpu"] = _load_cpu()
    _status["cuda"] = _load_cuda()
    if not native("cpu") and os.environ.get("ADVDL_OPS_BACKEND") != "reference":
        warn_once(f"CPU: {_status['cpu']}")


@functools.cache
def warn_once(reason: str) -> None:
    """Say that the reference serves in place of a kernel, and why."""
    warnings.warn(
        f"advdl_ops runs without its fused kernels, on the plain PyTorch reference. {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
