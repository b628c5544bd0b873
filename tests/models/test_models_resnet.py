"""The ResNets: what every model must do, and their options. Against torchvision: test_models_torchvision.py."""

from typing import ClassVar

import pytest
import torch
from support.models import (
    ModelTester,
    check_compiled,
    random_input,
    randomize,
    recorded_calls,
    relative_error,
)

from advdl_ops import models, nn
from advdl_ops.models.resnet import Bottleneck


class TestResNet18(ModelTester):
    name = "resnet18"


class TestResNet50Small(ModelTester):
    """Bottlenecks, dilation, another stem and another channel count, all at once."""

    name = "resnet50"
    input_shape = (2, 1, 10, 10)
    odd_shapes = ((1, 1, 9, 17), (2, 1, 1, 1), (1, 1, 2, 15))
    options: ClassVar = {
        "in_channels": 1,
        "stem": "small",
        "replace_stride_with_dilation": (False, False, True),
    }

    @pytest.mark.slow
    def test_compile(self, model):
        super().test_compile(model)


def tiny(block=models.BasicBlock, **options):
    """One block per stage."""
    torch.manual_seed(0)
    model = models.ResNet(block, (1, 1, 1, 1), 5, name="tiny", **options)
    return randomize(model)


def test_compile_bottlenecks():
    model = tiny(models.Bottleneck, stem="small", replace_stride_with_dilation=(False, False, True))
    check_compiled(model.double(), random_input((2, 3, 16, 16)), "aot_eager")


@pytest.mark.slow
def test_compile_inductor():
    check_compiled(tiny().double(), random_input((2, 3, 40, 40)), "inductor")


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as published with torchvision's weights
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("resnext50_32x4d", 25_028_904),
        ("wide_resnet50_2", 68_883_240),
    ],
)
def test_parameter_count(name, parameters):
    with torch.device("meta"):
        model = models.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_modules_are_torchvisions():
    """Norms without an activation, and a ReLU in each block, which can be replaced."""
    model = models.resnet50(num_classes=2)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert isinstance(module, nn.BatchNormAct2d), name
            assert module.act.name == "identity", name
        if isinstance(module, Bottleneck):
            assert list(dict(module.named_children()))[:7] == [
                "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu",
            ]  # fmt: skip
            assert type(module.relu) is torch.nn.ReLU, name


def test_norm_and_addition_are_one_call(monkeypatch):
    """Each of the 20 convolutions goes with its norm; 8 of them with a residual."""
    calls = recorded_calls(monkeypatch)
    models.resnet18(num_classes=2)(torch.randn(2, 3, 32, 32))
    assert len(calls) == 20
    assert sum(residual is not None for _, _, residual, _ in calls) == 8
    assert sum(act is None for _, _, _, act in calls) == 3
    assert all(act is not None for _, _, residual, act in calls if residual is not None)


# ---------------------------------------------------------------- options


def test_initial_values():
    torch.manual_seed(0)
    model = models.resnet50(num_classes=2)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), name
            assert module.bias is None
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual(name, last):
    model = models.create_model(name, num_classes=2, zero_init_residual=True)
    for key, parameter in model.named_parameters():
        if key.startswith("layer") and f".{last}.weight" in key:
            assert (parameter == 0).all(), key
        elif ".bn" in key and key.endswith("weight"):
            assert (parameter == 1).all(), key
    # A block without downsample is then its shortcut.
    block = model.layer1[1]
    x = torch.rand(2, 64 * block.expansion, 5, 5)
    assert torch.equal(block(x), x)


def test_in_channels():
    model = models.create_model("resnet18", num_classes=5, in_channels=1)
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_small_stem():
    model = tiny(stem="small").double().eval()
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert list(model.state_dict()) == list(tiny().state_dict())
    sizes = {}
    for name in ("conv1", "layer1", "layer4"):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _, __, out, name=name: sizes.update({name: out.shape[2:]})
        )
    x = random_input((2, 3, 32, 32))
    model(x)
    assert sizes["layer1"] == (32, 32)
    assert sizes["layer4"] == (4, 4)
    # conv1 with its norm equals the plain layers, and no pooling follows.
    stem = torch.relu(
        model.bn1.weight.view(-1, 1, 1)
        * (
            torch.nn.functional.conv2d(x, model.conv1.weight, padding=1)
            - model.bn1.running_mean.view(-1, 1, 1)
        )
        / (model.bn1.running_var + model.bn1.eps).sqrt().view(-1, 1, 1)
        + model.bn1.bias.view(-1, 1, 1)
    )
    rest = torch.nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4)
    expected = model.fc(rest(stem).mean((2, 3)))
    assert relative_error(model(x), expected) < 1e-12


def test_dilation_keeps_resolution():
    def size(dilate):
        model = models.resnet50(num_classes=2, replace_stride_with_dilation=dilate).eval()
        sizes = []
        model.layer4.register_forward_hook(lambda _, __, out: sizes.append(out.shape[2]))
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
        return sizes[0]

    assert size(None) == 2
    assert size((False, False, True)) == 4
    assert size((False, True, True)) == 8


def test_group_norm():
    model = models.create_model("resnet18", num_classes=5, norm="group", zero_init_residual=True)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert isinstance(model.layer1[0].bn1, nn.GroupNorm)
    assert model.layer1[0].bn1.num_groups == 32
    assert (model.layer1[0].bn2.weight == 0).all()
    randomize(model).double()
    # One sample with one pixel left is no error here.
    for shape in ((1, 3, 32, 32), (2, 3, 40, 40)):
        x = random_input(shape)
        out = model(x)
        assert relative_error(model(x[:1]), out[:1]) < 1e-10


class StockGroupNorm(torch.nn.GroupNorm):
    """torch's layers in place of advdl_ops.nn.GroupNorm."""

    def __init__(self, num_groups, num_channels, *, act=None):
        super().__init__(num_groups, num_channels)
        self.act = act

    def forward(self, x, residual=None):
        y = super().forward(x)
        y = y if residual is None else y + residual
        return y if self.act is None else torch.relu(y)


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [("resnet18", torch.contiguous_format), ("resnet50", torch.channels_last)],
)
def test_group_norm_equals_torchs(monkeypatch, name, memory_format):
    options = {"num_classes": 5, "norm": "group", "stem": "small"}
    model = randomize(models.create_model(name, **options)).double()
    monkeypatch.setattr(nn, "GroupNorm", StockGroupNorm)
    stock = models.create_model(name, **options).double()
    stock.load_state_dict(model.state_dict(), strict=True)
    kinds = {type(m) for m in stock.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert kinds == {StockGroupNorm}
    results = []
    for each in (model, stock):
        each.to(memory_format=memory_format)
        x = random_input((2, 3, 24, 17)).contiguous(memory_format=memory_format).requires_grad_()
        out = each(x)
        out.backward(random_input(out.shape, seed=1))
        gradients = {key: p.grad for key, p in each.named_parameters()}
        results.append({"out": out.detach(), "x": x.grad, **gradients})
    found, expected = results
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-9, key


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (2, 3, 32), (2, 3, 4, 32, 32), (2, 4, 32, 32), (2, 32, 32, 3), ()]
)
@pytest.mark.parametrize("train", [True, False])
def test_wrong_shape(shape, train):
    model = tiny().train(train)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = ValueError if len(shape) != 4 else RuntimeError  # torch's own types
    with pytest.raises(error, match=r"^tiny: input shape \[.*\] must be \[N, 3, H, W\]$"):
        model(torch.zeros(shape))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_input(dtype):
    with pytest.raises(RuntimeError, match=rf"^tiny: input dtype {dtype} must be floating point"):
        tiny()(torch.zeros(2, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "side"), [({}, 32), ({"stem": "small"}, 8), ({"norm_eval": True}, 32)]
)
def test_one_value_per_channel_in_training(options, side):
    frozen = options.pop("norm_eval", False)
    model = tiny(**options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if frozen:  # norms in eval mode inside a model in train mode: nothing to refuse
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        assert model(torch.randn(1, 3, side, side)).isfinite().all()
        return
    for shape in ((1, 3, side, side), (1, 3, 1, 1), (1, 3, side, 5)):
        with pytest.raises(
            ValueError, match=r"^tiny: input shape .* one value per channel in training"
        ):
            model(torch.randn(shape))
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
    # One more pixel, or a second sample, or eval mode, and it is well.
    for shape in ((1, 3, side + 1, 1), (1, 3, 2, side + 1), (2, 3, 1, 1)):
        assert model(torch.randn(shape)).isfinite().all()
    assert model.eval()(torch.randn(1, 3, 1, 1)).isfinite().all()
    # A part that trains within a model in eval mode.
    model.layer3.train(), model.layer4.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^tiny: .* one value per channel in training"):
        model(torch.randn(1, 3, side, side))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


# ---------------------------------------------------------------- modules that others wrapped


def test_hooks_run_in_eval():
    """Folding may not pass over a hook: feature extraction and old-style weight norm live on them."""
    model = tiny().double().eval()
    x = random_input((2, 3, 32, 32))
    with torch.no_grad():
        expected = model(x)
        seen = []
        for name in ("conv1", "layer1.0.conv2", "layer1.0.bn2", "bn1"):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        out = model(x)
    assert seen == ["conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2"]
    assert relative_error(out, expected) < 1e-12


def test_parametrized_convolution():
    model = tiny().double().eval()
    x = random_input((2, 3, 32, 32))
    with torch.no_grad():
        model(x)
        torch.nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
        model.layer1[0].conv1.parametrizations.weight.original0.mul_(2)
        folded = model(x)
    assert relative_error(folded, model(x).detach()) < 1e-12


# ---------------------------------------------------------------- training


def test_one_seed_one_result():
    def run():
        torch.manual_seed(0)
        model = models.resnet18(num_classes=3, stem="small")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x, y = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
        for _ in range(2):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.detach(), model.state_dict()

    (loss, state), (again, state_again) = run(), run()
    assert torch.equal(loss, again)
    for key, value in state.items():
        assert torch.equal(value, state_again[key]), key


def test_it_learns():
    """Four samples by heart in a few steps."""
    torch.manual_seed(0)
    model = tiny(stem="small")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    first = torch.nn.functional.cross_entropy(model(x), y).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    assert (model(x).argmax(1) == y).all()
