"""Loads the native libraries. If one cannot be loaded, it warns once, and ``reference`` serves instead."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

_LIB_DIR = Path(__file__).parent / "lib"
_CPU_LIBRARY = _LIB_DIR / "libadvdl_ops_cpu.so"

# Device type -> None if its kernels are loaded, else why not.
_status: dict[str, str | None] = {}


def _load_cpu() -> str | None:
    if not _CPU_LIBRARY.exists():
        return "the CPU library was not built (python setup.py build_ext --inplace)"
    return _load(_CPU_LIBRARY)


def _load_cuda() -> str | None:
    # Nothing here may initialise the driver, because forked children could not use it any more.
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    path = _LIB_DIR / "libadvdl_ops_cuda.so"
    if not path.exists():
        return "the CUDA library was not built (nvcc was not found, or ADVDL_OPS_CUDA=0)"
    built, driver = _built(), _driver()
    # NVIDIA's minor version compatibility: within a major version, an older driver runs what a newer toolkit compiled.
    if built and driver and driver[0] < built.toolkit[0]:
        return _too_old(driver, built.toolkit)
    return _load(path)


def _driver() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports, ``None`` without a driver. Initialises nothing."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


class _Built(NamedTuple):
    toolkit: tuple[int, int]
    gpus: list[tuple[int, int]]


def _built() -> _Built | None:
    """The toolkit and the GPUs of the CUDA library's build. ``None`` if `_C`, which has them, is for another Python."""
    try:
        info = importlib.import_module("advdl_ops._C").build_info()
    except ImportError:
        return None
    gpus = [_version(name.removesuffix("+PTX").rstrip("af")) for name in info["cuda_architectures"]]
    return _Built(_version(info["cuda"]), gpus) if info["cuda"] else None


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = map(int, text.split("."))
    return major, minor


def _too_old(driver: tuple[int, int], toolkit: tuple[int, int]) -> str:
    return (
        f"the driver serves CUDA {driver[0]}.{driver[1]}, the kernels were compiled by "
        f"CUDA {toolkit[0]}.{toolkit[1]}: update the driver, or build with an nvcc of its version"
    )


@functools.cache
def unsupported_gpu(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, or ``None``. The caller has a tensor on it, so CUDA is initialised."""
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"GPU {index} is of compute capability {capability[0]}.{capability[1]}, kernels need 8.0 or later"
    built, driver = _built(), _driver()
    # On a GPU that the library was not compiled for, the driver compiles its PTX. A driver older than the toolkit
    # cannot.
    if (
        built
        and driver
        and driver < built.toolkit
        and not any(
            major == capability[0] and minor <= capability[1] for major, minor in built.gpus
        )
    ):
        return _too_old(driver, built.toolkit)
    return None


def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


def native(device_type: str) -> bool:
    """Whether the kernels for ``device_type`` ("cpu", "cuda") are loaded."""
    return _status.get(device_type, "") is None


@functools.cache
def cpu_capability() -> str:
    """The CPU library's capability: ``"default"``, ``"avx2"`` or ``"avx512"``. Without a library ``"default"``."""
    if not native("cpu"):
        return "default"
    name = ctypes.CDLL(str(_CPU_LIBRARY)).advdl_ops_cpu_capability
    name.restype = ctypes.c_char_p
    return name().decode()


def status() -> dict[str, str | None]:
    """For "cpu" and "cuda": ``None`` if the kernels are loaded, else the reason why not."""
    return dict(_status)


def load() -> None:
    """Load the libraries that this machine can use. Called once, by ``import advdl_ops``."""
    _status["cpu"] = _load_cpu()
    _status["cuda"] = _load_cuda()
    if not native("cpu") and os.environ.get("ADVDL_OPS_BACKEND") != "reference":
        warn_once(f"CPU: {_status['cpu']}")


@functools.cache
def warn_once(reason: str) -> None:
    """Warn that the reference serves in place of a kernel, and why."""
    warnings.warn(
        f"advdl_ops runs without its fused kernels, on the plain PyTorch reference. {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
