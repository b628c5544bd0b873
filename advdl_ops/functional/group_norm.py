"""Group norm, layer norm 2d and instance norm with residual addition and activation, each as one op.

Wu & He 2018 (arXiv:1803.08494), Ba et al. 2016 (arXiv:1607.06450), Ulyanov et al. 2016 (arXiv:1607.08022).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _lean, reference
from .._lean import Kind
from ..activation import Activation, resolve_activation
from ..backend import fixed, is_exported, needs_grad, serves_native
from ..reference.activation import finished
from ._norm import (
    check_floating,
    check_per_channel,
    check_residual,
    check_same_dtype,
    check_tensors,
    check_writable,
    norm_gradients,
    saved_for,
    to_be_saved,
)
from .batch_norm_act import batch_norm_act, check_norm

# The number of groups that tells the kernels to normalize each position over its channels (csrc/common/group_norm.h).
_EACH_POSITION = 0

_Act = str | Activation | torch.nn.Module | None


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: _Act = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""``act(group_norm(x) + residual)``; arguments in the order of :func:`torch.nn.functional.group_norm`.

    .. math:: y = \mathrm{act}\Big(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta + r\Big)

    with mean and variance of each group of ``C / num_groups`` neighbouring channels of each sample.

    Args:
        input: x, ``[N, C]`` or ``[N, C, ...]``; fp32, fp64, bf16 or fp16; contiguous or channels_last (kept; other
            strides give a contiguous result).
        num_groups: divides ``C``; 1 normalizes each sample, ``C`` each channel of each sample.
        weight, bias: ``[C]`` or ``None``; in ``x``'s dtype, or fp32 with a half-precision ``x``.
        eps: added to the variance; >= 0.
        act: ``None``, a name or a ``torch.nn`` module, see :func:`.resolve_activation`.
        residual: of ``x``'s shape, added before the activation.

    Returns:
        ``[N, C, ...]`` in ``x``'s memory format and dtype (promoted with ``residual``'s, as an addition does; fp32
        under CUDA's autocast, as stock group norm).

    Raises:
        RuntimeError: fewer than two dimensions, groups that do not divide the channels, ``weight`` or ``bias`` of
            another length, mixed devices, a dtype that does not go with ``x``'s; for a non-floating ``x`` its
            subclass ``NotImplementedError``.
        ValueError: one value per group in the whole of ``x``, a negative ``eps``, an unknown ``act``, ``residual`` of
            another shape.
        TypeError: ``num_groups`` is not an integer, or an argument that must be a tensor is not.
    """
    x = input
    if num_groups < 1:
        raise RuntimeError(f"group_norm: num_groups ({num_groups}) must be at least 1")
    options = num_groups, eps, _resolve("group_norm", act)
    return _normalize("group_norm", x, residual, weight, bias, options)


def layer_norm_2d(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: _Act = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(layer_norm(x) + residual)`` over the channels of each position of ``x`` ``[N, C, ...]``.

    As :func:`torch.nn.functional.layer_norm` of ``x.movedim(1, -1)``, without the two copies.
    Arguments, returns and errors as :func:`group_norm`.
    """
    x = input
    options = _EACH_POSITION, eps, _resolve("layer_norm_2d", act)
    return _normalize("layer_norm_2d", x, residual, weight, bias, options)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    act: _Act = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(instance_norm(x) + residual)``; arguments in the order of :func:`torch.nn.functional.instance_norm`.

    Args:
        input: x, ``[N, C, ...]``, as :func:`group_norm`.
        running_mean, running_var: ``[C]``, both or neither, in ``x``'s dtype or fp32 with a half-precision ``x``.
            Written with ``use_input_stats``: the mean over the batch of each sample's mean and unbiased variance,
            with weight ``momentum``. An empty batch does not change them.
        use_input_stats: normalize each channel of each sample by its own statistics, else by the running ones.

    Raises:
        ValueError: with ``use_input_stats`` one position, only one of the running statistics.
        RuntimeError: no running statistics without ``use_input_stats``.

    And as :func:`group_norm`. Nothing is written when an argument is refused.
    """
    x = input
    function = "instance_norm"
    activation = _resolve(function, act)
    check_tensors(function, x=x, running_mean=running_mean, running_var=running_var)
    if is_exported() and x.dim() > 1:
        _check(function, x, residual, weight, bias, (x.shape[1], eps, activation))
        z = F.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
        return finished(z, residual, activation)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                f"{function}: running_mean and running_var must be given when use_input_stats is False"
            )
        if x.dim() < 2:
            raise RuntimeError(
                f"{function}: x (shape {tuple(x.shape)}) must have at least 2 dimensions, [N, C, ...]"
            )
        try:
            return batch_norm_act(
                x, running_mean, running_var, weight, bias, False, momentum, eps,
                residual=residual, act=activation,
            )  # fmt: skip
        except (RuntimeError, ValueError):
            # batch_norm_act has refused the call. The check here only names this function in the error.
            check_norm(function, x, x.shape[1], running_mean, running_var, weight, bias, False, eps)
            raise
    shape = x.shape
    positions = math.prod(shape[2:])
    if positions == 1 or len(shape) < 3:
        raise ValueError(
            f"{function}: x (shape {tuple(shape)}) must have more than 1 spatial element when "
            "normalized by its own statistics"
        )
    options = shape[1], eps, activation
    if running_mean is None and running_var is None:
        return _normalize(function, x, residual, weight, bias, options)
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{function}: {missing} (None) must be given, or neither of running_mean and running_var"
        )
    running_statistics = {"running_mean": running_mean, "running_var": running_var}
    check_floating(function, "x", x)
    check_per_channel(function, x, shape[1], **running_statistics)
    for name, running in running_statistics.items():
        if shape[1] > 1 and running.stride(0) == 0:
            raise RuntimeError(f"{function}: {name} (strides (0,)) must not be expanded")
        if torch.is_grad_enabled() and running.requires_grad:
            raise RuntimeError(f"{function}: {name} must not require a gradient in training")
        check_writable(function, **{name: running})
    out, (mean, var) = _normalize_with_stats(function, x, residual, weight, bias, options)
    if x.numel() > 0:
        with torch.no_grad():
            unbiased = var * (positions / (positions - 1))
            for running, of_samples in ((running_mean, mean), (running_var, unbiased)):
                of_batch = of_samples.view(shape[0], shape[1]).mean(0)
                running.copy_((1 - momentum) * running + momentum * of_batch)
    return out


_forward_op = torch.ops.advdl_ops.group_norm.default
_backward_op = torch.ops.advdl_ops.group_norm_backward.default

# groups, eps, activation
_Options = tuple[int, float, Activation]


def _resolve(function: str, act: _Act) -> Activation:
    return act if type(act) is Activation else resolve_activation(function, act)


def _normalize(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: _Options,
) -> Tensor:
    tensors = x, residual, weight, bias
    # The operator checks all of its input before it computes. Only if it refuses, Python checks again to name the
    # error: checking everything twice in every call would cost as much as a small kernel. The fake function, which
    # serves meta tensors and many subclasses, checks little.
    try:
        if (
            type(x) is Tensor
            and not x.is_meta
            and not _changes_dtype(x, residual)
            and serves_native(function, x)
            and not torch.compiler.is_compiling()
            and x.numel() > options[0]  # fewer values must be refused; the operator accepts them
        ):
            if needs_grad(*tensors):
                return _apply_eagerly(*tensors, options, False)
            return _forward(*tensors, options)[0]
    except (RuntimeError, AttributeError):  # AttributeError: an argument is not a tensor
        try:
            _check(function, *tensors, options)
            savable = to_be_saved(*tensors) if needs_grad(*tensors) else tensors
        except (RuntimeError, ValueError, TypeError) as named:
            raise named from None
        if all(map(operator.is_, savable, tensors)):
            raise
        return _apply_eagerly(*savable, options, False)
    return _normalize_with_stats(function, *tensors, options)[0]


def _changes_dtype(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the result has another dtype than ``x``: because of the residual, or of autocast."""
    return (residual is not None and residual.dtype != x.dtype) or (
        x.is_cuda and torch.is_autocast_enabled("cuda")
    )


def _normalize_with_stats(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: _Options,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and mean and variance of each set, ``[N * groups]`` or ``[N * S]``."""
    _check(function, x, residual, weight, bias, options)
    groups, eps, act = options
    if is_exported():
        if groups == _EACH_POSITION:
            z = F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, eps).movedim(-1, 1)
        else:
            z = F.group_norm(x, groups, weight, bias, eps)
        return finished(z, residual, act), ()
    if _changes_dtype(x, residual):
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.promote_types(dtype, torch.float32)
        x = x.to(dtype)
        residual, weight, bias = (t if t is None else t.to(dtype) for t in (residual, weight, bias))
    tensors = x, residual, weight, bias
    is_empty = x.numel() == 0 and groups != _EACH_POSITION  # its sets have no mean
    if is_empty or not serves_native(function, x):
        out, mean, var = reference.group_norm(x, groups, weight, bias, eps, residual, act)
        return out, (mean.detach().flatten(), var.detach().flatten())
    if needs_grad(*tensors):
        out, stats = GroupNormFunction.apply(*tensors, fixed(options), True)
    else:
        out, stats = _forward(*tensors, options)
    return out, stats.unbind()


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    groups, eps, (_, code, param) = options
    return _forward_op(x, residual, weight, bias, groups, eps, code, param)


class GroupNormFunction(torch.autograd.Function):
    """Gradients of these norms. Saved: ``x``, mean and variance of the sets, and the tensor of :func:`.saved_for`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: _Options,
        returns_stats: bool,
    ) -> Any:
        out, stats = _forward(x, residual, weight, bias, options)
        kind = Kind.PASS if residual is None else Kind.SUM
        if _lean.makes_again(kind):
            # With the statistics too: two passes, and the same bits.
            _lean.offer(
                kind,
                out,
                lambda x, residual, weight, bias: _forward(x, residual, weight, bias, options)[0],
                x, residual, weight, bias,
            )  # fmt: skip
        saved, ctx.z_source = saved_for(options[2], residual, out)
        ctx.save_for_backward(x, saved, weight, bias, stats)
        ctx.options = options
        if returns_stats:
            ctx.mark_non_differentiable(stats)
            ctx.set_materialize_grads(False)
            return out, stats
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 6
        tensors = ctx.saved_tensors
        groups, eps, (_, code, param) = ctx.options

        def forward(x, residual, weight, bias, act):
            return reference.group_norm(x, groups, weight, bias, eps, residual, act)[0]

        def kernel(need_x, need_residual):
            return _backward_op(
                dout, *tensors, groups, eps, code, param, ctx.z_source, need_x, need_residual
            )

        return *norm_gradients(ctx, tensors, dout, forward, kernel), None, None


# Function.apply without torch's Python wrapper, which checks for functorch transforms, as serves_native has done.
_apply_eagerly = super(torch.autograd.Function, GroupNormFunction).apply


def _check(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: _Options,
) -> None:
    groups, eps, _ = options
    check_tensors(function, x=x, weight=weight, bias=bias, residual=residual)
    shape = x.shape
    if isinstance(groups, float):
        raise TypeError(f"{function}: num_groups ({groups}) must be an integer")
    if len(shape) < 2:
        raise RuntimeError(
            f"{function}: x (shape {tuple(shape)}) must have at least 2 dimensions, [N, C, ...]"
        )
    channels = shape[1]
    check_floating(function, "x", x)
    check_per_channel(function, x, channels, weight=weight, bias=bias)
    check_same_dtype(function, "bias", bias, "weight", weight)
    if groups != _EACH_POSITION:
        if channels % groups != 0:
            raise RuntimeError(
                f"{function}: num_groups ({groups}) must divide the channels ({channels})"
            )
        if x.numel() == groups and channels > 0:
            raise ValueError(
                f"{function}: x (shape {tuple(shape)}) must have more than 1 value per group"
            )
    if not eps >= 0:
        raise ValueError(f"{function}: eps ({eps}) must not be negative")
    if residual is not None:
        check_residual(function, residual, shape, x.device)
