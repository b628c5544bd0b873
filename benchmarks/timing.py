"""Timing of interleaved providers: one block of each per round, in an order that rotates from round to round.

CPU: ``torch.utils.benchmark.Timer`` for calls that can be repeated, a clock around the single call for
those that are slow or need preparation (a backward pass needs its forward). CUDA: events, after a
write over the whole L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import benchmark

SLOW = 0.03  # seconds; a longer call is timed alone
L2_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Timed:
    """In ``call(prepare())``, only ``call`` is timed. Without ``prepare``, ``call()`` is."""

    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def once(self) -> Any:
        return self.call() if self.prepare is None else self.call(self.prepare())


def _clocked(timed: Timed, count: int) -> float:
    seconds = []
    for _ in range(count):
        arguments = () if timed.prepare is None else (timed.prepare(),)
        begin = time.perf_counter()
        result = timed.call(*arguments)
        seconds.append(time.perf_counter() - begin)
        del result, arguments
    return statistics.median(seconds)


def _cpu_block(timed: Timed, count: int, slow: bool) -> float:
    if slow or timed.prepare is not None:
        return _clocked(timed, count)
    timer = benchmark.Timer(
        "call()", globals={"call": timed.call}, num_threads=torch.get_num_threads()
    )
    return timer.timeit(count).mean


def _cuda_block(timed: Timed, count: int, cache: torch.Tensor) -> float:
    pairs = []
    for _ in range(count):
        arguments = () if timed.prepare is None else (timed.prepare(),)
        cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        timed.call(*arguments)
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e-3


def measure(
    calls: Mapping[str, Timed],
    device: torch.device,
    rounds: int,
    block_seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds per call of each provider, one entry per round. Everything must be warmed up before."""
    cuda = device.type == "cuda"
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if cuda else torch.empty(0)

    def block(timed: Timed, count: int, slow: bool) -> float:
        return _cuda_block(timed, count, cache) if cuda else _cpu_block(timed, count, slow)

    plan = {}
    for name, timed in calls.items():
        timed.once()
        estimate = block(timed, 2, True)
        plan[name] = (
            max(1, min(100_000, int(block_seconds / max(estimate, 1e-7)))),
            estimate > SLOW,
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            count, slow = plan[name]
            seconds[name].append(block(calls[name], count, slow))
        progress(turn + 1, rounds)
    return seconds
