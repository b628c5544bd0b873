"""Group norm, residual addition and activation in plain PyTorch (Wu & He 2018, arXiv:1803.08494)."""

from __future__ import annotations

import math

from torch import Tensor

from .._schemas import acc_dtype
from ..activation import Activation
from .activation import activate
from .batch_norm_act import per_channel


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`advdl_ops.functional.group_norm`; ``groups`` 0 normalizes each position over its channels.

    Returns:
        The output, and the mean and biased variance of each set: ``[N, groups]``, or ``[N, S]``.
    """
    acc = acc_dtype(x.dtype)
    wide = x.to(acc)
    n, channels = x.shape[:2]
    if groups == 0:
        mean = wide.mean(1, keepdim=True)
        var = (wide - mean).square().mean(1, keepdim=True)
        spread_mean, spread_var = mean, var
        sets = math.prod(x.shape[2:])
    else:
        grouped = wide.reshape(n, groups, math.prod(x.shape[1:]) // groups)
        if x.numel() == 0:  # a mean would be NaN, which would reach the gradient of the weight
            mean = var = grouped.sum(2)
        else:
            mean = grouped.mean(2)
            var = (grouped - mean.unsqueeze(2)).square().mean(2)
        # One value for each channel, so that the arithmetic runs in x's own shape and keeps its memory format.
        spread_mean, spread_var = (
            v.unsqueeze(2)
            .expand(n, groups, channels // groups)
            .reshape([n, channels] + [1] * (x.dim() - 2))
            for v in (mean, var)
        )
        sets = groups
    scale = (spread_var + eps).rsqrt()
    if weight is not None:
        scale = scale * per_channel(weight.to(acc), x)
    z = (wide - spread_mean) * scale
    if bias is not None:
        z = z + per_channel(bias.to(acc), x)
    if residual is not None:
        z = z + residual.to(acc)
    return activate(z, act).to(x.dtype), mean.reshape(n, sets), var.reshape(n, sets)
