"""2-D convolution, dilated and depthwise too, with scale, shift, residual addition and activation as one op.

Dilated: Yu & Koltun 2016 (arXiv:1511.07122). Depthwise: Howard et al. 2017 (arXiv:1704.04861).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._schemas import conv2d_shape
from .._stock_faults import sees_nothing
from ..activation import IDENTITY, Activation, resolve_activation
from ..backend import fixed, serves_native, unwatched
from ..reference.batch_norm_act import acc_dtype
from . import _conv2d_cpu, _conv2d_cuda
from ._activation import activated
from ._conv2d_cpu import Conv
from ._conv_options import autocast_dtype, cast, check_groups, padded_by, pair_of
from ._epilogue import normalized, unit_statistics
from ._norm import (
    HALF,
    Z_INPUT,
    Z_OUTPUT,
    Z_RESIDUAL,
    check_floating,
    check_per_channel,
    check_residual,
    check_tensors,
    gradient_like,
    gradients_with_graph,
    needs_grad,
    without_relu,
)

_NAME = "conv2d"


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    act: str | Activation | torch.nn.Module | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""``act((conv2d(x) + bias) * scale + shift + residual)``; arguments as of :func:`torch.nn.functional.conv2d`.

    .. math:: y_{n,o,p} = \mathrm{act}\Big(\Big(\sum_{c,k} w_{o,c,k}\, x_{n,c,sp + dk - q} + b_o\Big) \gamma_o + \beta_o
        + r_{n,o,p}\Big)

    with stride s, dilation d and padding q by zeros; c runs over the channels of the group of o.

    Args:
        x: ``[N, C_in, H, W]`` or ``[C_in, H, W]``; fp32, fp64, bf16 or fp16; contiguous or channels_last (kept; other
            strides give a contiguous result).
        weight: ``[C_out, C_in / groups, kH, kW]`` in ``x``'s dtype.
        bias: ``[C_out]`` or ``None``; in ``x``'s dtype, or fp32 beside a half-precision ``x``, as scale and shift.
        stride, dilation: >= 1, one number or (height, width).
        padding: >= 0, as those, or ``"valid"`` (none), or ``"same"`` (stride 1: the output has ``x``'s size).
        groups: divides ``C_in`` and ``C_out``; where it equals both, depthwise kernels serve.
        act: ``None``, a name or a ``torch.nn`` module, see :func:`.resolve_activation`.
        residual: of the output's shape and dtype, added before the activation.
        scale, shift: ``[C_out]`` or ``None``: a norm of fixed statistics, for example.

    Returns:
        ``[N, C_out, H_out, W_out]`` (or without N, as ``x``) in ``x``'s memory format and dtype;
        ``H_out = (H + 2 padding - dilation (kH - 1) - 1) // stride + 1``. Under autocast in the autocast dtype.

    Raises:
        RuntimeError: shapes that do not fit together, ``groups`` that do not divide the channels, a kernel larger than
            the padded ``x``, a stride, padding or dilation out of range, an unknown padding, ``"same"`` with a stride,
            mixed dtypes or devices; of a non-floating ``x`` its subclass ``NotImplementedError``.
        ValueError: an unknown ``act``, ``residual`` of another shape.
        TypeError: an option that is no integer, or a tensor that is none.

    Saved for backward are ``x`` and the weight; for relu the output; for the other activations, and where ``scale``
    needs a gradient, what the convolution alone gives, and the residual.
    """
    activation = act if type(act) is Activation else resolve_activation(_NAME, act)
    x, weight, bias, residual, scale, shift = _tensors(x, weight, bias, residual, scale, shift)
    if x.dim() == 3:
        added = None if residual is None else residual.unsqueeze(0)
        out = _conv2d(
            x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, activation,
            added, scale, shift,
        )  # fmt: skip
        return out.squeeze(0)
    return _conv2d(
        x, weight, bias, stride, padding, dilation, groups, activation, residual, scale, shift
    )


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    """:func:`conv2d` of what :func:`prepared` returns."""
    return _served(x, weight, bias, options, None, None, None)


def convolved_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options, config: Any
) -> tuple[Tensor, Tensor]:
    """As :func:`convolved`, by a Triton ``config``, and the statistics of the output, which pass no gradient.

    Those are fp32 ``[2, C_out]``, see :func:`._conv2d_cuda.conv2d_with_statistics`.
    """
    shift = _folded(x, bias, None, None)[1]
    return _apply_with_statistics(x, weight, None, shift, None, options, config)


def prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor | None, _Options]:
    """Arguments of :func:`conv2d`, ``x`` ``[N, C_in, H, W]``: checked, under autocast cast, and padded if need be."""
    x, weight, bias, *_ = _tensors(x, weight, bias, None, None, None)
    x, options = _checked(
        x, weight, bias, stride, padding, dilation, groups, IDENTITY, None, None, None
    )
    return x, weight, bias, options


def _tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """In the dtypes that autocast asks for."""
    check_tensors(_NAME, x=x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual)
    if weight is None or x is None:
        raise TypeError(f"{_NAME}: {'x' if x is None else 'weight'} (None) must be a Tensor")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = cast(x, dtype), cast(weight, dtype)
        residual = residual if residual is None else cast(residual, dtype)
        # What is [C_out] may stay in fp32.
        bias, scale, shift = (
            t if t is None or t.dtype == torch.float32 else cast(t, dtype)
            for t in (bias, scale, shift)
        )
    return x, weight, bias, residual, scale, shift


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    act: Activation,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    padded, options = _checked(
        x, weight, bias, stride, padding, dilation, groups, act, residual, scale, shift
    )
    return _served(padded, weight, bias, options, residual, scale, shift)


def _served(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: _Options,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    act = options[4]
    if not serves_native(_NAME, x):
        return reference.conv2d(x, weight, bias, *options[:4], scale, shift, residual, act)
    scale, shift = _folded(x, bias, scale, shift)
    tensors = x, weight, scale, shift, residual
    if not needs_grad(*tensors):
        return _forward(*tensors, options)
    if torch.compiler.is_compiling():
        return Conv2dFunction.apply(*tensors, fixed(options))
    if _torch_derives_as_well(*tensors, options):
        out = F.conv2d(x, weight, shift, *options[:4])
        return activated(out, act, in_place=act.name == "relu")
    return _apply_eagerly(*tensors, options)


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    act: Activation,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, _Options]:
    """``x``, padded where its two sides differ, and the options as operators take them."""
    if x.dim() != 4 or weight.dim() != 4:
        name, t, what = (
            ("weight", weight, "[C_out, C_in / groups, kH, kW]")
            if weight.dim() != 4
            else ("x", x, "[N, C_in, H, W] or [C_in, H, W]")
        )
        raise RuntimeError(f"{_NAME}: {name} (shape {tuple(t.shape)}) must be {what}")
    steps, rates = pair_of(_NAME, "stride", stride, 1), pair_of(_NAME, "dilation", dilation, 1)
    padded, border = padded_by(_NAME, x, weight, padding, steps, rates)
    _check(padded, weight, bias, steps, border, rates, groups, residual, scale, shift)
    return padded, (steps, border, rates, groups, act)


# stride, padding, dilation, groups, activation
_Options = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int, Activation]

_dense_op = torch.ops.advdl_ops.conv2d.default
_dense_backward_op = torch.ops.advdl_ops.conv2d_backward.default
_depthwise_op = torch.ops.advdl_ops.depthwise_conv2d.default
_depthwise_backward_op = torch.ops.advdl_ops.depthwise_conv2d_backward.default
_epilogue_backward_op = torch.ops.advdl_ops.batch_norm_act_backward.default


def _is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Every channel by itself; with more outputs than inputs the other operator serves."""
    return groups == x.shape[1] and groups == weight.shape[0]


def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    options: _Options,
) -> Tensor:
    stride, padding, dilation, groups, (_, code, param) = options
    tensors = x, weight, scale, shift, residual
    if _is_depthwise(x, weight, groups):
        return _depthwise_op(*tensors, stride, padding, dilation, code, param)
    # On CPU the operator is Python: without the dispatcher it is called in half of the time.
    dense = _conv2d_cpu.conv2d if x.is_cpu and unwatched(*tensors) else _dense_op
    return dense(*tensors, stride, padding, dilation, groups, code, param)


def _torch_derives_as_well(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    options: _Options,
) -> bool:
    """Whether torch's convolution and activation, two autograd nodes in C++, save and compute what the Function would.

    Not so of channels_last, where oneDNN takes long for the gradient of a bias, and where a weight in another format
    than ``x`` would decide the output's.
    """
    return (
        x.is_cpu
        and scale is None
        and residual is None
        and x.dtype not in HALF
        and not _is_depthwise(x, weight, options[3])
        and _conv2d_cpu.has_format(x, torch.contiguous_format)
        and _conv2d_cpu.has_format(weight, torch.contiguous_format)
        and _conv2d_cpu.compute_format(x, options[2]) == torch.contiguous_format
        and not any(_conv2d_cpu.own_kernel(x, weight, Conv(*options[:4])))
        and not sees_nothing(x, weight, *options[:3])
    )


def _backward(
    dz: Tensor, x: Tensor, weight: Tensor, options: _Options, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups, _ = options
    if _is_depthwise(x, weight, groups):
        return _depthwise_backward_op(dz, x, weight, stride, padding, dilation, *needs)
    plain = x.is_cpu and unwatched(dz, x, weight)
    dense = _conv2d_cpu.conv2d_backward if plain else _dense_backward_op
    return dense(dz, x, weight, stride, padding, dilation, groups, *needs)


class Conv2dFunction(torch.autograd.Function):
    """Gradients of ``conv2d``.

    ``saved`` is by what backward knows of the pre-activation: nothing without an activation, relu's output, or ``z``,
    the result of the convolution alone, with the residual. ``z`` is saved too where the scale needs a gradient.
    The epilogue is the norm's kernel in evaluation, of mean 0 and deviation 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        options: _Options,
    ) -> Tensor:
        act = options[4]
        by_output = act.name == "relu"
        z = saved = None
        ctx.z_source = Z_INPUT
        if ctx.needs_input_grad[2] or not (act.code == 0 or by_output):
            # With the parameter of act: a float that options do not hold would be an input of a compiler's graph.
            alone = IDENTITY._replace(param=act.param)
            z = _forward(x, weight, None, None, None, (*options[:4], alone))
            out = normalized(z, scale, shift, residual, act)
            if residual is not None and act.code != 0 and not by_output:
                saved, ctx.z_source = residual, Z_RESIDUAL
        else:
            out = _forward(x, weight, scale, shift, residual, options)
        if by_output and (z is None or residual is not None):
            saved, ctx.z_source = out, Z_OUTPUT
        # The shift is known where the pre-activation is computed anew from z.
        kept = None if z is None else shift
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.save_for_backward(x, weight, scale, kept, z, saved)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, weight, scale, shift, z, saved = ctx.saved_tensors
        act, needs = ctx.options[4], ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (*_differentiable_gradients(ctx, dout), None)
        dscale = dshift = None
        dz = dresidual = dout
        if act.code != 0 or scale is not None:
            stats = unit_statistics(weight.shape[0], dout).stats
            # With relu's output at hand z matters for the gradient of the scale alone, and without an activation too.
            of_z = z if z is not None else saved if saved is not None else dout
            # Without a scale or an activation the two gradients are one tensor.
            writes_both = needs[4] and scale is not None and act.code != 0
            dz, dresidual, dscale, dshift = _epilogue_backward_op(
                dout, of_z, saved, scale, shift, stats, False, act.code, act.param, ctx.z_source,
                True, writes_both,
            )  # fmt: skip
            if not writes_both:
                dresidual = dz if scale is None else dout
        tensors = dz, x, weight
        # Of no scale the sum of dz is the gradient of the shift.
        wanted = needs[0], needs[1], needs[3] and dshift is None
        dx = dweight = dbias = None
        if any(wanted):
            dx, dweight, dbias = _backward(*tensors, ctx.options, wanted)
        return (
            dx if needs[0] else None,
            gradient_like(dweight, weight) if needs[1] else None,
            gradient_like(dscale, scale) if needs[2] else None,
            _of_shift(ctx, dbias if dshift is None else dshift) if needs[3] else None,
            dresidual if needs[4] else None,
            None,
        )


class Conv2dWithStatisticsFunction(Conv2dFunction):
    """The convolution and a shift alone, with the statistics of the output beside it, see ``_conv2d_cuda.py``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: None,
        shift: Tensor | None,
        residual: None,
        options: _Options,
        config: Any,
    ) -> tuple[Tensor, Tensor]:
        conv = Conv(*options[:4])
        out, statistics = _conv2d_cuda.conv2d_with_statistics(x, weight, shift, conv, config)
        ctx.save_for_backward(x, weight, None, None, None, None)
        ctx.options, ctx.z_source = options, Z_INPUT
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 7
        return *Conv2dFunction.backward(ctx, dout), None


def _of_shift(ctx: Any, grad: Tensor | None) -> Tensor:
    """The shift is not always saved: of it the dtype is."""
    assert grad is not None
    return grad if grad.dtype == ctx.shift_dtype else grad.to(ctx.shift_dtype)


# Function.apply without torch's wrapper of it, which looks for functorch transforms: serves_native has.
_apply_eagerly = super(torch.autograd.Function, Conv2dFunction).apply
_apply_with_statistics = super(torch.autograd.Function, Conv2dWithStatisticsFunction).apply


def _differentiable_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """What backward returns under ``create_graph=True``, made of differentiable torch operators."""
    x, weight, scale, shift, _, saved = ctx.saved_tensors
    stride, padding, dilation, groups, act = ctx.options
    dout, act, residual = without_relu(dout, act, saved, ctx.z_source)

    def forward(x, weight, scale, shift, residual):
        return reference.conv2d(
            x, weight, None, stride, padding, dilation, groups, scale, shift, residual, act
        )

    gradients = gradients_with_graph(forward, (x, weight, scale, shift, residual), dout)
    # What was not saved is added behind the activation that is left.
    if shift is None and ctx.shift_dtype is not None:
        gradients[3] = _of_shift(ctx, dout.sum((0, 2, 3), dtype=acc_dtype(dout.dtype)))
    if residual is None:
        gradients[4] = dout
    needs = ctx.needs_input_grad[:5]
    return tuple(g if n else None for g, n in zip(gradients, needs, strict=True))


def _folded(
    x: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """One scale and one shift for all three, of one dtype."""
    acc = acc_dtype(x.dtype)
    if bias is not None:
        if scale is None and shift is None:
            return None, bias
        bias = bias.to(acc) if scale is None else bias.to(acc) * scale.to(acc)
        shift = bias if shift is None else shift.to(acc) + bias
    if scale is not None and shift is not None and scale.dtype != shift.dtype:
        scale, shift = scale.to(acc), shift.to(acc)
    return scale, shift


# ---- checks ----


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    check_groups(_NAME, groups)
    channels, outputs = x.shape[1], weight.shape[0]
    for of, count in (("channels", channels), ("channels of the output", outputs)):
        if count % groups != 0:
            raise RuntimeError(f"{_NAME}: groups ({groups}) must divide the {of} ({count})")
    if weight.shape[1] * groups != channels:
        raise RuntimeError(
            f"{_NAME}: x (shape {tuple(x.shape)}) must have {weight.shape[1] * groups} channels for "
            f"weight (shape {tuple(weight.shape)}) and groups ({groups})"
        )
    if outputs == 0 or 0 in weight.shape[2:]:
        raise RuntimeError(
            f"{_NAME}: weight (shape {tuple(weight.shape)}) must have an output channel and a kernel of size 1 at least"
        )
    check_floating(_NAME, "x", x)
    if weight.dtype != x.dtype or weight.device != x.device:
        raise RuntimeError(
            f"{_NAME}: weight ({weight.dtype} on {weight.device}) must be of x's dtype and on its device "
            f"({x.dtype} on {x.device})"
        )
    shape = conv2d_shape(x, weight.shape, stride, padding, dilation)
    if shape[2] < 1 or shape[3] < 1:
        raise RuntimeError(
            f"{_NAME}: weight (shape {tuple(weight.shape)}, dilation {dilation}) must not be larger than the padded x "
            f"(shape {tuple(x.shape)}, padding {padding})"
        )
    check_per_channel(_NAME, x, outputs, bias=bias, scale=scale, shift=shift)
    if residual is not None:
        check_residual(_NAME, residual, shape, x.device)
        if residual.dtype != x.dtype:
            raise RuntimeError(
                f"{_NAME}: residual (dtype {residual.dtype}) must be of x's dtype ({x.dtype})"
            )
