"""The cost of one call beyond its kernel: batch norm + ReLU, group norm + SiLU, an LSTM cell, convolution + ReLU.

Measured on a tiny tensor. The stock layers are nn.BatchNorm2d and nn.ReLU(inplace=True), nn.GroupNorm and nn.SiLU,
nn.LSTMCell, nn.Conv2d and nn.ReLU(inplace=True), and their functional forms. ``eager native`` is the operator below
F.batch_norm or F.group_norm, without their checks in Python (1.1x to 1.4x as fast). Compiled, they have 0.1x to 0.4x of
the speed. ``over_stock`` compares each provider with the fastest stock form. ``raw operator`` is torch.ops.advdl_ops
alone. targets.md: raw <= 10 us, without gradients <= 15 us, with gradients below the stock layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..registry import Case, register

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..session import Session

SHAPE = (2, 8, 4, 4)


Calls = dict[str, dict[str, Callable[[], Any]]]


def batch_norm_calls(device: str) -> Calls:
    """The competing calls of each mode. ``eager`` and ``advdl_ops`` are the modules."""
    import torch
    from torch import nn
    from torch.nn.functional import batch_norm, relu_

    native = torch.native_batch_norm

    from advdl_ops.functional import batch_norm_act
    from advdl_ops.nn import BatchNormAct2d

    torch.manual_seed(0)
    x, channels = torch.randn(SHAPE, device=device), SHAPE[1]
    ours = BatchNormAct2d(channels, act="relu").to(device)
    stock = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)).to(device)
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    operator, relu = torch.ops.advdl_ops.batch_norm_act_.default, ours.act

    def forward(training: bool) -> dict[str, Callable[[], Any]]:
        modules = {"eager": stock, "advdl_ops": ours}
        modules = {name: _copy(module).train(training) for name, module in modules.items()}
        options = (training, 0.1, 1e-5, relu.code, relu.param)
        return {
            "eager": lambda: modules["eager"](x),
            "eager functional": lambda: relu_(batch_norm(x, mean, var, weight, bias, training)),
            "eager native": lambda: relu_(
                native(x, weight, bias, mean, var, training, 0.1, 1e-5)[0]
            ),
            "raw operator": lambda: operator(x, None, weight, bias, mean, var, *options),
            "functional": lambda: batch_norm_act(x, mean, var, weight, bias, training, act="relu"),
            "advdl_ops": lambda: modules["advdl_ops"](x),
        }

    return {
        "eval fwd": _without_gradients(forward(False)),
        "train fwd": _without_gradients(forward(True)),
        **_under_gradients(
            {"eager": stock, "advdl_ops": ours},
            {
                "eager functional": lambda x, w, b: relu_(batch_norm(x, mean, var, w, b, True)),
                "eager native": lambda x, w, b: relu_(
                    native(x, w, b, mean, var, True, 0.1, 1e-5)[0]
                ),
                "functional": lambda x, w, b: batch_norm_act(x, mean, var, w, b, True, act="relu"),
            },
            x,
        ),
    }


def group_norm_calls(device: str) -> Calls:
    """As :func:`batch_norm_calls`."""
    import torch
    from torch import nn
    from torch.nn import functional as stock_functional

    from advdl_ops import functional
    from advdl_ops.nn import GroupNorm

    torch.manual_seed(0)
    x, channels, groups = torch.randn(SHAPE, device=device), SHAPE[1], 2
    ours = GroupNorm(groups, channels, act="silu").to(device)
    stock = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU()).to(device)
    # In place it is faster without gradients, and slower with them.
    in_place = nn.Sequential(_copy(stock[0]), nn.SiLU(inplace=True))
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    operator, silu = torch.ops.advdl_ops.group_norm.default, ours.act

    native = torch.native_group_norm
    sizes = SHAPE[0], channels, SHAPE[2] * SHAPE[3], groups, 1e-5

    def stock_silu() -> torch.Tensor:
        y = stock_functional.group_norm(x, groups, weight, bias)
        return stock_functional.silu(y, inplace=True)

    forward = {
        "eager": lambda: in_place(x),
        "eager functional": stock_silu,
        "eager native": lambda: stock_functional.silu(
            native(x, weight, bias, *sizes)[0], inplace=True
        ),
        "raw operator": lambda: operator(
            x, None, weight, bias, groups, 1e-5, silu.code, silu.param
        ),
        "functional": lambda: functional.group_norm(x, groups, weight, bias, act="silu"),
        "advdl_ops": lambda: ours(x),
    }
    functions = {
        "eager functional": lambda x, w, b: stock_functional.silu(
            stock_functional.group_norm(x, groups, w, b)
        ),
        "eager native": lambda x, w, b: stock_functional.silu(native(x, w, b, *sizes)[0]),
        "functional": lambda x, w, b: functional.group_norm(x, groups, w, b, act="silu"),
    }
    return {
        "eval fwd": _without_gradients(forward),
        **_under_gradients({"eager": stock, "advdl_ops": ours}, functions, x),
    }


def conv2d_calls(device: str) -> Calls:
    """As :func:`batch_norm_calls`, for a dilated 3x3 convolution."""
    import torch
    from torch import nn
    from torch.nn import functional as stock_functional

    from advdl_ops import functional
    from advdl_ops.nn import DilatedConv2d

    torch.manual_seed(0)
    x, channels = torch.randn(SHAPE, device=device), SHAPE[1]
    conv = nn.Conv2d(channels, channels, 3, padding=2, dilation=2).to(device)
    stock = nn.Sequential(conv, nn.ReLU(inplace=True))
    ours = DilatedConv2d(channels, channels, 3, 2, act="relu").to(device)
    ours.load_state_dict(conv.state_dict())
    weight, bias = (p.detach() for p in conv.parameters())
    operator, relu = torch.ops.advdl_ops.conv2d.default, ours.act
    pairs = [1, 1], [2, 2], [2, 2]

    def stock_relu() -> torch.Tensor:
        return stock_functional.relu_(stock_functional.conv2d(x, weight, bias, 1, 2, 2))

    forward = {
        "eager": lambda: stock(x),
        "eager functional": stock_relu,
        "raw operator": lambda: operator(
            x, weight, None, bias, None, *pairs, 1, relu.code, relu.param
        ),
        "functional": lambda: functional.conv2d(x, weight, bias, 1, 2, 2, act="relu"),
        "advdl_ops": lambda: ours(x),
    }
    functions = {
        "eager functional": lambda x, w, b: stock_functional.relu_(
            stock_functional.conv2d(x, w, b, 1, 2, 2)
        ),
        "functional": lambda x, w, b: functional.conv2d(x, w, b, 1, 2, 2, act="relu"),
    }
    return {
        "eval fwd": _without_gradients(forward),
        **_under_gradients({"eager": stock, "advdl_ops": ours}, functions, x),
    }


CELL = (1, 32, 32)  # batch, input and hidden size


def lstm_cell_calls(device: str) -> Calls:
    """As :func:`batch_norm_calls`. The modules get zeros as states, as in the first step of a loop."""
    import torch
    from torch import nn

    from advdl_ops import functional
    from advdl_ops.nn import LSTMCell

    torch.manual_seed(0)
    batch, features, hidden = CELL
    x = torch.randn(batch, features, device=device)
    stock = nn.LSTMCell(features, hidden).to(device)
    ours = LSTMCell(features, hidden).to(device)
    ours.load_state_dict(stock.state_dict())
    weights = [p.detach() for p in stock.parameters()]
    states = torch.randn(batch, hidden, device=device), torch.randn(batch, hidden, device=device)
    operator = torch.ops.advdl_ops.lstm_cell.default
    forward = {
        "eager": lambda: stock(x, states),
        "eager functional": lambda: torch.lstm_cell(x, states, *weights),
        "raw operator": lambda: operator(x, *states, *weights, False),
        "functional": lambda: functional.lstm_cell(x, states, *weights),
        "advdl_ops": lambda: ours(x, states),
    }

    functions = {
        "eager functional": lambda x, *weights: torch.lstm_cell(x, states, *weights)[0],
        "functional": lambda x, *weights: functional.lstm_cell(x, states, *weights)[0],
    }
    return {
        "eval fwd": _without_gradients(forward),
        **_under_gradients(
            {"eager": stock, "advdl_ops": ours},
            functions,
            x,
            lambda module: lambda x: module(x, states)[0],
            states[0],
        ),
    }


def _under_gradients(
    modules: dict[str, nn.Module],
    functions: dict[str, Callable[..., torch.Tensor]],
    x: torch.Tensor,
    output: Callable[[nn.Module], Callable[[Any], Any]] = lambda module: module,
    gradient: torch.Tensor | None = None,
) -> Calls:
    """The calls with gradients: of modules, and of functions of x and the stock module's parameters, all as leaves."""
    import torch

    leaf = x.clone().requires_grad_()
    given = torch.randn_like(x) if gradient is None else gradient
    calls = {
        name: (functools.partial(output(module), leaf), [leaf, *module.parameters()])
        for name, module in modules.items()
    }
    parameters = [p.detach().clone().requires_grad_() for p in modules["eager"].parameters()]
    leaves = [leaf, *parameters]
    calls |= {name: (functools.partial(f, *leaves), leaves) for name, f in functions.items()}

    def full(call: Callable[[], Any], leaves: list[torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), leaves, given)

    return {
        "fwd": {name: call for name, (call, _) in calls.items()},
        "full": {name: full(*one) for name, one in calls.items()},
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
    from ..measure_op import report_over_stock, report_times

    calls = {
        "batch_norm": batch_norm_calls,
        "group_norm": group_norm_calls,
        "lstm": lstm_cell_calls,
        "conv2d": conv2d_calls,
    }
    family = next(name for name in calls if name in case.op)
    for mode, competing in calls[family](case.device).items():
        _agree(session, competing)
        # The host's clock on CUDA too, as the cost of a call is measured and not the time of its kernel.
        seconds = timing.measure(
            {name: timing.Timed(call) for name, call in competing.items()},
            torch.device("cpu"),
            session.rounds,
            session.block_seconds,
            session.each_round(f"time {mode}"),
        )
        report_times(session, mode, seconds)
        report_over_stock(session, mode, seconds)


def _agree(session: Session, competing: dict[str, Callable[[], Any]]) -> None:
    """Refuses calls whose result differs from stock PyTorch's (``full``: the gradients; raw operator: the first
    output).

    Refused calls are not timed.
    """
    import torch

    from ..session import in_one_line

    def parts(result: Any) -> tuple[torch.Tensor, ...]:
        return result if isinstance(result, tuple) else (result,)

    expected = parts(competing["eager"]())
    for name in list(competing):
        try:
            found = parts(competing[name]())
            # The raw operator also returns the tensors saved for backward.
            pairs = list(zip(found, expected, strict=name != "raw operator"))
            right = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)
            off = [f"{float((a - b).detach().abs().max()):.2e}" for a, b in pairs]
            why = "" if right else f"off by {', '.join(off)}"
        except (RuntimeError, ValueError) as error:
            why = in_one_line(error)
        if why:
            session.refuse(name, why)
            del competing[name]


for _op, _modes, _shape in (
    ("batch_norm_relu", ("eval fwd", "train fwd", "fwd", "full"), SHAPE),
    ("group_norm_silu", ("eval fwd", "fwd", "full"), SHAPE),
    ("lstm_cell", ("eval fwd", "fwd", "full"), CELL),
    ("conv2d_relu", ("eval fwd", "fwd", "full"), SHAPE),
):
    for _device in ("cpu", "cuda"):
        register(
            Case(
                name=f"overhead/{_op}/{_device}",
                suites=("ops",),
                op=f"overhead of {_op}",
                modes=_modes,
                dtype="float32",
                layout="contiguous",
                shape=_shape,
                device=_device,
                run=run,
                target="raw <= 10 us, no gradients <= 15 us, gradients below stock",
            )
        )
