"""Inputs of convolutions, the same calls in stock PyTorch and in fp64, and bounds for their rounding errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import advdl_ops
from advdl_ops._conv import choice
from advdl_ops._conv.choice import Thresholds
from advdl_ops.functional import conv2d
from support.accuracy import ACTIVATIONS, SMOOTH, ULPS, acc_dtype, assert_accurate, f64, in_layout

DTYPES = {"fp32": torch.float32, "fp64": f64, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A convolution: shape of x, output channels, kernel, and the options as passed."""

    x: tuple[int, ...]
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("stride", "padding", "dilation", "groups")}


CASES = {
    "3x3": Case((2, 5, 9, 7), 6, padding=1),
    "1x1": Case((2, 16, 5, 5), 8, (1, 1)),
    "1x1 stride": Case((2, 8, 7, 5), 4, (1, 1), stride=2),
    "of one position": Case((3, 4, 1, 1), 5, padding=1),
    "batch 1": Case((1, 4, 6, 6), 4, padding=1),
    "one channel": Case((2, 1, 6, 7), 3),
    "stride": Case((2, 3, 11, 8), 8, (3, 5), stride=(2, 1), padding=(1, 2)),
    "dilated": Case((2, 8, 13, 12), 16, padding=2, dilation=2),
    "dilated by pairs": Case((2, 4, 13, 12), 4, dilation=(3, 1), padding=(4, 0), stride=(1, 2)),
    "large padding": Case((1, 3, 4, 4), 2, (2, 2), padding=3, dilation=3),
    "groups": Case((2, 6, 6, 5), 9, padding=1, groups=3),
    "same": Case((2, 4, 7, 6), 3, (4, 3), padding="same"),
    "same, dilated": Case((2, 4, 9, 10), 3, (2, 3), padding="same", dilation=(3, 2)),
    "valid": Case((2, 4, 9, 10), 3, padding="valid"),
    "multiplier": Case((2, 4, 8, 7), 8, padding=1, groups=4),
    "depthwise": Case((2, 6, 9, 8), 6, padding=1, groups=6),
    "depthwise, dilated": Case((2, 17, 9, 12), 17, padding=2, dilation=2, groups=17),
    "depthwise, stride": Case((2, 8, 9, 11), 8, (5, 3), stride=2, padding=(2, 1), groups=8),
}


@dataclass
class Inputs:
    """Tensors already rounded to their dtypes, so that fp64 arithmetic on them is the truth."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    dout: Tensor
    case: Case

    def map(self, function: Any) -> Inputs:
        changed = {n: function(t) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **changed)

    def to(self, dtype: torch.dtype) -> Inputs:
        return self.map(lambda t: t.detach().to(dtype, copy=True))

    def laid(self, layout: str) -> Inputs:
        return self.map(lambda t: in_layout(t, layout) if t.dim() == 4 else t)


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    with_: tuple[str, ...] = ("bias",),
    channel_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """``with_``: which of bias, scale, shift and residual are given."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=f64)

    weight_shape = case.outputs, case.x[-3] // case.groups, *case.kernel
    x = normal(*case.x)
    weight = normal(*weight_shape) / math.prod(weight_shape[1:]) ** 0.5
    shape = F.conv2d(x, weight, **case.options).shape
    channels = {
        "bias": normal(case.outputs),
        "scale": 0.5 + torch.rand(case.outputs, generator=g, dtype=f64),
        "shift": normal(case.outputs),
    }
    residual, dout = normal(*shape), normal(*shape)
    return Inputs(
        x=x.to(dtype),
        weight=weight.to(dtype),
        residual=residual.to(dtype) if "residual" in with_ else None,
        dout=dout.to(dtype),
        case=case,
        **{n: t.to(channel_dtype or dtype) if n in with_ else None for n, t in channels.items()},
    )


def per_channel(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def call_stock(
    case: Case,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    scale: Any,
    shift: Any,
    residual: Any,
    act: str,
) -> Tensor:
    """One operator after the other. A bias whose dtype torch's convolution refuses is added after it."""
    return ACTIVATIONS[act][1](before_act(case, x, weight, bias, scale, shift, residual))


def before_act(
    case: Case, x: Tensor, weight: Tensor, bias: Any, scale: Any, shift: Any, residual: Any
) -> Tensor:
    in_conv = bias is not None and bias.dtype == x.dtype
    z = F.conv2d(x, weight, bias if in_conv else None, **case.options)
    if bias is not None and not in_conv:
        z = z + per_channel(bias)
    if scale is not None:
        z = z * per_channel(scale)
    if shift is not None:
        z = z + per_channel(shift)
    if residual is not None:
        z = z + residual
    return z


def call_ours(
    case: Case,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    scale: Any,
    shift: Any,
    residual: Any,
    act: str,
) -> Tensor:
    return conv2d(
        x, weight, bias, **case.options, act=ACTIVATIONS[act][0], residual=residual, scale=scale,
        shift=shift,
    )  # fmt: skip


NAMES = ("x", "weight", "bias", "scale", "shift", "residual")


def results(call: Any, p: Inputs, act: str, wanted: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The output, and the gradients of those of ``wanted`` that are given."""
    leaves = {n: getattr(p, n) for n in NAMES}
    leaves = {
        n: None if t is None else t.detach().requires_grad_(n in wanted) for n, t in leaves.items()
    }
    out = call(p.case, *leaves.values(), act)
    given = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    found = {"out": out.detach()}
    if given:
        gradients = torch.autograd.grad(out, list(given.values()), p.dout.to(out.dtype))
        found |= {"d" + n: g for n, g in zip(given, gradients, strict=True)}
    return found


def term_sizes(p: Inputs) -> dict[str, Tensor]:
    """For each result, the sum of the sizes of its terms. Rounding errors are relative to it."""
    q = p.map(lambda t: t.detach().to(f64).abs())
    with torch.enable_grad():
        x, weight = q.x.requires_grad_(), q.weight.requires_grad_()
        conv = F.conv2d(x, weight, **p.case.options)
        inner = conv if q.bias is None else conv + per_channel(q.bias)
        scale = torch.ones(p.case.outputs, dtype=f64) if q.scale is None else q.scale
        z = inner * per_channel(scale)
        z = z if q.shift is None else z + per_channel(q.shift)
        z = (z if q.residual is None else z + q.residual).detach()
        # The rounding error of z enters the derivative of the activation.
        dp = q.dout * (1 + z)
        dz = dp * per_channel(scale)
        dx, dweight = torch.autograd.grad(conv, (x, weight), dz)
    dims = [d for d in range(dp.dim()) if d != dp.dim() - 3]
    return {
        "out": z,
        "dx": dx,
        "dweight": dweight,
        "dbias": dz.sum(dims),
        "dscale": (dp * inner.detach()).sum(dims),
        "dshift": dp.sum(dims),
        "dresidual": dp,
    }


def without_kinks(p: Inputs, act: str) -> Inputs:
    """``p`` with a zero cotangent where rounding of the pre-activation may step over a kink of the activation.

    The derivative jumps there (at 0; hardswish at 3 and -3; relu6 at 6), and stock and advdl_ops may be on different
    sides.
    """
    if act in SMOOTH:
        return p
    q = p.to(f64)
    z = before_act(q.case, q.x, q.weight, q.bias, q.scale, q.shift, q.residual)
    step = ULPS * torch.finfo(p.x.dtype).eps * term_sizes(p)["out"]
    near = (z.abs() <= step) | ((z.abs() - 3).abs() <= step) | ((z - 6).abs() <= step)
    return replace(p, dout=p.dout.masked_fill(near, 0))


def check(
    p: Inputs,
    act: str = "none",
    wanted: tuple[str, ...] = NAMES,
    backend: str = "fused",
    what: Any = "",
) -> dict[str, Tensor]:
    """Output and gradients on ``p`` by the rule of support/accuracy.py; returns them."""
    p = without_kinks(p, act)
    with advdl_ops.use_backend(backend):
        found = results(call_ours, p, act, wanted)
    exact = results(call_stock, p.to(f64), act, wanted)
    plain = results(call_stock, p, act, wanted)
    sizes = term_sizes(p)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        like = p.x if name == "out" else getattr(p, name.removeprefix("d"))
        assert found[name].dtype == like.dtype, name
        assert found[name].shape == value.shape, name
        size = sizes[name].max().item() if sizes[name].numel() else 0.0
        acc = acc_dtype(p.x.dtype)
        assert_accurate(found[name], value, plain[name], size, (name, act, backend, what), acc)
    return found


# With these thresholds each candidate serves some problem. So tests do not depend on measured thresholds.
THRESHOLDS = Thresholds(
    small=8192, few_channels=32, few_pixels=48, pixels=256, pixels_contiguous=128,
    pixels_contiguous_many=128, pixels_weight_last=192, pixels_strided=800, pixels_dweight=800,
    pixels_dweight_contiguous=512, pixels_dweight_weight_last=560, pixels_dweight_1x1=640, many_channels=128,
    pixels_dweight_dilated=2048, large_dilation=8, large_dilation_dweight=8, short_row=8,
    short_row_dweight=6, short_row_large=5, depthwise_cached_bytes=4 << 20, depthwise_strided_bytes=16 << 20,
    depthwise_strided_dx_bytes=16 << 20, depthwise_strided_dweight_bytes=16 << 20, winograd_channels=48,
    winograd_pixels=1200, winograd_pixels_contiguous=1600, winograd_pixels_kept=900, winograd_pixels_dweight=1521,
    winograd_waste=200,
)  # fmt: skip


@contextmanager
def fixed_thresholds() -> Iterator[None]:
    """Inside this context, :data:`THRESHOLDS` apply on every CPU."""
    before = choice.THRESHOLDS
    choice.THRESHOLDS = dict.fromkeys(before, THRESHOLDS)
    choice.forget()
    try:
        yield
    finally:
        choice.THRESHOLDS = before
        choice.forget()
