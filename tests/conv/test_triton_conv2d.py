"""The Triton convolution on CPU tensors, by Triton's interpreter, against fp64.

The bounds are those of any fp32 summation: a sum of K products is off by at most (K + 1) u S, with u = 2^-24 and S the
sum of the products' sizes, in whatever order they are added. The epilogue adds a few roundings at the size of its
terms, an activation (none here is steeper than 1.13) passes all that on, and the result is rounded once to its dtype.
A prologue rounds x' to x's dtype: half an ulp of each x', weighed by the other operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.triton_kernels import (
    ACTS,
    DTYPES,
    FP32,
    TINY,
    UNIT,
    GuardedOutputs,
    act_of,
    assert_within,
    case_id,
    covering,
    excess,
    guarded,
    per_channel,
    refusals,
    rounded,
    with_epilogue,
)
from torch import Tensor

from advdl_ops._conv.problem import Conv, Epilogue

pytest.importorskip("triton")

CASES = covering(
    {
        "stride": [(1, 1), (2, 2), (2, 1)],
        "padding": [(0, 0), (1, 1), (2, 1)],
        "dilation": [(1, 1), (2, 2), (3, 1)],
        "kernel": [(3, 3), (1, 1), (2, 3)],
        "groups": [1, 2],
        "dtype": list(DTYPES),
        "prologue": [None, "relu"],
        "epilogue": ["none", "affine-relu", "residual-silu"],
    }
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values(interpreted: Callable[..., Any], case: dict[str, Any]) -> None:
    assert_within(interpreted(run_case, case))


@pytest.mark.parametrize("act", ACTS)
def test_activations(interpreted: Callable[..., Any], act: str) -> None:
    assert interpreted(run_activation, act) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_shifted_channels(interpreted: Callable[..., Any], dtype: str) -> None:
    """Far from zero the mean of squares less the squared mean would have no digit left."""
    assert_within(interpreted(run_statistics, dtype))


def test_stride_beyond_the_input_and_the_kernel(interpreted: Callable[..., Any]) -> None:
    """Input pixels that no tap reaches get a zero, phases without a pixel nothing."""
    case = dict(
        CASES[0], stride=(4, 5), kernel=(2, 3), padding=(0, 2), dilation=(1, 1), size=(5, 3)
    )
    assert_within(interpreted(run_case, case))


@pytest.mark.parametrize("split_k", [1, 3, 100])
def test_splits(interpreted: Callable[..., Any], split_k: int) -> None:
    assert interpreted(run_split, split_k) <= 1


def test_two_runs_are_bitwise_equal(interpreted: Callable[..., Any]) -> None:
    assert interpreted(run_twice)


def test_empty(interpreted: Callable[..., Any]) -> None:
    assert interpreted(run_empty)


def test_other_dtypes_are_refused(interpreted: Callable[..., Any]) -> None:
    for error in interpreted(run_refused):
        assert error.startswith("NotImplementedError: conv2d")
        assert "float64" in error


# --- In the worker --------------------------------------------------------------------------------------------------


def config(split_k: int = 0) -> Any:
    from advdl_ops.triton.conv2d import Config

    return Config(16, 16, 16, 1, 1, split_k)


def run_case(case: dict[str, Any]) -> dict[str, float]:
    from advdl_ops.triton import conv2d, launch

    torch.manual_seed(0)
    dtype, groups, kernel = DTYPES[case["dtype"]], case["groups"], case["kernel"]
    unit, tiny = UNIT[dtype], TINY[dtype]
    geometry = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    options = Conv(**geometry)
    channels, filters = (19, 16) if groups == 1 else (10, 38)
    x = guarded(torch.randn(2, channels, *case.get("size", (9, 7))), dtype)
    weight = guarded(torch.randn(filters, channels // groups, *kernel), dtype)

    # x' and by how much it may be off.
    prologue, x_used, x_off = None, x.double(), torch.zeros((), dtype=torch.float64)
    if case["prologue"]:
        scale = guarded(torch.randn(channels), torch.float32)
        shift = guarded(torch.randn(channels), torch.float32)
        prologue = conv2d.Prologue(scale, shift, act_of(case["prologue"]))
        terms = x_used * per_channel(scale), per_channel(shift).expand_as(x)
        x_used = ACTS[case["prologue"]](terms[0] + terms[1])
        x_off = unit * x_used.abs() + 3 * FP32 * (terms[0].abs() + terms[1].abs()) + tiny
    conv = lambda a, b: F.conv2d(a, b, None, **geometry)  # noqa: E731
    size = x_used.abs() + x_off
    z, z_size = conv(x_used, weight.double()), conv(size, weight.double().abs())
    length = weight[0].numel()
    z_off = (length + 1) * FP32 * z_size + conv(x_off.expand_as(x), weight.double().abs())

    epilogue, truth, off = with_epilogue(case["epilogue"], z, z_size, z_off, dtype)

    outputs = GuardedOutputs()
    launch.empty_channels_last = outputs.empty
    more = {"conv": options, "epilogue": epilogue}
    more |= {"prologue": prologue, "config": config()}
    out, sums = conv2d.forward_with_statistics(x, weight, **more)
    plain = conv2d.forward(x.contiguous(), weight.contiguous(), **more)
    found = {"out": excess(out, truth, rounded(truth, off, dtype))}
    found |= check_statistics(out, sums)
    found["without statistics, from contiguous"] = 0.0 if torch.equal(plain, out) else 2.0

    dz = guarded(torch.randn(truth.shape), dtype)
    weight_ = weight.double().requires_grad_()
    x_ = x_used.clone().requires_grad_()
    dx, dw = torch.autograd.grad(conv(x_, weight_), (x_, weight_), dz.double())
    weight_ = weight.double().abs().requires_grad_()
    x_ = size.clone().requires_grad_()
    dx_size, dw_size = torch.autograd.grad(conv(x_, weight_), (x_, weight_), dz.double().abs())
    x_ = x_off.expand_as(x).clone()
    (dw_off,) = torch.autograd.grad(conv(x_, weight_), weight_, dz.double().abs())

    length = filters // groups * kernel[0] * kernel[1]
    off = (length + 1) * FP32 * dx_size
    got = conv2d.input_gradient(dz, weight, x.shape, conv=options, config=config())
    found["dx"] = excess(got, dx, rounded(dx, off, dtype))
    length = dz.numel() // filters
    got = conv2d.weight_gradient(
        dz, x, weight.shape, conv=options, prologue=prologue, config=config()
    )
    found["dw"] = excess(got, dw, (length + 1) * FP32 * dw_size + dw_off + TINY[torch.float32])
    found["beside the outputs"] = outputs.beside()
    found["dtypes"] = 0.0 if out.dtype == dtype and got.dtype == torch.float32 else 2.0
    return found


def check_statistics(out: Tensor, sums: Tensor) -> dict[str, float]:
    """Against the fp64 statistics of what was stored.

    A mean of P values is off by e = (P + 2) u mean|v|; every distance from it by that and one rounding.
    """
    values = out.double().transpose(0, 1).flatten(1)
    pixels = values.shape[1]
    mean = values.mean(1)
    away = (values - mean[:, None]).abs()
    squares = away.square().sum(1)
    off = (pixels + 2) * FP32 * values.abs().mean(1) + TINY[torch.float32]
    squares_off = (pixels + 8) * FP32 * squares + 2 * off * away.sum(1) + pixels * off**2
    return {
        "mean": excess(sums[0], mean, off),
        "centred squares": excess(sums[1], squares, squares_off + TINY[torch.float32]),
    }


def run_activation(name: str) -> float:
    """A 1x1 convolution by the identity matrix: z itself, exact, under the activation."""
    from advdl_ops.triton import conv2d

    z = torch.cat([torch.linspace(-12, 12, 505), torch.logspace(-6, 0, 100), -torch.logspace(-6, 0, 99)])  # fmt: skip
    z = z.reshape(1, 16, -1, 1).contiguous(memory_format=torch.channels_last)
    one = torch.eye(16)[:, :, None, None]
    options = {"conv": Conv(), "epilogue": Epilogue(act=act_of(name)), "config": config()}
    out = conv2d.forward(z, one, **options)
    truth = ACTS[name](z.double())
    # A few ulp of the result, of 1 + y where a sum with 1 is part of the formula (sigmoid, gelu).
    size = truth.abs() + (z.double().abs() if name in ("gelu", "gelu_tanh") else 0)
    nan = torch.full_like(z[..., :1, :], float("nan"))
    passes = conv2d.forward(nan, one, **options)
    return excess(out, truth, 8 * FP32 * size + 1e-38) if passes.isnan().all() else float("inf")


def run_statistics(dtype: str) -> dict[str, float]:
    from advdl_ops.triton import conv2d

    torch.manual_seed(0)
    x = torch.randn(3, 19, 5, 7).to(DTYPES[dtype])
    weight = torch.randn(21, 19, 1, 1).to(DTYPES[dtype])
    shifted = Epilogue(shift=torch.full((21,), 1000.0))
    out, sums = conv2d.forward_with_statistics(
        x, weight, conv=Conv(), epilogue=shifted, config=config()
    )
    return check_statistics(out, sums)


def run_split(split_k: int) -> float:
    from advdl_ops.triton import conv2d

    torch.manual_seed(0)
    geometry = {"stride": (1, 1), "padding": (1, 0), "dilation": (1, 1)}
    # 49 output pixels: the last block of 16 has one.
    x, weight = torch.randn(1, 5, 7, 8), torch.randn(3, 5, 3, 2).double().requires_grad_()
    z = F.conv2d(x.double(), weight, None, **geometry)
    dz = torch.randn(z.shape)
    (dw,) = torch.autograd.grad(z, weight, dz.double())
    sizes = F.conv2d(x.double().abs(), weight, None, **geometry)
    (dw_size,) = torch.autograd.grad(sizes, weight, dz.double().abs())
    got = conv2d.weight_gradient(dz, x, weight.shape, conv=Conv(**geometry), config=config(split_k))
    return excess(got, dw, (dz.numel() // 3 + 1) * FP32 * dw_size)


def run_twice() -> bool:
    from advdl_ops.triton import conv2d

    torch.manual_seed(0)
    options = {"conv": Conv((2, 1), (1, 1), (1, 2), 2), "config": config()}
    x, weight = torch.randn(2, 10, 9, 7), torch.randn(6, 5, 3, 3)
    first: list[Tensor] = []
    for _ in range(2):
        out, sums = conv2d.forward_with_statistics(x, weight, **options)
        dx = conv2d.input_gradient(out, weight, x.shape, **options)
        dw = conv2d.weight_gradient(out, x, weight.shape, **options)
        first = first or [out, sums, dx, dw]
    return all(torch.equal(a, b) for a, b in zip(first, (out, sums, dx, dw), strict=True))


def run_empty() -> bool:
    from advdl_ops.triton import conv2d

    options = {"conv": Conv(padding=(1, 1)), "config": config()}
    x, weight = torch.randn(0, 5, 9, 7), torch.randn(6, 5, 3, 3)
    out, sums = conv2d.forward_with_statistics(x, weight, **options)
    dx = conv2d.input_gradient(out, weight, x.shape, **options)
    dw = conv2d.weight_gradient(out, x, weight.shape, **options)
    return (
        out.shape == (0, 6, 9, 7)
        and torch.equal(sums, torch.zeros(2, 6))
        and dx.shape == x.shape
        and torch.equal(dw, torch.zeros(weight.shape))
    )


def run_refused() -> list[str]:
    from advdl_ops.triton import conv2d

    options = {"conv": Conv(padding=(1, 1)), "config": config()}
    x, weight = torch.randn(1, 5, 9, 7).double(), torch.randn(6, 5, 3, 3).double()
    z = torch.randn(1, 6, 9, 7).double()
    return refusals(
        lambda: conv2d.forward(x, weight, **options),
        lambda: conv2d.input_gradient(z, weight, x.shape, **options),
        lambda: conv2d.weight_gradient(z, x, weight.shape, **options),
    )
