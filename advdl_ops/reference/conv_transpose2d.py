"""Transposed convolution and activation in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._stock_faults import transposed_convolution
from ..activation import Activation
from .activation import activate


def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Any, act: Activation
) -> Tensor:
    """See :func:`advdl_ops.functional.conv_transpose2d`.

    ``options`` are (stride, padding, output_padding, groups, dilation).
    """
    return activate(transposed_convolution(x, weight, bias, *options), act)
