"""The raw operators ``conv2d`` and ``conv2d_backward`` on CPU: oneDNN, in the memory format in which it is fast.

What oneDNN appends to its convolution (bias, residual, activation) it does while the output is still in cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import native
from .._schemas import _library, conv2d_format, conv2d_shape
from .._stock_faults import fails_in_channels_last, padded, sees_nothing
from ..activation import IDENTITY, Activation, activation_of
from ..backend import is_traced
from ..reference.activation import activate
from ..reference.batch_norm_act import acc_dtype
from ._activation import activated
from ._epilogue import epilogue
from ._norm import HALF


class Conv(NamedTuple):
    """The options of a 2-D convolution, as :func:`torch.nn.functional.conv2d` takes them."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int


def conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: int,
    act_param: float,
) -> Tensor:
    """``act(conv2d(x, weight) * scale + shift + residual)`` in ``x``'s memory format, see ``_schemas.py``."""
    activation = activation_of(act, act_param)
    given_format = conv2d_format(x)
    if sees_nothing(x, weight, stride, padding, dilation):
        x, padding = padded(x, padding), (0, 0)
    conv = Conv(stride, padding, dilation, groups)
    x = convert(x, compute_format(x, dilation))
    # In half precision a folded scale would round the weights once more, and a wider shift would be rounded.
    folds = x.dtype not in HALF or (scale is None and shift is not None and shift.dtype == x.dtype)
    bias = shift if folds else None
    if folds:
        if scale is not None:
            weight = weight * scale.view(-1, 1, 1, 1)
        scale = shift = None
    if own_kernel(x, weight, conv).out:
        out = torch.ops.advdl_ops.dense_conv2d(
            x, weight, bias, residual, stride, padding, dilation, act, act_param
        )
        return convert(out, given_format)
    if appends(x, weight, conv):
        # oneDNN's relu and relu6 would hide a NaN from whoever trains; a pass in place costs 0.3 % of a 3x3 convolution
        # of 64 channels, 4 % of a 1x1.
        later = activation if activation.name in ("relu", "relu6") else IDENTITY
        appended = activation if later is IDENTITY else IDENTITY
        out = onednn_conv_act(x, weight, bias, conv, residual, appended)
        return convert(activated(out, later, in_place=True), given_format)
    # The same operator by way of torch.ops takes 4 us more.
    out = torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return convert(epilogue(out, scale, shift, residual, activation), given_format)


def conv2d_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of the weight and of a bias ``[C_out]``, see ``_schemas.py``."""
    acc = acc_dtype(x.dtype)
    dbias = dz.sum((0, 2, 3), dtype=acc) if need_dbias else x.new_empty(0, dtype=acc)
    dx, dweight = x.new_empty(0), x.new_empty(0, dtype=acc)
    if not (need_dx or need_dweight):
        return dx, dweight, dbias
    given_format = conv2d_format(x)
    fast, weight_format = compute_format(x, dilation), conv2d_format(weight)
    own = own_kernel(x, weight, Conv(stride, padding, dilation, groups))
    own_dx, own_dweight = need_dx and own.dx, need_dweight and own.dweight
    if own_dx or own_dweight:
        found = torch.ops.advdl_ops.dense_conv2d_backward(
            dz, x, weight, stride, padding, dilation, own_dx, own_dweight
        )
        dx = found[0] if own_dx else dx
        dweight = found[1] if own_dweight else dweight
        need_dx, need_dweight = need_dx and not own_dx, need_dweight and not own_dweight
        if not (need_dx or need_dweight):
            return dx, dweight, dbias
    if need_dweight and fails_in_channels_last(x, weight, stride, padding, dilation, groups):
        fast, weight = torch.contiguous_format, convert(weight, torch.contiguous_format)
    rest = torch.ops.aten.convolution_backward(
        convert(dz, fast),
        convert(x, fast),
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [need_dx, need_dweight, False],
    )
    if need_dx:
        dx = convert(rest[0], given_format)
    if need_dweight:
        dweight = convert(rest[1], weight_format).to(acc)
    return dx, dweight, dbias


_library.impl("conv2d", conv2d, "CPU")
_library.impl("conv2d_backward", conv2d_backward, "CPU")


# Up to so many numbers torch chooses what computes: oneDNN takes 30 to 50 us for a call, in which torch's own kernel is
# done with 1x1 of 1x64x16x16 or 3x3 of 1x8x4x4 (7 us). So too where the weight is larger than x: oneDNN's call orders
# it anew as it lies, 1x1 of 1x512x7x7 to 2048 channels in channels_last takes 2.4 ms of which torch's takes 1.2.
_SMALL = 8192


def appends(x: Tensor, weight: Tensor, conv: Conv) -> bool:
    """Whether, where the own kernel does not serve, oneDNN's fused convolution does; else torch chooses."""
    return x.numel() > max(_SMALL, weight.numel()) and uses_onednn(x, weight, conv)


class Own(NamedTuple):
    """Which of a convolution's results csrc/cpu/dense_conv2d.cpp computes faster than oneDNN."""

    out: bool = False
    dx: bool = False
    dweight: bool = False


# Fewer channels leave lanes of that kernel empty, fewer pixels use a packed weight too seldom.
_FEW_CHANNELS, _FEW_PIXELS, _MOST_TAPS = 32, 48, 64

# Up to so many pixels of the output the kernel is faster: oneDNN orders the whole weight anew in every call, and its
# gradient back, which the products of a few pixels do not outweigh. More of a strided gradient of x, for which oneDNN
# multiplies zeros, and of the gradient of a weight, unless it has few channels; fewer of contiguous images, which are
# converted. Measured: docs/performance.md.
_PIXELS, _PIXELS_CONTIGUOUS = 256, 128
_PIXELS_STRIDED, _PIXELS_DWEIGHT, _PIXELS_DWEIGHT_CONTIGUOUS = 800, 800, 512
_MANY_CHANNELS = 128
# Of a dilation for which channels_last is chosen: oneDNN takes up to nine times as long for the gradient of the weight.
_PIXELS_DWEIGHT_DILATED = 2048


def own_kernel(x: Tensor, weight: Tensor, conv: Conv) -> Own:
    """What of the convolution of ``x`` is left to the own kernel."""
    outputs, channels, kernel_h, kernel_w = weight.shape
    if (
        conv.groups != 1
        or x.dtype != torch.float32
        or min(outputs, channels) < _FEW_CHANNELS
        or kernel_h * kernel_w > _MOST_TAPS
        or not native("cpu")
    ):
        return Own()
    n, _, height, width = conv2d_shape(x, weight.shape, conv.stride, conv.padding, conv.dilation)
    pixels = n * height * width
    if pixels < _FEW_PIXELS or x.numel() == 0:
        return Own()
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    few = _PIXELS if is_last else _PIXELS_CONTIGUOUS
    dx = few if max(conv.stride) == 1 else _PIXELS_STRIDED
    dweight = _PIXELS
    if max(conv.dilation) >= _LARGE_DILATION:
        dweight = _PIXELS_DWEIGHT_DILATED
    elif min(outputs, channels) >= _MANY_CHANNELS:
        dweight = _PIXELS_DWEIGHT if is_last else _PIXELS_DWEIGHT_CONTIGUOUS
    return Own(pixels <= few, pixels <= dx, pixels <= dweight)


# From this dilation on oneDNN's convolution is faster in channels_last, by more than the two conversions take; below,
# and without dilation, it is as fast in either format. Forward, contiguous -> by way of channels_last, in ms on one
# core with AVX-512, 3x3: 2x64x56x56 dilated by 2: 8.8 -> 13, by 6: 13 -> 18, by 8: 24 -> 17, by 12: 19 -> 3.9, by 16:
# 19 -> 6.1; 1x128x33x33 by 6: 2.5 -> 3.0, by 12: 5.6 -> 2.4, by 18: 3.7 -> 1.6. Backward of the first by 8: 49 -> 34,
# by 12: 44 -> 30. 1x1, strides, groups and bf16: nothing gained.
_LARGE_DILATION = 8


def compute_format(x: Tensor, dilation: Sequence[int]) -> torch.memory_format:
    """The memory format in which a convolution of ``x`` is computed."""
    if x.dtype == torch.float32 and max(dilation) >= _LARGE_DILATION:
        return torch.channels_last
    return conv2d_format(x)


def has_format(t: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether ``t`` ``[N, C, H, W]`` has the strides of ``memory_format``, those of sizes of 1 and 0 included."""
    return t.stride() == _strides(t.shape, memory_format)


def convert(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t`` ``[N, C, H, W]`` with the strides of ``memory_format``, those of sizes of 1 and 0 included."""
    strides = _strides(t.shape, memory_format)
    if t.stride() == strides:
        return t
    if t.is_contiguous(memory_format=memory_format):  # but for what a size of 1 leaves open
        return t.as_strided(t.shape, strides)
    if t.is_cpu and native("cpu"):
        return torch.ops.advdl_ops.convert_layout(t, memory_format == torch.channels_last)
    return t.contiguous(memory_format=memory_format)


def _strides(shape: Any, memory_format: torch.memory_format) -> tuple[int, ...]:
    _, c, h, w = shape
    if memory_format == torch.channels_last:
        return h * w * c, 1, w * c, c
    c, h, w = max(c, 1), max(h, 1), max(w, 1)
    return c * h * w, h * w, w, 1


# ---- oneDNN's fused convolution ----

# What oneDNN calls the activations that it appends to a convolution; elu is not offered.
_ONEDNN_NAMES = {
    "identity": "none",
    "silu": "swish",
    "gelu_tanh": "gelu",
    "relu6": "hardtanh",
    **{name: name for name in ("relu", "leaky_relu", "gelu", "sigmoid", "tanh", "hardswish")},
}
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_convolution_pointwise"
)


def uses_onednn(x: Tensor, weight: Tensor, conv: Conv) -> bool:
    """Whether this input may be handed to oneDNN's fused convolution."""
    return bool(
        _HAS_ONEDNN
        and type(x)
        in (Tensor, torch.nn.Parameter)  # no subclass: fake tensors have no such operator
        and x.device.type == "cpu"
        and x.dtype == torch.float32 == weight.dtype
        and x.dim() == 4
        and x.numel() > 0
        and not isinstance(conv.padding, str)
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
    )


def prepack(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """``weight`` in the blocked layout that oneDNN likes best for inputs of ``x``'s shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight,
        pair(conv.padding),
        pair(conv.stride),
        pair(conv.dilation),
        conv.groups,
        list(x.shape),
    )


def onednn_conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """``act(conv2d(x, weight, bias) + residual)``, in channels_last mostly whatever ``x`` is.

    oneDNN's relu and relu6 give 0 for NaN.
    """
    options = pair(conv.padding), pair(conv.stride), pair(conv.dilation), conv.groups
    ops = torch.ops.mkldnn
    if residual is not None:
        unary = "relu" if act.name == "relu" else None
        out = ops._convolution_pointwise.binary(
            x, residual, weight, bias, *options, "add", 1.0, unary, [], ""
        )
        return activate(out, act) if unary is None else out
    if act.name in _ONEDNN_NAMES:
        scalars = {"leaky_relu": [act.param], "relu6": [0.0, 6.0]}.get(act.name, [])
        algorithm = {"gelu": "none", "gelu_tanh": "tanh"}.get(act.name, "")
        return ops._convolution_pointwise(
            x, weight, bias, *options, _ONEDNN_NAMES[act.name], scalars, algorithm
        )
    return activate(ops._convolution_pointwise(x, weight, bias, *options, "none", [], ""), act)


# ---- options ----


def pair(value: Any) -> list[int]:
    """Height and width of an option that is one number for both, or two, or a sequence of one."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
