"""Convolution, batch norm, residual addition and activation.

In training these are two ops: :func:`conv2d` and :func:`batch_norm_act`. On CUDA the first may return the statistics
that the second needs, which then reads its input once less. Measurement decides whether it does. In evaluation without
gradients it is one op: the norm is then a scale and a shift of each channel (Jacob et al. 2018, arXiv:1712.05877,
section 3.2), which the convolution applies together with residual and activation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._conv import choice, cuda
from .._conv.choice import APART, Candidate
from .._conv.problem import WITH_NORM, Conv, computes_in_float32, problem_of
from .._schemas import acc_dtype
from ..activation import IDENTITY, Activation, resolve_activation
from ..backend import (
    autocast_dtype,
    get_backend,
    is_exported,
    needs_grad,
    serves_native,
    transformed,
    unwatched,
)
from .batch_norm_act import batch_norm_act, batch_norm_act_by, check_norm
from .conv2d import conv2d, convolved, convolved_with_statistics, prepared

_NAME = "conv_bn_act"
ORDERS = ("conv-bn-act", "conv-act-bn")


def conv_bn_act(
    input: Tensor,
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
        input: x, ``[N, C_in, H, W]``.
        weight: ``[C_out, C_in / groups, kH, kW]``.
        running_mean, running_var, bn_weight, bn_bias: ``[C_out]``, see :func:`batch_norm_act`.
        bias: ``[C_out]``, the convolution's own.
        stride, padding, dilation, groups: as :func:`conv2d`.
        training, momentum, eps: as :func:`batch_norm_act`.
        residual: of the output's shape, added after the norm, before the activation of ``"conv-bn-act"``.
        act: see :func:`resolve_activation`.
        order: ``"conv-bn-act"`` or ``"conv-act-bn"``.

    Returns:
        ``[N, C_out, H_out, W_out]``.

    Raises:
        ValueError: an unknown ``order`` or ``act``, unbatched ``x``; else what :func:`conv2d` and
            :func:`batch_norm_act` raise. Nothing is written when an error is raised.
    """
    x = input
    activation = resolve_activation(_NAME, act)
    if order not in ORDERS:
        raise ValueError(f"{_NAME}: order ({order!r}) must be one of {', '.join(ORDERS)}")
    if x.dim() != 4:
        # The exceptions of torch's layers: the convolution accepts an unbatched image, and the norm then refuses it.
        error = ValueError if x.dim() == 3 else RuntimeError
        raise error(f"{_NAME}: x (shape {tuple(x.shape)}) must be [N, C_in, H, W]")
    options = Conv(stride, padding, dilation, groups)
    if (
        not training
        and order == "conv-bn-act"
        and folds(x, weight, groups, residual, bias, bn_weight, bn_bias)
    ):
        scale, shift = scale_and_shift(
            x, weight.shape[0], running_mean, running_var, bn_weight, bn_bias, eps
        )
        return conv2d(
            x, weight, bias, *options, act=activation, residual=residual, scale=scale, shift=shift
        )
    inside, outside = (IDENTITY, activation) if order == "conv-bn-act" else (activation, IDENTITY)
    norm = Norm(running_mean, running_var, bn_weight, bn_bias, residual, outside)
    if training and inside.code == 0 and gives_statistics(norm, x, weight, bias, groups):
        z, statistics = convolution_before(norm, x, weight, bias, options)
        if statistics is not None:
            return batch_norm_act_by(
                statistics, z, *norm[:4], momentum, eps, residual=residual, act=outside
            )
    else:
        z = conv2d(x, weight, bias, *options, act=inside)
    return batch_norm_act(z, *norm[:4], training, momentum, eps, residual=residual, act=outside)


class Norm(NamedTuple):
    """A batch norm in training after a convolution: its tensors, the residual and the activation."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    act: Activation

    def name(self) -> str:
        """The names of its parts, on which its time depends."""
        parts = {"norm": True, "running": self.running_mean, "residual": self.residual}
        found = [name for name, part in parts.items() if part is not None]
        return "+".join(found if self.act.code == 0 else [*found, self.act.name])


# Tests set it to "cpu".
STATISTICS_DEVICE = "cuda"


def asks_for_statistics(x: Tensor) -> bool:
    """Whether a convolution on the device of ``x`` can return the statistics for the norm after it."""
    return x.device.type == STATISTICS_DEVICE


def gives_statistics(
    norm: Norm, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> bool:
    """Whether the convolution of ``x`` can return the statistics for the norm after it, if that is faster."""
    if not asks_for_statistics(x) or x.dim() != 4 or x.numel() == 0:
        return False
    mean, var, norm_weight, norm_bias, residual, _ = norm
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 4
        and unwatched(x, weight, bias, mean, var, norm_weight, norm_bias, residual)
        and not groups == x.shape[1] == weight.shape[0]  # depthwise
        and result_dtype(x) in cuda.TRITON_DTYPES
        and (residual is None or residual.dtype == result_dtype(x))
        # Running statistics that the norm's kernel refuses or copies are left to it.
        and all(t is None or (t.is_contiguous() and not t.requires_grad) for t in (mean, var))
        and serves_native(_NAME, x)
        and cuda.has_triton()
    )


def convolution_before(
    norm: Norm, x: Tensor, weight: Tensor, bias: Tensor | None, options: Conv
) -> tuple[Tensor, Tensor | None]:
    """The convolution of ``x``, and the statistics of its output, or ``None`` if the norm should compute them.

    Called if :func:`gives_statistics` holds. A Triton kernel computes the statistics, and the norm then reads the
    output once instead of twice. Whether that is faster is measured, see ``_conv/choice.py``.
    :func:`.batch_norm_act_by` takes the statistics.
    """
    x, weight, bias, conv = prepared(x, weight, bias, options)
    name = norm.name() if bias is None else f"shift+{norm.name()}"
    problem = problem_of(WITH_NORM, x, weight, conv, name)

    def trial(candidate: Candidate) -> Tensor:
        # The norm writes the running statistics, so each trial gets copies. Their cost is the same for all candidates.
        mean, var = (None if t is None else t.clone() for t in norm[:2])
        affine = norm.weight, norm.bias
        rest: Any = {"residual": norm.residual, "act": norm.act}
        with torch.no_grad():
            if candidate.name == APART:
                z = convolved(x, weight, bias, conv)
                return batch_norm_act(z, mean, var, *affine, True, 0.1, 1e-5, **rest)
            z, statistics = convolved_with_statistics(x, weight, bias, conv, candidate)
            return batch_norm_act_by(statistics, z, mean, var, *affine, 0.1, 1e-5, **rest)

    candidate = choice.chosen(problem, x.device, trial)
    if candidate.name == APART:
        return convolved(x, weight, bias, conv), None
    return convolved_with_statistics(x, weight, bias, conv, candidate)


def folds(
    x: Tensor, weight: Tensor, groups: int, residual: Tensor | None, *parameters: Tensor | None
) -> bool:
    """Whether evaluation folds the norm into the convolution.

    If gradients are needed it does not: the convolution and one fused pass move as few bytes as folding, and give every
    gradient. With a residual that would change the result's dtype it cannot.
    """
    if not _evaluates(x, weight, residual, *parameters):
        return False
    dtype = result_dtype(x)
    is_depthwise = groups == x.shape[1] == weight.shape[0]
    if x.is_cpu and dtype != torch.float32 and not (is_depthwise or computes_in_float32(dtype)):
        # The scale would be a pass after the convolution, just as the norm is.
        return False
    return residual is None or residual.dtype == dtype


def _evaluates(x: Tensor, *others: Tensor | None) -> bool:
    return (
        not (needs_grad(x, *others) or transformed() or is_exported()) and get_backend() == "fused"
    )


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a convolution of ``x``. Autocast does not cast fp64."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def scale_and_shift(
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The norm in evaluation as scale and shift, ``[channels]`` each; fp32 with a half-precision ``x``."""
    check_norm(_NAME, x, channels, running_mean, running_var, bn_weight, bn_bias, False, eps)
    assert running_mean is not None and running_var is not None
    acc = acc_dtype(x.dtype)
    scale = (running_var.to(acc) + eps).rsqrt()
    if bn_weight is not None:
        scale = scale * bn_weight.to(acc)
    if bn_bias is None:
        return scale, -running_mean.to(acc) * scale
    return scale, torch.addcmul(bn_bias.to(acc), running_mean.to(acc), scale, value=-1)
