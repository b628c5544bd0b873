"""The activations of ``csrc/common/activation.h`` for Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expm1(x):
    # exp(x) - 1 cancels near zero. There the series up to x^9 is exact to fp32.
    series = 1.0 + x / 8.0 * (1.0 + x / 9.0)
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * series)
    series = 1.0 + x / 4.0 * (1.0 + x / 5.0 * series)
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _tanh(x):
    # As above: the series up to x^9 below 0.25, where 1 - exp would cancel. NaN takes the second branch.
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x + x * square * (-1.0 / 3.0 + square * series)
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -large, large))


@triton.jit
def activate(z, param, ACT: tl.constexpr):
    """act(z) of an fp32 block; ACT is the code of :class:`advdl_ops.activation.Activation`. NaN passes through."""
    if ACT == 1:  # relu
        z = tl.where(z < 0.0, 0.0, z)
    elif ACT == 2:  # leaky_relu
        z = tl.where(z > 0.0, z, z * param)
    elif ACT == 3:  # elu
        z = tl.where(z > 0.0, z, param * _expm1(z))
    elif ACT == 4:  # silu
        z = z / (1.0 + tl.exp(-z))
    elif ACT == 5:  # gelu
        z = z * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)))
    elif ACT == 6:  # gelu_tanh
        z = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACT == 7:  # sigmoid
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACT == 8:  # tanh
        z = _tanh(z)
    elif ACT == 9:  # hardswish
        t = z + 3.0
        z = z * tl.where(t < 0.0, 0.0, tl.where(t > 6.0, 6.0, t)) / 6.0
    elif ACT == 10:  # relu6
        z = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    else:
        tl.static_assert(ACT == 0, "unknown activation")
    return z
