"""How the convolutions read what they are given: pairs of numbers, groups, autocast."""

from __future__ import annotations

import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PADDINGS = ("same", "valid")
# What autocast casts; numbers of fp64 it leaves.
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def pair_of(function: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """Height and width of an option that is one number for both, or a sequence of one or two; ``least`` at least."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        pair = value  # as modules hold it
    else:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        for v in values:
            if not _is_integer(v):
                raise TypeError(f"{function}: {name} ({value!r}) must be an integer, or two")
        if len(values) not in (1, 2):
            raise RuntimeError(f"{function}: {name} ({value!r}) must be one integer, or two")
        pair = values[0], values[-1]
    if pair[0] < least or pair[1] < least:
        raise RuntimeError(f"{function}: {name} ({value!r}) must be at least {least}")
    return pair


def padded_by(
    function: str,
    x: Tensor,
    weight: Tensor,
    padding: Any,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """``x`` ``[N, C, H, W]``, padded here where its two sides differ, and the padding of both sides."""
    if not isinstance(padding, str):
        return x, pair_of(function, "padding", padding, 0)
    if padding not in _PADDINGS:
        raise RuntimeError(
            f"{function}: padding ({padding!r}) must be numbers or one of {', '.join(_PADDINGS)}"
        )
    if padding == "valid":
        return x, (0, 0)
    if stride != (1, 1):
        raise RuntimeError(f"{function}: stride ({stride}) must be 1 with padding 'same'")
    height, width = (
        rate * (kernel - 1) for rate, kernel in zip(dilation, weight.shape[2:], strict=True)
    )
    if height % 2 or width % 2:  # of an even kernel, as torch: one more behind
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return x, (height // 2, width // 2)


def check_groups(function: str, groups: Any) -> None:
    if type(groups) is not int and not _is_integer(groups):
        raise TypeError(f"{function}: groups ({groups!r}) must be an integer")
    if groups < 1:
        raise RuntimeError(f"{function}: groups ({groups}) must be at least 1")


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, torch.SymInt, numbers.Integral))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on ``x``'s device, or ``None``."""
    device = x.device.type
    if device == "meta" or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` as autocast gives it to an operator: so that backward holds no fp32 copy, not left to the operator."""
    return t.to(dtype) if t.dtype in _CAST else t
