"""What the launchers of the dense and of the depthwise convolution share: checks, allocation, splits, the order of
steps.

Tensors are [N, C, H, W] on one CUDA device, in fp32, bf16 or fp16; fp64 is refused. Kernels use channels_last memory;
another format is converted once per call. There are no atomics, so two runs with the same config are bitwise equal. The
operators check the arguments. Here is only a check for what no kernel supports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._conv.problem import Conv
from .._schemas import conv2d_shape
from . import conv2d_kernels as kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Weight gradients have few tiles and long sums. The sums are split until there are this many programs, several for each
# multiprocessor of any GPU. A constant, so that the result does not depend on the size of the GPU.
_SPLIT_PROGRAMS = 1024


class Splits(NamedTuple):
    """How the sum of a weight gradient over the output pixels is split.

    Attributes:
        pixels: pixels of each split.
        number: the number of splits.
    """

    pixels: int
    number: int


def forward(
    function: str, x: Tensor, weight: Tensor, conv: Conv, run: Callable[[Tensor, Tensor, int], None]
) -> Tensor:
    """Output ``[N, C_out, oH, oW]`` in channels_last.

    Args:
        function: the name in errors.
        run: launches the kernel on ``x`` in channels_last, the output and the number of its pixels. Not called for an
            empty output.
    """
    _check(function, x, weight)
    x = channels_last(x)
    out = empty_channels_last(x, conv2d_shape(x.shape, weight.shape, *conv[:3]))
    pixels = out.shape[0] * out.shape[2] * out.shape[3]
    _check_pixels(function, pixels)
    if out.numel() > 0:
        with torch.cuda.device_of(x):
            run(x, out, pixels)
    return out


def input_gradient(
    function: str,
    dz: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    conv: Conv,
    run: Callable[[Tensor, Tensor, int], None],
) -> Tensor:
    """The gradient of x ``[N, C_in, H, W]`` in channels_last.

    Args:
        run: launches the kernel on ``dz`` in channels_last, the gradient and the number of input pixels of the largest
            phase.
    """
    _check(function, dz, weight)
    dz = channels_last(dz)
    batch, _, height, width = x_shape
    dx = empty_channels_last(dz, tuple(x_shape))
    _check_pixels(function, batch * height * width)
    if dx.numel() > 0:
        pixels = batch * triton.cdiv(height, conv.stride[0]) * triton.cdiv(width, conv.stride[1])
        with torch.cuda.device_of(dz):
            run(dz, dx, pixels)
    return dx


def weight_gradient(
    function: str,
    dz: Tensor,
    x: Tensor,
    shape: Sequence[int],
    programs: int,
    block: int,
    split_k: int,
    run: Callable[[Tensor, Tensor, Tensor, int, Splits], None],
) -> Tensor:
    """The gradient of the weight in fp32. ``shape`` has the kernel's order of dimensions.

    Args:
        programs: the number of programs of one split.
        block: pixels that a program takes at a time.
        split_k: number of splits; 0: depends on the sizes.
        run: launches the kernel on ``dz`` and ``x`` in channels_last, ``[splits, *shape]``, the number of output
            pixels and the splits.
    """
    _check(function, dz, x)
    dz, x = channels_last(dz), channels_last(x)
    pixels = dz.shape[0] * dz.shape[2] * dz.shape[3]
    _check_pixels(function, pixels)
    dweight = x.new_empty(tuple(shape), dtype=torch.float32)
    if pixels == 0 or dweight.numel() == 0:
        return dweight.zero_()
    split_pixels = _pixels_of_split(pixels, programs, block, split_k)
    splits = Splits(split_pixels, triton.cdiv(pixels, split_pixels))
    partial = dweight
    if splits.number > 1:
        partial = dweight.new_empty((splits.number, dweight.numel()))
    with torch.cuda.device_of(dz):
        run(dz, x, partial, pixels, splits)
        if splits.number > 1:
            size = dweight.numel()
            kernels.sum_splits_kernel[(triton.cdiv(size, 256),)](
                partial, dweight, splits.number, size, BLOCK=256, num_warps=4
            )
    return dweight


def vector(t: Tensor | None) -> Tensor | None:
    """A per-channel tensor as kernels read it: contiguous, or ``None``."""
    return None if t is None else t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def geometry(weight_shape: Sequence[int], conv: Conv) -> dict[str, int]:
    """The compile-time constants of a Triton kernel, from the filter's size and the options."""
    names = "KH", "KW", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DIL_H", "DIL_W"
    values = *weight_shape[2:], *conv.stride, *conv.padding, *conv.dilation
    return dict(zip(names, values, strict=True))


def tap_steps(conv: Conv) -> dict[str, int]:
    """The step between taps of the same phase: their distance in pixels is a multiple of the stride."""
    pairs = zip(conv.stride, conv.dilation, strict=True)
    step_h, step_w = (stride // math.gcd(stride, dilation) for stride, dilation in pairs)
    return {"STEP_H": step_h, "STEP_W": step_w}


def _pixels_of_split(pixels: int, programs: int, block: int, split_k: int) -> int:
    """The pixels of each split: a multiple of ``block``. With ``split_k`` 0, at least four blocks."""
    blocks = triton.cdiv(pixels, block)
    splits = split_k or min(triton.cdiv(_SPLIT_PROGRAMS, programs), max(blocks // 4, 1))
    return triton.cdiv(blocks, splits) * block


def _check(function: str, *tensors: Tensor) -> None:
    dtype = tensors[0].dtype
    if dtype not in _DTYPES:
        raise NotImplementedError(
            f"{function}: x (dtype {dtype}) must be of float32, bfloat16 or float16 for the Triton kernels"
        )
    for t in tensors:
        if t.dtype != dtype:
            raise RuntimeError(
                f"{function}: tensors of {dtype} and of {t.dtype} must be of one dtype"
            )


def _check_pixels(function: str, pixels: int) -> None:
    if pixels >= 2**31 - 256:  # row numbers of the last block must not wrap around
        raise NotImplementedError(
            f"{function}: N * H * W ({pixels}) must be below 2^31 for the Triton kernels"
        )
