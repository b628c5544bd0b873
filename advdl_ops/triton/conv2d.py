"""Launchers of the convolution kernels: forward with prologue and epilogue, gradients of the input and of the weight.

Tensors are [N, C, H, W] on one CUDA device, used in channels_last memory (another format is converted, once per call),
in fp32, bf16 or fp16; fp64 is refused. ``stride``, ``padding`` and ``dilation`` are pairs (h, w). Products of fp32 run
in TF32 where ``torch.backends.cudnn`` allows it for convolutions, else in fp32; sums are in fp32. No atomics: two runs
with the same config are bitwise equal. Arguments are checked where the operator is called: here only for what no kernel
does.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._schemas import conv2d_shape
from ..activation import IDENTITY, Activation
from . import conv2d_kernels as kernels

__all__ = [
    "FORWARD_CONFIGS",
    "INPUT_GRADIENT_CONFIGS",
    "WEIGHT_GRADIENT_CONFIGS",
    "Config",
    "Prologue",
    "forward",
    "input_gradient",
    "suitable_configs",
    "weight_gradient",
]

Pair = tuple[int, int]

_convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Weight gradients have few tiles and long sums: these are split until there are this many programs, some for each
# multiprocessor of any GPU. Not asked of the device, so that the result does not depend on how large that is.
_SPLIT_PROGRAMS = 1024


class Config(NamedTuple):
    """What tuning may choose of a kernel.

    Attributes:
        block_m, block_n: rows and columns of the result that a program computes.
        block_k: length of the sum that it takes at a time.
        num_warps, num_stages: as Triton has them.
        split_k: of a weight gradient, into how many parts its sum is split; 0 lets the sizes decide.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 0


class Prologue(NamedTuple):
    """What is applied to x as it is read: ``act(x * scale + shift)``, with zero padding after it.

    Attributes:
        scale, shift: ``[C_in]``, fp32 or of x's dtype.
        act: the activation.
    """

    scale: Tensor
    shift: Tensor
    act: Activation = IDENTITY


# None of these spills a register in what suitable_configs lets through, with prologue and epilogue, on sm_80 and sm_90.
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
    """Those of ``configs`` that a kernel on tensors of ``dtype`` can hold in its registers.

    Half precision takes them all. TF32 takes twice the room in K. Products in fp32 without tensor cores keep a whole
    block of both operands in registers.
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
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: Activation = IDENTITY,
    prologue: Prologue | None = None,
    with_sums: bool = False,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """``act(conv2d(prologue(x), weight) * scale + shift + residual)`` and, if asked for, its statistics.

    Args:
        x: ``[N, C_in, H, W]``.
        weight: ``[C_out, C_in / groups, kH, kW]`` in x's dtype.
        scale, shift: ``[C_out]``, fp32 or x's dtype.
        residual: of the output's shape, added before the activation.
        with_sums: also return the statistics.
        config: one of ``FORWARD_CONFIGS``.

    Returns:
        The output ``[N, C_out, oH, oW]`` in channels_last and x's dtype; and ``None`` or fp32 ``[2, C_out]``: the mean
        of each channel of the output as stored, and the sum of its squared distances from that.

    Raises:
        NotImplementedError: another dtype, or 2^31 output pixels.
    """
    _check("conv2d", x, weight)
    x, weight = _channels_last(x), _channels_last(weight)
    batch, in_channels, in_h, in_w = x.shape
    out_channels, group_in, kh, kw = weight.shape
    out_h, out_w = conv2d_shape(x, weight.shape, stride, padding, dilation)[2:]
    out = _empty_channels_last(x, (batch, out_channels, out_h, out_w))
    pixels = batch * out_h * out_w
    _check_pixels("conv2d", pixels)
    if out.numel() == 0:
        return out, x.new_zeros((2, out_channels), dtype=torch.float32) if with_sums else None
    blocks_m = triton.cdiv(pixels, config.block_m)
    partial = x.new_empty((2, blocks_m, out_channels), dtype=torch.float32) if with_sums else None
    group_out = out_channels // groups
    grid = (blocks_m * triton.cdiv(group_out, config.block_n) * groups,)
    with torch.cuda.device_of(x):
        kernels.forward_kernel[grid](
            x, weight, out, vector(scale), vector(shift), None if residual is None else _channels_last(residual),
            None if prologue is None else vector(prologue.scale),
            None if prologue is None else vector(prologue.shift), partial,
            act.param, 0.0 if prologue is None else prologue.act.param,
            pixels, in_h, in_w, out_h, out_w, in_channels, out_channels, group_in, group_out,
            KH=kh, KW=kw, **_geometry(stride, padding, dilation),
            ACT=act.code, PROLOGUE_ACT=0 if prologue is None else prologue.act.code,
            PRECISION=_precision(x.dtype), **_blocks(config),
        )  # fmt: skip
        return out, None if partial is None else _merged(partial, pixels, config.block_m)


def input_gradient(
    dz: Tensor,
    weight: Tensor,
    x_shape: tuple[int, ...] | torch.Size,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
    config: Config,
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
    _check("conv2d_backward", dz, weight)
    dz, weight = _channels_last(dz), _channels_last(weight)
    batch, in_channels, in_h, in_w = x_shape
    out_channels, group_in, kh, kw = weight.shape
    dx = _empty_channels_last(dz, (batch, in_channels, in_h, in_w))
    _check_pixels("conv2d_backward", batch * in_h * in_w)
    if dx.numel() == 0:
        return dx
    phase_pixels = batch * triton.cdiv(in_h, stride[0]) * triton.cdiv(in_w, stride[1])
    tiles = triton.cdiv(phase_pixels, config.block_m) * triton.cdiv(group_in, config.block_n)
    with torch.cuda.device_of(dz):
        kernels.input_gradient_kernel[(tiles * groups, stride[0] * stride[1])](
            dz, weight, dx, batch, in_h, in_w, dz.shape[2], dz.shape[3],
            in_channels, out_channels, group_in, out_channels // groups,
            KH=kh, KW=kw, **_geometry(stride, padding, dilation), **tap_steps(stride, dilation),
            PRECISION=_precision(dz.dtype), **_blocks(config),
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
    groups: int = 1,
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
    _check("conv2d_backward", dz, x)
    dz, x = _channels_last(dz), _channels_last(x)
    batch, in_channels, in_h, in_w = x.shape
    out_channels, group_in, kh, kw = weight_shape
    pixels = batch * dz.shape[2] * dz.shape[3]
    _check_pixels("conv2d_backward", pixels)
    dw = x.new_empty((out_channels, kh, kw, group_in), dtype=torch.float32)
    if pixels == 0 or dw.numel() == 0:
        return dw.zero_().permute(0, 3, 1, 2)
    group_out = out_channels // groups
    tiles = triton.cdiv(group_out, config.block_m) * triton.cdiv(group_in, config.block_n)
    programs = tiles * kh * kw * groups
    split_pixels = pixels_of_split(pixels, programs, config.block_k, config.split_k)
    splits = triton.cdiv(pixels, split_pixels)
    partial = dw if splits == 1 else dw.new_empty((splits, dw.numel()))
    with torch.cuda.device_of(dz):
        kernels.weight_gradient_kernel[(programs, splits)](
            dz, x, partial,
            None if prologue is None else vector(prologue.scale),
            None if prologue is None else vector(prologue.shift),
            0.0 if prologue is None else prologue.act.param,
            pixels, in_h, in_w, dz.shape[2], dz.shape[3], in_channels, out_channels, group_in, group_out, split_pixels,
            KH=kh, KW=kw, **_geometry(stride, padding, dilation),
            PROLOGUE_ACT=0 if prologue is None else prologue.act.code, PRECISION=_precision(x.dtype), **_blocks(config),
        )  # fmt: skip
        if splits > 1:
            sum_splits(partial, dw)
    return dw.permute(0, 3, 1, 2)


def sum_splits(partial: Tensor, out: Tensor) -> None:
    """The sum of ``partial`` [splits, n] over the splits in their order, into ``out`` of n elements."""
    kernels.sum_splits_kernel[(triton.cdiv(out.numel(), 256),)](
        partial, out, partial.shape[0], out.numel(), BLOCK=256, num_warps=4
    )


def vector(t: Tensor | None) -> Tensor | None:
    """As kernels read a value per channel."""
    return None if t is None else t.contiguous()


def tap_steps(stride: Pair, dilation: Pair) -> dict[str, int]:
    """Every how many taps one reaches the same input pixel again: the tap's distance is a multiple of the stride."""
    step_h, step_w = (s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    return {"STEP_H": step_h, "STEP_W": step_w}


def pixels_of_split(pixels: int, programs: int, block: int, split_k: int) -> int:
    """How many pixels each split sums: a multiple of ``block``, at least four of them where the sizes decide."""
    blocks = triton.cdiv(pixels, block)
    splits = split_k or min(triton.cdiv(_SPLIT_PROGRAMS, programs), max(blocks // 4, 1))
    return triton.cdiv(blocks, splits) * block


def _merged(partial: Tensor, pixels: int, rows: int) -> Tensor:
    _, blocks, channels = partial.shape
    sums = partial.new_empty((2, channels))
    kernels.merge_statistics_kernel[(triton.cdiv(channels, 16),)](
        partial, sums, blocks, pixels, channels, ROWS=rows, BLOCK_R=64, BLOCK_C=16, num_warps=4
    )
    return sums


def _blocks(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _geometry(stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    return {
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DIL_H": dilation[0],
        "DIL_W": dilation[1],
    }


def _precision(dtype: torch.dtype) -> str:
    # Not cudnn.allow_tf32: reading that raises where convolutions and LSTMs are set apart.
    tf32 = dtype == torch.float32 and _convolutions.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _empty_channels_last(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


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
    if pixels >= 2**31 - 256:  # blocks that pass the end must not wrap around
        raise NotImplementedError(
            f"{function}: N * H * W ({pixels}) must be below 2^31 for the Triton kernels"
        )
