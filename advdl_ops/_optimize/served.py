"""What serves a layer on the CPU, from the same choice that the calls themselves use.

:func:`of_layer` gives the text before a call, with the conditions. :func:`of_call` gives the text for one call.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library, nn
from .._conv import choice
from .._conv.problem import (
    CHANNELS_LAST,
    CONTIGUOUS,
    FOLDED,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    Epilogue,
    Problem,
    computes_in_float32,
    layout_of,
    pair,
    problem_of,
)
from ..activation import IDENTITY
from ..functional.conv2d import _torch_derives_as_well, prepared
from ..functional.conv_bn_act import result_dtype
from ..functional.conv_transpose2d import Options, _has_own_operators, _is_gradient
from ..functional.conv_transpose2d import _problem as _problem_of_transposed
from ..nn._one_by_one import Act, unobserved
from ..nn.conv2d import padded_input
from ..nn.conv_bn_act import _is_convolution_alone, _padded, evaluates_as_one, problem_of_kept

ONEDNN, TORCH, EITHER = "oneDNN", "torch's own", "oneDNN or torch's own"
TWO_LAYERS = "its two layers"
_WINOGRAD = "by Winograd's minimal filtering"
_GRADIENTS = (INPUT_GRADIENT, WEIGHT_GRADIENT)
_FOLDED = "in evaluation without gradients one convolution, the norm folded into it"


class Told(NamedTuple):
    """What serves one call on CPU.

    Attributes:
        text: a description; ``None`` if it is not known.
        problems: every direction of its convolution, or the single problem of a folded pair.
    """

    text: str | None
    problems: tuple[Problem, ...] = ()


def own() -> str:
    return f"CPU C++ kernel, {_library.cpu_capability()}"


def of_layer(layer: torch.nn.Module) -> str:
    """What serves the layer. If that depends on the input, with the conditions."""
    if isinstance(layer, nn.ConvBNAct):
        return of_pair_in_general(layer.conv, layer.bn) if _folds_by_order(layer) else TWO_LAYERS
    if isinstance(layer, nn.ConvTranspose2d):
        if _is_depthwise_transposed(layer) and is_gradient(layer):
            return own()
        is_dense = layer.groups == 1 and result_dtype(layer.weight) == torch.float32
        cases = []
        if is_gradient(layer):
            cases += ["of few pixels"] if is_dense else []
            cases += [f"{_WINOGRAD},"] if _may_use_winograd(layer) else []
        return _in_general(layer) + (f"; {', or '.join(cases)} {own()}" if cases else "")
    if isinstance(layer, nn.Conv2d):
        return _of_convolution(layer)
    return _of_other(layer)


def of_call(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Told:
    """What serves a call of the layer's forward with these arguments, without gradients."""
    x, *others = args or (kwargs.get("input", kwargs.get("x")),)
    if isinstance(layer, nn.ConvTranspose2d) and type(x) is Tensor:
        return Told(_of_transposed(layer, x, *others, **kwargs))
    if not isinstance(layer, (nn.Conv2d, nn.ConvBNAct)):
        return Told(_of_other(layer))
    if type(x) is not Tensor:
        return Told(None)
    residual = others[0] if others else kwargs.get("residual")
    if isinstance(layer, nn.ConvBNAct):
        if not isinstance(layer.conv, torch.nn.Conv2d):
            return Told(TWO_LAYERS)
        if not _folds_by_order(layer):
            return Told(TWO_LAYERS, _call_of(x, layer.conv, None, act=layer.act).problems)
        return of_pair(layer.conv, layer.bn, x, residual, layer.act)
    call = _call_of(x, layer, residual)
    return Told(_parts(call).text(), call.problems)


def _folds_by_order(layer: nn.ConvBNAct) -> bool:
    return layer.order == "conv-bn-act" or unobserved(layer.act) == IDENTITY


def of_pair_in_general(conv: torch.nn.Conv2d, bn: nn.BatchNormAct2d) -> str:
    """What serves :func:`.nn.conv_bn_act`, before a call."""
    return _of_folding(_of_folded(conv)) if folds_any(conv, bn) else TWO_LAYERS


def of_pair(
    conv: torch.nn.Conv2d,
    bn: nn.BatchNormAct2d,
    x: Tensor,
    residual: Tensor | None = None,
    act: Act = None,
) -> Told:
    """What serves a call of :func:`.nn.conv_bn_act`."""
    own = unobserved(getattr(bn, "act", None)) == IDENTITY
    joins = act is None or (own and unobserved(act) is not None)
    if not joins or not _folds(conv, bn, x, residual):
        shown = isinstance(conv, nn.Conv2d) and type(x) is Tensor
        return Told(TWO_LAYERS, _call_of(x, conv, None).problems if shown else ())
    with torch.no_grad():
        x, options = _padded(conv, x)
        problem = problem_of_kept(conv, x, options)
        if problem is None:
            call = _call_of(x, conv, None, options.padding)
            by = _parts(call).forward if _library.native("cpu") else _without_kernels()
            return Told(_of_folding(by), call.problems)
        behind = unobserved(bn.act if act is None else act) or IDENTITY
        # The folded convolution has a shift even if neither of the two layers has a bias.
        epilogue = Epilogue(None, conv.weight, residual, behind)
        problem = problem._replace(epilogue=epilogue.name())
        by = _by(choice.expected(problem), x, conv.weight, problem.conv)
        return Told(_of_folding(by), (problem,))


def _of_folding(by: str) -> str:
    return f"in training {TWO_LAYERS}; {_FOLDED}: {by}"


def folds_any(conv: torch.nn.Module, bn: torch.nn.Module) -> bool:
    """Whether the norm is folded into the convolution in evaluation, for an input in the weight's dtype."""
    return isinstance(conv, torch.nn.Conv2d) and _folds(conv, bn, _smallest(conv), None)


def _folds(conv: torch.nn.Conv2d, bn: torch.nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    if not isinstance(bn, nn.BatchNormAct2d) or not _is_convolution_alone(conv):
        return False  # one was replaced by another class
    source = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    with torch.no_grad():
        return evaluates_as_one(conv, bn, x, residual, source)


def _smallest(conv: torch.nn.Conv2d) -> Tensor:
    """A small input that is large enough for the layer's kernel and padding."""
    side = max(_extent(conv)) + max(conv._reversed_padding_repeated_twice)
    return conv.weight.new_empty(1, conv.in_channels, side, side)


def _of_folded(conv: torch.nn.Conv2d) -> str:
    x, options = _padded(conv, _smallest(conv))
    problem = problem_of_kept(conv, x, options)
    if problem is not None:
        return (
            _of_depthwise(conv)
            if problem.is_depthwise
            else _in_general(conv) + _by_winograd(conv, (FOLDED,))
        )
    return _of_convolution(conv) if _library.native("cpu") else _without_kernels()


def _without_kernels() -> str:
    return f"the reference, in plain PyTorch: {_library.status().get('cpu')}"


def _of_other(layer: torch.nn.Module) -> str:
    # With layer norm, torch computes and normalizes the product with the input before the kernel.
    normalized = isinstance(layer, nn.LSTM) and layer.layer_norm
    return own() + ("; product with the input, and its norm, torch's own" if normalized else "")


# ---- convolution ----


class _Parts(NamedTuple):
    """What serves the forward pass without gradients, the forward pass with gradients, and each gradient."""

    forward: str
    derived: str
    dx: str
    dweight: str

    def text(self) -> str:
        """The implementation of the forward pass, then the parts with another one."""
        further = {"under gradients": self.derived}
        if self.dx == self.dweight:
            further["gradients"] = self.dx
        else:
            further |= {"gradient of x": self.dx, "gradient of the weight": self.dweight}
        differing = [f"{name} {by}" for name, by in further.items() if by != self.forward]
        return "; ".join([self.forward, *differing])


class _Call(NamedTuple):
    """The operator's arguments for a call of a convolution, and the problems of its three directions."""

    x: Tensor
    weight: Tensor
    conv: Conv
    epilogue: Epilogue
    problems: tuple[Problem, Problem, Problem]


def _call_of(
    x: Tensor, layer: torch.nn.Conv2d, residual: Tensor | None, padding: Any = None, act: Act = None
) -> _Call:
    """``padding``: the padding that is left to do, if ``x`` was already padded. ``act``: given to the layer."""
    if padding is None:
        x, padding = padded_input(layer, x)
    stride: Any = layer.stride
    dilation: Any = layer.dilation
    x, weight, bias, conv = prepared(
        x if x.dim() == 4 else x.unsqueeze(0), layer.weight, layer.bias,
        Conv(stride, padding, dilation, layer.groups),
    )  # fmt: skip
    own = layer.act if isinstance(layer, nn.Conv2d) and act is None else act
    epilogue = Epilogue(None, bias, residual, unobserved(own) or IDENTITY)
    # Assumes that the output's gradient has the input's memory format, as is usual.
    names = {FORWARD: epilogue.name(), **dict.fromkeys(_GRADIENTS, layout_of(x))}
    forward, dx, dweight = (problem_of(of, x, weight, conv, name) for of, name in names.items())
    return _Call(x, weight, conv, epilogue, (forward, dx, dweight))


def _parts(call: _Call) -> _Parts:
    x, weight, conv, (_, shift, residual, act), problems = call
    forward, dx, dweight = (_by(choice.expected(p), x, weight, conv) for p in problems)
    derived = residual is None and _torch_derives_as_well(x, weight, shift, conv, act)
    return _Parts(forward, _by_torch(x, weight, conv) if derived else forward, dx, dweight)


def _by(candidate: choice.Candidate, x: Tensor, weight: Tensor, conv: Conv) -> str:
    """The implementation behind a candidate."""
    if candidate.name.startswith((choice.DEPTHWISE, choice.DENSE, choice.WINOGRAD)):
        return own()
    if candidate.name.startswith(choice.ONEDNN):
        return ONEDNN
    if candidate.memory_format is not None:
        x = x.contiguous(memory_format=candidate.memory_format)
    if candidate.name == choice.IN_FLOAT32:
        return f"{_by_torch(x.float(), weight.float(), conv)} in float32"
    return _by_torch(x, weight, conv)


def _by_torch(x: Tensor, weight: Tensor, conv: Conv, **transposed: Any) -> str:
    """The implementation that torch chooses, by torch's own function."""
    padding: Any = transposed.get("output_padding")
    found: Any = torch._C._select_conv_backend(
        x, weight, None, conv.stride, conv.padding, conv.dilation,
        padding is not None, padding or (0, 0), conv.groups, None,
    )  # fmt: skip
    # The value for transposed convolutions, the next one in C++, has no name in Python.
    mkldnn = int(torch._C._ConvBackend.Mkldnn)  # type: ignore[attr-defined]
    return ONEDNN if int(found) in (mkldnn, mkldnn + 1) else TORCH


def _of_convolution(layer: torch.nn.Conv2d) -> str:
    """The text for a convolution, with the numbers of pixels for which this package's kernels serve."""
    if layer.groups == layer.in_channels == layer.out_channels:
        return _of_depthwise(layer)
    spans: dict[str, list[str]] = {}
    for direction, part in _PARTS.items():
        last, contiguous = (
            _span(_serves(layer, direction, layout)) for layout in (CHANNELS_LAST, CONTIGUOUS)
        )
        if last or contiguous:
            spans.setdefault(_in_both(last, contiguous), []).append(part)
    winograd = _by_winograd(layer, _PARTS)
    if not spans:
        return _in_general(layer) + winograd
    return f"{EITHER}{winograd}; by pixels of the output {own()}: {_joined(spans)}"


def _in_general(layer: torch.nn.Conv2d | torch.nn.ConvTranspose2d) -> str:
    dtype = result_dtype(layer.weight)
    return f"{EITHER}, in float32" if computes_in_float32(dtype) else EITHER


def _by_winograd(layer: torch.nn.Conv2d, directions: Iterable[str]) -> str:
    """From how many pixels on Winograd serves, as a further part of a text; empty if for none."""
    x, options = _padded(layer, _smallest(layer))
    if isinstance(options.padding, str):  # the sides of x differ
        return ""
    dtype = result_dtype(layer.weight)
    spans: dict[str, list[str]] = {}
    for direction in directions:
        problem = problem_of(direction, x.to(dtype), layer.weight, options)
        last, contiguous = (
            _least_of_winograd(problem._replace(layout=layout))
            for layout in (CHANNELS_LAST, CONTIGUOUS)
        )
        if last is not None:
            spans.setdefault(_in_both(last, contiguous), []).append(_PARTS.get(direction, ""))
    return f"; {_WINOGRAD} {own()}: {_joined(spans)} pixels and more" if spans else ""


def _least_of_winograd(problem: Problem) -> int | None:
    serves = choice.may_use_winograd(problem)
    return choice.winograd_pixels(problem, choice.thresholds()) if serves else None


def _may_use_winograd(layer: torch.nn.ConvTranspose2d) -> bool:
    """Whether Winograd serves the layer, whose forward is a gradient, from some number of pixels on."""
    if isinstance(layer.padding, str):
        return False
    conv = Conv(pair(layer.stride), pair(layer.padding), pair(layer.dilation), layer.groups)
    x = layer.weight.new_empty(1, layer.out_channels, *pair(layer.kernel_size))
    problem = problem_of(INPUT_GRADIENT, x, layer.weight, conv)
    return _least_of_winograd(problem) is not None


def _in_both(last: object, contiguous: object) -> str:
    return str(last) if last == contiguous else f"{last} (contiguous: {contiguous})"


def _joined(spans: dict[str, list[str]]) -> str:
    return ", ".join(f"{' and '.join(parts)} at {span}".lstrip() for span, parts in spans.items())


_PARTS = {
    FORWARD: "forward",
    INPUT_GRADIENT: "gradient of x",
    WEIGHT_GRADIENT: "gradient of the weight",
}


def _of_depthwise(layer: torch.nn.Conv2d) -> str:
    # With a stride of 2 oneDNN is faster for some sizes of contiguous images.
    some = 2 in pair(layer.stride) and result_dtype(layer.weight) == torch.float32
    return own() + (f"; some contiguous images: {EITHER}" if some else "")


def _extent(layer: torch.nn.Conv2d) -> tuple[int, int]:
    """Height and width of the dilated kernel."""
    height, width = (
        d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    )
    return height, width


def _of_shape(problem: Problem, height: int, width: int, layout: str) -> Problem:
    return problem._replace(x=(*problem.x[:2], height, width), layout=layout)


def _serves(layer: torch.nn.Conv2d, direction: str, layout: str) -> Callable[[int], bool]:
    """A function of a number of pixels: whether the dense kernel serves ``direction`` for an output of one such row."""
    stride: Any = layer.stride
    dilation: Any = layer.dilation
    conv = Conv(stride, (0, 0), dilation, layer.groups)
    height, width = _extent(layer)
    dtype = result_dtype(layer.weight)
    x = torch.empty(1, layer.in_channels, height, width, dtype=dtype)
    problem = problem_of(direction, x, layer.weight, conv)

    def serves(pixels: int) -> bool:
        across = (pixels - 1) * layer.stride[1] + width
        found = choice.expected(_of_shape(problem, height, across, layout))
        return found.name == choice.DENSE

    return serves


def _span(serves: Callable[[int], bool]) -> str | None:
    """The text for the range of numbers for which ``serves`` holds. It must be contiguous."""
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
    """Whether the layer is the gradient of a convolution, with its own output padding."""
    return _is_gradient(
        _large(layer), layer.weight, _transposed_options(layer, layer.output_padding)
    )


def _large(layer: nn.ConvTranspose2d) -> Tensor:
    """An input that is large enough for any kernel and padding."""
    return torch.empty(1, layer.in_channels, 1024, 1024, device="meta")


def _is_depthwise_transposed(layer: nn.ConvTranspose2d) -> bool:
    return layer.groups == layer.in_channels == layer.out_channels


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
    dtype = result_dtype(x)
    x, weight = x.to(dtype), layer.weight.to(dtype)
    options = _transposed_options(layer, output_padding)
    conv = Conv(options.stride, options.padding, options.dilation, options.groups)
    if not _has_own_operators(x, weight, options):
        return _by_torch(x, weight, conv, output_padding=tuple(output_padding))
    # The layer is the gradient of a convolution, and its own gradient is that convolution.
    problem = _problem_of_transposed(x, weight, options)
    like = torch.empty(problem.x, dtype=dtype)
    forward, dx, dweight = (
        _by(choice.expected(problem._replace(direction=direction)), like, weight, conv)
        for direction in (INPUT_GRADIENT, FORWARD, WEIGHT_GRADIENT)
    )
    return _Parts(forward, forward, dx, dweight).text()
