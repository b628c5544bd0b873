"""Convolution, norm, addition and activation as one op, if nobody watches them and none was replaced.

The blocks of the zoo and the new forwards of ``optimize`` call :func:`run_as_one` with the layers that they hold at the
moment. So a layer can be replaced, or get a hook, at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._schemas import conv2d_shape
from .._watch import is_observed, is_watched
from ..activation import IDENTITY
from ..functional.conv_bn_act import result_dtype
from ._one_by_one import Act, has_own_parts, layer_of, one_by_one, unobserved
from .batch_norm_act import BatchNormAct2d
from .conv2d import Conv2d
from .conv_bn_act import conv_bn_act
from .conv_transpose2d import ConvTranspose2d
from .group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm2d

CONVOLUTIONS = Conv2d, ConvTranspose2d
NORMS = BatchNormAct2d, GroupNorm, LayerNorm2d, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d


def run_as_one(
    layers: tuple[torch.nn.Module, ...],
    x: Tensor,
    residual: Tensor | None = None,
    act: Act = None,
    in_place: bool = False,
) -> Tensor:
    """``act(norm(conv(x)) + residual)``, where the layers are a convolution, a norm, or both in this order.

    Args:
        layers: the current layers of the model. If one of them was replaced or got a hook, they are called one by one.
        x: the input of the first layer.
        residual: added if given.
        act: an activation's name or module, or ``None``.
        in_place: whether the addition is ``+=``, which keeps the dtype.

    Returns:
        What the layers would return if called one after another.
    """
    activation = unobserved(act)
    if activation is None or is_observed(x):
        return one_by_one(layers, x, residual, act, in_place)
    before: Any
    *before, last = layers
    if before and (type(before[0]) not in _CONVOLUTIONS_2D or is_watched(before[0])):
        x, before = before[0](x), []
    if not _takes(last, act, residual):
        return one_by_one((*before, last), x, residual, act, in_place)
    if residual is not None and not _fits(residual, x, (*before, last)[0]):
        return one_by_one((), run_as_one((*before, last), x), residual, act, in_place)
    if before:
        if layer_of(last) is BatchNormAct2d:
            return conv_bn_act(before[0], last, x, residual, act=act)
        x = before[0](x)
    own = None if act is None else activation
    if type(last) is ConvTranspose2d:
        return last(x, act=own)
    return last(x, residual, act=own)


_CONVOLUTIONS_2D = Conv2d, torch.nn.Conv2d


def _takes(layer: Any, act: Act, residual: Tensor | None) -> bool:
    """Whether ``layer`` is one of this package's that nobody watches, and may be given the activation and residual."""
    kind = layer_of(layer)
    if (kind not in CONVOLUTIONS and kind not in NORMS) or is_watched(layer):
        return False
    if act is None and residual is None:
        return True
    own = has_own_parts(layer) and unobserved(layer.act) == IDENTITY
    return own and (residual is None or kind is not ConvTranspose2d)


def _fits(residual: Any, x: Tensor, first: Any) -> bool:
    """Whether the sum with the layers' result neither broadcasts nor changes the dtype."""
    if not isinstance(residual, Tensor) or residual.dtype != result_dtype(x):
        return False
    if not isinstance(first, torch.nn.Conv2d):
        return residual.shape == x.shape
    if x.dim() != 4:
        return False
    # Not from the weight, because a parametrized one is recomputed at each access.
    weight_shape = (first.out_channels, 0, *first.kernel_size)
    return residual.shape == conv2d_shape(
        x.shape, weight_shape, first.stride, _paddings(first), first.dilation
    )


def _paddings(conv: torch.nn.Conv2d) -> Any:
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "valid":
        return 0, 0
    return tuple(d * (k - 1) / 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
