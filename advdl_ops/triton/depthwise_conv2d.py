"""Launchers of the depthwise convolution (one filter per channel) and of its gradients.

Computed in fp32, never in TF32. :mod:`.launch` describes tensors and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._conv.problem import Conv, Epilogue
from . import depthwise_conv2d_kernels as kernels
from . import launch

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
    """The parameters of a kernel among which tuning chooses.

    Attributes:
        block_m, block_n: pixels and channels that a program takes at a time.
        num_warps: as in Triton.
        split_k: the number of parts into which the sum of a weight gradient is split; 0: depends on the sizes.
    """

    block_m: int
    block_n: int
    num_warps: int
    split_k: int = 0


_NO_EPILOGUE = Epilogue()

# These kernels are bound by memory: half a warp or more reads neighbouring channels, with a few elements per thread.
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
    """All of ``configs``: in every dtype these kernels need far fewer registers than a thread has."""
    return configs


def forward(
    x: Tensor,
    weight: Tensor,
    *,
    conv: Conv,
    epilogue: Epilogue = _NO_EPILOGUE,
    config: Config,
) -> Tensor:
    """The epilogue of ``conv2d(x, weight, groups=C)``.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, 1, kH, kW]`` in x's dtype.
        epilogue: with a scale and a shift in fp32 or x's dtype.
        config: one of ``FORWARD_CONFIGS``.

    Returns:
        ``[N, C, oH, oW]`` in channels_last and x's dtype.

    Raises:
        NotImplementedError: another dtype, or 2^31 output pixels.
    """
    scale, shift, residual, act = epilogue
    channels = x.shape[1]

    def run(x: Tensor, out: Tensor, pixels: int) -> None:
        grid = triton.cdiv(pixels, config.block_m) * triton.cdiv(channels, config.block_n)
        kernels.depthwise_forward_kernel[(grid,)](
            x, _taps_first(weight), out, launch.vector(scale), launch.vector(shift),
            None if residual is None else launch.channels_last(residual),
            act.param, pixels, *x.shape[2:], *out.shape[2:], channels,
            **launch.geometry(weight.shape, conv), ACT=act.code, **_blocks(config),
        )  # fmt: skip

    return launch.forward("depthwise_conv2d", x, weight, conv, run)


def input_gradient(
    dz: Tensor, weight: Tensor, x_shape: Sequence[int], *, conv: Conv, config: Config
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
    batch, channels, in_h, in_w = x_shape

    def run(dz: Tensor, dx: Tensor, phase_pixels: int) -> None:
        tiles = triton.cdiv(phase_pixels, config.block_m) * triton.cdiv(channels, config.block_n)
        kernels.depthwise_input_gradient_kernel[(tiles, conv.stride[0] * conv.stride[1])](
            dz, _taps_first(weight), dx, batch, in_h, in_w, *dz.shape[2:], channels,
            **launch.geometry(weight.shape, conv), **launch.tap_steps(conv), **_blocks(config),
        )  # fmt: skip

    return launch.input_gradient("depthwise_conv2d_backward", dz, weight, x_shape, conv, run)


def weight_gradient(
    dz: Tensor, x: Tensor, weight_shape: Sequence[int], *, conv: Conv, config: Config
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
    channels, _, kh, kw = weight_shape
    programs = triton.cdiv(channels, config.block_n) * kh * kw

    def run(dz: Tensor, x: Tensor, partial: Tensor, pixels: int, splits: launch.Splits) -> None:
        kernels.depthwise_weight_gradient_kernel[(programs, splits.number)](
            dz, x, partial, pixels, *x.shape[2:], *dz.shape[2:], channels, splits.pixels,
            **launch.geometry(weight_shape, conv), **_blocks(config),
        )  # fmt: skip

    dweight = launch.weight_gradient(
        "depthwise_conv2d_backward", dz, x, (kh, kw, channels), programs,
        config.block_m, config.split_k, run,
    )  # fmt: skip
    return dweight.permute(2, 0, 1)[:, None]


def _taps_first(weight: Tensor) -> Tensor:
    """[C, 1, kH, kW] -> [kH * kW, C], so that neighbouring channels are read together."""
    return weight.flatten(1).t().contiguous()


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "num_warps": config.num_warps}
