"""Batch norm, residual addition and activation as one op (Ioffe & Szegedy 2015, arXiv:1502.03167)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _lean, reference
from .._lean import Kind
from ..activation import Activation, resolve_activation
from ..backend import fixed, is_exported, needs_grad, serves_native
from ..reference.activation import finished
from ..reference.batch_norm_act import batch_stats, normalize_act
from ._norm import (
    check_floating,
    check_per_channel,
    check_residual,
    check_same_dtype,
    check_writable,
    norm_gradients,
    saved_for,
    to_be_saved,
)

_NAME = "batch_norm_act"


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | Activation | torch.nn.Module | None = None,
) -> Tensor:
    r"""``act(batch_norm(x) + residual)``; arguments in the order of :func:`torch.nn.functional.batch_norm`.

    .. math:: y = \mathrm{act}\Big(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta + r\Big)

    Args:
        input: x, ``[N, C]`` or ``[N, C, ...]`` with up to three spatial dimensions; fp32, fp64, bf16 or fp16;
            contiguous or channels_last (kept).
        running_mean, running_var: ``[C]``, written in training (``running_var`` with the unbiased variance);
            both may be ``None`` in training.
        weight, bias: ``[C]`` or ``None``; in ``x``'s dtype, or fp32 with a half-precision ``x``, as the buffers.
        training: normalize by the statistics of the batch, else by the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; > 0 in training.
        residual: of ``x``'s shape, added before the activation.
        act: ``None``, a name or a ``torch.nn`` module, see :func:`resolve_activation`.

    Returns:
        ``[N, C, ...]`` in ``x``'s memory format and dtype (promoted with ``residual``'s, as an addition does).

    Raises:
        ValueError: fewer than two dimensions, one value per channel in training, ``eps`` out of range, an unknown
            ``act``, ``residual`` of another shape, only one of the running statistics.
        RuntimeError: a ``[C]`` tensor of another length, mixed devices, a dtype that does not go with ``x``'s,
            evaluation without running statistics; for a non-floating ``x`` its subclass ``NotImplementedError``.

    Nothing is written when an argument is refused.
    """
    x = input
    activation = act if type(act) is Activation else resolve_activation(_NAME, act)
    if is_exported():
        check(x, running_mean, running_var, weight, bias, training, momentum, eps, residual)
        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return finished(z, residual, activation)
    if residual is not None and residual.dtype != x.dtype:
        check(x, running_mean, running_var, weight, bias, training, momentum, eps, residual)
        return _promoted(
            x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
        )  # fmt: skip
    tensors = x, residual, weight, bias, running_mean, running_var
    options = training, momentum, eps, activation
    native = serves_native(_NAME, x)
    eager = native and not torch.compiler.is_compiling()
    # The operator checks all of its input before it writes. Only if it refuses, Python checks again to name the error:
    # checking everything twice in every call would cost as much as a small kernel. The fake function, which serves meta
    # tensors and many subclasses, checks little.
    if eager and type(x) is Tensor and not x.is_meta:
        try:
            return _eager(*tensors, options)
        except RuntimeError:
            try:
                check(x, running_mean, running_var, weight, bias, training, momentum, eps, residual)
            except (RuntimeError, TypeError, ValueError) as named:
                raise named from None
            raise
    check(x, running_mean, running_var, weight, bias, training, momentum, eps, residual)
    if eager:
        return _eager(*tensors, options)
    if native:
        if needs_grad(x, residual, weight, bias):
            out, running = BatchNormActFunction.apply(*tensors, fixed(options))
        else:
            out, _, running = _forward(*tensors, options)
        new_mean, new_var = running.unbind()
    else:
        if training:
            check_writable(_NAME, running_mean=running_mean, running_var=running_var)
        out, new_mean, new_var = reference.batch_norm_act(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual,
            activation,
        )
    if training and running_mean is not None and running_var is not None:
        assert new_mean is not None and new_var is not None
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return out


def batch_norm_act_by(
    statistics: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """:func:`batch_norm_act` in training, eager and by a kernel, if the statistics of ``x`` are already known.

    Args:
        statistics: fp32 ``[2, C]``: the mean of each channel and the sum of squared distances from it.
        x: ``[N, C, ...]``, not fp64 and not empty. The other arguments are those of :func:`batch_norm_act`, with
            ``residual`` in ``x``'s dtype.
    """
    check(x, running_mean, running_var, weight, bias, True, momentum, eps, residual)
    check_writable(_NAME, running_mean=running_mean, running_var=running_var)
    mean, squares = statistics.unbind()
    count = x.numel() // x.shape[1]
    options = True, momentum, eps, act
    out = _apply_given(x, residual, weight, bias, mean, squares / count, options)
    if running_mean is not None and running_var is not None:
        for running, batch in ((running_mean, mean), (running_var, squares / (count - 1))):
            # As in the kernel, computed in fp32 whatever the dtype of the running statistics.
            old = running.to(batch.dtype) * (1.0 - momentum)
            torch.add(old, batch, alpha=momentum, out=running)
    return out


_forward_op = torch.ops.advdl_ops.batch_norm_act.default
_forward_in_place_op = torch.ops.advdl_ops.batch_norm_act_.default
apply_op = torch.ops.advdl_ops.batch_norm_act_apply.default
backward_op = torch.ops.advdl_ops.batch_norm_act_backward.default

# training, momentum, eps, activation
_Options = tuple[bool, float, float, Activation]


def _eager(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: _Options,
) -> Tensor:
    tensors = x, residual, weight, bias, running_mean, running_var
    if not needs_grad(x, residual, weight, bias):
        return _forward_in_place(*tensors, options)[0]
    if options[0] and running_mean is not None and running_mean.requires_grad:
        raise RuntimeError(f"{_NAME}: running_mean must not require a gradient in training")
    # Checked before anything is written, because autograd refuses what it cannot save only afterwards.
    if (
        x.is_inference()
        or (weight is not None and weight.is_inference())
        or (bias is not None and bias.is_inference())
        or (residual is not None and residual.is_inference())
    ):
        tensors = *to_be_saved(x, residual, weight, bias), running_mean, running_var
    return _apply_eagerly(*tensors, options)


def _promoted(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor,
    act: Activation,
) -> Tensor:
    """:func:`batch_norm_act` in the dtype that adding ``residual`` to ``x`` would give."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    mean, var, weight, bias = (
        t if t is None else t.to(dtype) for t in (running_mean, running_var, weight, bias)
    )
    out = batch_norm_act(
        x.to(dtype), mean, var, weight, bias, training, momentum, eps,
        residual=residual.to(dtype), act=act,
    )  # fmt: skip
    if training and running_mean is not None and running_mean is not mean:
        assert running_var is not None and mean is not None and var is not None
        running_mean.copy_(mean)
        running_var.copy_(var)
    return out


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, statistics ``[2, C]`` and new running statistics ``[2, C]``. A compiler traces this variant."""
    training, momentum, eps, (_, code, param) = options
    return _forward_op(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, code, param
    )


def _forward_in_place(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Output and statistics ``[2, C]``. The running statistics are overwritten."""
    training, momentum, eps, (_, code, param) = options
    outputs = _forward_in_place_op(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, code, param
    )
    if training and running_mean is not None and running_var is not None:
        # Tells autograd that these buffers were written. Torch's stable ABI has no call for it.
        increment_version((running_mean, running_var))
    return outputs


def offer(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    act: Activation,
) -> None:
    """In lean training, lets backward make the output again from ``x``, which it needs in any case."""
    kind = Kind.PASS if residual is None else Kind.SUM
    if _lean.makes_again(kind):
        options = act.code, act.param
        _lean.offer(kind, out, lambda *t: apply_op(*t, *options), x, residual, weight, bias, stats)


class BatchNormActFunction(torch.autograd.Function):
    """Gradients of ``batch_norm_act``. Saved: ``x``, the ``[C]`` statistics, and the tensor of :func:`.saved_for`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        options: _Options,
    ) -> Any:
        tensors = x, residual, weight, bias, running_mean, running_var
        traced = torch.compiler.is_compiling()
        if traced:
            out, stats, running = _forward(*tensors, options)
        else:
            out, stats = _forward_in_place(*tensors, options)
            offer(out, x, residual, weight, bias, stats, options[3])
        saved, z_source = saved_for(options[3], residual, out)
        # The statistics of an evaluation are saved only so that writing them before backward is an error, as in stock.
        used: list[Tensor] = []
        if not options[0] and not traced:
            used = [
                t for t in (running_mean, running_var) if t is not None and not t.is_inference()
            ]
        ctx.save_for_backward(x, saved, weight, bias, stats, *used)
        ctx.options, ctx.z_source = options, z_source
        if traced:
            # A traced Function must not write its inputs, so the caller writes the running statistics.
            ctx.mark_non_differentiable(running)
            ctx.set_materialize_grads(False)
            return out, running
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 7
        tensors = ctx.saved_tensors[:5]
        stats = tensors[4]
        training, _momentum, eps, (_, code, param) = ctx.options

        def forward(x, residual, weight, bias, act):
            mean, rstd = stats.unbind()
            if training:
                mean, var = batch_stats(x)
                rstd = (var + eps).rsqrt()
            return normalize_act(x, mean, rstd, weight, bias, residual, act)

        def kernel(need_x, need_residual):
            return backward_op(
                dout, *tensors, training, code, param, ctx.z_source, need_x, need_residual
            )

        return *norm_gradients(ctx, tensors, dout, forward, kernel), None, None, None


class GivenStatisticsFunction(BatchNormActFunction):
    """Forward as in evaluation, with the batch's mean and variance ``[C]``; backward as in training."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        options: _Options,
    ) -> Tensor:
        _, momentum, eps, act = options
        out, stats, _ = _forward(x, residual, weight, bias, mean, var, (False, momentum, eps, act))
        offer(out, x, residual, weight, bias, stats, act)
        saved, ctx.z_source = saved_for(act, residual, out)
        ctx.save_for_backward(x, saved, weight, bias, stats)
        ctx.options = options
        return out


# Function.apply without torch's Python wrapper, which checks for functorch transforms, as serves_native has done.
_apply_eagerly = super(torch.autograd.Function, BatchNormActFunction).apply
_apply_given = super(torch.autograd.Function, GivenStatisticsFunction).apply


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    *,
    alone: bool = True,
) -> None:
    """``alone``: no other process adds values to those of ``x``."""
    shape = x.shape
    if not 2 <= len(shape) <= 5:
        raise ValueError(
            f"{_NAME}: x (shape {tuple(shape)}) must have 2 to 5 dimensions, [N, C, ...]"
        )
    check_norm(_NAME, x, shape[1], running_mean, running_var, weight, bias, training, eps)
    if training and alone and x.numel() == shape[1] and shape[1] > 0:
        raise ValueError(
            f"{_NAME}: x (shape {tuple(shape)}) must have more than 1 value per channel in training"
        )
    if momentum is None:
        raise TypeError(f"{_NAME}: momentum (None) must be a number")
    if residual is not None:
        check_residual(_NAME, residual, shape, x.device)


def check_norm(
    function: str,
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """The per-channel tensors must fit ``channels`` and the dtype and device of ``x``."""
    check_floating(function, "x", x)
    check_per_channel(
        function,
        x,
        channels,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    check_same_dtype(function, "bias", bias, "weight", weight)
    check_same_dtype(function, "running_var", running_var, "running_mean", running_mean)
    if training:
        if (running_mean is None) != (running_var is None):
            raise ValueError(
                f"{function}: {'running_mean' if running_mean is None else 'running_var'} (None) must be given, "
                "or neither of running_mean and running_var"
            )
        if eps <= 0:
            raise ValueError(f"{function}: eps ({eps}) must be positive in training")
    else:
        if running_mean is None or running_var is None:
            name = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"{function}: {name} (None) must be given when training is False")
        if eps < 0:
            raise ValueError(f"{function}: eps ({eps}) must not be negative")
