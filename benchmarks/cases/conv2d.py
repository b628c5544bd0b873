"""Convolutions with bias and ReLU, dilated and depthwise, on CPU and CUDA, in both layouts.

Bytes: forward reads x and the weight and writes y. Backward reads dy and y (for ReLU's mask), x and the weight,
and writes dx and dweight. Flops: forward 2 per product, backward twice that; bias and ReLU are not counted.
Stock runs in both layouts. In the layout that is not the case's (``eager channels_last`` or ``eager contiguous``), the
conversions of x and the output are included. A dilated depthwise convolution, for which stock has no fast kernel, also
runs in channels_last as one with zeros between the weights (``eager zero-stuffed``) and as one without dilation on
every d-th pixel (``eager phases``). For fwd + bwd at dilation 2 in contiguous layout, these are 9.9x and 9.6x as fast
as ``eager``, channels_last alone 7.1x.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ..norms import LAYOUTS, MARGIN, SIZE, Random, run
from ..registry import Case, register

if TYPE_CHECKING:
    import torch

    from ..measure_op import Function, Problem, Tensors


class Conv(NamedTuple):
    """[N, C, H, W] by a square kernel, padded so that stride 1 keeps height and width."""

    shape: tuple[int, int, int, int]
    outputs: int
    kernel: int = 3
    dilation: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel - 1) // 2

    @property
    def output(self) -> tuple[int, ...]:
        sizes = ((size - 1) // self.stride + 1 for size in self.shape[2:])  # odd kernels
        return (self.shape[0], self.outputs, *sizes)

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.shape[1] // self.groups, self.kernel, self.kernel)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.outputs == self.shape[1]

    @property
    def name(self) -> str:
        kind = "conv2d_depthwise" if self.depthwise else "conv2d"
        parts = [kind, f"{self.kernel}x{self.kernel}"]
        if not self.depthwise and self.outputs != self.shape[1]:
            parts.append(f"to{self.outputs}")
        parts += [f"d{self.dilation}"] if self.dilation != 1 else []
        parts += [f"s{self.stride}"] if self.stride != 1 else []
        return "_".join(parts)


def stock(conv: Conv, act: bool, layout: str = "") -> Function:
    """torch's convolution with its bias, then ReLU in place, as nn.Conv2d and nn.ReLU(inplace=True).

    With ``layout``, it runs in that layout and converts x and the output.
    """
    import torch
    import torch.nn.functional as F

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        x, weight = inputs["x"], inputs["weight"]
        given, inside = torch.contiguous_format, torch.channels_last
        if layout == "contiguous":
            given, inside = inside, given
        if layout:
            x, weight = (t.contiguous(memory_format=inside) for t in (x, weight))
        options = conv.stride, conv.padding, conv.dilation, conv.groups
        y = F.conv2d(x, weight, inputs.get("bias"), *options)
        y = F.relu_(y) if act else y
        return y.contiguous(memory_format=given) if layout else y

    return function


def zero_stuffed(conv: Conv) -> Function:
    """The dilated convolution as a larger one, whose weight has zeros between the taps."""
    import torch
    import torch.nn.functional as F

    size, step = conv.dilation * (conv.kernel - 1) + 1, conv.dilation

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        x, weight = inputs["x"], inputs["weight"]
        given = memory_format(x)
        large = weight.new_zeros(*weight.shape[:2], size, size)
        large[:, :, ::step, ::step] = weight
        x = x.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, large, None, conv.stride, conv.padding, 1, conv.groups)
        return y.contiguous(memory_format=given)

    return function


def phases(conv: Conv) -> Function:
    """The dilated convolution as one without dilation on d * d images, each with every d-th pixel of every d-th row."""
    import torch
    import torch.nn.functional as F

    d = conv.dilation
    images, channels, height, width = conv.shape

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        x, weight = inputs["x"], inputs["weight"]
        given = memory_format(x)
        x = x.reshape(images, channels, height // d, d, width // d, d).permute(0, 3, 5, 1, 2, 4)
        x = x.reshape(-1, channels, height // d, width // d)
        x = x.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, None, 1, (conv.kernel - 1) // 2, 1, conv.groups)
        y = y.reshape(images, d, d, -1, height // d, width // d).permute(0, 3, 4, 1, 5, 2)
        return y.reshape(images, -1, height, width).contiguous(memory_format=given)

    return function


def memory_format(x: torch.Tensor) -> torch.memory_format:
    import torch

    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def fused(conv: Conv, act: bool) -> Function:
    from advdl_ops import functional

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        return functional.conv2d(
            inputs["x"], inputs["weight"], inputs.get("bias"), conv.stride, conv.padding, conv.dilation, conv.groups,
            act="relu" if act else None,
        )  # fmt: skip

    return function


def problem(case: Case) -> Problem:
    import torch

    from ..measure_op import Problem

    conv, act = case.options["conv"], bool(case.options["epilogue"])
    assert isinstance(conv, Conv)
    random, dtype = Random(case), getattr(torch, case.dtype)
    scale = math.prod(conv.weight[1:]) ** -0.5
    inputs: dict[str, Any] = {
        "x": random.activation().requires_grad_(),
        "weight": random.normal(*conv.weight, scale=scale).to(dtype),
    }
    if case.layout == "channels_last":
        inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    inputs["weight"].requires_grad_()
    if act:
        inputs["bias"] = random.normal(conv.outputs, scale=0.2).to(dtype).requires_grad_()
    other = next(layout for layout in LAYOUTS if layout != case.layout)
    functions = {
        "eager": stock(conv, act),
        "advdl_ops": fused(conv, act),
        f"eager {other}": stock(conv, act, other),
    }
    if conv.depthwise and conv.dilation > 1 and not act:
        functions["eager zero-stuffed"] = zero_stuffed(conv)
        if conv.stride == 1 and not any(pixels % conv.dilation for pixels in conv.shape[2:]):
            functions["eager phases"] = phases(conv)
    made = Problem(inputs, {}, functions)
    made.grad = random.normal(*conv.output).to(dtype)
    if act:
        before = stock(conv, False)({n: t.detach().double() for n, t in inputs.items()}, {})
        # Near ReLU's kink, rounding decides the side, and both implementations may have the full error there.
        made.grad = made.grad.masked_fill(before.abs() < MARGIN[case.dtype], 0.0)
    if case.layout == "channels_last":
        made.grad = made.grad.contiguous(memory_format=torch.channels_last)
    return made


def add(
    conv: Conv,
    layout: str,
    *,
    epilogue: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    suites: tuple[str, ...] = ("ops",),
    modes: tuple[str, ...] = ("fwd", "full"),
    target: str = "",
    compile_ours: bool = True,
    hidden: bool = False,
) -> None:
    op = conv.name + ("_bias_relu" if epilogue else "")
    x, y, weight = (math.prod(shape) for shape in (conv.shape, conv.output, conv.weight))
    elements = {"fwd": x + y + weight, "bwd": 2 * x + (1 + epilogue) * y + 2 * weight}
    products = y * math.prod(conv.weight[1:])
    flops = {"fwd": 2 * products, "bwd": 4 * products}
    elements["full"], flops["full"] = sum(elements.values()), sum(flops.values())
    register(
        Case(
            name="/".join([op, "x".join(map(str, conv.shape)), layout, dtype, device]),
            suites=suites,
            op=op,
            modes=modes,
            dtype=dtype,
            layout=layout,
            shape=conv.shape,
            device=device,
            run=run(problem),
            bytes={mode: elements[mode] * SIZE[dtype] for mode in modes},
            flops={mode: flops[mode] for mode in modes},
            target=target,
            compile=not hidden,
            compile_ours=compile_ours,
            hidden=hidden,
            options={"conv": conv, "epilogue": epilogue},
        )
    )


STEM = (16, 64, 56, 56)

for _layout in LAYOUTS:
    _first = _layout == "contiguous"
    for _dilation, _target in (
        (1, ">= 2x" if _first else ">= 1.5x"),
        (2, ">= 8x"),
        (4, ">= 8x"),
    ):
        _conv = Conv(STEM, 64, 3, _dilation, groups=64)
        add(_conv, _layout, epilogue=False, target=_target)
    _target = ">= 4x" if _first else ">= 2x"
    add(Conv(STEM, 64, 7, groups=64), _layout, epilogue=False, compile_ours=False, target=_target)
    for _dilation in (2, 4, 6, 8, 12):
        _target = ">= 0.95x" if _dilation == 8 else ">= 1.6x / >= 1.4x"
        add(Conv(STEM, 64, 3, _dilation), _layout, compile_ours=False, target=_target)
    # The layers of MobileNets that halve the image, and those with small images.
    add(
        Conv((16, 64, 112, 112), 64, stride=2, groups=64),
        _layout,
        epilogue=False,
        compile_ours=False,
    )
    add(Conv((16, 512, 14, 14), 512, groups=512), _layout, epilogue=False, compile_ours=False)
    # The last stages of a ResNet for small images: few pixels, large weights.
    for _conv in (Conv((16, 512, 4, 4), 512), Conv((16, 256, 7, 7), 512, stride=2)):
        add(_conv, _layout, epilogue=False, compile_ours=False)

    # The 3x3 stages of a ResNet, which Winograd's algorithm may serve.
    for _channels, _pixels in ((64, 56), (128, 28), (256, 14), (512, 14)):
        for _batch in (1, 8):
            _shape = (_batch, _channels, _pixels, _pixels)
            add(
                Conv(_shape, _channels),
                _layout,
                epilogue=False,
                compile_ours=False,
                target=">= 1.8x / >= 1.69x",
            )

# DeepLab: the dilated stages of its ResNet, and the branches of its pyramid (Chen et al. 2017, arXiv:1706.05587).
DEEPLAB = (
    *(Conv((8, 512, size, size), 512, 3, dilation) for size in (33, 65) for dilation in (2, 4)),
    *(Conv((8, 2048, size, size), 256, 3, d) for size in (33, 65) for d in (6, 12, 18)),
)
# ResNet-50, one of each kind and stage.
RESNET = (
    Conv((32, 64, 56, 56), 64, 1),
    Conv((32, 64, 56, 56), 64),
    Conv((32, 64, 56, 56), 256, 1),
    Conv((32, 128, 56, 56), 128, stride=2),
    Conv((32, 128, 28, 28), 128),
    Conv((32, 512, 28, 28), 1024, 1, stride=2),
    Conv((32, 256, 14, 14), 256),
    Conv((32, 1024, 14, 14), 256, 1),
    Conv((32, 512, 7, 7), 512),
    Conv((32, 512, 7, 7), 2048, 1),
)
for _layout in LAYOUTS:
    for _conv in DEEPLAB:
        add(_conv, _layout, dtype="bfloat16", device="cuda", compile_ours=_conv.shape[2] == 33)
    for _dilation in (1, 2, 4):
        _depthwise = Conv((32, 256, 56, 56), 256, 3, _dilation, groups=256)
        add(_depthwise, _layout, epilogue=False, dtype="bfloat16", device="cuda")
    add(Conv((32, 256, 56, 56), 256, 7, groups=256), _layout, dtype="bfloat16", device="cuda")
for _conv in RESNET:
    for _epilogue in (False, True):
        add(_conv, "channels_last", epilogue=_epilogue, dtype="bfloat16", device="cuda")
add(DEEPLAB[0], "channels_last", device="cuda")

# For tests of the benchmark itself.
for _layout in LAYOUTS:
    add(Conv((2, 4, 6, 6), 6, 3, 2), _layout, hidden=True)
    add(Conv((2, 4, 6, 6), 4, 3, 2, groups=4), _layout, epilogue=False, hidden=True)
