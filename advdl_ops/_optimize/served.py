"""What serves a layer on the CPU: asked of the conditions by which the calls themselves choose.

By the texts of :func:`of_layer` (before a call: with what it depends on) and :func:`of_call` (of one call).
"""

from __future__ import annotations

import bisect
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library, nn
from ..functional._conv2d_cpu import (
    Conv,
    appends,
    compute_format,
    convert,
    own_kernel,
    pair,
)
from ..functional.conv2d import _is_depthwise, _torch_derives_as_well, prepared
from ..functional.conv_bn_act import result_dtype
from ..functional.conv_transpose2d import Options, _has_own_operators, _is_gradient
from ..nn.conv2d import padded_input
from ..nn.conv_bn_act import _SHORT_ROW, _packing_pays, _packs, _padded, evaluates_as_one

ONEDNN, TORCH, EITHER = "oneDNN", "torch's own", "oneDNN or torch's own"
TWO_LAYERS = "its two layers"
_FOLDED = "in evaluation without gradients one convolution, the norm folded into it"


def own() -> str:
    """With the capability, where ``_C``, which knows, is of this Python."""
    try:
        return f"CPU C++ kernel, {importlib.import_module('advdl_ops._C').cpu.capability()}"
    except ImportError:
        return "CPU C++ kernel"


def of_layer(layer: torch.nn.Module) -> str:
    """By which condition on its input, where it depends on that."""
    if isinstance(layer, nn.ConvBNAct):
        return of_pair(layer.conv, layer.bn)
    if isinstance(layer, nn.ConvTranspose2d):
        x = _large(layer)
        return own() if _is_own_transposed(layer, x, layer.output_padding) else EITHER
    if isinstance(layer, nn.Conv2d):
        return _of_convolution(layer)
    return _of_other(layer)


def of_call(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> str | None:
    """For the arguments of its forward, called without gradients; ``None`` where nothing is known of them."""
    x, *others = args or (kwargs.get("input", kwargs.get("x")),)
    if isinstance(layer, nn.ConvTranspose2d) and type(x) is Tensor:
        return _of_transposed(layer, x, *others, **kwargs)
    if isinstance(layer, (nn.Conv2d, nn.ConvBNAct)):
        if type(x) is not Tensor:
            return None
        residual = others[0] if others else kwargs.get("residual")
        if isinstance(layer, nn.ConvBNAct):
            return of_pair(layer.conv, layer.bn, x, residual)
        parts = _parts(x, layer, residual)
        further = {"under gradients": parts.derived}
        if parts.dx == parts.dweight:
            further["gradients"] = parts.dx
        else:
            further |= {"gradient of x": parts.dx, "gradient of the weight": parts.dweight}
        differing = [f"{name} {by}" for name, by in further.items() if by != parts.forward]
        return "; ".join([parts.forward, *differing])
    return _of_other(layer)


def of_pair(
    conv: torch.nn.Conv2d,
    bn: nn.BatchNormAct2d,
    x: Tensor | None = None,
    residual: Tensor | None = None,
) -> str:
    """Of :func:`.nn.conv_bn_act`, for an ``x`` if one is given."""
    if not (folds_any(conv, bn) if x is None else _folds(conv, bn, x, residual)):
        return TWO_LAYERS
    with torch.no_grad():
        return f"in training {TWO_LAYERS}; {_FOLDED}: {_of_folded(conv, x)}"


def folds_any(conv: torch.nn.Module, bn: torch.nn.Module) -> bool:
    """Whether in evaluation the norm becomes part of the convolution, of an input in the weight's dtype."""
    if not isinstance(conv, torch.nn.Conv2d) or not isinstance(bn, nn.BatchNormAct2d):
        return False  # something else was put in the place of one
    return _folds(conv, bn, _smallest(conv), None)


def _folds(
    conv: torch.nn.Conv2d, bn: nn.BatchNormAct2d, x: Tensor, residual: Tensor | None
) -> bool:
    source = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    with torch.no_grad():
        return evaluates_as_one(conv, bn, x, residual, source)


def _smallest(conv: torch.nn.Conv2d) -> Tensor:
    """An input that every kernel and mode of padding takes."""
    side = max(_extent(conv)) + max(conv._reversed_padding_repeated_twice)
    return conv.weight.new_empty(1, conv.in_channels, side, side)


def _of_folded(conv: torch.nn.Conv2d, given: Tensor | None) -> str:
    any_x = given is None
    x, options = _padded(conv, _smallest(conv) if given is None else given)
    if any_x and _is_depthwise(x, conv.weight, conv.groups):
        narrow = conv.weight.new_empty(1, conv.in_channels, 2, 1)
        width = _SHORT_ROW * pair(conv.stride)[1]
        short = f"; contiguous rows of up to {width}: {EITHER}"
        return own() + (short if _packs(conv, narrow, options) else "")
    if _packs(conv, x, options):
        if any_x:
            return EITHER
        stride, padding, dilation = map(pair, options[:3])
        by_torch = _by_torch(x, conv.weight, Conv(stride, padding, dilation, options.groups))
        return ONEDNN if _packing_pays(x, conv.weight) else by_torch
    if not _library.native("cpu"):
        return f"the reference, in plain PyTorch: {_library.status().get('cpu')}"
    return _of_convolution(conv) if any_x else _parts(x, conv, None, options.padding).forward


def _of_other(layer: torch.nn.Module) -> str:
    # The product is normalized before the kernel may add to it.
    normalized = isinstance(layer, nn.LSTM) and layer.layer_norm
    return own() + ("; product with the input, and its norm, torch's own" if normalized else "")


# ---- convolution ----


class _Parts(NamedTuple):
    """What serves the forward pass without and under gradients, and what each gradient."""

    forward: str
    derived: str
    dx: str
    dweight: str


def _parts(
    x: Tensor, layer: torch.nn.Conv2d, residual: Tensor | None, padding: Any = None
) -> _Parts:
    if padding is None:
        x, padding = padded_input(layer, x)
    x, weight, _, options = prepared(
        x if x.dim() == 4 else x.unsqueeze(0), layer.weight, layer.bias,
        layer.stride, padding, layer.dilation, layer.groups,
    )  # fmt: skip
    if _is_depthwise(x, weight, layer.groups):
        return _Parts(*[own()] * 4)
    conv = Conv(*options[:4])
    inside = convert(x, compute_format(x, conv.dilation))
    by_torch = _by_torch(inside, weight, conv)
    forward = ONEDNN if appends(inside, weight, conv) else by_torch
    if own_kernel(inside, weight, conv).out:
        forward = own()
    derived = _torch_derives_as_well(x, weight, None, None, residual, options)
    _, dx, dweight = own_kernel(x, weight, conv)
    return _Parts(
        forward,
        by_torch if derived else forward,
        own() if dx else by_torch,
        own() if dweight else by_torch,
    )


def _by_torch(x: Tensor, weight: Tensor, conv: Conv, **transposed: Any) -> str:
    """What torch's dispatcher takes: its own answer."""
    padding: Any = transposed.get("output_padding")
    found: Any = torch._C._select_conv_backend(
        x, weight, None, conv.stride, conv.padding, conv.dilation,
        padding is not None, padding or (0, 0), conv.groups, None,
    )  # fmt: skip
    # The one of transposed convolutions, the next in C++, has no name in Python.
    mkldnn = int(torch._C._ConvBackend.Mkldnn)  # type: ignore[attr-defined]
    return ONEDNN if int(found) in (mkldnn, mkldnn + 1) else TORCH


def _of_convolution(layer: torch.nn.Conv2d) -> str:
    """Where the own kernel depends on the number of pixels, by which numbers."""
    if layer.groups == layer.in_channels == layer.out_channels:
        return own()
    spans: dict[str, list[str]] = {}
    for part in ("out", "dx", "dweight"):
        last, contiguous = (
            _span(_serves(layer, part, memory_format))
            for memory_format in (torch.channels_last, torch.contiguous_format)
        )
        if last or contiguous:
            both = last if last == contiguous else f"{last} (contiguous: {contiguous})"
            spans.setdefault(str(both), []).append(_PARTS[part])
    found = [f"{' and '.join(parts)} at {span}" for span, parts in spans.items()]
    if not found:
        return EITHER
    return f"{EITHER}; by pixels of the output {own()}: {', '.join(found)}"


_PARTS = {"out": "forward", "dx": "gradient of x", "dweight": "gradient of the weight"}


def _extent(layer: torch.nn.Conv2d) -> tuple[int, int]:
    """Of the kernel, with its holes."""
    height, width = (
        d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    )
    return height, width


def _serves(
    layer: torch.nn.Conv2d, part: str, memory_format: torch.memory_format
) -> Callable[[int], bool]:
    """Whether the own kernel serves ``part`` where the output has so many pixels."""
    conv = Conv(layer.stride, (0, 0), layer.dilation, layer.groups)
    height, width = _extent(layer)
    dtype = result_dtype(layer.weight)
    weight = layer.weight.to(dtype)

    def serves(pixels: int) -> bool:
        shape = 1, layer.in_channels, height, (pixels - 1) * layer.stride[1] + width
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
        if part == "out":
            format_inside = compute_format(x, layer.dilation)
            x = x.contiguous(memory_format=format_inside)
        return bool(getattr(own_kernel(x, weight, conv), part))

    return serves


def _span(serves: Callable[[int], bool]) -> str | None:
    """The numbers from 1 on that it serves, which lie side by side."""
    powers = [2**n for n in range(1, 17)]
    inside = [n for n in powers if serves(n)]
    if not inside:
        return None
    low, high = inside[0] // 2 + 1, inside[-1]
    first = low + bisect.bisect_left(range(low, inside[0]), True, key=serves)
    if high == powers[-1]:
        return f"{first} and more"
    last = high + bisect.bisect_left(range(high + 1, 2 * high), True, key=lambda n: not serves(n))
    return f"{first} to {last}"


# ---- transposed convolution ----


def is_gradient(layer: nn.ConvTranspose2d) -> bool:
    """Whether it is the gradient of a convolution, with its own output padding."""
    return _is_gradient(
        _large(layer), layer.weight, _transposed_options(layer, layer.output_padding)
    )


def _large(layer: nn.ConvTranspose2d) -> Tensor:
    """An input of which any kernel and padding leave something."""
    return torch.empty(1, layer.in_channels, 1024, 1024, device="meta")


def _is_own_transposed(layer: nn.ConvTranspose2d, x: Tensor, output_padding: Any) -> bool:
    return _has_own_operators(x, layer.weight, _transposed_options(layer, output_padding))


def _transposed_options(layer: nn.ConvTranspose2d, output_padding: Any) -> Options:
    options: Any = layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
    return Options(*options)


def _of_transposed(
    layer: nn.ConvTranspose2d, x: Tensor, output_size: Any = None, **kwargs: Any
) -> str:
    if x.dim() == 3:
        x = x.unsqueeze(0)
    size, match = kwargs.get("output_size", output_size), kwargs.get("match")
    if isinstance(match, Tensor):
        match = match.shape[-2:]
    output_padding, _ = layer.padding_of(x, size if size is None else tuple(size)[-2:], match)
    if _is_own_transposed(layer, x, output_padding):
        return own()
    dtype = result_dtype(x)
    options = _transposed_options(layer, output_padding)
    conv = Conv(options.stride, options.padding, options.dilation, options.groups)
    return _by_torch(
        x.to(dtype), layer.weight.to(dtype), conv, output_padding=tuple(output_padding)
    )
