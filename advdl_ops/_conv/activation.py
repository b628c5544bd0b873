"""The activation after one of torch's ops: in place where possible, and its derivative from what was saved."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..activation import Activation


def activated(z: Tensor, act: Activation, in_place: bool) -> Tensor:
    """``act(z)``, written over ``z`` if ``in_place`` allows it and torch has the activation in place."""
    if act.code == 0:
        return z
    write = _IN_PLACE.get(act.name) if in_place else None
    if write is None:
        return reference.activation.activate(z, act)
    return write(z, act.param)


_IN_PLACE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: z.relu_(),
    "leaky_relu": lambda z, slope: F.leaky_relu_(z, slope),
    "elu": lambda z, alpha: F.elu_(z, alpha),
    "silu": lambda z, _: F.silu(z, inplace=True),
    "gelu": lambda z, _: torch.ops.aten.gelu_(z),
    "gelu_tanh": lambda z, _: torch.ops.aten.gelu_(z, approximate="tanh"),
    "sigmoid": lambda z, _: z.sigmoid_(),
    "tanh": lambda z, _: z.tanh_(),
    "hardswish": lambda z, _: F.hardswish(z, inplace=True),
    "relu6": lambda z, _: F.relu6(z, inplace=True),
}


def derivative_from_output(act: Activation) -> bool:
    """Whether the derivative from the output is as exact as from the pre-activation (not for elu: a difference)."""
    return act.name in ("relu", "relu6", "sigmoid", "tanh") or (
        act.name == "leaky_relu" and act.param >= 0
    )


# (gradient of the output, what forward saved, the activation's parameter) -> the gradient of the pre-activation.
DERIVATIVES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relu": lambda dout, out, _: torch.ops.aten.threshold_backward(dout, out, 0),
    # Only the sign of what was saved matters.
    "leaky_relu": lambda dout, saved, slope: torch.ops.aten.leaky_relu_backward(
        dout, saved, slope, False
    ),
    "elu": lambda dout, z, alpha: torch.ops.aten.elu_backward(dout, alpha, 1, 1, False, z),
    "silu": lambda dout, z, _: torch.ops.aten.silu_backward(dout, z),
    "gelu": lambda dout, z, _: torch.ops.aten.gelu_backward(dout, z),
    "gelu_tanh": lambda dout, z, _: torch.ops.aten.gelu_backward(dout, z, approximate="tanh"),
    "sigmoid": lambda dout, out, _: torch.ops.aten.sigmoid_backward(dout, out),
    "tanh": lambda dout, out, _: torch.ops.aten.tanh_backward(dout, out),
    "hardswish": lambda dout, z, _: torch.ops.aten.hardswish_backward(dout, z),
    "relu6": lambda dout, out, _: torch.ops.aten.hardtanh_backward(dout, out, 0, 6),
}
