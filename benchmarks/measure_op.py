"""How an operator is measured: check, warm up, time every mode round by round, count memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import ceilings, memory, timing
from .check import wrong_values
from .record import FLOOR, OURS, STOCK, STOCK_COMPILED, compiled_name, is_stock
from .registry import Case
from .session import Refused, Session, in_one_line

# The additional error that other stock forms may have beyond the rule of check.py. advdl_ops may not.
STOCK_SLACK = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}

Tensors = Mapping[str, torch.Tensor]
Function = Callable[[Tensors, Tensors], torch.Tensor]


@dataclass
class Problem:
    """Random data of one case and the functions that compete on it.

    A function maps (inputs, state) to the output. It may update ``state`` in place; each provider has its own
    copy. ``inputs`` that require grad are differentiated; ``grad`` is the output's gradient. ``eager`` also
    computes the fp64 truth. Other stock forms (``eager ...``) compute the same in another way.
    """

    inputs: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    functions: dict[str, Function]
    grad: torch.Tensor | None = None
    uncompiled: tuple[str, ...] = ()  # functions that are not also compiled
    # Inputs that are weights: for inference stock is also compiled with freezing.
    frozen: tuple[str, ...] = ()
    # A mask that broadcasts to the output, where that is arbitrary: providers are not compared there.
    ignored: torch.Tensor | None = None


class Provider:
    """One function on its own copy of the state."""

    def __init__(
        self, function: Function, problem: Problem, dtype: torch.dtype | None = None
    ) -> None:
        def own(tensor: torch.Tensor) -> torch.Tensor:
            if dtype is None or not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        self.function = function
        self.inputs = {name: own(tensor) for name, tensor in problem.inputs.items()}
        self.state = {name: own(tensor).clone() for name, tensor in problem.state.items()}
        self.leaves = {name: tensor for name, tensor in self.inputs.items() if tensor.requires_grad}
        self.grad = None if problem.grad is None else own(problem.grad)
        self.ignored = problem.ignored

    def forward(self) -> torch.Tensor:
        if self.grad is None:
            with torch.inference_mode():
                return self.function(self.inputs, self.state)
        return self.function(self.inputs, self.state)

    def backward(self, output: torch.Tensor) -> Any:
        return torch.autograd.grad(output, list(self.leaves.values()), self.grad)

    def values(self) -> dict[str, torch.Tensor]:
        """Output, gradients and updated state of one call."""
        output = self.forward()
        compared = output.detach()
        if self.ignored is not None:
            compared = compared.masked_fill(self.ignored, 0)
        found = {"output": compared}
        if self.grad is not None:
            gradients = self.backward(output)
            found.update(
                {f"gradient of {n}": g for n, g in zip(self.leaves, gradients, strict=True)}
            )
        found.update({n: t for n, t in self.state.items() if t.is_floating_point()})
        return found

    def timed(self, mode: str) -> timing.Timed:
        if mode == "bwd":
            return timing.Timed(self.backward, self.forward)
        if mode == "full":
            return timing.Timed(lambda: self.backward(self.forward()))
        return timing.Timed(self.forward)


def floor_call(like: torch.Tensor, passes: int) -> timing.Timed:
    """A call that moves ``passes`` times the bytes of a tensor: a clone moves two, an in-place add three."""
    clones, adds = _split(passes)
    kept, other = like.detach().clone(), torch.zeros_like(like)

    def call() -> torch.Tensor:
        target = kept
        for _ in range(clones):
            target = kept.clone()
        for _ in range(adds):
            target.add_(other)
        return target

    return timing.Timed(torch.inference_mode()(call))


def _split(passes: int) -> tuple[int, int]:
    adds = next(a for a in range(passes // 3, -1, -1) if (passes - 3 * a) % 2 == 0)
    return (passes - 3 * adds) // 2, adds


class Frozen(torch.nn.Module):
    """Stock with weights and statistics as buffers of the module, because freezing makes those constant."""

    def __init__(self, function: Function, problem: Problem) -> None:
        super().__init__()
        self.function, self.weights, self.statistics = function, problem.frozen, list(problem.state)
        for name in self.weights:
            self.register_buffer(name, problem.inputs[name].detach())
        for name, tensor in problem.state.items():
            self.register_buffer(name, tensor)

    def forward(self, inputs: Tensors) -> torch.Tensor:
        weights = {name: getattr(self, name) for name in self.weights}
        return self.function(
            {**inputs, **weights}, {name: getattr(self, name) for name in self.statistics}
        )


def with_freezing(function: Function, problem: Problem) -> Function:
    call = torch.compile(Frozen(function, problem), dynamic=False, options={"freezing": True})
    varying = [name for name in problem.inputs if name not in problem.frozen]
    return lambda inputs, state: call({name: inputs[name] for name in varying})


def compiled_functions(problem: Problem, session: Session) -> dict[str, Function]:
    """The competing compiled forms. Stock may have graph breaks, as it would for users."""
    found = {}
    for name, function in problem.functions.items():
        stock = is_stock(name)
        if name not in problem.uncompiled and (
            session.compiles if stock else session.compiles_ours
        ):
            found[compiled_name(name)] = torch.compile(function, fullgraph=not stock, dynamic=False)
    if session.compiles and problem.grad is None and problem.frozen:
        found[f"{STOCK_COMPILED} freezing"] = with_freezing(problem.functions[STOCK], problem)
    return found


def stock_values(problem: Problem) -> dict[str, torch.Tensor]:
    """The values of the first stock form that runs on this machine."""
    failures = []
    for name, function in problem.functions.items():
        if is_stock(name):
            try:
                return Provider(function, problem).values()
            except Exception as failure:  # providers() refuses it
                failures.append(f"{name}: {in_one_line(failure)}")
    raise Refused("no stock form runs: " + "; ".join(failures))


def providers(problem: Problem, session: Session) -> dict[str, Provider]:
    """All providers with correct values, warmed up. The others are refused."""
    functions = problem.functions | compiled_functions(problem, session)
    truth = Provider(functions[STOCK], problem, torch.float64).values()
    stock = stock_values(problem)
    kept = {}
    for name, function in functions.items():
        if not session.settings.wants(name):
            continue
        session.progress(f"check {name}")
        provider = Provider(function, problem)
        try:
            # Another stock form is refused if it is wrong, but not if it is only less accurate than ``eager``.
            slack = STOCK_SLACK[session.case.dtype] if is_stock(name) else 0.0
            why = wrong_values(provider.values(), stock, truth, slack)
        except Exception as failure:  # only this provider is refused
            why = in_one_line(failure)
        if why is None:
            kept[name] = provider
        else:
            session.refuse(name, why)
    if not kept:
        raise Refused(f"{session.case.name}: no provider returned the right values")
    return kept


def report_times(
    session: Session, mode: str, seconds: Mapping[str, list[float]], ours: str = OURS
) -> None:
    """Records times, and how much faster ``ours`` is than each other provider, as the ratio of every round."""
    for name, values in seconds.items():
        session.record(name, mode, "time", "s", values)
        if ours in seconds and name != ours:
            ratios = [theirs / own for theirs, own in zip(values, seconds[ours], strict=True)]
            session.record(name, mode, "speedup", "x", ratios)


def report_over_stock(session: Session, mode: str, seconds: Mapping[str, list[float]]) -> None:
    """Records how much faster each provider is than the fastest stock one, as the ratio of every round."""
    stock = [name for name in seconds if is_stock(name)]
    if stock:
        # The fastest by its share of each round, so that rounds on a slowed-down machine do not decide.
        rounds = [sum(times) for times in zip(*seconds.values(), strict=True)]
        shares = {
            name: statistics.median(
                t / whole for t, whole in zip(seconds[name], rounds, strict=True)
            )
            for name in stock
        }
        fastest = seconds[min(stock, key=lambda name: shares[name])]
        for name, values in seconds.items():
            ratios = [theirs / own for theirs, own in zip(fastest, values, strict=True)]
            session.record(name, mode, "over_stock", "x", ratios)


def report_rates(
    session: Session, mode: str, seconds: Mapping[str, list[float]], rates: tuple[float, float],
    moved: int | None, flops: int | None,
) -> None:  # fmt: skip
    """Records bandwidth and throughput, and their share of the ceilings (copy, matrix product)."""
    pairs = (
        (moved, rates[0], "bandwidth", "GB/s", "copy_share"),
        (flops, rates[1], "throughput", "GFLOP/s", "matmul_share"),
    )
    for work, ceiling, metric, unit, share in pairs:
        if work:
            for name, values in seconds.items():
                session.record(name, mode, metric, unit, [work / value * 1e-9 for value in values])
                session.record(name, mode, share, "1", work / statistics.median(values) / ceiling)


def measure_op(case: Case, session: Session, problem: Problem) -> None:
    """Records of every mode of an op case."""
    device = torch.device(case.device)
    session.progress("ceilings")
    first = next(iter(problem.inputs.values()))
    rates = ceilings.ceilings(device, first.dtype, first.nbytes)
    session.record("machine", "-", "copy", "GB/s", rates[0] * 1e-9)
    session.record("machine", "-", "matmul", "GFLOP/s", rates[1] * 1e-9)
    running = providers(problem, session)
    for mode in case.modes:
        calls = {name: provider.timed(mode) for name, provider in running.items()}
        if case.passes.get(mode) and session.settings.wants(FLOOR):
            calls[FLOOR] = floor_call(first, case.passes[mode])
        seconds = timing.measure(
            calls,
            device,
            session.rounds,
            session.block_seconds,
            session.each_round(f"time {mode}"),
        )
        report_times(session, mode, seconds)
        report_rates(session, mode, seconds, rates, case.bytes.get(mode), case.flops.get(mode))
    if "full" in case.modes:
        for name, provider in running.items():
            session.progress(f"memory of {name}")
            held, peak = memory.held_and_peak(provider.forward, provider.backward, device)
            session.record(name, "full", "held", "B", held)
            session.record(name, "full", "peak", "B", peak)
