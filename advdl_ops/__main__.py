"""``python -m advdl_ops``: the environment report that a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

_ENVIRONMENT = re.compile(
    r"ADVDL_OPS_|CUDA_(HOME|PATH|VISIBLE_DEVICES|LAUNCH_BLOCKING)|TORCH(_|INDUCTOR)|PYTORCH_|TRITON_|"
    r"OMP_|MKL_|KMP_|ONEDNN_|DNNL_|MALLOC_|LD_(LIBRARY_PATH|PRELOAD)$"
)


def report() -> dict[str, Any]:
    """Facts about this machine, this installation and its native libraries, as values that JSON can hold."""
    return {
        "versions": _versions(),
        "native": _native(),
        "build": _build(),
        "cpu": _cpu(),
        "gpu": _gpus(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _ENVIRONMENT.match(name)
        },
    }


def _versions() -> dict[str, Any]:
    import torch

    import advdl_ops

    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "advdl_ops": advdl_ops.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": f"{platform.platform()}",
    }


def _native() -> dict[str, Any]:
    """For each device: "loaded", or why its kernels are not."""
    from . import _library, backend

    loaded = {name: reason or "loaded" for name, reason in _library.status().items()}
    return {"backend": backend.get_backend(), **loaded}


def _build() -> dict[str, Any] | str:
    try:
        from . import _C  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        built = list(Path(__file__).parent.glob("_C.*.so"))
        if not built:
            return "_C was not built"
        return f"_C is of another Python ({', '.join(path.name for path in built)}): {error}"
    return _C.build_info()


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": _cpu_model(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel_capability": _kernel_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _kernel_capability() -> str | None:
    """The capability of the CPU kernels. `_C` contains the same code as the library and so chooses the same one."""
    try:
        from . import _C  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    return _C.cpu.capability()


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "driver": _driver(),
            }
        )
    return gpus


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _lines(value: Any, name: str, indent: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        head = [f"{indent}{name}:"]
        return head + [
            line for key, item in value.items() for line in _lines(item, key, indent + "  ")
        ]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [
            line for i, item in enumerate(value) for line in _lines(item, f"{name} {i}", indent)
        ]
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return [f"{indent}{name}: {'none' if value in (None, '', {}) else value}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m advdl_ops", description="Print the environment report a bug report needs."
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    options = parser.parse_args(arguments)
    values = report()
    if options.json:
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(line for name, item in values.items() for line in _lines(item, name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
