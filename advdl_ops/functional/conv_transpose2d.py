"""Transposed convolution and activation (Zeiler et al. 2010; the arithmetic: Dumoulin & Visin 2016, arXiv:1603.07285).

On CPU, if ``_conv/choice.py`` chooses torch in every direction, oneDNN serves the layer through torch. All other layers
(depthwise layers, dense ones of few pixels, 3x3 with stride 1) are computed as gradients of this package's convolution.
For other dense layers no kernel of this package is faster than oneDNN (fp32, 2 threads). For kernel 2, stride 2, where
outputs do not overlap, a matrix product and a pixel shuffle took (channels_last, ms, against oneDNN): 2.8 / 2.2 for x
[8, 128, 28, 28] to 64 channels, 11.7 / 9.1 at 56 x 56, 6.4 / 6.0 for [4, 512, 16, 16] to 256, 4.1 / 3.1 for [2, 64,
128, 128] to 32.

The activation is written over the convolution's output if its derivative follows from that output or is not needed
(at 56 x 56 above: 15 ms, against 23 ms with a new tensor). The gradient of a bias in channels_last is a separate sum
(:func:`_sums_bias`).

On CUDA every layer is computed as a gradient of this package's convolution, so that the candidate measured to be the
fastest serves. If a layer is no such gradient, see :func:`_is_gradient`, cuDNN serves it, in deterministic mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._conv import choice, cuda
from .._conv.epilogue import activated
from .._conv.problem import (
    FORWARD,
    Conv,
    Problem,
    call_key,
    check_groups,
    pair_of,
    problem_of,
)
from .._schemas import conv2d_format
from .._stock_faults import (
    fails_in_channels_last,
    fails_in_half,
    in_contiguous,
    padded,
    sees_nothing,
)
from ..activation import Activation, resolve_activation
from ..backend import (
    autocast_dtype,
    cast,
    fixed,
    get_backend,
    is_traced,
    needs_grad,
    serves_native,
    transformed,
    unwatched,
)
from ..reference.activation import finished
from ._norm import (
    Z_INPUT,
    check_floating,
    check_tensors,
    differentiable_gradients,
    gradient_like,
)

_NAME = "conv_transpose2d"
_convolution_backward_op = torch.ops.aten.convolution_backward.default
_conv2d_op = torch.ops.advdl_ops.conv2d.default
_conv2d_backward_op = torch.ops.advdl_ops.conv2d_backward.default


class Options(NamedTuple):
    """The options of a transposed convolution, in torch's order."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    groups: int
    dilation: tuple[int, int]


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    act: str | Activation | torch.nn.Module | None = None,
) -> Tensor:
    r"""``act(conv_transpose2d(x))``; arguments in the order of :func:`torch.nn.functional.conv_transpose2d`.

    The gradient of ``conv2d`` with respect to its input, taken at ``x``. On each axis the output has

    .. math:: (\mathrm{size} - 1) \cdot \mathrm{stride} - 2 \cdot \mathrm{padding}
              + \mathrm{dilation} \cdot (\mathrm{kernel} - 1) + \mathrm{output\_padding} + 1

    Args:
        input: x, ``[N, C_in, H, W]`` or ``[C_in, H, W]``; fp32, fp64, bf16 or fp16; contiguous or channels_last (kept;
            other strides give a contiguous result). Complex numbers are left to torch.
        weight: ``[C_in, C_out / groups, kH, kW]``, in ``x``'s dtype.
        bias: ``[C_out]`` or ``None``, in ``x``'s dtype.
        stride, padding, output_padding, dilation: one integer, or one for each of height and width;
            ``output_padding`` is less than the larger of stride and dilation on its axis.
        groups: divides ``C_in``.
        act: ``None``, a name or a ``torch.nn`` module, see :func:`.resolve_activation`.

    Returns:
        ``[N, C_out, H_out, W_out]`` or ``[C_out, H_out, W_out]`` in ``x``'s memory format and dtype (autocast's under
        autocast). Besides ``x`` and ``weight``, nothing is saved for backward without an activation. For relu, relu6,
        leaky_relu, sigmoid and tanh it is the output, which must then not be overwritten; else the pre-activation.

    Raises:
        RuntimeError: a tensor of another rank, channels that do not fit ``weight``, ``groups`` or ``bias``, an option
            out of range or not of one or two values, an empty kernel or image, mixed dtypes or devices; for a
            non-floating ``x`` its subclass ``NotImplementedError``.
        TypeError: an option that is not an integer, an argument that must be a tensor and is not, an ``act`` of another
            class.
        ValueError: an unknown ``act``.
    """
    x = input
    activation = act if type(act) is Activation else resolve_activation(_NAME, act)
    if isinstance(x, Tensor) and x.is_complex():  # torch's alone
        z = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
        return finished(z, None, activation)
    options = Options(
        pair_of(_NAME, "stride", stride, 1),
        pair_of(_NAME, "padding", padding, 0),
        pair_of(_NAME, "output_padding", output_padding, 0),
        groups,
        pair_of(_NAME, "dilation", dilation, 1),
    )
    check_tensors(_NAME, x=x, weight=weight, bias=bias)
    if x is None or weight is None:
        raise TypeError(f"{_NAME}: {'weight' if weight is None else 'x'} (None) must be a Tensor")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = cast(x, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    _check(x, weight, bias, options)
    if x.dim() == 3:
        return _batched(x.unsqueeze(0), weight, bias, options, activation).squeeze(0)
    return _batched(x, weight, bias, options, activation)


def _batched(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, act: Activation
) -> Tensor:
    own = _has_own_operators(x, weight, options) and serves_native(_NAME, x)
    # For the other layers, compilers and exporters get aten operators, and fuse the activation themselves.
    if get_backend() == "reference" or transformed() or (is_traced() and not own):
        return reference.conv_transpose2d(x, weight, bias, options, act)
    if not needs_grad(x, None, weight, bias):
        z = _convolve_transposed(x, weight, bias, options, own)
        return activated(z, act, in_place=True)
    if (
        act.code == 0
        and not own
        and not x.is_cuda  # because backward must be deterministic there
        and not _fails_in_channels_last(x, weight, options)
        and not _fails_in_half(x, weight, options)
        and not _sees_nothing(x, weight, options)
        and not (bias is not None and _sums_bias(x))
        # Such a weight would determine the format of x's gradient.
        and not weight.is_contiguous(memory_format=torch.channels_last)
    ):
        # Torch's own gradients are as good here.
        return _convolve_transposed(x, weight, bias, options, False)
    return ConvTranspose2dFunction.apply(x, weight, bias, options, fixed(act), own)


def _has_own_operators(x: Tensor, weight: Tensor, options: Options) -> bool:
    """Whether this package's convolution serves. On CPU it does not if torch is the choice for each direction."""
    if not _is_gradient(x, weight, options):
        return False
    if x.is_cuda or _is_depthwise(weight, options):
        return True
    # For the other layers, a compiler gets aten operators.
    if not x.is_cpu or not unwatched(x, weight):
        return False
    key = "transposed", call_key(x, weight, _conv(options)), options.output_padding
    found = choice.plans.get(key)
    if found is None:
        is_torchs = choice.is_torchs(_problem(x, weight, options))
        if is_torchs is None:
            return True  # so that each direction is measured
        found = choice.keep(key, x, not is_torchs)
    return bool(found)


def _problem(x: Tensor, weight: Tensor, options: Options) -> Problem:
    """The problem of the convolution whose gradient the layer is. Its output has the shape of ``x``."""
    channels = weight.shape[1] * options.groups
    shape = x.shape[0], channels, *_output_size(x, weight, options)
    return problem_of(FORWARD, x, weight, _conv(options))._replace(x=shape)


def _is_gradient(x: Tensor, weight: Tensor, options: Options) -> bool:
    """Whether a convolution of the layer's output has ``x``'s shape, so that the layer is its gradient.

    With an output padding of at least the stride, which torch allows if it is below the dilation, that shape would be
    larger.
    """
    return (
        all(more < s for more, s in zip(options.output_padding, options.stride, strict=True))
        and min(_output_size(x, weight, options)) > 0
    )


def _is_depthwise(weight: Tensor, options: Options) -> bool:
    return options.groups == weight.shape[0] and weight.shape[1] == 1


# From the output, as stock: it must not be written before backward.
_FROM_OUTPUT = ("relu", "sigmoid", "tanh")
# From where the pre-activation is: a byte for each element. Stock keeps the pre-activation, so the output may be
# written.
_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda z: z > 0,
    "relu6": lambda z: ((z <= 0) | (z >= 6)).logical_not_(),  # NaN is within, as in torch
}


# (gradient of the output, what forward saved, the activation's parameter) -> the gradient of the pre-activation.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relu": lambda dout, out, _: torch.ops.aten.threshold_backward(dout, out, 0),
    "leaky_relu": lambda dout, mask, slope: torch.where(mask, dout, dout * slope),
    "elu": lambda dout, z, alpha: torch.ops.aten.elu_backward(dout, alpha, 1, 1, False, z),
    "silu": lambda dout, z, _: torch.ops.aten.silu_backward(dout, z),
    "gelu": lambda dout, z, _: torch.ops.aten.gelu_backward(dout, z),
    "gelu_tanh": lambda dout, z, _: torch.ops.aten.gelu_backward(dout, z, approximate="tanh"),
    "sigmoid": lambda dout, out, _: torch.ops.aten.sigmoid_backward(dout, out),
    "tanh": lambda dout, out, _: torch.ops.aten.tanh_backward(dout, out),
    "hardswish": lambda dout, z, _: torch.ops.aten.hardswish_backward(dout, z),
    "relu6": lambda dout, mask, _: torch.where(mask, dout, 0),
}


class ConvTranspose2dFunction(torch.autograd.Function):
    """Gradients of ``conv_transpose2d``. Saved: ``x``, ``weight``, ``bias``, and what the activation needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: Options,
        act: Activation,
        own: bool,
    ) -> Tensor:
        saved = z = _convolve_transposed(x, weight, bias, options, own)
        if act.name in _MASKS:
            saved = _MASKS[act.name](z)
        out = activated(z, act, in_place=saved is not z or act.name in _FROM_OUTPUT)
        if act.name in _FROM_OUTPUT:
            saved = out
        ctx.save_for_backward(x, weight, bias, None if act.code == 0 else saved)
        ctx.options, ctx.act, ctx.own = options, act, own
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dout,) = grads
        x, weight, bias, saved = ctx.saved_tensors
        options, act = ctx.options, ctx.act
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():

            def forward(x, _residual, weight, bias, act):
                return reference.conv_transpose2d(x, weight, bias, options, act)

            dx, _, dweight, dbias = differentiable_gradients(
                forward, dout, x, None, weight, bias, act, Z_INPUT
            )
        else:
            dz = dout if saved is None else _DERIVATIVES[act.name](dout, saved, act.param)
            needs = need_x, need_weight, need_bias
            gradients = _own_gradients if ctx.own else _dense_gradients
            dx, dweight, dbias = gradients(dz, x, weight, options, needs)
        return (
            dx if need_x else None,
            gradient_like(dweight, weight) if need_weight else None,
            gradient_like(dbias, bias) if need_bias else None,
            None,
            None,
            None,
        )


def _convolve_transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, own: bool
) -> Tensor:
    """``[N, C_out, H_out, W_out]`` in the memory format of ``x``, always a new tensor."""
    layout = conv2d_format(x)
    if own:
        channels = weight.shape[1] * options.groups
        shape = (x.shape[0], channels, *_output_size(x, weight, options))
        # Never written or read: the gradient only needs the sizes and format of the convolution's input.
        like = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        out = _convolution_gradients(x, like, weight, options, True, False)[0]
        return out if bias is None else out.add_(bias[:, None, None])
    if layout == torch.contiguous_format:
        weight = weight.contiguous()  # otherwise the result would have the weight's format
    if x.is_cuda:
        out = cuda.convolution(x, weight, bias, _conv(options), True, options.output_padding)
    else:
        out = F.conv_transpose2d(x, weight, bias, *options)
    return out.contiguous(memory_format=layout)


def _conv(options: Options) -> Conv:
    return Conv(options.stride, options.padding, options.dilation, options.groups)


def _convolution_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, options: Options, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``conv2d(x, weight)``. Its ``dz`` has the shape of the transposed convolution's input."""
    return _conv2d_backward_op(dz, x, weight, *_conv(options), need_dx, need_dweight, False)


def _own_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, options: Options, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`_dense_gradients`: a convolution of ``dz``, and that convolution's gradient for its weight."""
    need_x, need_weight, need_bias = needs
    dz = dz.contiguous(memory_format=conv2d_format(x))
    dx = dweight = None
    if need_x:
        dx = _conv2d_op(dz, weight, None, None, None, *_conv(options), 0, 0.0)
    if need_weight:
        dweight = _convolution_gradients(x, dz, weight, options, False, True)[1]
    return dx, dweight, dz.sum((0, 2, 3)) if need_bias else None


def _dense_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, options: Options, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that ``needs`` names. dx has x's format."""
    layout = conv2d_format(x)
    need_x, need_weight, need_bias = needs
    if x.is_cpu and need_weight and _fails_in_half(x, weight, options):
        wide = _dense_gradients(dz.float(), x.float(), weight.float(), options, needs)
        dx, dweight, dbias = (t if t is None else t.to(x.dtype) for t in wide)
        return dx, dweight, dbias
    sums_bias = need_bias and _sums_bias(x)
    computed, padding = layout, options.padding
    if x.is_cpu and need_weight and _fails_in_channels_last(x, weight, options):
        computed = torch.contiguous_format
        x, weight = in_contiguous(x), in_contiguous(weight)
    dz = dz.contiguous(memory_format=computed)
    dx = dweight = dbias = None
    if sums_bias:
        dbias = dz.sum((0, 2, 3))
    if x.is_cpu and _sees_nothing(x, weight, options):
        dz, padding = padded(dz, padding), (0, 0)
    if need_x or need_weight or not sums_bias:
        with cuda.deterministic() if x.is_cuda else contextlib.nullcontext():
            dx, dweight, sum_of_dz = _convolution_backward_op(
                dz,
                x,
                weight,
                [dz.shape[1]],
                options.stride,
                padding,
                options.dilation,
                True,
                options.output_padding,
                options.groups,
                [need_x, need_weight, need_bias and not sums_bias],
            )
        dbias = dbias if sums_bias else sum_of_dz
    return None if dx is None else dx.contiguous(memory_format=layout), dweight, dbias


def _fails_in_channels_last(x: Tensor, weight: Tensor, options: Options) -> bool:
    stride, padding, more, groups, dilation = options
    return fails_in_channels_last(x, weight, stride, padding, dilation, groups, more)


def _fails_in_half(x: Tensor, weight: Tensor, options: Options) -> bool:
    stride, padding, more, _, dilation = options
    return fails_in_half(x, weight, stride, padding, dilation, more)


def _sees_nothing(x: Tensor, weight: Tensor, options: Options) -> bool:
    stride, padding, more, _, dilation = options
    return sees_nothing(x, weight, stride, padding, dilation, more)


def _sums_bias(x: Tensor) -> bool:
    """Whether a bias's gradient is computed as a separate sum, because oneDNN is slow for it in channels_last.

    Backward of the layers at the head of this file, in ms, without / with the separate sum: 6.2 / 4.6, 33.9 / 25.1,
    14.3 / 13.8, 12.8 / 7.4. In contiguous memory there is no such difference.
    """
    return x.is_cpu and conv2d_format(x) == torch.channels_last


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> None:
    if x.dim() not in (3, 4):
        raise RuntimeError(
            f"{_NAME}: x (shape {tuple(x.shape)}) must be [N, C_in, H, W] or [C_in, H, W]"
        )
    check_floating(_NAME, "x", x)
    shape, groups = weight.shape, options.groups
    if len(shape) != 4 or 0 in (shape[0], shape[1], shape[2], shape[3]):
        raise RuntimeError(
            f"{_NAME}: weight (shape {tuple(shape)}) must be [C_in, C_out / groups, kH, kW], none of them 0"
        )
    check_groups(_NAME, groups)
    if shape[0] % groups:
        raise RuntimeError(f"{_NAME}: groups ({groups}) must divide the channels ({shape[0]})")
    if x.shape[-3] != shape[0]:
        raise RuntimeError(
            f"{_NAME}: x (shape {tuple(x.shape)}) must have the {shape[0]} channels of weight "
            f"(shape {tuple(shape)})"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != shape[1] * groups):
        raise RuntimeError(
            f"{_NAME}: bias (shape {tuple(bias.shape)}) must have one value for each of the "
            f"{shape[1] * groups} channels"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(
                f"{_NAME}: {name} (dtype {t.dtype}) must be of x's dtype ({x.dtype})"
            )
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"{_NAME}: {name} (device {t.device}) must be on x's device ({x.device})"
            )
    _check_output_padding(options)
    sizes = _output_size(x, weight, options)
    if x.shape[-2] == 0 or x.shape[-1] == 0 or min(sizes) < 0:
        raise RuntimeError(
            f"{_NAME}: x (shape {tuple(x.shape)}) must not be empty and must leave an output, "
            f"of height and width {sizes}"
        )


def _check_output_padding(options: Options) -> None:
    more, stride, dilation = options.output_padding, options.stride, options.dilation
    if more[0] >= max(stride[0], dilation[0]) or more[1] >= max(stride[1], dilation[1]):
        raise RuntimeError(
            f"{_NAME}: output_padding ({more}) must be less than the larger of stride ({stride}) "
            f"and dilation ({dilation}) on each axis"
        )


def _output_size(x: Tensor, weight: Tensor, options: Options) -> tuple[int, int]:
    (height, width), (kernel_h, kernel_w) = x.shape[-2:], weight.shape[2:]
    (stride_h, stride_w), (padding_h, padding_w), (more_h, more_w), _, (dilation_h, dilation_w) = (
        options
    )
    return (
        unpadded_size(height, kernel_h, stride_h, padding_h, dilation_h) + more_h,
        unpadded_size(width, kernel_w, stride_w, padding_w, dilation_w) + more_w,
    )


def unpadded_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """The size of the output on one axis, without output padding."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
