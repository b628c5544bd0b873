"""The Triton depthwise convolution on CPU tensors, by Triton's interpreter; bounds as in test_triton_conv2d.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.triton_kernels import (
    DTYPES,
    FP32,
    TINY,
    GuardedOutputs,
    assert_within,
    case_id,
    covering,
    excess,
    guarded,
    refusals,
    rounded,
    with_epilogue,
)

from advdl_ops._conv.problem import Conv

pytest.importorskip("triton")

CASES = covering(
    {
        "stride": [(1, 1), (2, 2), (2, 1), (1, 3)],
        "padding": [(0, 0), (1, 1), (2, 1)],
        "dilation": [(1, 1), (2, 2), (3, 3), (1, 2)],
        "kernel": [(3, 3), (1, 1), (2, 3)],
        "dtype": list(DTYPES),
        "epilogue": ["none", "affine-relu", "residual-silu"],
    }
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values(interpreted: Callable[..., Any], case: dict[str, Any]) -> None:
    assert_within(interpreted(run_case, case))


def test_seven_by_seven(interpreted: Callable[..., Any]) -> None:
    case = dict(CASES[0], kernel=(7, 7), padding=(3, 3), dilation=(1, 1), size=(4, 3))
    assert_within(interpreted(run_case, case))


def test_stride_beyond_the_input_and_the_kernel(interpreted: Callable[..., Any]) -> None:
    """Input pixels that no tap reaches get a zero, phases without a pixel nothing."""
    case = dict(
        CASES[0], stride=(4, 5), kernel=(2, 3), padding=(0, 2), dilation=(1, 1), size=(5, 3)
    )
    assert_within(interpreted(run_case, case))


@pytest.mark.parametrize("split_k", [1, 3, 100])
def test_splits(interpreted: Callable[..., Any], split_k: int) -> None:
    case = dict(CASES[0], split_k=split_k)
    assert_within(interpreted(run_case, case))


def test_empty(interpreted: Callable[..., Any]) -> None:
    assert interpreted(run_empty)


def test_other_dtypes_are_refused(interpreted: Callable[..., Any]) -> None:
    for error in interpreted(run_refused):
        assert error.startswith("NotImplementedError: depthwise_conv2d")
        assert "float64" in error


# --- In the worker --------------------------------------------------------------------------------------------------


def config(split_k: int = 0) -> Any:
    from advdl_ops.triton.depthwise_conv2d import Config

    return Config(16, 16, 1, split_k)


def run_case(case: dict[str, Any]) -> dict[str, float]:
    from advdl_ops.triton import depthwise_conv2d, launch

    torch.manual_seed(0)
    dtype, kernel, channels = DTYPES[case["dtype"]], case["kernel"], 19
    geometry = {k: case[k] for k in ("stride", "padding", "dilation")}
    x = guarded(torch.randn(2, channels, *case.get("size", (9, 7))), dtype)
    weight = guarded(torch.randn(channels, 1, *kernel), dtype)

    x_, weight_ = x.double().requires_grad_(), weight.double().requires_grad_()
    z = F.conv2d(x_, weight_, None, **geometry, groups=channels)
    x_abs, weight_abs = (t.double().abs().requires_grad_() for t in (x, weight))
    z_size = F.conv2d(x_abs, weight_abs, None, **geometry, groups=channels)
    dz = guarded(torch.randn(z.shape), dtype)
    dx, dw = torch.autograd.grad(z, (x_, weight_), dz.double())
    dx_size, dw_size = torch.autograd.grad(z_size, (x_abs, weight_abs), dz.double().abs())

    taps = kernel[0] * kernel[1]
    z, z_size = z.detach(), z_size.detach()
    z_off = (taps + 1) * FP32 * z_size
    epilogue, truth, off = with_epilogue(case["epilogue"], z, z_size, z_off, dtype)

    options = {"conv": Conv(**geometry), "config": config(case.get("split_k", 0))}
    outputs = GuardedOutputs()
    launch.empty_channels_last = outputs.empty
    out = depthwise_conv2d.forward(x, weight, epilogue=epilogue, **options)
    again = depthwise_conv2d.forward(x.contiguous(), weight, epilogue=epilogue, **options)
    found = {
        "out": excess(out, truth, rounded(truth, off, dtype)),
        "twice, from contiguous": 0.0 if torch.equal(out, again) else 2.0,
    }
    got_dx = depthwise_conv2d.input_gradient(dz, weight, x.shape, **options)
    off = (taps + 1) * FP32 * dx_size
    found["dx"] = excess(got_dx, dx, rounded(dx, off, dtype))
    got_dw = depthwise_conv2d.weight_gradient(dz, x, weight.shape, **options)
    length = dz.numel() // channels
    found["dw"] = excess(got_dw, dw, (length + 1) * FP32 * dw_size + TINY[torch.float32])
    found["beside the outputs"] = outputs.beside()
    kept = out.dtype == got_dx.dtype == dtype and got_dw.dtype == torch.float32
    found["dtypes"] = 0.0 if kept else 2.0
    return found


def run_empty() -> bool:
    from advdl_ops.triton import depthwise_conv2d

    options = {"conv": Conv(padding=(1, 1)), "config": config()}
    x, weight = torch.randn(0, 5, 9, 7), torch.randn(5, 1, 3, 3)
    out = depthwise_conv2d.forward(x, weight, **options)
    dx = depthwise_conv2d.input_gradient(out, weight, x.shape, **options)
    dw = depthwise_conv2d.weight_gradient(out, x, weight.shape, **options)
    return out.shape == dx.shape == (0, 5, 9, 7) and torch.equal(dw, torch.zeros(weight.shape))


def run_refused() -> list[str]:
    from advdl_ops.triton import depthwise_conv2d

    options = {"conv": Conv(padding=(1, 1)), "config": config()}
    x, weight = torch.randn(1, 5, 9, 7).double(), torch.randn(5, 1, 3, 3).double()
    return refusals(
        lambda: depthwise_conv2d.forward(x, weight, **options),
        lambda: depthwise_conv2d.input_gradient(x, weight, x.shape, **options),
        lambda: depthwise_conv2d.weight_gradient(x, x, weight.shape, **options),
    )
