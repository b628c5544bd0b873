"""What this machine reaches now: the rate of a copy and of a matrix product."""

from __future__ import annotations

import importlib
import statistics
from typing import Any

import torch

from . import timing

COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 1 << 30}
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def _probe(name: str) -> Any:
    """A probe of the optional extension ``_C``, or None where that is not built for this Python."""
    try:
        return getattr(importlib.import_module("advdl_ops._C"), name, None)
    except ImportError:
        return None


def copy_rate(device: torch.device, rounds: int = 5) -> float:
    """Bytes per second, read and written counted."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)
    calls = {"torch": timing.Timed(lambda: target.copy_(source))}
    seconds = timing.measure(calls, device, rounds, 0.02)["torch"]
    return 2 * size / statistics.median(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations per second of a square product in ``dtype``."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls = {"torch": timing.Timed(lambda: a @ b)}
    seconds = timing.measure(calls, device, rounds, 0.02)["torch"]
    return 2 * size**3 / statistics.median(seconds)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Copy and matrix rate; on CPU the better of torch's and ``_C``'s probe, each an honest lower bound."""
    copy, flops = copy_rate(device), matmul_rate(device, dtype)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        if (probe := _probe("copy_bandwidth")) is not None:
            copy = max(copy, float(probe(COPY_BYTES["cpu"], threads)))
        if dtype == torch.float32 and (probe := _probe("peak_flops")) is not None:
            flops = max(flops, float(probe(threads)))
    return copy, flops
