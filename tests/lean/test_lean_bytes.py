"""Bytes held between forward and backward, and the peak of both, beside those without a level and stock."""

import copy

import pytest
import torch
from support.lean import LEVELS, held_after, leaned, tiny_net

from advdl_ops import models, nn
from advdl_ops.functional import ConvNorm, basic_block, bottleneck, conv_chain
from benchmarks import memory
from benchmarks.stock_resnet import StockResNet
from benchmarks.stock_unet import StockUNet


def bytes_of(model, x):
    """Held and peak bytes of one step, after another one."""

    def forward():
        return model(x).square().mean()

    def backward(loss):
        loss.backward()
        model.zero_grad(set_to_none=True)

    backward(forward())
    return memory.held_and_peak(forward, backward, torch.device("cpu"))


def held_by(model, x):
    """Held bytes alone, in half of the time."""
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)
    return held_after(lambda: model(x).square().mean())


def at_each_level(model, x, of=bytes_of):
    """Held and peak bytes by level; ``None``: without one."""
    return {level: of(leaned(model, level), x) for level in (None, *LEVELS)}


# The largest share of stock's held bytes, by level.
BOUNDS = {
    "resnet50": (0.81, 0.56, 0.48, 0.29),
    "resnet18": (0.70, 0.56, 0.68, 0.60),
    "unet": (0.55, 0.55, 0.55, 0.55),
}


def networks(name):
    """Ours and stock's, and an input."""
    if name == "unet":
        return models.UNet(2, base_channels=16), StockUNet(3, 2, 16), torch.randn(2, 3, 96, 96)
    bottleneck = name == "resnet50"
    ours = models.create_model(name, num_classes=10)
    stock = StockResNet((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2), bottleneck, 10)
    return ours, stock, torch.randn(8, 3, 112, 112)


def check_bounds(name):
    ours, stock, x = networks(name)
    held_by_stock, _ = bytes_of(stock, x)
    found = at_each_level(ours, x)
    plain, plain_peak = found.pop(None)
    assert plain <= 1.05 * held_by_stock
    shares = {level: held / held_by_stock for level, (held, _) in found.items()}
    for bound, (level, share) in zip(BOUNDS[name], shares.items(), strict=True):
        assert share <= bound, (level, shares)
    for level, (_, peak) in found.items():
        assert peak <= 1.1 * plain_peak, level


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        pytest.param("resnet18", marks=pytest.mark.extra),
        pytest.param("unet", marks=pytest.mark.extra),
    ],
)
def test_bounds(name):
    check_bounds(name)


def test_levels_are_ordered():
    """Each level keeps less than those that it contains, and none has a peak above that of no level."""
    net, x = tiny_net(blocks=3), torch.randn(4, 3, 64, 64)
    found = at_each_level(net, x)
    held = {level: held for level, (held, _) in found.items()}
    assert held["block"] < 0.8 * held[None]
    assert held["stage"] < held["block"] and held["deep"] < held["block"]
    assert held["deepest"] < min(held["stage"], held["deep"])
    assert held["deepest"] < 0.45 * held[None]
    for level, (_, peak) in found.items():
        assert peak <= 1.1 * found[None][1], level


@pytest.mark.parametrize("norm", [nn.BatchNormAct2d, lambda channels: nn.GroupNorm(4, channels)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.extra
def test_what_a_chain_keeps(layout, norm):
    """At "block", of a chain of convolution, norm and ReLU, the outputs of the convolutions; counted to the byte."""

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = torch.nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
            self.norms = torch.nn.ModuleList(norm(8) for _ in range(5))

        def forward(self, x):
            for conv, layer in zip(self.convs, self.norms, strict=True):
                x = layer(conv(x), act="relu")
            return x

    net, x = Chain(), torch.randn(2, 8, 32, 32).contiguous(memory_format=layout)
    image = x.numel() * 4
    found = at_each_level(net, x, held_by)
    # The last activation is saved by the square.
    assert found[None] // image == 10
    for level in LEVELS:
        assert 5 * image <= found[level] < 6.1 * image, level
        assert found[level] < found[None] - 3.9 * image, level


def test_under_autocast():
    """Neither fp32 nor bf16 copies of what can be made again."""
    net, x = tiny_net(blocks=3), torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = at_each_level(net, x, held_by)
    assert found["block"] < 0.8 * found[None]
    assert found["deepest"] < 0.5 * found[None]
    assert found["deepest"] < min(found["stage"], found["deep"])


def test_hooked_layers_keep_as_little():
    """A hook on each convolution: the layers run one by one, and leave the same recipes."""
    net, x = tiny_net(), torch.randn(2, 3, 32, 32)
    hooked = copy.deepcopy(net)
    for layer in hooked.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *_: None)
    assert held_by(leaned(hooked, "deepest"), x) == held_by(leaned(net, "deepest"), x)


def test_frozen_layers_keep_nothing():
    """Without gradients there is nothing to keep or to make again."""
    net, x = tiny_net(), torch.randn(2, 3, 32, 32)
    for parameter in net[:4].parameters():
        parameter.requires_grad_(False)
    whole = held_by(leaned(tiny_net(), "block"), x)
    assert held_by(leaned(net, "block"), x) < 0.5 * whole


@pytest.mark.parametrize("level", ["block", "deepest"])
def test_parts_by_name(level):
    """A level of one stage alone saves what it saves there."""
    net, x = tiny_net(), torch.randn(2, 3, 32, 32)
    parts = None, {"2": level}, {"2": level, "3": level}, {"": level, "4": None}, level
    plain, one, two, most, whole = (held_by(leaned(net, lean), x) for lean in parts)
    assert whole < most < plain
    assert whole < two < one < plain


@pytest.mark.parametrize("block", [basic_block, bottleneck, conv_chain])
def test_functions(block):
    """The functions keep less from level to level, without a model."""
    sizes = [(8, 16, 3), (16, 16, 3), (16, 32, 1)] if block is not basic_block else [(8, 8, 3)] * 2
    shortcut = None
    units = []
    for inputs, outputs, size in sizes:
        norm = torch.ones(outputs, requires_grad=True), torch.zeros(outputs, requires_grad=True)
        weight = torch.randn(outputs, inputs, size, size, requires_grad=True)
        units.append(ConvNorm(weight, None, None, *norm, padding=size // 2))
    if block is bottleneck:
        norm = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
        shortcut = ConvNorm(torch.randn(32, 8, 1, 1, requires_grad=True), None, None, *norm)
    x = torch.randn(2, 8, 32, 32, requires_grad=True)

    def call(lean):
        if block is conv_chain:
            out = conv_chain(x, units, training=True, lean=lean)
        else:
            arguments = (*units, shortcut)
            out = block(x, *arguments, training=True, lean=lean)
        return out

    found = {}
    for lean in (None, *LEVELS):
        call(lean)
        found[lean] = held_after(lambda lean=lean: call(lean).sum())
    assert found["block"] < found[None]
    assert found["deepest"] <= found["deep"] <= found["block"]
    assert found["stage"] <= found["block"]
    if block is bottleneck:
        assert found["deepest"] < found["deep"] < found["block"]
        assert found["stage"] < found["block"]


def test_a_concatenation_is_not_kept():
    """Of images that somebody else keeps."""
    parts = [torch.randn(2, 8, 32, 32, requires_grad=True) for _ in range(3)]
    unit = ConvNorm(torch.randn(4, 24, 3, 3, requires_grad=True), None, None, padding=1)

    def held(lean):
        return held_after(lambda: conv_chain(parts, [unit], training=True, lean=lean).sum())

    assert held(None) - held("block") == 3 * parts[0].numel() * 4


def test_evaluation_holds_nothing():
    net, x = leaned(tiny_net(), "deepest").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        net(x)
        held = held_after(lambda: net(x).sum())
    assert held <= 4096
