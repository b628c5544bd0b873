"""Bytes that a forward pass leaves allocated for its backward, and the peak of both.

On CPU the profiler's memory events give every allocation and release of torch's allocator, so that a tensor
in an autograd context, inside a compiled graph or inside a C++ operator counts too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def _profiled(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """Net and peak bytes of a call on the CPU while its result is alive, and that result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = function()
        gc.collect()  # reference cycles do not count
    kineto = run.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    net = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        net += event.nbytes()
        peak = max(peak, net)
    return net, peak, result


def kept(first: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Bytes that a first call leaves allocated, without the tensors that it returns in a dict; and that dict.

    They are what a model creates once for all calls, such as weights in another form. For a compiled model, memory
    allocated during compilation counts too.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        result = first()
        torch.cuda.synchronize()
        gc.collect()
        net = torch.cuda.memory_allocated() - before
    else:
        net, _, result = _profiled(first)
    return max(0, net - sum(t.untyped_storage().nbytes() for t in result.values())), result


def held_and_peak(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device
) -> tuple[int, int]:
    """Bytes held between ``forward`` and ``backward``, and the peak over both. Inputs do not count.

    Run both once before, because one-time allocations (caches, compiled code) are not part of a step.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = forward()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        result = backward(output)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del output, result
        return held, peak

    held, _, output = _profiled(forward)
    backward(output)
    del output
    gc.collect()
    _, peak, result = _profiled(lambda: backward(forward()))
    del result
    return held, peak
