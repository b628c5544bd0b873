"""The rule for comparing values, activations and memory layouts.

The rule: the error against fp64 is at most that of stock PyTorch in the same dtypes, plus a few units in the
last place of the result and a few roundings of the accumulation dtype relative to the size of the terms that are
summed. If stock refuses the mix of dtypes, stock in the accumulation dtype, rounded to the result's, is used instead.
No tolerance is chosen by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ULPS = 4  # "a few"

# name -> dtypes of x, of weight and bias, of the running statistics.
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# id -> (argument for advdl_ops, the same in stock PyTorch).
ACTIVATIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "none": (None, lambda z: z),
    "relu": ("relu", F.relu),
    "leaky_relu": ("leaky_relu", F.leaky_relu),
    "elu": ("elu", F.elu),
    "silu": ("silu", F.silu),
    "gelu": ("gelu", F.gelu),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "tanh": ("tanh", torch.tanh),
    "hardswish": ("hardswish", F.hardswish),
    "relu6": ("relu6", F.relu6),
    "LeakyReLU(0.2)": (torch.nn.LeakyReLU(0.2), lambda z: F.leaky_relu(z, 0.2)),
    "ELU(0.7)": (torch.nn.ELU(0.7), lambda z: F.elu(z, 0.7)),
    "GELU(tanh)": (torch.nn.GELU("tanh"), lambda z: F.gelu(z, approximate="tanh")),
}

SMOOTH = ("none", "silu", "gelu", "sigmoid", "tanh", "GELU(tanh)")

LAYOUTS = ("contiguous", "channels_last", "strided")


def channels_last(t: Tensor) -> Tensor:
    """``t`` [N, C, ...] with channels innermost in memory, whatever its rank."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def strided(t: Tensor) -> Tensor:
    """``t`` as every second element of a larger tensor: neither contiguous nor channels_last."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7, dtype=t.dtype)
    view = wide[..., ::2]
    view.copy_(t)
    return view


def in_layout(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in one of :data:`LAYOUTS`."""
    return {"contiguous": Tensor.contiguous, "channels_last": channels_last, "strided": strided}[
        layout
    ](t)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return f64 if dtype == f64 else f32


def stock_or_none(call: Callable[[], Any]) -> tuple[Any, str]:
    """The result of stock; or ``None`` and the reason if oneDNN has no kernel for this CPU.

    This happens for the LSTM in half precision without AVX-512 (pytorch/pytorch#88136). The test then only compares
    with fp64 and with the documented dtypes.
    """
    try:
        return call(), ""
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        return None, str(error)


def error(found: Tensor, exact: Tensor, what: Any = "stock") -> float:
    """The largest absolute error. NaN and infinities must be in the same places."""
    assert found.shape == exact.shape, what
    found, exact = found.double(), exact.double()
    finite = exact.isfinite()
    assert torch.equal(found.isnan(), exact.isnan()), what
    assert torch.equal(found[exact.isinf()], exact[exact.isinf()]), what
    return (found - exact)[finite].abs().max().item() if finite.any() else 0.0


def largest(t: Tensor) -> float:
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_accurate(
    found: Tensor,
    exact: Tensor,
    stock_result: Tensor,
    size: float,
    what: Any,
    acc: torch.dtype | None = None,
) -> None:
    """The rule of this file.

    Args:
        found: the result under test.
        exact: the same in fp64.
        stock_result: the same by stock PyTorch.
        size: the size of the terms that are summed to the result, see :func:`term_sizes`.
        acc: dtype of the arithmetic; by default fp64 for an fp64 result, else fp32.
    """
    acc = acc or acc_dtype(found.dtype)
    roundings = torch.finfo(found.dtype).eps * largest(exact) + torch.finfo(acc).eps * size
    limit = error(stock_result.to(found.dtype), exact) + ULPS * roundings
    own = error(found, exact, what)
    assert own <= limit, f"{what}: error {own:.3g} > {limit:.3g}"
