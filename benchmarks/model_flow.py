"""How a network is measured: stock and fused from the same weights, either layout, with and without torch.compile."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from . import ceilings, memory, timing
from .check import wrong_values
from .op_flow import OURS, STOCK, STOCK_COMPILED, report_rates, report_times
from .registry import Case
from .session import Refused, Session, in_one_line
from .stock_resnet import stock_resnet

LAYOUTS = {"": torch.contiguous_format, " channels_last": torch.channels_last}
# Rounding flips the sign of single pre-activations in a deep network, which changes its gradients by far more than
# rounding itself: up to 3 % of their norm between eager in its two layouts (ResNet-50 at 112 px). So what is
# timed is compared loosely, and our network once more in fp64, where nothing flips, closely.
OUTPUT_SLACK, GRADIENT_SLACK, EXACT_SLACK = 1e-5, 5e-2, 1e-8


@dataclass
class Network:
    """One provider: a model in one layout, its input, and what is timed on it."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    call: Callable[..., Tensor]  # the model, or its compiled form
    optimizer: torch.optim.Optimizer | None = None
    autocast: bool = False

    def forward(self) -> Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.call(self.images)
            return cross_entropy(output, self.labels) if self.optimizer is not None else output

    def in_double(self) -> Network:
        """The same network in fp64, not compiled."""
        twin = copy.deepcopy(self.model).double()
        return dataclasses.replace(
            self, model=twin, call=twin, images=self.images.double(), autocast=False
        )

    def infer(self) -> Tensor:
        with torch.inference_mode():
            return self.forward()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(self.forward())
        self.optimizer.step()

    def values(self) -> dict[str, Tensor]:
        """What is checked: the output, or the loss and every gradient of one pass."""
        if self.optimizer is None:
            return {"output": self.infer().clone()}
        self.model.zero_grad(set_to_none=True)
        loss = self.forward()
        self.backward(loss)
        found = {"loss": loss.detach()}
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            found[f"gradient of {name}"] = parameter.grad
        self.model.zero_grad(set_to_none=True)
        return found


def models(name: str, device: str, training: bool, seed: int = 0) -> dict[str, nn.Module]:
    """Stock and fused network of the same weights; for inference with statistics of random images."""
    from advdl_ops.models import create_model

    torch.manual_seed(seed)
    fused = create_model(name)
    stock: nn.Module = stock_resnet(name)
    stock.load_state_dict(fused.state_dict())
    if not training:
        norms = [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            stock(torch.randn(4, 3, 64, 64))
        for norm in norms:
            norm.momentum = 0.1
        fused.load_state_dict(stock.state_dict())
    return {k: m.to(device).train(training) for k, m in ((STOCK, stock), (OURS, fused))}


def networks(case: Case, session: Session) -> tuple[dict[str, Network], dict[str, str]]:
    """Every provider of a case, unchecked and not yet compiled, and the compiled ones' names."""
    training = bool(case.options["training"])
    made = models(str(case.options["model"]), case.device, training)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.shape, generator=generator).to(case.device)
    labels = torch.randint(1000, case.shape[:1], generator=generator).to(case.device)
    found: dict[str, Network] = {}
    eager_names: dict[str, str] = {}
    for base, model in made.items():
        for suffix, layout in LAYOUTS.items():
            for compiled in (False, True) if session.compiles else (False,):
                name = base + suffix
                if compiled:
                    stock_name = f"{STOCK_COMPILED}{suffix}"
                    name = stock_name if base == STOCK else f"{base}{suffix} + {STOCK_COMPILED}"
                if not session.settings.wants(name):
                    continue
                own = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
                optimizer = (
                    torch.optim.SGD(own.parameters(), 1e-3, momentum=0.9, fused=True)
                    if training
                    else None
                )
                found[name] = Network(
                    own,
                    images.contiguous(memory_format=layout),
                    labels,
                    own,
                    optimizer,
                    case.dtype == "bfloat16",
                )
                if compiled:
                    eager_names[name] = base + suffix
    return found, eager_names


def drop_slower_layout(
    found: dict[str, Network], compiled: dict[str, str], device: torch.device
) -> None:
    """Compile the layout only in which the same network runs faster uncompiled: a compilation costs minutes.

    Stock inference, which targets.md names, is compiled in both.
    """
    for base in (STOCK, OURS):
        if base == STOCK and found[STOCK].optimizer is None:
            continue
        names = [
            name for name, eager in compiled.items() if eager.startswith(base) and name in found
        ]
        # No step: the weights must stay those that all providers start from.
        calls = {
            name: timing.Timed(found[name].values if found[name].optimizer else found[name].infer)
            for name in names
        }
        if len(names) > 1:
            seconds = timing.measure(calls, device, 3, 0.0)
            fastest = min(names, key=lambda name: sorted(seconds[name])[1])
            for name in names:
                if name != fastest:
                    del found[name]


def compile_all(found: dict[str, Network], compiled: dict[str, str], session: Session) -> None:
    """Put torch.compile in place; its first call and the seconds it takes come with the check."""
    training = bool(session.case.options["training"])
    options: Any = {} if training else {"freezing": True}
    for name in compiled:
        if name in found:
            found[name].call = torch.compile(
                found[name].model, dynamic=False, options=options or None
            )


def check(found: dict[str, Network], compiled: dict[str, str], session: Session) -> None:
    """Refuse every network whose output (or loss and gradients) is off the fp64 result."""
    training = bool(session.case.options["training"])
    session.progress("fp64 reference")
    truth, stock = found[STOCK].in_double().values(), found[STOCK].values()
    slack = GRADIENT_SLACK if training else OUTPUT_SLACK
    for name in list(found):
        session.progress(f"check {name}")
        begin = time.perf_counter()
        try:
            why = wrong_values(found[name].values(), stock, truth, slack, norm=2)
        except Exception as failure:  # it is no competitor; the others still are
            why = in_one_line(failure)
        if name in compiled and why is None:
            session.record(name, "compile", "time", "s", time.perf_counter() - begin)
        if why is None and name.startswith(OURS) and name not in compiled:
            why = wrong_values(found[name].in_double().values(), truth, truth, EXACT_SLACK, norm=2)
            why = why and f"in fp64, {why}"
        if why is not None:
            session.refuse(name, why)
            del found[name]
    if not found:
        raise Refused(f"{session.case.name}: no provider returned the right values")


def counted_flops(network: Network, training: bool) -> int:
    """Flops of convolutions and matrix products, counted by torch while the stock network runs."""
    with FlopCounterMode(display=False) as counter:
        if training:
            network.step()
        else:
            with torch.no_grad():
                network.forward()
    return counter.get_total_flops()


def best(seconds: dict[str, list[float]], start: str) -> str | None:
    names = [name for name in seconds if name.startswith(start) and STOCK_COMPILED not in name]
    return min(names, key=lambda name: sorted(seconds[name])[len(seconds[name]) // 2], default=None)


def measure_model(case: Case, session: Session) -> None:
    """Records of a model case: times, speedups over each provider, rates, and for training the memory."""
    with tempfile.TemporaryDirectory(prefix="advdl_ops_inductor_") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
            folder  # compile seconds are those of a first compilation
        )
        _measure(case, session, torch.device(case.device), bool(case.options["training"]))


def _measure(case: Case, session: Session, device: torch.device, training: bool) -> None:
    mode = "full" if training else "fwd"
    session.progress("ceilings")
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    rates = ceilings.ceilings(device, dtype)
    session.record("machine", "-", "copy", "GB/s", rates[0] * 1e-9)
    session.record("machine", "-", "matmul", "GFLOP/s", rates[1] * 1e-9)
    found, compiled = networks(case, session)
    drop_slower_layout(found, compiled, device)
    compile_all(found, compiled, session)
    check(found, compiled, session)
    flops = counted_flops(found[STOCK], training) if STOCK in found else None
    if not case.options.get("memory_only"):
        calls = {
            name: timing.Timed(network.step if training else network.infer)
            for name, network in found.items()
        }
        seconds = timing.measure(
            calls,
            device,
            session.rounds,
            session.block_seconds,
            session.each_round(f"time {mode}"),
        )
        report_times(session, mode, seconds, best(seconds, OURS) or OURS)
        report_rates(session, mode, seconds, rates, None, flops)
    if training:
        for name, network in found.items():
            session.progress(f"memory of {name}")
            network.step()
            network.model.zero_grad(set_to_none=True)
            held, peak = memory.held_and_peak(network.forward, network.backward, device)
            session.record(name, mode, "held", "B", held)
            session.record(name, mode, "peak", "B", peak)
