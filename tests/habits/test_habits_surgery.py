"""Layers exchanged in the zoo and in ``ConvBNAct``, as people do it on torchvision's networks, and converters."""

import copy
import importlib
import itertools
import pickle

import pytest
import torch
from support.torchvision_stub import torchvision_models
from torch import nn as stock

import advdl_ops
from advdl_ops import models, nn

stocks = torchvision_models()
f64 = torch.float64


def pair(name="resnet18"):
    torch.manual_seed(0)
    original = getattr(stocks, name)(num_classes=5).to(f64)
    for layer in original.modules():
        if isinstance(layer, stock.BatchNorm2d):
            for t in (layer.weight, layer.bias, layer.running_mean):
                stock.init.uniform_(t, 0.5, 1.5)
    ours = models.create_model(name, num_classes=5).to(f64)
    ours.load_state_dict(original.state_dict())
    return original, ours


def grey_convolution(model):
    torch.manual_seed(1)
    model.conv1 = stock.Conv2d(1, 64, 7, 2, 3, bias=False, dtype=f64)


def grey_weight(model):
    model.conv1.weight = stock.Parameter(model.conv1.weight.detach().sum(1, keepdim=True))


def replace(model, kind, make):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))


def fused_by_hand(model):
    """The user's own ``fuse()``: the norm goes into the convolution, and Identity into its place."""
    from torch.nn.utils import fuse_conv_bn_eval

    model.eval()
    for parent in list(model.modules()):
        names = list(parent._modules)
        for first, second in itertools.pairwise(names):
            conv, bn = parent._modules[first], parent._modules[second]
            if isinstance(conv, stock.Conv2d) and isinstance(bn, stock.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(conv, bn))
                setattr(parent, second, stock.Identity())


def frozen(bn):
    made = importlib.import_module("torchvision.ops").FrozenBatchNorm2d(bn.num_features).to(f64)
    made.load_state_dict({k: v for k, v in bn.state_dict().items() if "num_batches" not in k})
    return made


def dilated(model):
    block = model.layer4[0]
    for conv in (block.conv1, block.conv2, block.downsample[0]):
        conv.stride = (1, 1)
    model.layer4[1].conv1.dilation = model.layer4[1].conv1.padding = (2, 2)


SURGERY = {
    "first convolution, stock's": (grey_convolution, 1),
    "its weight summed": (grey_weight, 1),
    "group norm": (
        lambda m: replace(
            m, stock.BatchNorm2d, lambda bn: stock.GroupNorm(2, bn.num_features, dtype=f64)
        ),
        3,
    ),
    "one group norm": (lambda m: setattr(m, "bn1", stock.GroupNorm(2, 64, dtype=f64)), 3),
    "frozen norms": (lambda m: replace(m, stock.BatchNorm2d, frozen), 3),
    "identity": (lambda m: replace(m, stock.BatchNorm2d, lambda _: stock.Identity()), 3),
    "gelu": (lambda m: replace(m, stock.ReLU, lambda _: stock.GELU()), 3),
    "prelu": (lambda m: replace(m, stock.ReLU, lambda _: stock.PReLU(dtype=f64)), 3),
    "one activation": (lambda m: setattr(m.layer2[0], "relu", stock.Hardtanh(-0.1, 0.2)), 3),
    "no max-pool": (lambda m: setattr(m, "maxpool", stock.Identity()), 3),
    "dilation in place of a stride": (dilated, 3),
    "another head": (lambda m: setattr(m, "fc", stock.Identity()), 3),
    "synchronized, evaluation": (
        lambda m: stock.SyncBatchNorm.convert_sync_batchnorm(m).eval(),
        3,
    ),
    "fuse() of the user": (fused_by_hand, 3),
    "a sequence in place of a convolution": (
        lambda m: setattr(m, "conv1", stock.Sequential(m.conv1, stock.Hardtanh())),
        3,
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edit", SURGERY)
def test_the_zoo(edit, training):
    change, channels = SURGERY[edit]
    if training and edit in ("synchronized, evaluation", "fuse() of the user"):
        return
    original, ours = pair()
    x = torch.randn(2, channels, 40, 40, dtype=f64)
    if channels == 3:
        ours.eval()(x)  # whatever is kept must not serve later
    for model in (original, ours):
        torch.manual_seed(2)
        change(model)
        model.train(training)
    assert list(ours.state_dict()) == list(original.state_dict())
    expected, found = original(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), original(x), rtol=1e-8, atol=1e-9)
    gradients = [
        torch.autograd.grad(out.square().sum(), [p for p in m.parameters() if p.requires_grad])
        for out, m in ((expected, original), (found, ours))
    ]
    for e, g in zip(*gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-7)


def test_one_image_of_another_stride_trains():
    """The check for one value per channel asks the layers as they are."""
    original, ours = pair()
    for model in (original, ours):
        dilated(model)
    x = torch.randn(1, 3, 32, 32, dtype=f64)
    torch.testing.assert_close(ours(x), original(x), rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="one value per channel"):
        ours(x[..., :16, :16])


def test_too_few_channels_are_named():
    ours = models.resnet18(num_classes=2)
    ours.conv1 = stock.Conv2d(1, 64, 7, 2, 3)
    with pytest.raises(RuntimeError, match=r"must be \[N, 1, H, W\]"):
        ours(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["unet", "fcn_resnet50", "deeplabv3_resnet50", "unet_resnet18"])
def test_synchronized_norms_keep_activations(name):
    torch.manual_seed(0)
    model = models.create_model(name, num_classes=2).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    converted = stock.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(m, stock.BatchNorm2d) for m in converted.modules())
    found = converted(x)
    out = [o["out"] if isinstance(o, dict) else o for o in (found, expected)]
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu"])
def test_a_lone_norm_keeps_its_activation(act):
    model = stock.Sequential(stock.Conv2d(3, 4, 3), nn.BatchNormAct2d(4, act=act)).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    converted = stock.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is stock.SyncBatchNorm
    for each in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(each(x), expected)
    assert not hasattr(nn.BatchNormAct2d(4, act="relu"), "qconfig")
    layer = nn.BatchNormAct2d(4, act="relu")
    layer.qconfig = None  # as torch's quantization sets it
    assert layer.qconfig is None


def test_conv_bn_act_owns_its_activation():
    layer = nn.ConvBNAct(3, 4, 3, act="relu").eval()
    x, residual = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    layer.bn = stock.Identity()
    torch.testing.assert_close(layer(x, residual), (layer.conv(x) + residual).relu())
    layer.act = stock.PReLU()
    torch.testing.assert_close(layer(x, residual), layer.act(layer.conv(x) + residual))
    layer.bn = nn.BatchNormAct2d(4, act="silu").eval()
    expected = layer.act(layer.bn(layer.conv(x)) + residual)
    torch.testing.assert_close(layer(x, residual), expected)
    layer.conv, layer.act = stock.Conv2d(3, 4, 3, padding=1), stock.GELU()
    expected = layer.act(layer.bn(layer.conv(x)) + residual)
    torch.testing.assert_close(layer(x, residual), expected)
    first = nn.ConvBNAct(3, 4, 3, act="relu", order="conv-act-bn").eval()
    first.conv = stock.Conv2d(3, 4, 3, padding=1)
    torch.testing.assert_close(first(x), first.bn(first.conv(x).relu()))


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def made_by_timm(kind):
    torch.manual_seed(0)
    model = (
        importlib.import_module("timm")
        .create_model(kind, num_classes=5, pretrained=False)
        .to(f64)
        .eval()
    )
    for layer in model.modules():
        if isinstance(layer, stock.BatchNorm2d):
            layer.running_mean.normal_()
    return model


@pytest.mark.parametrize("kind", ["efficientnet_b0", "resnetv2_50x1_bit", "convnext_atto"])
def test_timms_layers_remain_instances_of_their_classes(timm, kind):
    model = made_by_timm(kind)
    fast = advdl_ops.optimize(model)
    changed = 0
    for name, layer in model.named_modules():
        own = fast.get_submodule(name)
        assert isinstance(own, type(layer)), name
        changed += type(own) is not type(layer)
    assert changed > 10
    x = torch.randn(1, 3, 64, 64, dtype=f64)
    with torch.no_grad():
        expected = model(x)
        for each in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(each(x), expected, rtol=1e-8, atol=1e-9)
    assert all(
        type(a) is type(b)
        for a, b in zip(advdl_ops.restore(fast).modules(), model.modules(), strict=True)
    )


@pytest.mark.parametrize("converter", ["convert_sync_batchnorm", "freeze_batch_norm_2d"])
@pytest.mark.parametrize("order", ["after", "before"])
def test_timms_own_converters(timm, converter, order):
    convert = getattr(timm.layers, converter)
    model = made_by_timm("efficientnet_b0")
    x = torch.randn(1, 3, 64, 64, dtype=f64)
    with torch.no_grad():
        expected = model(x)
        steps = (advdl_ops.optimize, convert) if order == "after" else (convert, advdl_ops.optimize)
        fast = steps[1](steps[0](model))
        assert not any(isinstance(m, stock.BatchNorm2d) for m in fast.modules())
        torch.testing.assert_close(fast.eval()(x), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("edit", ["act", "drop", "hook"])
def test_parts_of_timms_norms(timm, edit):
    norm = timm.layers.BatchNormAct2d(4, act_layer=stock.SiLU).to(f64)
    model = stock.Sequential(stock.Conv2d(3, 4, 3, dtype=f64), norm).eval()
    fast = advdl_ops.optimize(copy.deepcopy(model))
    x, seen = torch.randn(2, 3, 6, 6, dtype=f64), []
    for each in (model, fast):
        if edit == "act":
            each[1].act = stock.Tanh()
        elif edit == "drop":
            each[1].drop = stock.Hardtanh(-0.2, 0.2)
        else:
            each[1].act.register_forward_hook(lambda _, __, out: seen.append(out) or out * 2)
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert len(seen) == (2 if edit == "hook" else 0)


@pytest.mark.parametrize("act", [None, "relu"])
def test_a_parametrized_norm_adds_before_its_activation(act):
    bn = nn.BatchNormAct2d(4, act=act).eval()
    torch.nn.utils.parametrize.register_parametrization(bn, "weight", stock.Softplus())
    conv, x, residual = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6), torch.randn(2, 4, 4, 4)
    found = nn.conv_bn_act(conv, bn, x, residual)
    expected = bn(conv(x), residual)
    torch.testing.assert_close(found, expected)


def test_any_layer_in_place_of_a_convolution():
    layer = nn.ConvBNAct(3, 4, 3, act="relu").eval()
    layer.conv = stock.Sequential(stock.Conv2d(3, 4, 3), stock.Tanh())
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)).relu())
    assert str(advdl_ops.explain(layer, x))


@pytest.mark.parametrize("part", ["inc", "stem"])
def test_the_first_part_is_replaced(part):
    name = {"inc": "unet", "stem": "convnet"}[part]
    model = models.create_model(name, num_classes=2).eval()
    channels = 64 if part == "inc" else 16
    setattr(model, part, stock.Conv2d(5, channels, 3, padding=1))
    assert model(torch.randn(2, 5, 32, 32)).shape[1] == 2
    with pytest.raises(RuntimeError, match=r"must be \[N, 5, H, W\]"):
        model(torch.randn(2, 3, 32, 32))


def test_vmap_over_the_zoo():
    model = models.resnet18(num_classes=2).eval()
    x = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad(), advdl_ops.use_backend("reference"):
        torch.testing.assert_close(
            torch.func.vmap(model)(x), torch.stack([model(y) for y in x]), rtol=1e-3, atol=1e-4
        )


def test_an_activation_that_is_no_kernels_is_shown(timm):
    fast = advdl_ops.optimize(made_by_timm("efficientnet_b0"))
    fast.bn1.act = stock.PReLU()
    assert "PReLU" in repr(fast.bn1)
