"""Residual blocks, and chains of convolutions and norms, as one function each that keeps little for backward.

Between two convolutions, stock PyTorch keeps the output of the first, for the norm, and the output of the activation,
for the second convolution. These functions keep the first, and make the second again in backward, with one pass, to the
same bits. docs/lean_training.md explains the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._lean import LEVELS, concatenated, saving
from ..activation import Activation
from .batch_norm_act import batch_norm_act
from .conv2d import conv2d
from .conv_bn_act import ORDERS, conv_bn_act

_PRE_ACTIVATION = "bn-act-conv"


class ConvNorm(NamedTuple):
    """A convolution and its batch norm: arguments of :func:`.conv_bn_act`, under the same names.

    ``order`` may also be ``"bn-act-conv"`` (He et al. 2016, arXiv:1603.05027; Huang et al. 2017, arXiv:1608.06993): the
    norm is then ``[C_in]``.
    """

    weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    momentum: float = 0.1
    eps: float = 1e-5
    act: str | Activation | torch.nn.Module | None = "relu"
    order: str = "conv-bn-act"


def conv_chain(
    input: Tensor | Sequence[Tensor],
    units: Sequence[ConvNorm],
    residual: Tensor | None = None,
    *,
    training: bool = False,
    lean: str | None = "block",
) -> Tensor:
    """The units one after another; ``residual`` is added before the activation of the last one.

    With ``"bn-act-conv"`` it is added behind the convolution.

    Args:
        input: ``[N, C, H, W]``, or several of the same size, which are joined by channels.
        units: the first takes the input, each further one the output of the one before.
        residual: of the output's shape.
        training: whether the norms take the statistics of the batch.
        lean: what backward makes again: ``None`` (nothing), ``"block"`` (activations), ``"stage"`` (also the output),
            ``"deep"`` (also products of 1x1 that have more outputs than inputs), ``"deepest"`` (both). Inside of a lean
            model, the model's level holds.

    Returns:
        ``[N, C_out, H_out, W_out]``. Values and gradients are the same with every ``lean``.

    Raises:
        ValueError: no unit, an unknown ``lean`` or order; else what :func:`.conv_bn_act` raises.
    """
    _check("conv_chain", units, lean)
    with saving(lean, overrides=False):
        x = input if isinstance(input, Tensor) else concatenated(*input)
        for unit in units[:-1]:
            x = _unit(x, unit, None, training)
        return _unit(x, units[-1], residual, training)


def basic_block(
    input: Tensor,
    first: ConvNorm,
    second: ConvNorm,
    downsample: ConvNorm | None = None,
    *,
    training: bool = False,
    lean: str | None = "block",
) -> Tensor:
    """ResNet's block of two convolutions (He et al. 2015, arXiv:1512.03385): ``act(second(first(x)) + shortcut)``.

    Args:
        input: x, ``[N, C, H, W]``.
        first, second: the two convolutions, each with its activation.
        downsample: the shortcut's convolution; ``None``: the shortcut is ``x``. Its own activation is not used.
        training, lean: as :func:`conv_chain`.
    """
    return _residual_block("basic_block", input, (first, second), downsample, training, lean)


def bottleneck(
    input: Tensor,
    first: ConvNorm,
    second: ConvNorm,
    third: ConvNorm,
    downsample: ConvNorm | None = None,
    *,
    training: bool = False,
    lean: str | None = "block",
) -> Tensor:
    """ResNet's block of three convolutions; arguments as :func:`basic_block`."""
    return _residual_block("bottleneck", input, (first, second, third), downsample, training, lean)


def _residual_block(
    function: str,
    x: Tensor,
    units: tuple[ConvNorm, ...],
    downsample: ConvNorm | None,
    training: bool,
    lean: str | None,
) -> Tensor:
    _check(function, units, lean)
    with saving(lean, overrides=False):
        shortcut = x
        if downsample is not None:
            shortcut = _unit(x, downsample._replace(act=None), None, training)
        return conv_chain(x, units, shortcut, training=training, lean=lean)


def _check(function: str, units: Sequence[ConvNorm], lean: str | None) -> None:
    if lean is not None and lean not in LEVELS:
        raise ValueError(f"{function}: lean ({lean!r}) must be None or one of {', '.join(LEVELS)}")
    if not units:
        raise ValueError(f"{function}: units must have one at least")
    for unit in units:
        if unit.order not in (*ORDERS, _PRE_ACTIVATION):
            orders = ", ".join((*ORDERS, _PRE_ACTIVATION))
            raise ValueError(f"{function}: order ({unit.order!r}) must be one of {orders}")


def _unit(x: Tensor, unit: ConvNorm, residual: Tensor | None, training: bool) -> Tensor:
    weight, mean, var, bn_weight, bn_bias, bias, *conv, momentum, eps, act, order = unit
    if order == _PRE_ACTIVATION:
        x = batch_norm_act(x, mean, var, bn_weight, bn_bias, training, momentum, eps, act=act)
        return conv2d(x, weight, bias, *conv, residual=residual)
    stride, padding, dilation, groups = conv
    return conv_bn_act(
        x, weight, mean, var, bn_weight, bn_bias, bias=bias, stride=stride, padding=padding,
        dilation=dilation, groups=groups, training=training, momentum=momentum, eps=eps,
        residual=residual, act=act, order=order,
    )  # fmt: skip
