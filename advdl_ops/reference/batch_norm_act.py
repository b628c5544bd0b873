"""Batch norm, residual addition and activation in plain PyTorch (Ioffe & Szegedy 2015, arXiv:1502.03167)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._schemas import acc_dtype
from ..activation import Activation
from .activation import activate


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """``v`` ``[C]`` shaped to broadcast against ``x`` ``[N, C, ...]``."""
    return v.reshape([1, -1] + [1] * (x.dim() - 2))


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``x`` ``[N, C, ...]`` over all dimensions but the channels: two ``[C]``."""
    dims = [0, *range(2, x.dim())]
    wide = x.to(acc_dtype(x.dtype))
    if x.numel() == 0:  # its mean would be NaN, but torch's gradients of an empty batch are zero
        nothing = wide.sum(dims)
        return nothing, nothing
    mean = wide.mean(dims)
    return mean, (wide - per_channel(mean, x)).square().mean(dims)


def normalize_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """``act((x - mean) * rstd * weight + bias + residual)``, computed in at least fp32, in ``x``'s dtype.

    Shapes: ``x``, ``residual`` ``[N, C, ...]``; the others ``[C]``.
    """
    acc = acc_dtype(x.dtype)
    scale = rstd if weight is None else rstd * weight.to(acc)
    z = (x.to(acc) - per_channel(mean.to(acc), x)) * per_channel(scale, x)
    if bias is not None:
        z = z + per_channel(bias.to(acc), x)
    if residual is not None:
        z = z + residual.to(acc)
    return activate(z, act).to(x.dtype)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    act: Activation,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`advdl_ops.functional.batch_norm_act`; returns the output and the new running statistics.

    The running statistics are returned, not written. They are ``None`` if there is nothing to write.
    """
    acc = acc_dtype(x.dtype)
    if not training:
        assert running_mean is not None and running_var is not None
        rstd = (running_var.to(acc) + eps).rsqrt()
        return normalize_act(x, running_mean, rstd, weight, bias, residual, act), None, None
    mean, var = batch_stats(x)
    out = normalize_act(x, mean, (var + eps).rsqrt(), weight, bias, residual, act)
    if running_mean is None or running_var is None:
        return out, None, None
    if x.numel() == 0:
        return out, running_mean, running_var
    with torch.no_grad():
        count = x.numel() // x.shape[1]
        unbiased = var * (count / (count - 1))
        new_mean = (1 - momentum) * running_mean.to(acc) + momentum * mean
        new_var = (1 - momentum) * running_var.to(acc) + momentum * unbiased
        return out, new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)
