"""Launchers of the depthwise convolution (one filter per channel) and of its gradients.

As in :mod:`advdl_ops.triton.conv2d`: [N, C, H, W] used in channels_last memory; fp32, bf16 or fp16, computed in fp32,
never in TF32; no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._schemas import conv2d_shape
from ..activation import IDENTITY, Activation
from . import depthwise_conv2d_kernels as kernels
from .conv2d import (
    Pair,
    _channels_last,
    _check,
    _check_pixels,
    _empty_channels_last,
    _geometry,
    pixels_of_split,
    sum_splits,
    tap_steps,
    vector,
)

__all__ = [
    "FORWARD_CONFIGS",
    "INPUT_GRADIENT_CONFIGS",
    "WEIGHT_GRADIENT_CONFIGS",
    "Config",
    "forward",
    "input_gradient",
    "suitable_configs",
    "weight_gradient",
]


class Config(NamedTuple):
    """What tuning may choose of a kernel.

    Attributes:
        block_m, block_n: pixels and channels that a program takes at a time.
        num_warps: as Triton has it.
        split_k: of a weight gradient, into how many parts its sum is split; 0 lets the sizes decide.
    """

    block_m: int
    block_n: int
    num_warps: int
    split_k: int = 0


# Memory decides: half a warp or more on neighbouring channels, and a few elements per thread.
FORWARD_CONFIGS = (
    Config(16, 128, 4),
    Config(32, 64, 4),
    Config(64, 32, 4),
    Config(64, 16, 4),
)
INPUT_GRADIENT_CONFIGS = FORWARD_CONFIGS
WEIGHT_GRADIENT_CONFIGS = (
    Config(32, 64, 4),
    Config(64, 32, 4),
    Config(128, 16, 4),
)


def suitable_configs(configs: tuple[Config, ...], dtype: torch.dtype) -> tuple[Config, ...]:
    """All of ``configs``: none of these kernels comes near to the registers of a thread, in any dtype."""
    return configs


def forward(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: Activation = IDENTITY,
    config: Config,
) -> Tensor:
    """``act(conv2d(x, weight, groups=C) * scale + shift + residual)``.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, 1, kH, kW]`` in x's dtype.
        scale, shift: ``[C]``, fp32 or x's dtype.
        residual: of the output's shape, added before the activation.
        config: one of ``FORWARD_CONFIGS``.

    Returns:
        ``[N, C, oH, oW]`` in channels_last and x's dtype.

    Raises:
        NotImplementedError: another dtype, or 2^31 output pixels.
    """
    _check("depthwise_conv2d", x, weight)
    x = _channels_last(x)
    batch, channels, in_h, in_w = x.shape
    _, _, kh, kw = weight.shape
    out_h, out_w = conv2d_shape(x, weight.shape, stride, padding, dilation)[2:]
    out = _empty_channels_last(x, (batch, channels, out_h, out_w))
    pixels = batch * out_h * out_w
    _check_pixels("depthwise_conv2d", pixels)
    if out.numel() == 0:
        return out
    grid = triton.cdiv(pixels, config.block_m) * triton.cdiv(channels, config.block_n)
    with torch.cuda.device_of(x):
        kernels.depthwise_forward_kernel[(grid,)](
            x, _taps_first(weight), out, vector(scale), vector(shift),
            None if residual is None else _channels_last(residual),
            act.param, pixels, in_h, in_w, out_h, out_w, channels,
            KH=kh, KW=kw, **_geometry(stride, padding, dilation), ACT=act.code, **_blocks(config),
        )  # fmt: skip
    return out


def input_gradient(
    dz: Tensor,
    weight: Tensor,
    x_shape: tuple[int, ...] | torch.Size,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    config: Config,
) -> Tensor:
    """The gradient of ``x`` from that of ``z = conv2d(x, weight, groups=C)``.

    Args:
        dz: ``[N, C, oH, oW]``.
        weight: ``[C, 1, kH, kW]`` in dz's dtype.
        x_shape: ``[N, C, H, W]``.
        config: one of ``INPUT_GRADIENT_CONFIGS``.

    Returns:
        ``x_shape`` in channels_last and dz's dtype.

    Raises:
        NotImplementedError: another dtype, or 2^31 input pixels.
    """
    _check("depthwise_conv2d_backward", dz, weight)
    dz = _channels_last(dz)
    batch, channels, in_h, in_w = x_shape
    _, _, kh, kw = weight.shape
    dx = _empty_channels_last(dz, (batch, channels, in_h, in_w))
    _check_pixels("depthwise_conv2d_backward", batch * in_h * in_w)
    if dx.numel() == 0:
        return dx
    phase_pixels = batch * triton.cdiv(in_h, stride[0]) * triton.cdiv(in_w, stride[1])
    tiles = triton.cdiv(phase_pixels, config.block_m) * triton.cdiv(channels, config.block_n)
    with torch.cuda.device_of(dz):
        kernels.depthwise_input_gradient_kernel[(tiles, stride[0] * stride[1])](
            dz, _taps_first(weight), dx, batch, in_h, in_w, dz.shape[2], dz.shape[3], channels,
            KH=kh, KW=kw, **_geometry(stride, padding, dilation), **tap_steps(stride, dilation), **_blocks(config),
        )  # fmt: skip
    return dx


def weight_gradient(
    dz: Tensor,
    x: Tensor,
    weight_shape: tuple[int, ...] | torch.Size,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    config: Config,
) -> Tensor:
    """The gradient of ``weight`` from that of ``z = conv2d(x, weight, groups=C)``.

    Args:
        dz: ``[N, C, oH, oW]``.
        x: ``[N, C, H, W]`` in dz's dtype.
        weight_shape: ``[C, 1, kH, kW]``.
        config: one of ``WEIGHT_GRADIENT_CONFIGS``.

    Returns:
        ``weight_shape`` in fp32; a transposed view, not contiguous.

    Raises:
        NotImplementedError: another dtype, or 2^31 output pixels.
    """
    _check("depthwise_conv2d_backward", dz, x)
    dz, x = _channels_last(dz), _channels_last(x)
    batch, channels, in_h, in_w = x.shape
    _, _, kh, kw = weight_shape
    pixels = batch * dz.shape[2] * dz.shape[3]
    _check_pixels("depthwise_conv2d_backward", pixels)
    dw = x.new_empty((kh, kw, channels), dtype=torch.float32)
    if pixels == 0 or dw.numel() == 0:
        return dw.zero_().permute(2, 0, 1)[:, None]
    programs = triton.cdiv(channels, config.block_n) * kh * kw
    split_pixels = pixels_of_split(pixels, programs, config.block_m, config.split_k)
    splits = triton.cdiv(pixels, split_pixels)
    partial = dw if splits == 1 else dw.new_empty((splits, dw.numel()))
    with torch.cuda.device_of(dz):
        kernels.depthwise_weight_gradient_kernel[(programs, splits)](
            dz, x, partial, pixels, in_h, in_w, dz.shape[2], dz.shape[3], channels, split_pixels,
            KH=kh, KW=kw, **_geometry(stride, padding, dilation), **_blocks(config),
        )  # fmt: skip
        if splits > 1:
            sum_splits(partial, dw)
    return dw.permute(2, 0, 1)[:, None]


def _taps_first(weight: Tensor) -> Tensor:
    """[C, 1, kH, kW] -> [kH * kW, C]: neighbouring channels are read together."""
    return weight.flatten(1).t().contiguous()


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "num_warps": config.num_warps}
