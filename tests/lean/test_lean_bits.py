"""Outputs, gradients, running statistics and random numbers at each level: those without it, to the last bit."""

import functools

import pytest
import torch
from support.lean import LEVELS, assert_same_bits, assert_same_values, leaned, step, tiny_net
from torch.nn import functional as F

from advdl_ops import models, nn
from advdl_ops._lean import Kind, recipes
from advdl_ops.functional import ConvNorm, batch_norm_act, conv2d, conv_chain

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
extra = pytest.mark.extra

autocast = functools.partial(torch.autocast, "cpu", bf16)


class PreActivation(torch.nn.Module):
    """A residual block of norm, ReLU and convolution, whose sum is the convolution's."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.norm1 = nn.BatchNormAct2d(channels, act="relu")
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2 = nn.BatchNormAct2d(8, act="relu")
        self.conv2 = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x):
        out = self.conv1(self.norm1(x))
        return self.conv2(self.norm2(out), x)


class Dense(torch.nn.Module):
    """Dense connections by functions: each unit takes the concatenation of all before."""

    def __init__(self, growth=4, units=3, channels=3):
        super().__init__()
        self.growth, self.units = growth, torch.nn.ModuleList()
        for index in range(units):
            inputs = channels + index * growth
            self.units.append(
                torch.nn.ModuleList(
                    [
                        nn.BatchNormAct2d(inputs),
                        nn.Conv2d(inputs, 4 * growth, 1, bias=False),
                        nn.BatchNormAct2d(4 * growth),
                        nn.Conv2d(4 * growth, growth, 3, bias=False),
                    ]
                )
            )

    def forward(self, x):
        features = [x]
        for norm1, conv1, norm2, conv2 in self.units:
            chain = [
                ConvNorm(
                    conv.weight, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                    padding=conv.kernel_size[0] // 2, order="bn-act-conv",
                )
                for norm, conv in ((norm1, conv1), (norm2, conv2))
            ]  # fmt: skip
            features.append(conv_chain(features, chain, training=self.training))
        return torch.cat(features, 1)


class SqueezeExcitation(torch.nn.Module):
    """Layers of torch between those of this package, and an activation that several of them save."""

    def __init__(self, channels=12):
        super().__init__()
        self.conv1 = nn.ConvBNAct(3, channels, 3, act="silu")
        self.reduce = torch.nn.Conv2d(channels, 4, 1)
        self.expand = torch.nn.Conv2d(4, channels, 1)
        self.conv2 = nn.ConvBNAct(channels, channels, 3, act="hardswish")
        self.conv3 = nn.ConvBNAct(channels, 2 * channels, 1, act="leaky_relu")

    def forward(self, x):
        x = self.conv1(x)
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = torch.sigmoid(self.expand(F.silu(self.reduce(scale))))
        x = self.conv2(x * scale, x)  # a residual that is an activation
        return self.conv3(F.dropout(x, 0.3, self.training)).mean((2, 3))


def resnet(kind, layers=(1, 1, 1, 1), **options):
    return models.ResNet(kind, layers, 5, **options)


def group_norm(channels):
    return nn.GroupNorm(4, channels)


NETS = {
    "tiny basic": functools.partial(tiny_net, models.BasicBlock),
    "tiny bottleneck": tiny_net,
    "tiny bottleneck, group norm": functools.partial(tiny_net, norm=group_norm),
    "tiny basic, layer norm": functools.partial(tiny_net, models.BasicBlock, norm=nn.LayerNorm2d),
    "pre-activation": lambda: torch.nn.Sequential(
        nn.Conv2d(3, 16, 3), *[PreActivation(16) for _ in range(3)], nn.BatchNormAct2d(16)
    ),
    "dense": Dense,
    "squeeze and excitation": SqueezeExcitation,
    "unet": functools.partial(models.UNet, 2, base_channels=4, depth=2),
    "bilinear unet": functools.partial(
        models.UNet, 2, True, base_channels=4, depth=2, norm="group"
    ),
}
LARGE = {
    "resnet of basic blocks": functools.partial(resnet, models.BasicBlock),
    "resnet of bottlenecks": functools.partial(resnet, models.Bottleneck, (2, 1, 2, 1)),
    "resnet, group norm": functools.partial(resnet, models.Bottleneck, norm="group"),
    "resnext": functools.partial(resnet, models.Bottleneck, groups=32, width_per_group=4),
    "resnet18": functools.partial(models.create_model, "resnet18", num_classes=5),
    "resnet50": functools.partial(models.create_model, "resnet50", num_classes=5),
    "unet, dilated": functools.partial(
        models.UNet, 2, base_channels=16, depth=3, dilated_bottleneck=True
    ),
    "unet_resnet": functools.partial(models.UNetResNet, models.BasicBlock, (2, 1, 1, 1), 2),
    "unet_resnet, group norm": functools.partial(
        models.UNetResNet, models.Bottleneck, (1, 1, 1, 1), 2, norm="group"
    ),
    "deeplabv3": functools.partial(models.create_model, "deeplabv3_resnet50", num_classes=3),
}


def check(net, shape, dtype, layout, **options):
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
    return assert_same_bits(net.to(dtype), x, **options)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [f32, f64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NETS)
def test_small_networks(name, dtype, layout):
    """Two steps: the second is of running statistics that the first has written."""
    check(NETS[name](), (2, 3, 35, 33), dtype, layout, steps=2)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [f32, f64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=extra) for name in LARGE])
def test_large_networks(name, dtype, layout):
    check(LARGE[name](), (2, 3, 35, 33), dtype, layout)


@pytest.mark.parametrize("backward", ["outside", "inside"])
@pytest.mark.parametrize(
    "name", ["tiny bottleneck", "tiny basic", "unet", "dense", "pre-activation"]
)
def test_autocast(name, backward):
    """With the backward outside of autocast, as torch advises, and inside, as some do."""
    net, x = NETS[name](), torch.randn(2, 3, 35, 33)
    if backward == "inside":
        assert_same_bits(net, x, context=autocast)
        return

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        @autocast()
        def forward(self, x):
            return self.net(x)

    assert_same_bits(Net(), x)


@pytest.mark.parametrize("level", LEVELS)
def test_a_backward_under_another_autocast(level):
    """What is made again has the dtype of the forward."""
    plain = tiny_net()
    lean, x = leaned(plain, level), torch.randn(2, 3, 20, 20)

    def backward(loss):
        with autocast():
            loss.backward()

    assert_same_values(step(lean, x, backward=backward), step(plain, x, backward=backward))


@extra
@pytest.mark.parametrize("name", LARGE)
def test_autocast_of_large_networks(name):
    assert_same_bits(LARGE[name](), torch.randn(2, 3, 35, 33), context=autocast)


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 4, 4), (1, 3, 5, 9), (3, 3, 1, 40), (2, 3, 2, 1)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["fp32", "bf16"])
def test_small_images(dtype, layout, shape):
    """Images of one pixel have both layouts at once."""
    check(tiny_net(), shape, dtype, layout)
    check(tiny_net(models.BasicBlock), shape, dtype, layout)


def test_sizes_of_images_that_change():
    plain, lean = tiny_net(), leaned(tiny_net(), "deepest")
    lean.load_state_dict(plain.state_dict())
    for size in (33, 20, 47):
        x = torch.randn(2, 3, size, size)
        assert_same_values(step(lean, x), step(plain, x), size)


@pytest.mark.parametrize("act", ["relu", "silu", "leaky_relu", "gelu", None])
def test_activations_of_a_chain_with_residuals(act):
    """Blocks whose activation needs its input in backward have a residual to keep, not an output."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([nn.ConvBNAct(6, 6, 3, act=act) for _ in range(4)])

        def forward(self, x):
            x = F.pad(x, (0, 0, 0, 0, 0, 3))
            for layer in self.layers:
                x = layer(x, x)
            return x

    x = torch.randn(2, 3, 9, 9, dtype=f64)
    kinds = assert_same_bits(Net().to(f64), x, levels=["stage", "deepest"])
    assert set(kinds["stage"]) == {Kind.SUM}


def test_every_kind_is_made_again():
    """What each level of a network of bottlenecks makes again; the other tests see that it is right."""
    kinds = assert_same_bits(tiny_net(), torch.randn(2, 3, 20, 20))
    found = {level: set(made) for level, made in kinds.items()}
    assert found == {
        "block": {Kind.PASS},
        "stage": {Kind.PASS, Kind.SUM},
        "deep": {Kind.PASS, Kind.PRODUCT},
        "deepest": {Kind.PASS, Kind.SUM, Kind.PRODUCT},
    }


def test_what_a_product_is_made_of(monkeypatch):
    """Of a tensor that is kept, or of one pass: the output of a residual block would need all blocks before it."""
    found = []
    make = recipes.Recipe.__init__

    def noted(self, kind, function, sources, like):
        make(self, kind, function, sources, like)
        found.append((kind, [s.kind for s in sources if isinstance(s, recipes.Recipe)]))

    monkeypatch.setattr(recipes.Recipe, "__init__", noted)
    leaned(tiny_net(blocks=1), "deepest")(torch.randn(2, 3, 20, 20))
    sources = [kinds for kind, kinds in found if kind is Kind.PRODUCT]
    # The shortcut and the last convolution of each stage. The first shortcut's input is behind max-pooling.
    assert sorted(sources, key=len) == [[], [], [Kind.PASS], [Kind.PASS]]


@pytest.mark.parametrize("level", LEVELS)
def test_products_with_bias_and_stride(level):
    """1x1 convolutions with more outputs than inputs, in every form in which they may be made again."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = torch.nn.ModuleList(
                [
                    nn.Conv2d(3, 8, 1),
                    nn.Conv2d(8, 12, 1, stride=2, bias=False),
                    nn.Conv2d(12, 20, 1, padding=1),
                ]
            )
            self.norms = torch.nn.ModuleList(
                [nn.BatchNormAct2d(c, act="relu") for c in (8, 12, 20)]
            )

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(conv(x))
            return x

    for dtype in (f32, f64, bf16):
        for layout in (CONTIGUOUS, CHANNELS_LAST):
            check(Net(), (2, 3, 11, 7), dtype, layout, levels=[level])


@pytest.mark.parametrize("level", LEVELS)
def test_statistics_that_are_not_tracked_and_norms_without_weights(level):
    def norm(channels):
        return nn.BatchNormAct2d(channels, affine=False, track_running_stats=False)

    def cumulative(channels):
        return nn.BatchNormAct2d(channels, momentum=None)

    for make in (norm, cumulative):
        check(tiny_net(norm=make), (2, 3, 19, 19), f32, CONTIGUOUS, levels=[level], steps=2)


@pytest.mark.parametrize("level", LEVELS)
def test_frozen_norms_in_training(level):
    """Layers in evaluation mode take the running statistics, which backward must find again."""

    def froze(net, how):
        for index, module in enumerate(net.modules()):
            if isinstance(module, torch.nn.BatchNorm2d) and (how == "all" or index % 2):
                module.eval()
                module.weight.requires_grad_(False)
                module.bias.requires_grad_(False)
                module.running_mean.uniform_(-0.2, 0.2)
        return net

    for how in ("all", "half"):
        check(froze(tiny_net(), how), (2, 3, 19, 19), f32, CONTIGUOUS, levels=[level], steps=2)


@pytest.mark.parametrize("count", [1, 2])
def test_threads(count, threads):
    torch.set_num_threads(count)
    check(tiny_net(width=16), (2, 3, 33, 33), f32, CONTIGUOUS)


def test_functions_inside_of_a_module_at_a_level():
    """``conv2d`` and ``batch_norm_act`` as functions, with a plain sum between them."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(8, 3, 1, 1))
            self.b = torch.nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x):
            first = batch_norm_act(conv2d(x, self.a), None, None, training=True, act="relu")
            second = conv2d(first, self.b, padding=1)
            second = batch_norm_act(second, None, None, training=True, residual=first, act="relu")
            return conv2d(second + first, self.b, padding=1) * second

    assert_same_bits(Net().to(f64), torch.randn(2, 3, 9, 7, dtype=f64))
