"""What a new forward calls in place of a group of layers: one op, if the layers have not changed since the plan.

`fuse.py` puts the call of :func:`run_as_one` into a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import nn
from .._schemas import conv2d_shape
from ..activation import ACTIVATIONS, IDENTITY, Activation, resolve_activation
from ..functional.conv_bn_act import result_dtype
from ..reference.activation import activate

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (
    nn.BatchNormAct2d,
    nn.GroupNorm,
    nn.LayerNorm2d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def run_as_one(
    x: Tensor,
    residual: Tensor | None,
    in_place: bool,
    act: str | torch.nn.Module | None,
    *layers: torch.nn.Module,
) -> Tensor:
    """``act(norm(conv(x)) + residual)``, where the layers are a convolution, a norm, or both in this order.

    Args:
        x: the input of the first layer.
        residual: added if given.
        in_place: whether the original code added it with ``+=``, which keeps the dtype.
        act: an activation's name or module, or ``None``.
        layers: the current layers of the model. If one of them was replaced or got a hook, they are called one by one.

    Returns:
        What the layers would return if called one after another.
    """
    activation = IDENTITY if act is None else _resolved(act)
    first, last = layers[0], layers[-1]
    if activation is not None and all(_takes(layer, act) for layer in layers):
        own = None if act is None else activation
        if residual is not None and not _fits(residual, x, first):
            x, layers = run_as_one(x, None, False, None, *layers), ()
        elif len(layers) == 2:
            if type(first) is nn.Conv2d and type(last) is nn.BatchNormAct2d:
                return nn.conv_bn_act(first, last, x, residual, act=own)
        elif type(first) is nn.ConvTranspose2d:
            return first(x, act=own)
        else:
            return first(x, residual, act=own)
    # One of them was replaced, or has a hook that must be called.
    for layer in layers:
        x = layer(x)
    if residual is not None:
        if in_place:
            x += residual
        else:
            x = x + residual
    if isinstance(act, torch.nn.Module):
        return act(x)
    return x if act is None else activate(x, ACTIVATIONS[act])


def _resolved(act: str | torch.nn.Module) -> Activation | None:
    """The activation, or ``None`` for a module that must be called itself."""
    if isinstance(act, str):
        return ACTIVATIONS[act]
    try:
        return None if is_watched(act) else resolve_activation("optimize", act)
    except TypeError:
        return None


def _takes(layer: Any, act: Any) -> bool:
    """Whether ``layer`` has not changed since its conversion, and has no activation of its own if ``act`` follows."""
    ours = type(layer) in CONVOLUTIONS or type(layer) in NORMS
    return ours and not is_watched(layer) and (act is None or layer.act == IDENTITY)


def has_hooks(layer: torch.nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def is_watched(layer: torch.nn.Module) -> bool:
    """Whether the layer has hooks, or its forward was replaced."""
    replaced = "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__
    return has_hooks(layer) or replaced


def _fits(residual: Any, x: Tensor, first: Any) -> bool:
    """Whether the sum with the layers' result neither broadcasts nor changes the dtype."""
    if not isinstance(residual, Tensor) or residual.dtype != result_dtype(x):
        return False
    if not isinstance(first, nn.Conv2d):
        return residual.shape == x.shape
    if x.dim() != 4:
        return False
    # Not from the weight, because a parametrized one is recomputed at each access.
    weight_shape = (first.out_channels, 0, *first.kernel_size)
    return residual.shape == conv2d_shape(
        x.shape, weight_shape, first.stride, _paddings(first), first.dilation
    )


def _paddings(conv: nn.Conv2d) -> Any:
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "valid":
        return 0, 0
    return tuple(d * (k - 1) / 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
