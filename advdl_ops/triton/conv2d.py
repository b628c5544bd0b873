"""Launchers of the convolution kernels: forward with prologue and epilogue, gradients of the input and of the weight.

Products of fp32 run in TF32 if ``torch.backends.cudnn`` allows it for convolutions, else in fp32. Sums are in fp32.
:mod:`.launch` describes tensors and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._conv.problem import Conv, Epilogue, allows_tf32
from ..activation import IDENTITY, Activation
from . import conv2d_kernels as kernels
from . import launch

__all__ = [
    "FORWARD_CONFIGS",
    "INPUT_GRADIENT_CONFIGS",
    "WEIGHT_GRADIENT_CONFIGS",
    "Config",
    "Prologue",
    "forward",
    "forward_with_statistics",
    "input_gradient",
    "suitable_configs",
    "weight_gradient",
]


class Config(NamedTuple):
    """The parameters of a kernel among which tuning chooses.

    Attributes:
        block_m, block_n: rows and columns of the result that a program computes.
        block_k: length of the sum that it takes at a time.
        num_warps, num_stages: as in Triton.
        split_k: the number of parts into which the sum of a weight gradient is split; 0: depends on the sizes.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 0


class Prologue(NamedTuple):
    """What is applied to x when it is read: ``act(x * scale + shift)``. The zero padding comes after it.

    Attributes:
        scale, shift: ``[C_in]``, fp32 or of x's dtype.
        act: the activation.
    """

    scale: Tensor | None
    shift: Tensor | None
    act: Activation = IDENTITY


_NO_EPILOGUE = Epilogue()


# For the dtypes that suitable_configs allows, none of these spills registers on sm_80 and sm_90, with prologue and
# epilogue.
FORWARD_CONFIGS = (
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 32, 8, 3),
    Config(64, 64, 32, 8, 4),
    Config(64, 64, 16, 4, 3),
)
INPUT_GRADIENT_CONFIGS = FORWARD_CONFIGS
WEIGHT_GRADIENT_CONFIGS = (
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(64, 128, 32, 4, 3),
    Config(64, 64, 64, 4, 3),
    Config(64, 64, 16, 8, 3),
)


def suitable_configs(configs: tuple[Config, ...], dtype: torch.dtype) -> tuple[Config, ...]:
    """Those of ``configs`` for which a kernel on tensors of ``dtype`` has enough registers.

    Half precision allows all. TF32 needs twice the registers for the same K. Products in fp32 without tensor cores keep
    a whole block of both operands in registers.
    """
    if dtype != torch.float32:
        return configs
    if _precision(dtype) == "tf32":
        return tuple(c for c in configs if c.block_k <= 32)
    return tuple(c for c in configs if c.block_m * c.block_n * c.block_k <= 64 * 64 * 32)


def forward(
    x: Tensor,
    weight: Tensor,
    *,
    conv: Conv,
    epilogue: Epilogue = _NO_EPILOGUE,
    prologue: Prologue | None = None,
    config: Config,
) -> Tensor:
    """The epilogue of ``conv2d(prologue(x), weight)``.

    Args:
        x: ``[N, C_in, H, W]``.
        weight: ``[C_out, C_in / groups, kH, kW]`` in x's dtype.
        epilogue: with a scale and a shift in fp32 or x's dtype.
        config: one of ``FORWARD_CONFIGS``.

    Returns:
        The output ``[N, C_out, oH, oW]`` in channels_last and x's dtype.

    Raises:
        NotImplementedError: another dtype, or 2^31 output pixels.
    """
    return _forward(x, weight, conv, epilogue, prologue, config, False)[0]


def forward_with_statistics(
    x: Tensor,
    weight: Tensor,
    *,
    conv: Conv,
    epilogue: Epilogue = _NO_EPILOGUE,
    prologue: Prologue | None = None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """As :func:`forward`, and the statistics of the output after rounding.

    The statistics are fp32 ``[2, C_out]``: the mean of each channel and the sum of squared distances from it.
    """
    out, statistics = _forward(x, weight, conv, epilogue, prologue, config, True)
    assert statistics is not None
    return out, statistics


def _forward(
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    epilogue: Epilogue,
    prologue: Prologue | None,
    config: Config,
    with_statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    scale, shift, residual, act = epilogue
    before = prologue or Prologue(None, None)
    out_channels, group_in = weight.shape[:2]
    group_out = out_channels // conv.groups
    statistics = x.new_empty((2, out_channels), dtype=torch.float32) if with_statistics else None

    def run(x: Tensor, out: Tensor, pixels: int) -> None:
        blocks_m = triton.cdiv(pixels, config.block_m)
        partial = None if statistics is None else statistics.new_empty((2, blocks_m, out_channels))
        kernels.forward_kernel[(blocks_m * triton.cdiv(group_out, config.block_n) * conv.groups,)](
            x, launch.channels_last(weight), out, launch.vector(scale), launch.vector(shift),
            None if residual is None else launch.channels_last(residual),
            launch.vector(before.scale), launch.vector(before.shift), partial,
            act.param, before.act.param, pixels, *x.shape[2:], *out.shape[2:],
            x.shape[1], out_channels, group_in, group_out, **launch.geometry(weight.shape, conv),
            ACT=act.code, PROLOGUE_ACT=before.act.code, PRECISION=_precision(x.dtype), **_blocks(config),
        )  # fmt: skip
        if partial is not None:
            kernels.merge_statistics_kernel[(triton.cdiv(out_channels, 16),)](
                partial, statistics, blocks_m, pixels, out_channels,
                ROWS=config.block_m, BLOCK_R=64, BLOCK_C=16, num_warps=4,
            )  # fmt: skip

    out = launch.forward("conv2d", x, weight, conv, run)
    if statistics is not None and out.numel() == 0:
        statistics.zero_()
    return out, statistics


def input_gradient(
    dz: Tensor, weight: Tensor, x_shape: Sequence[int], *, conv: Conv, config: Config
) -> Tensor:
    """The gradient of ``x`` from that of ``z = conv2d(x, weight)``.

    Args:
        dz: ``[N, C_out, oH, oW]``.
        weight: ``[C_out, C_in / groups, kH, kW]`` in dz's dtype.
        x_shape: ``[N, C_in, H, W]``.
        config: one of ``INPUT_GRADIENT_CONFIGS``.

    Returns:
        ``x_shape`` in channels_last and dz's dtype.

    Raises:
        NotImplementedError: another dtype, or 2^31 input pixels.
    """
    batch, in_channels, in_h, in_w = x_shape
    out_channels, group_in = weight.shape[:2]

    def run(dz: Tensor, dx: Tensor, phase_pixels: int) -> None:
        tiles = triton.cdiv(phase_pixels, config.block_m) * triton.cdiv(group_in, config.block_n)
        kernels.input_gradient_kernel[(tiles * conv.groups, conv.stride[0] * conv.stride[1])](
            dz, launch.channels_last(weight), dx, batch, in_h, in_w, *dz.shape[2:],
            in_channels, out_channels, group_in, out_channels // conv.groups,
            **launch.geometry(weight.shape, conv), **launch.tap_steps(conv),
            PRECISION=_precision(dz.dtype), **_blocks(config),
        )  # fmt: skip

    return launch.input_gradient("conv2d_backward", dz, weight, x_shape, conv, run)


def weight_gradient(
    dz: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    *,
    conv: Conv,
    prologue: Prologue | None = None,
    config: Config,
) -> Tensor:
    """The gradient of ``weight`` from that of ``z = conv2d(prologue(x), weight)``.

    Args:
        dz: ``[N, C_out, oH, oW]``.
        x: ``[N, C_in, H, W]`` in dz's dtype.
        weight_shape: ``[C_out, C_in / groups, kH, kW]``.
        config: one of ``WEIGHT_GRADIENT_CONFIGS``.

    Returns:
        ``weight_shape`` in channels_last and fp32.

    Raises:
        NotImplementedError: another dtype, or 2^31 output pixels.
    """
    before = prologue or Prologue(None, None)
    out_channels, group_in, kh, kw = weight_shape
    group_out = out_channels // conv.groups
    tiles = triton.cdiv(group_out, config.block_m) * triton.cdiv(group_in, config.block_n)
    programs = tiles * kh * kw * conv.groups

    def run(dz: Tensor, x: Tensor, partial: Tensor, pixels: int, splits: launch.Splits) -> None:
        kernels.weight_gradient_kernel[(programs, splits.number)](
            dz, x, partial, launch.vector(before.scale), launch.vector(before.shift), before.act.param,
            pixels, *x.shape[2:], *dz.shape[2:], x.shape[1], out_channels, group_in, group_out, splits.pixels,
            **launch.geometry(weight_shape, conv),
            PROLOGUE_ACT=before.act.code, PRECISION=_precision(x.dtype), **_blocks(config),
        )  # fmt: skip

    dweight = launch.weight_gradient(
        "conv2d_backward", dz, x, (out_channels, kh, kw, group_in), programs,
        config.block_k, config.split_k, run,
    )  # fmt: skip
    return dweight.permute(0, 3, 1, 2)


def _blocks(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"
