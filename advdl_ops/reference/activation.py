"""The activations in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..activation import Activation


def activate(z: torch.Tensor, act: Activation) -> torch.Tensor:
    """``act(z)``, elementwise; any shape and floating dtype."""
    name = act.name
    if name == "identity":
        return z
    if name == "leaky_relu":
        return F.leaky_relu(z, act.param)
    if name == "elu":
        return F.elu(z, act.param)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return _PLAIN[name](z)


def finished(z: torch.Tensor, residual: torch.Tensor | None, act: Activation) -> torch.Tensor:
    """``act(z + residual)``: what follows torch's own operator, where that is recorded or serves in our place."""
    return activate(z if residual is None else z + residual, act)


_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
}
