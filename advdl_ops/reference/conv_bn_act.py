"""Convolution, batch norm, residual addition and activation in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._stock_faults import convolution
from ..activation import IDENTITY, Activation
from .activation import activate
from .batch_norm_act import batch_norm_act


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bias: Tensor | None,
    conv: tuple[Any, Any, Any, int],
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    act: Activation,
    order: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`advdl_ops.functional.conv_bn_act`; ``conv`` is (stride, padding, dilation, groups).

    Returns the output and the new running statistics, as :func:`.batch_norm_act`.
    """
    y = convolution(x, weight, bias, *conv)
    inside, outside = (IDENTITY, act) if order == "conv-bn-act" else (act, IDENTITY)
    return batch_norm_act(
        activate(y, inside),
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        momentum,
        eps,
        residual,
        outside,
    )
