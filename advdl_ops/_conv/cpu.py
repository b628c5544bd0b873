"""The run functions of the candidates on CPU: this package's kernels, oneDNN with its own epilogue, or torch.

A forward takes ``(x, weight, conv, epilogue, memory_format)`` and returns the output. A gradient takes
``(dz, x, weight, conv, needs, memory_format)`` and returns the gradients of x, weight and bias. ``needs`` has one bool
for each of the three; a gradient that is not needed is ``None``. ``memory_format`` is the one to compute in; the caller
converts the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._schemas import acc_dtype
from .._stock_faults import fails_in_channels_last, fails_in_half, padded, sees_nothing
from ..activation import IDENTITY, Activation
from .epilogue import activated
from .epilogue import epilogue as run_epilogue
from .problem import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    Epilogue,
    convert,
    without_data,
)
from .winograd import Tile, tile_for

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]

_depthwise_op = torch.ops.advdl_ops.depthwise_conv2d.default
_depthwise_backward_op = torch.ops.advdl_ops.depthwise_conv2d_backward.default
_dense_op = torch.ops.advdl_ops.dense_conv2d.default
_dense_backward_op = torch.ops.advdl_ops.dense_conv2d_backward.default
_winograd_pack_op = torch.ops.advdl_ops.winograd_pack.default
_winograd_op = torch.ops.advdl_ops.winograd_conv2d.default
_winograd_backward_op = torch.ops.advdl_ops.winograd_conv2d_backward.default
_torch_backward_op = torch.ops.aten.convolution_backward.default


# ---- csrc/cpu/depthwise_conv2d.cpp and depthwise_conv2d_last.cpp ----


def depthwise(
    x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue, memory_format: torch.memory_format
) -> Tensor:
    scale, shift, residual, act = epilogue
    if not x.is_contiguous(memory_format=memory_format):
        x = convert(x, memory_format)
    return _depthwise_op(x, weight, scale, shift, residual, *conv[:3], act.code, act.param)


def depthwise_gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
    memory_format: torch.memory_format,
) -> Gradients:
    if not x.is_contiguous(memory_format=memory_format):
        x = convert(x, memory_format) if needs[1] else without_data(x, memory_format)
    found = _depthwise_backward_op(dz, x, weight, *conv[:3], *needs)
    return _needed(found, needs)


# ---- csrc/cpu/dense_conv2d.cpp ----


def dense(
    x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue, memory_format: torch.memory_format
) -> Tensor:
    weight, shift, rest = _folded(x, weight, epilogue)
    act = rest.act
    return _dense_op(x, weight, shift, rest.residual, *conv[:3], act.code, act.param)


def dense_gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
    memory_format: torch.memory_format,
) -> Gradients:
    dx, dweight = _dense_backward_op(dz, x, weight, *conv[:3], *needs[:2])
    return _needed((dx, dweight, sum_of(dz) if needs[2] else None), needs)


# ---- csrc/cpu/winograd_conv2d.cpp ----


class Transformed(NamedTuple):
    """A weight for :func:`winograd` that was transformed before.

    Attributes:
        weight: as it is. Tiles with Inf or NaN are computed from it.
        packed: the transformed one, of :func:`winograd_pack`.
        tile: for which.
    """

    weight: Tensor
    packed: Tensor
    tile: Tile


def winograd_pack(weight: Tensor, groups: int, tile: Tile) -> Tensor:
    """``weight`` transformed for a forward by ``tile``, in fp32."""
    return _winograd_pack_op(weight, groups, tile.code)


def winograd(
    x: Tensor,
    weight: Tensor | Transformed,
    conv: Conv,
    epilogue: Epilogue,
    memory_format: torch.memory_format,
) -> Tensor:
    scale, shift, residual, act = epilogue
    packed = None
    if isinstance(weight, Transformed):
        weight, packed, tile = weight
    else:
        tile = _tile(FORWARD, x, weight, conv)
    return _winograd_op(
        x, weight, packed, _in_float32(scale), _in_float32(shift), residual, conv.padding, conv.dilation,
        conv.groups, tile.code, act.code, act.param,
    )  # fmt: skip


def winograd_gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
    memory_format: torch.memory_format,
) -> Gradients:
    of_dx, of_dweight = (
        _tile(direction, x, weight, conv).code if needed else 0
        for direction, needed in ((INPUT_GRADIENT, needs[0]), (WEIGHT_GRADIENT, needs[1]))
    )
    dx, dweight = _winograd_backward_op(dz, x, weight, *conv[1:], of_dx, of_dweight, *needs[:2])
    return _needed((dx, dweight, sum_of(dz) if needs[2] else None), needs)


def _tile(direction: str, x: Tensor, weight: Tensor, conv: Conv) -> Tile:
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    tile = tile_for(direction, x.dtype, x.shape, weight.shape, conv, is_last)
    assert tile is not None  # else the choice does not accept Winograd
    return tile


# ---- oneDNN's fused convolution ----

# oneDNN's names of the activations that it applies to the output while that is in cache. elu is not among them. relu
# and relu6 are left out, because oneDNN's give 0 for NaN. In place afterwards they take 1 % of the time of a ResNet-50
# of one image, 0.3 % of one of eight images.
_ONEDNN_NAMES = {
    "identity": "none",
    "silu": "swish",
    "gelu_tanh": "gelu",
    **{name: name for name in ("leaky_relu", "gelu", "sigmoid", "tanh", "hardswish")},
}


def onednn(
    x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue, memory_format: torch.memory_format
) -> Tensor:
    weight, shift, (_, _, residual, act) = _folded(x, weight, epilogue)
    x, conv = _seen(convert(x, memory_format), weight, conv)
    return onednn_fused(x, weight, shift, conv, residual, act)


def onednn_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """``act(conv2d(x, weight, bias) + residual)``, mostly in channels_last whatever ``x`` is."""
    options = conv.padding, conv.stride, conv.dilation, conv.groups
    ops = torch.ops.mkldnn
    if residual is not None:
        out = ops._convolution_pointwise.binary(
            x, residual, weight, bias, *options, "add", 1.0, None, [], ""
        )
        return activated(out, act, in_place=True)
    inside = act if act.name in _ONEDNN_NAMES else IDENTITY
    scalars = [act.param] if inside.name == "leaky_relu" else []
    algorithm = {"gelu": "none", "gelu_tanh": "tanh"}.get(inside.name, "")
    out = ops._convolution_pointwise(
        x, weight, bias, *options, _ONEDNN_NAMES[inside.name], scalars, algorithm
    )
    return out if inside is act else activated(out, act, in_place=True)


def prepack(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """``weight`` in the blocked layout that oneDNN prefers for inputs of ``x``'s shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape)
    )


def prepacked(
    x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue, memory_format: torch.memory_format
) -> Tensor:
    """A forward with the weight of :func:`prepack`."""
    _, bias, residual, act = epilogue
    return onednn_fused(x, weight, bias, conv, residual, act)


# ---- torch's own: torch decides between oneDNN and its own kernels ----


def by_torch(
    x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue, memory_format: torch.memory_format
) -> Tensor:
    weight, bias, rest = _folded(x, weight, epilogue)
    x, conv = _seen(convert(x, memory_format), weight, conv)
    # The same operator through torch.ops takes 4 us more.
    out = torch.convolution(
        x, weight, bias, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
    )
    return run_epilogue(out, *rest)


def gradients_by_torch(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
    memory_format: torch.memory_format,
) -> Gradients:
    if needs[1] and fails_in_half(x, weight, *conv[:3]):
        return gradients_by_torch_in_float32(dz, x, weight, conv, needs, memory_format)
    if needs[1] and fails_in_channels_last(x, weight, *conv):
        memory_format = torch.contiguous_format
        weight = convert(weight, memory_format)
    dbias = sum_of(dz) if needs[2] else None
    dz, x = convert(dz, memory_format), convert(x, memory_format)
    dx, dweight, _ = _torch_backward_op(
        dz, x, weight, None, *conv[:3], False, [0, 0], conv.groups, [*needs[:2], False]
    )
    return dx, dweight, dbias


# ---- the same in fp32, for half precision ----


def by_torch_in_float32(
    x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue, memory_format: torch.memory_format
) -> Tensor:
    """``weight`` may be in fp32 already."""
    scale, shift, residual, act = epilogue
    wide = Epilogue(_in_float32(scale), _in_float32(shift), _in_float32(residual), act)
    return by_torch(x.float(), weight.float(), conv, wide, memory_format).to(x.dtype)


def gradients_by_torch_in_float32(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
    memory_format: torch.memory_format,
) -> Gradients:
    """The gradient of the weight stays in fp32."""
    dx, dweight, dbias = gradients_by_torch(
        dz.float(), x.float(), weight.float(), conv, needs, memory_format
    )
    return None if dx is None else dx.to(x.dtype), dweight, dbias


# ---- shared ----


def _in_float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def sum_of(dz: Tensor) -> Tensor:
    """The gradient of a bias: ``[C_out]``, at least fp32."""
    return dz.sum((0, 2, 3), dtype=acc_dtype(dz.dtype))


def _folded(
    x: Tensor, weight: Tensor, epilogue: Epilogue
) -> tuple[Tensor, Tensor | None, Epilogue]:
    """Weight and bias with scale and shift folded in, and the rest of the epilogue.

    In half precision, folding a scale would round the weights once more, and folding a wider shift would round it.
    Those stay in the epilogue.
    """
    scale, shift, residual, act = epilogue
    if acc_dtype(x.dtype) != x.dtype and (
        scale is not None or shift is None or shift.dtype != x.dtype
    ):
        return weight, None, epilogue
    if scale is not None:
        weight = weight * scale.view(-1, 1, 1, 1)
    return weight, shift, Epilogue(None, None, residual, act)


def _seen(x: Tensor, weight: Tensor, conv: Conv) -> tuple[Tensor, Conv]:
    """If no tap falls on a column of the image, oneDNN may crash the process. Then ``x`` is padded beforehand."""
    if not sees_nothing(x, weight, *conv[:3]):
        return x, conv
    return padded(x, conv.padding), conv._replace(padding=(0, 0))


def _needed(found: tuple[Any, ...], needs: Needs) -> Gradients:
    dx, dweight, dbias = (t if need else None for t, need in zip(found, needs, strict=True))
    return dx, dweight, dbias
