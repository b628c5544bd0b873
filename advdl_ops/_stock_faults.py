"""Which 2-D convolutions torch computes wrongly on CPU (docs/stock_faults.md), and how to get correct results.

Found by tools/stock_faults.py in torch 2.13. All code that passes a convolution to torch checks here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from ._schemas import conv2d_format
from .backend import transformed

# Channels that oneDNN computes at a time with AVX-512. With AVX2 there are 8.
_BLOCK = 16
_HALF = torch.float16, torch.bfloat16


def fails_in_channels_last(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
) -> bool:
    """Whether the gradient of the weight may be wrong, or crash the process, unless all tensors are contiguous.

    Options are pairs. With an output padding they are those of a transposed convolution. Called in every backward pass,
    so the cheapest tests come first.
    """
    strided = stride[0] > 1 or stride[1] > 1
    if not strided and (groups == 1 or (dilation[0] == 1 and dilation[1] == 1)):
        return False
    dtype = x.dtype
    if dtype == torch.float32:
        # oneDNN copies every stride-th pixel to a buffer, which is too small if there are fewer channels than a block.
        if groups > 1 or padding[0] > 0 or padding[1] > 0 or not strided:
            return False
        _, channels, kernel_h, kernel_w = weight.shape
        if channels >= _BLOCK or kernel_h > 1 or kernel_w > 1:
            return False
        height, width = _image(x, weight, stride, padding, dilation, output_padding)
        return height % stride[0] == 0 == width % stride[1]
    return dtype in _HALF and groups > 1 and max(dilation) > 1


def fails_in_half(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None = None,
) -> bool:
    """Whether the gradient of the weight may be wrong in half precision, in either memory format. fp32 is right.

    Arguments as of :func:`fails_in_channels_last`.
    """
    if stride[1] == 1 or x.dtype not in _HALF:
        return False
    return _image(x, weight, stride, padding, dilation, output_padding)[1] < stride[1]


def layer_may_fail(layer: torch.nn.Module) -> bool:
    """Whether :func:`fails_in_channels_last` holds for one of torch's layers with some fp32 image."""
    if not isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
        return False
    is_transposed = isinstance(layer, torch.nn.ConvTranspose2d)
    return (
        (layer.out_channels if is_transposed else layer.in_channels) < _BLOCK
        and layer.groups == 1
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.padding in ((0, 0), "valid")
    )


def sees_nothing(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None = None,
) -> bool:
    """Whether no tap of the kernel falls on a column of the image. oneDNN may then crash the process.

    Arguments as of :func:`fails_in_channels_last`. For a transposed convolution, the convolution meant is the gradient
    of x.
    """
    step, border, rate = stride[1], padding[1], dilation[1]
    if border == 0 or (step == 1 and rate == 1):
        return False
    kernel = weight.shape[3]
    # A tap with at most the padding on either side falls on the first column for any width. This test comes first
    # because an exporter may not know the width.
    if step == 1 and any(max(tap, kernel - 1 - tap) * rate <= border for tap in range(kernel)):
        return False
    image = (
        x.shape
        if output_padding is None
        else _image(x, weight, stride, padding, dilation, output_padding)
    )
    width = image[-1]
    if width >= step and width >= rate:
        return False
    last = width + 2 * border - rate * (kernel - 1) - 1
    return not any(
        border <= first + tap * rate < border + width
        for first in range(0, last + 1, step)
        for tap in range(kernel)
    )


def _image(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None,
) -> Sequence[int]:
    """Height and width of the convolution's input, which for a transposed convolution is its output."""
    if output_padding is None:
        return x.shape[2:]
    return [
        (size - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel - 1) + output_padding[i] + 1
        for i, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True))
    ]


def padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    """``x`` ``[N, C, H, W]`` with zeros around it, in its memory format."""
    return _as(x, F.pad(x, (padding[1], padding[1], padding[0], padding[0])))


def _as(x: Tensor, out: Tensor) -> Tensor:
    """``out`` in ``x``'s memory format; unchanged under functorch transforms, where the format cannot be queried."""
    return out if transformed() else out.contiguous(memory_format=conv2d_format(x))


# ---- torch's convolutions with correct outputs and gradients ----


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d`. ``padding`` must be given by numbers."""
    stride, padding, dilation = map(_pair, (stride, padding, dilation))
    if x.is_cpu and sees_nothing(x, weight, stride, padding, dilation):
        x, padding = padded(x, padding), (0, 0)
    options = stride, padding, dilation, groups
    if x.is_cpu and fails_in_half(x, weight, stride, padding, dilation):
        wide = F.conv2d(x.float(), weight.float(), _in_float32(bias), *options)
        return wide.to(x.dtype)
    if x.is_cpu and fails_in_channels_last(x, weight, *options):
        return _as(x, F.conv2d(in_contiguous(x), in_contiguous(weight), bias, *options))
    return F.conv2d(x, weight, bias, *options)


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose2d`."""
    stride, padding, output_padding, dilation = map(
        _pair, (stride, padding, output_padding, dilation)
    )
    options = stride, padding, output_padding, groups, dilation
    if not x.is_cpu:
        return F.conv_transpose2d(x, weight, bias, *options)
    conv = stride, padding, dilation
    if fails_in_half(x, weight, *conv, output_padding):
        return transposed_convolution(x.float(), weight.float(), _in_float32(bias), *options).to(
            x.dtype
        )
    given = x
    fails = fails_in_channels_last(x, weight, *conv, groups, output_padding)
    if fails:
        x, weight = in_contiguous(x), in_contiguous(weight)
    if sees_nothing(x, weight, *conv, output_padding):
        height, width = _image(x, weight, *conv, output_padding)
        whole = F.conv_transpose2d(x, weight, bias, stride, 0, output_padding, groups, dilation)
        out = whole[:, :, padding[0] :, padding[1] :][:, :, :height, :width]
        return _as(given, out.contiguous())
    out = F.conv_transpose2d(x, weight, bias, *options)
    return _as(given, out) if fails else out


def _in_float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def in_contiguous(t: Tensor) -> Tensor:
    """``t`` in contiguous memory. Sizes of 1 get contiguous strides too, or torch might take it as channels_last."""
    return t.reshape(-1).view(t.shape)
