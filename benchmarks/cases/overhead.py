"""What one call costs beyond its kernel: batch norm + ReLU on a tiny tensor.

The stock layers are nn.BatchNorm2d and nn.ReLU(inplace=True), and their functional forms. ``raw operator``
is torch.ops.advdl_ops alone. targets.md: raw <= 10 us, without gradients <= 15 us, with gradients below the
stock layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..registry import Case, register

if TYPE_CHECKING:
    from ..session import Session

SHAPE = (2, 8, 4, 4)


def calls(device: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """Per mode, the competing calls; ``eager`` and ``advdl_ops`` are the modules."""
    import torch
    from torch import nn
    from torch.nn.functional import batch_norm, relu_

    from advdl_ops.functional import batch_norm_act
    from advdl_ops.nn import BatchNormAct2d

    torch.manual_seed(0)
    x, channels = torch.randn(SHAPE, device=device), SHAPE[1]
    ours = BatchNormAct2d(channels, act="relu").to(device)
    stock = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)).to(device)
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    leaf = x.clone().requires_grad_()
    gradient = torch.randn(SHAPE, device=device)

    def raw(training: bool) -> Callable[[], Any]:
        operator = torch.ops.advdl_ops.batch_norm_act_.default
        relu = ours.act
        options = (training, 0.1, 1e-5, relu.code, relu.param)
        return lambda: operator(x, None, weight, bias, mean, var, *options)

    def forward(training: bool) -> dict[str, Callable[[], Any]]:
        modules = {"eager": stock, "advdl_ops": ours}
        modules = {name: _copy(module).train(training) for name, module in modules.items()}
        return {
            "eager": lambda: modules["eager"](x),
            "eager functional": lambda: relu_(batch_norm(x, mean, var, weight, bias, training)),
            "raw operator": raw(training),
            "functional": lambda: batch_norm_act(x, mean, var, weight, bias, training, act="relu"),
            "advdl_ops": lambda: modules["advdl_ops"](x),
        }

    def full(module: nn.Module) -> Callable[[], Any]:
        leaves = [leaf, *module.parameters()]
        return lambda: torch.autograd.grad(module(leaf), leaves, gradient)

    def recorded(module: nn.Module) -> Callable[[], Any]:
        return lambda: module(leaf)

    return {
        "eval fwd": _without_gradients(forward(False)),
        "train fwd": _without_gradients(forward(True)),
        "fwd": {"eager": recorded(stock), "advdl_ops": recorded(ours)},
        "full": {"eager": full(stock), "advdl_ops": full(ours)},
    }


def _copy(module: Any) -> Any:
    import copy

    return copy.deepcopy(module)


def _without_gradients(found: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    import torch

    return {name: torch.no_grad()(call) for name, call in found.items()}


def run(case: Case, session: Session) -> None:
    import torch

    from .. import timing
    from ..op_flow import report_times

    for mode, competing in calls(case.device).items():
        if mode.endswith("fwd"):
            _agree(session, competing)
        # The host's clock on CUDA too: what a call costs, not what its kernel takes.
        seconds = timing.measure(
            {name: timing.Timed(call) for name, call in competing.items()},
            torch.device("cpu"),
            session.rounds,
            session.block_seconds,
            session.each_round(f"time {mode}"),
        )
        report_times(session, mode, seconds)


def _agree(session: Session, competing: dict[str, Callable[[], Any]]) -> None:
    """Every call returns what stock PyTorch does (the raw operator's first output), or is not timed."""
    import torch

    from ..session import in_one_line

    expected = competing["eager"]()
    for name in list(competing):
        try:
            value = competing[name]()
            value = value[0] if isinstance(value, tuple) else value
            right = torch.allclose(value, expected, rtol=1e-5, atol=1e-5)
            why = "" if right else f"off by {float((value - expected).abs().max()):.2e}"
        except RuntimeError as error:
            why = in_one_line(error)
        if why:
            session.refuse(name, why)
            del competing[name]


for _device in ("cpu", "cuda"):
    register(
        Case(
            name=f"overhead/batch_norm_relu/{_device}",
            suites=("ops",),
            op="overhead of batch_norm_relu",
            modes=("eval fwd", "train fwd", "fwd", "full"),
            dtype="float32",
            layout="contiguous",
            shape=SHAPE,
            device=_device,
            run=run,
            target="raw <= 10 us, no gradients <= 15 us, gradients below stock",
        )
    )
