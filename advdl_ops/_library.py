"""Loads the native libraries; if one cannot be loaded, says why once, and ``reference`` serves in its place."""

from __future__ import annotations

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
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    path = _LIB_DIR / "libadvdl_ops_cuda.so"
    if not path.exists():
        return "the CUDA library was not built (nvcc was not found, or ADVDL_OPS_CUDA=0)"
    if not torch.cuda.is_available():
        return "no CUDA device is available (torch.cuda.is_available() is False)"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU is of compute capability {capability[0]}.{capability[1]}, kernels need 8.0 or later"
    return _load(path)


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
    missing = [] if native("cpu") else [f"CPU: {_status['cpu']}"]
    # A machine without a GPU misses nothing; one with a GPU should hear that its kernels are idle.
    if torch.version.cuda is not None and torch.cuda.is_available() and not native("cuda"):
        missing.append(f"CUDA: {_status['cuda']}")
    if missing and os.environ.get("ADVDL_OPS_BACKEND") != "reference":
        warnings.warn(
            "advdl_ops runs without its fused kernels, on the plain PyTorch reference. "
            + "; ".join(missing),
            RuntimeWarning,
            stacklevel=3,
        )
