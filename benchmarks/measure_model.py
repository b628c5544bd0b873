"""How a network is measured: stock, optimized and the zoo's, with the same weights, in both layouts, also compiled."""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from . import ceilings, memory, timing
from .calls import Calls
from .check import wrong_values
from .measure_op import report_over_stock, report_rates, report_times
from .record import CHANNELS_LAST, OPTIMIZED, OURS, STOCK, compiled_name
from .registry import Case
from .session import Refused, Session, in_one_line

LAYOUTS = {"": torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
# Rounding flips the sign of some pre-activations in a deep network, which changes its gradients much more than rounding
# itself: up to 3 % of their norm between eager in its two layouts (ResNet-50 at 112 px). So the gradients of timed
# networks are compared loosely as a whole, which finds wrong connections. For networks of advdl_ops that are not
# compiled there are two closer checks: of the network in fp64, where nothing flips, and of each call in the timed
# network (`calls.py`). A compiled network of advdl_ops is compared with the uncompiled one (`wrong_compilation`).
OUTPUT_SLACK, GRADIENT_SLACK, EXACT_SLACK, COMPILED_SLACK = 1e-5, 5e-2, 1e-8, 1e-3
# With this weight and one of these pairs of biases (even, odd channels), the outputs of a norm lie 5 standard
# deviations from 0, and further from the other kinks of activations, at -3, 3 and 6. So rounding flips hardly a sign.
# Larger biases make the gradients less accurate. The first pair opens every ReLU, and every weight has a gradient. The
# second closes half of them, which finds a missing ReLU.
STEADY_WEIGHT, STEADY_BIASES = 0.125, ((0.625, 0.625), (0.625, -0.625))


@dataclass
class Subject:
    """One network, stock and, if it has one, the zoo's, and one batch; all on the CPU.

    The zoo's network gets the weights of the stock one, so their ``state_dict`` keys must be the same.
    """

    stock: nn.Module
    zoo: nn.Module | None
    inputs: tuple[Tensor, ...]
    target: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy


def from_zoo(name: str, **options: Any) -> nn.Module | None:
    from advdl_ops import models

    return models.create_model(name, **options) if name in models.list_models() else None


def random_images(case: Case, seed: int = 0) -> Tensor:
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(seed))


def random_labels(classes: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def tensor_of(output: Any) -> Tensor:
    """The output tensor. torchvision's segmentation models return a dict, as diffusers' models do: the first value."""
    return output if isinstance(output, Tensor) else next(iter(output.values()))


@dataclass
class Network:
    """One provider: a model in one layout, its inputs, and what is timed on it."""

    base: str  # STOCK, OURS or OPTIMIZED
    model: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    call: Callable[..., Any]  # the model, or its compiled form
    optimizer: torch.optim.Optimizer | None = None
    autocast: bool = False
    uncompiled: Network | None = None  # the same network before compilation, for a compiled one
    kept: int = 0  # bytes that inference keeps for all calls, without parameters and buffers

    @property
    def compiled(self) -> bool:
        return self.uncompiled is not None

    def forward(self) -> Tensor:
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.autocast):
            output = tensor_of(self.call(*self.inputs))
            return self.loss(output, self.target) if self.optimizer is not None else output

    def in_double(self) -> Network:
        """The same network in fp64, not compiled."""
        twin = copy.deepcopy(self.model).double()
        inputs, target = map(_double, self.inputs), _double(self.target)
        return dataclasses.replace(
            self,
            model=twin,
            call=twin,
            inputs=tuple(inputs),
            target=target,
            autocast=False,
            uncompiled=None,
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
        """The values to check: the output, or the loss and every gradient of one pass."""
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


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def models(subject: Subject, device: str, training: bool) -> dict[str, nn.Module]:
    """The competing networks, with the same weights, and for inference also the same running statistics."""
    from advdl_ops import optimize

    found = {STOCK: subject.stock.to(device)}
    # With random masks every provider would compute something different.
    for module in (*subject.stock.modules(), *(subject.zoo.modules() if subject.zoo else ())):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if not training:
        take_statistics(subject.stock, subject.inputs[0].to(device))
    if subject.zoo is not None:
        subject.zoo.load_state_dict(subject.stock.state_dict())
        found[OURS] = subject.zoo.to(device)
    found[OPTIMIZED] = optimize(copy.deepcopy(subject.stock))
    return {name: model.train(training) for name, model in found.items()}


def take_statistics(model: nn.Module, inputs: Tensor) -> None:
    """Sets the running statistics of every batch norm, from random images as large as the timed ones (at least 64).

    Statistics of smaller images do not fit: EfficientNet's values grew to 1e5 and rounding errors to 5e-4, and stock
    was refused.
    """
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        size = (max(64, pixels) for pixels in inputs.shape[2:])
        model.train()(torch.randn(4, inputs.shape[1], *size, device=inputs.device))
    for norm, momentum in norms.items():
        norm.momentum = momentum


def new_network(
    subject: Subject,
    case: Case,
    base: str,
    model: nn.Module,
    suffix: str,
    uncompiled: Network | None = None,
) -> Network:
    """A copy of ``model`` in the layout of ``suffix``, and its inputs. It is compiled if ``uncompiled`` is given."""
    layout, training = LAYOUTS[suffix], bool(case.options["training"])
    own = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    call: Callable[..., Any] = own
    if uncompiled is not None:
        options: Any = None if training else {"freezing": True}
        call = torch.compile(own, dynamic=False, options=options)
    inputs = (t.to(case.device) for t in subject.inputs)
    return Network(
        base,
        own,
        tuple(t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in inputs),
        subject.target.to(case.device),
        subject.loss,
        call,
        torch.optim.SGD(own.parameters(), 1e-3, momentum=0.9, fused=True) if training else None,
        case.dtype == "bfloat16",
        uncompiled,
    )


def networks(subject: Subject, session: Session, made: dict[str, nn.Module]) -> dict[str, Network]:
    """Every uncompiled provider of a case, not yet checked. Includes those that are only wanted compiled."""
    wants = session.settings.wants
    return {
        base + suffix: new_network(subject, session.case, base, model, suffix)
        for base, model in made.items()
        for suffix in LAYOUTS
        if wants(base + suffix) or wants(compiled_name(base + suffix))
    }


def compiled_networks(
    subject: Subject, session: Session, made: dict[str, nn.Module], found: dict[str, Network]
) -> dict[str, Network]:
    """Stock compiled in both layouts, and the provider of advdl_ops that is the fastest uncompiled: a compilation takes
    minutes.

    The check makes the first call and measures the seconds of the compilation.
    """
    if not session.compiles:
        return {}
    training = bool(session.case.options["training"])
    chosen: list[str] = []
    for stock in (True, False):
        rivals = {
            name: network
            for name, network in found.items()
            if (network.base == STOCK) == stock and session.settings.wants(compiled_name(name))
        }
        if len(rivals) > 1 and not stock:
            # No optimizer step, because all providers must start from the same weights.
            calls = {n: timing.Timed(r.values if training else r.infer) for n, r in rivals.items()}
            seconds = timing.measure(calls, torch.device(session.case.device), 3, 0.0)
            chosen.append(min(rivals, key=lambda name: statistics.median(seconds[name])))
        else:
            chosen += rivals
    return {
        compiled_name(name): new_network(
            subject, session.case, base, made[base], name.removeprefix(base), found[name]
        )
        for name, base in ((name, found[name].base) for name in chosen)
    }


def _without_rounding(truth: dict[str, Tensor], least: float = 1e-12) -> dict[str, Tensor]:
    """Sets gradients to 0 that are 0 up to rounding, such as that of the bias of attention's keys.

    Their relative errors are meaningless. Against 0, the absolute error counts. ``least`` is a share of the largest
    norm.
    """
    norms = {name: float(torch.linalg.vector_norm(value)) for name, value in truth.items()}
    least *= max(norms.values())
    return {n: value if norms[n] > least else torch.zeros_like(value) for n, value in truth.items()}


def _rounding(values: dict[str, Tensor], least: float = 1e-12) -> set[str]:
    """Names of the gradients that :func:`_without_rounding` sets to 0."""
    return {name for name, value in _without_rounding(values, least).items() if not value.any()}


def expected_values(stock: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values of fp64, and those of stock in the timed dtype."""
    return _without_rounding(stock.in_double().values()), stock.values()


def judged_values(network: Network, calls: Calls) -> dict[str, Tensor]:
    """The values of a step. ``calls.wrong`` then lists the wrong calls in it."""
    with calls.judged():
        values = network.values()
    parameters = dict(network.model.named_parameters())
    calls.wrong += calls.altered({p: values[f"gradient of {n}"] for n, p in parameters.items()})
    return values


def steady_values(network: Network, biases: tuple[float, float]) -> dict[str, Tensor]:
    """The values with ``STEADY_WEIGHT`` and these biases in every norm. Afterwards the network has its own again."""
    norms = [m for m in network.model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    norms = [norm for norm in norms if norm.affine]
    with torch.no_grad():
        own = [(norm.weight.clone(), norm.bias.clone()) for norm in norms]
        for norm in norms:
            norm.weight.fill_(STEADY_WEIGHT)
            norm.bias[::2], norm.bias[1::2] = biases
    try:
        return network.values()
    finally:
        with torch.no_grad():
            for norm, (weight, bias) in zip(norms, own, strict=True):
                norm.weight.copy_(weight)
                norm.bias.copy_(bias)


def wrong_compilation(
    compiled: Network, uncompiled: Network, values: dict[str, Tensor]
) -> str | None:
    """Why a compiled network does not compute what it computed before, or None. ``values`` are those of its step.

    The loss and every gradient must agree within ``COMPILED_SLACK``, in fp32 on the CPU. If they do not at the timed
    weights, where rounding may flip signs (U-Net: 1e-3 to 6e-3), they must at both ``STEADY_BIASES`` (U-Net: 3e-4). The
    weights are inputs of the compiled code, so it is the same code that is timed. Gradients that the steady norms make
    0 up to rounding, such as those of many of ResNet-50's biases, are judged by fp64 alone then (``GRADIENT_SLACK``).
    """

    def difference(
        after: dict[str, Tensor], before: dict[str, Tensor], rounding: set[str]
    ) -> str | None:
        same = {n: torch.zeros_like(v) if n in rounding else v for n, v in before.items()}
        return wrong_values(after, same, same, COMPILED_SLACK, 2, "result before it was compiled")

    own = uncompiled.values()
    eps = torch.finfo(torch.float32).eps
    # In fp32 these are told at the timed weights: steady norms make others as small, though not by rounding.
    rounding = _rounding(own, eps)
    if difference(values, own, rounding) is None:
        return None
    exact = uncompiled.in_double()
    for biases in STEADY_BIASES:
        # With open ReLUs a norm removes the bias of the one before.
        why = difference(
            steady_values(compiled, biases),
            steady_values(uncompiled, biases),
            rounding | _rounding(steady_values(exact, biases)),
        )
        if why is not None:
            return why
    return None


def check(
    found: dict[str, Network],
    session: Session,
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> dict[str, Network]:
    """The networks whose output (or loss and gradients) agrees with fp64. The others are refused."""
    truth, stock = expected
    training, device = bool(session.case.options["training"]), torch.device(session.case.device)
    slack = GRADIENT_SLACK if training else OUTPUT_SLACK
    repeats = training and device.type == "cpu" and session.case.dtype == "float32"
    calls, right = Calls(), {}
    for name, network in found.items():
        session.progress(f"check {name}")
        begin = time.perf_counter()
        try:
            ours = network.base != STOCK and not network.compiled
            if not training:
                network.kept, values = memory.kept(network.values, device)
            elif ours:
                values = judged_values(network, calls)
            else:
                values = network.values()
            seconds = time.perf_counter() - begin
            why = wrong_values(values, stock, truth, slack, norm=2)
            if why is None and ours and calls.wrong:
                why = calls.wrong[0]
            if why is None and ours:
                why = wrong_values(network.in_double().values(), truth, truth, EXACT_SLACK, norm=2)
                why = why and f"in fp64, {why}"
            if why is None and repeats and network.base != STOCK and network.uncompiled is not None:
                why = wrong_compilation(network, network.uncompiled, values)
        except Exception as failure:  # only this provider is refused
            why = in_one_line(failure)
        if network.compiled and why is None:
            session.record(name, "compile", "time", "s", seconds)
        if why is None:
            right[name] = network
        else:
            session.refuse(name, why)
    return right


def conv_backward_flops(
    grad: list[int], x: list[int], weight: list[int], bias: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int, wanted: list[bool],
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Each gradient costs as much as the forward. Torch's own count ignores groups in that of the weight."""
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed)


def counted_flops(network: Network, training: bool) -> int:
    """Flops of convolutions and matrix products, counted by torch while the stock network runs."""
    rules = {torch.ops.aten.convolution_backward: conv_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=rules) as counter:
        if training:
            network.step()
        else:
            with torch.no_grad():
                network.forward()
    return counter.get_total_flops()


def best(found: dict[str, Network], seconds: Mapping[str, list[float]], base: str) -> str | None:
    """The name of the faster layout of an uncompiled network."""
    names = [name for name in seconds if found[name].base == base and not found[name].compiled]
    return min(names, key=lambda name: statistics.median(seconds[name]), default=None)


def measure_model(case: Case, session: Session, subject: Subject) -> None:
    """Records of a model case: times, speedups, rates, and memory."""
    # An empty cache, so that compile seconds are those of a first compilation.
    with (
        tempfile.TemporaryDirectory(prefix="advdl_ops_inductor_") as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        _measure(case, session, subject, torch.device(case.device))


def _measure(case: Case, session: Session, subject: Subject, device: torch.device) -> None:
    training = bool(case.options["training"])
    mode = "full" if training else "fwd"
    session.progress("ceilings")
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    rates = ceilings.ceilings(device, dtype)
    session.record("machine", "-", "copy", "GB/s", rates[0] * 1e-9)
    session.record("machine", "-", "matmul", "GFLOP/s", rates[1] * 1e-9)
    made = models(subject, case.device, training)
    found = networks(subject, session, made)
    session.progress("fp64 reference")
    expected = expected_values(found[STOCK])
    found = check(found, session, expected)
    found |= check(compiled_networks(subject, session, made, found), session, expected)
    if not found:
        raise Refused(f"{case.name}: no provider returned the right values")
    del made, expected
    flops = counted_flops(found[STOCK], training) if STOCK in found else None
    calls = {
        name: timing.Timed(network.step if training else network.infer)
        for name, network in found.items()
    }
    seconds = timing.measure(
        calls, device, session.rounds, session.block_seconds, session.each_round(f"time {mode}")
    )
    # Plots and comparisons show ratios over the zoo's network, or over the optimized one if the zoo has none.
    ours = best(found, seconds, OURS) or best(found, seconds, OPTIMIZED) or OURS
    report_times(session, mode, seconds, ours)
    report_over_stock(session, mode, seconds)
    report_rates(session, mode, seconds, rates, None, flops)
    for name, network in found.items():
        session.progress(f"memory of {name}")
        if training:
            network.step()
            network.model.zero_grad(set_to_none=True)
            held, peak = memory.held_and_peak(network.forward, network.backward, device)
            session.record(name, mode, "held", "B", held)
        else:
            _, peak = memory.held_and_peak(network.infer, lambda output: None, device)
            session.record(name, mode, "kept", "B", network.kept)
            peak += network.kept
        session.record(name, mode, "peak", "B", peak)
