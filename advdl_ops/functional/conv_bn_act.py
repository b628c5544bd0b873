"""Convolution, batch norm, residual addition and activation.

In training the convolution is torch's and the rest is one op, :func:`batch_norm_act`. In evaluation without
gradients the norm is folded into the convolution's weight and bias (Jacob et al. 2018, arXiv:1712.05877,
section 3.2), and on CPU oneDNN adds bias, residual and activation while the output is still in cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schemas import conv2d_format, conv2d_shape
from ..activation import IDENTITY, Activation, resolve_activation
from ..backend import get_backend, transformed
from ..reference.activation import activate
from ..reference.batch_norm_act import acc_dtype
from ._conv2d_cpu import (
    Conv,
    convert,
    is_traced,
    onednn_conv_act,
    pair,
    uses_onednn,
)
from ._norm import check_residual
from .batch_norm_act import batch_norm_act, check_norm

_NAME = "conv_bn_act"
ORDERS = ("conv-bn-act", "conv-act-bn")


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: str | Activation | torch.nn.Module | None = None,
    order: str = "conv-bn-act",
) -> Tensor:
    """``act(batch_norm(conv2d(x)) + residual)``, or ``batch_norm(act(conv2d(x))) + residual``.

    Args:
        x: ``[N, C_in, H, W]``.
        weight: ``[C_out, C_in / groups, kH, kW]``.
        running_mean, running_var, bn_weight, bn_bias: ``[C_out]``, see :func:`batch_norm_act`.
        bias: ``[C_out]``, the convolution's own.
        stride, padding, dilation, groups: as :func:`torch.nn.functional.conv2d`.
        training, momentum, eps: as :func:`batch_norm_act`.
        residual: of the output's shape, added last before the activation (with ``order="conv-act-bn"``: last).
        act: see :func:`resolve_activation`.
        order: ``"conv-bn-act"`` or ``"conv-act-bn"``.

    Returns:
        ``[N, C_out, H_out, W_out]``.

    Raises:
        ValueError: an unknown ``order`` or ``act``, unbatched ``x``; else what :func:`torch.nn.functional.conv2d`
            and :func:`batch_norm_act` raise. Nothing is written when an error is raised.
    """
    activation = resolve_activation(_NAME, act)
    if order not in ORDERS:
        raise ValueError(f"{_NAME}: order ({order!r}) must be one of {', '.join(ORDERS)}")
    if x.dim() != 4:
        # The types of torch's layers: the convolution takes an unbatched image, and the norm then refuses it.
        error = ValueError if x.dim() == 3 else RuntimeError
        raise error(f"{_NAME}: x (shape {tuple(x.shape)}) must be [N, C_in, H, W]")
    conv = Conv(stride, padding, dilation, groups)
    if (
        not training
        and order == "conv-bn-act"
        and folds(x, weight, bias, bn_weight, bn_bias, residual)
    ):
        check_norm(
            _NAME, x, weight.shape[0], running_mean, running_var, bn_weight, bn_bias, False, eps
        )
        check_conv(x, weight, bias)
        assert running_mean is not None and running_var is not None
        folded = fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps)
        return conv_act(x, *folded, conv, residual, activation)
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    inside, outside = (IDENTITY, activation) if order == "conv-bn-act" else (activation, IDENTITY)
    return batch_norm_act(
        activate(y, inside),
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        momentum,
        eps,
        residual=residual,
        act=outside,
    )


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What :func:`torch.nn.functional.conv2d` would refuse, before folding broadcasts over it."""
    if weight.dim() != 4:
        raise RuntimeError(
            f"{_NAME}: weight (shape {tuple(weight.shape)}) must be [C_out, C_in / groups, kH, kW]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"{_NAME}: bias (shape {tuple(bias.shape)}) must have one value for each of the {weight.shape[0]} channels"
        )
    for name, v in (("weight", weight), ("bias", bias)):
        if v is not None and (v.device != x.device or v.dtype != weight.dtype):
            raise RuntimeError(
                f"{_NAME}: {name} ({v.dtype} on {v.device}) must be of the weight's dtype ({weight.dtype}) "
                f"on x's device ({x.device})"
            )


def folds(x: Tensor, *others: Tensor | None) -> bool:
    """Whether evaluation folds the norm into the convolution.

    Under gradients it does not: conv, then one fused pass, moves as few bytes as folding and gives every gradient.
    On CUDA, the fused pass over the output stands until a convolution with this epilogue is there.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in others)
    ):
        return False
    return x.device.type == "cpu" and get_backend() == "fused" and not transformed()


def fold(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight ``[C_out, C_in / groups, kH, kW]`` and bias ``[C_out]`` of the convolution that includes the norm."""
    acc = acc_dtype(weight.dtype)
    scale = (running_var.to(acc) + eps).rsqrt()
    if bn_weight is not None:
        scale = scale * bn_weight.to(acc)
    shift = -running_mean.to(acc) if bias is None else bias.to(acc) - running_mean.to(acc)
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(acc)
    return (weight.to(acc) * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """``act(conv2d(x, weight, bias) + residual)`` without gradients, in ``x``'s memory format.

    On CPU one oneDNN call where torch offers it; ``weight`` may come prepacked by :func:`prepack`. Under compile the
    steps stay aten operators, visible to the compiler.
    As in what Inductor makes of a frozen network, oneDNN's relu gives 0 for NaN.
    """
    if uses_onednn(x, weight, conv) and (residual is None or residual.dtype == x.dtype):
        if residual is not None:
            pairs = pair(conv.stride), pair(conv.padding), pair(conv.dilation)
            check_residual(_NAME, residual, conv2d_shape(x, weight, *pairs), x.device)
        return convert(onednn_conv_act(x, weight, bias, conv, residual, act), conv2d_format(x))
    z = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if residual is not None:
        check_residual(_NAME, residual, z.shape, z.device)
        z = z + residual
    return activate(z, act)


def prefers_channels_last(x: Tensor, *parameters: Tensor) -> bool:
    """Whether a network that ends in no image should run this input in channels_last: folded convolutions on CPU do."""
    return folds(x, *parameters) and not is_traced()
