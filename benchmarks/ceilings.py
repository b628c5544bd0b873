"""The rates that this machine reaches at the moment, of a copy and of a matrix product."""

from __future__ import annotations

import importlib
import statistics
from typing import Any

import torch

from . import timing

COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 1 << 30}
SMALLEST_COPY = 4 * 2**20
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def _probe(name: str) -> Any:
    """A probe of the optional extension ``_C``, or None if that is not built for this Python."""
    try:
        return getattr(importlib.import_module("advdl_ops._C"), name, None)
    except ImportError:
        return None


def copy_bytes(device: torch.device, tensor_bytes: int | None) -> int:
    """The bytes to copy. On CPU those of the op's tensor, because a cache helps the op in the same way."""
    if tensor_bytes is None or device.type != "cpu":
        return COPY_BYTES[device.type]
    return max(SMALLEST_COPY, tensor_bytes // 64 * 64)


def copy_rate(device: torch.device, size: int, rounds: int = 5) -> float:
    """Bytes per second, read plus written, of a copy of ``size`` bytes."""
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


def ceilings(
    device: torch.device, dtype: torch.dtype, tensor_bytes: int | None = None
) -> tuple[float, float]:
    """Copy and matrix rate. On CPU the better of torch's and that of ``_C``'s probe: each is a lower bound."""
    size = copy_bytes(device, tensor_bytes)
    copy, flops = copy_rate(device, size), matmul_rate(device, dtype)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        if (probe := _probe("copy_bandwidth")) is not None:
            copy = max(copy, float(probe(size, threads)))
        if dtype == torch.float32 and (probe := _probe("peak_flops")) is not None:
            flops = max(flops, float(probe(threads)))
    return copy, flops
