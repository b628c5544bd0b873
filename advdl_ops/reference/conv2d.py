"""A convolution with per-channel scale and shift, residual addition and activation in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .._schemas import acc_dtype
from .._stock_faults import convolution
from ..activation import Activation
from .activation import activate
from .batch_norm_act import per_channel


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """See :func:`advdl_ops.functional.conv2d`; ``x`` is ``[N, C_in, H, W]``, ``padding`` a pair of numbers.

    The epilogue is computed in at least fp32 and rounded once to ``x``'s dtype.
    """
    in_conv = bias is not None and bias.dtype == x.dtype
    z = convolution(x, weight, bias if in_conv else None, stride, padding, dilation, groups)
    acc = acc_dtype(x.dtype)
    z = z.to(acc)
    if bias is not None and not in_conv:
        z = z + per_channel(bias.to(acc), z)
    if scale is not None:
        z = z * per_channel(scale.to(acc), z)
    if shift is not None:
        z = z + per_channel(shift.to(acc), z)
    if residual is not None:
        z = z + residual.to(acc)
    return activate(z, act).to(x.dtype)
