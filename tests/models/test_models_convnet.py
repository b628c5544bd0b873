"""convnet and fcn_dilated: what every model must do, and each restated in plain torch to compare with."""

import re
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.models import (
    ImageTester,
    ModelTester,
    assert_refused,
    assert_same,
    check_no_images,
    group_norms,
    randomize,
    recorded_calls,
)

from advdl_ops import models

pytestmark = pytest.mark.usefixtures("one_thread")


class TestConvNet(ModelTester):
    name = "convnet"
    input_shape = (2, 3, 13, 18)
    odd_shapes = ((1, 3, 33, 7), (2, 3, 1, 1), (1, 3, 2, 15))
    options: ClassVar = {"widths": (8, 16, 32), "blocks": 1}


class TestConvNetGroupNorm(ModelTester):
    """Group norm, widths that do not double, two stages and another channel count, all at once."""

    name = "convnet"
    input_shape = (2, 1, 9, 12)
    odd_shapes = ((1, 1, 9, 17), (2, 1, 3, 1), (1, 1, 3, 3))
    options: ClassVar = {"in_channels": 1, "widths": (8, 24), "blocks": 2, "norm": "group"}


class TestFCNDilated(ImageTester):
    name = "fcn_dilated"
    input_shape = (2, 3, 13, 18)
    odd_shapes = ((1, 3, 1, 7), (2, 3, 1, 1), (1, 3, 31, 19))
    options: ClassVar = {"width": 8}


class TestFCNDilatedGroupNorm(ImageTester):
    """Group norm, other rates and another channel count, all at once."""

    name = "fcn_dilated"
    input_shape = (2, 1, 9, 12)
    odd_shapes = ((1, 1, 1, 7), (1, 1, 31, 19))
    options: ClassVar = {"in_channels": 1, "width": 12, "rates": (1, 3), "norm": "group"}


# ---------------------------------------------------------------- restated in plain torch


def conv_and_norm(channels, out, size=3, stride=1, rate=1):
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, out, size, stride, rate * (size // 2), rate, bias=False),
        torch.nn.BatchNorm2d(out),
    )


class Block(torch.nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_and_norm(channels, out, 3, stride)
        self.conv2, self.bn2 = conv_and_norm(out, out)
        if stride > 1:
            self.downsample = conv_and_norm(channels, out, 1, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ReferenceConvNet(torch.nn.Module):
    def __init__(self, num_classes, in_channels, widths, blocks):
        super().__init__()
        self.stem = conv_and_norm(in_channels, widths[0])
        self.stages = torch.nn.Sequential()
        for index, width in enumerate(widths):
            before = widths[max(index - 1, 0)]
            first = Block(before, width, 2 if index else 1)
            rest = [Block(width, width, 1) for _ in range(blocks - 1)]
            self.stages.append(torch.nn.Sequential(first, *rest))
        self.fc = torch.nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        return self.fc(self.stages(F.relu(self.stem(x))).mean((2, 3)))


class ReferenceFCN(torch.nn.Module):
    def __init__(self, num_classes, in_channels, width, rates):
        super().__init__()
        channels = [in_channels, *[width] * (len(rates) - 1)]
        layers = [conv_and_norm(c, width, rate=r) for c, r in zip(channels, rates, strict=True)]
        self.layers = torch.nn.Sequential(*layers)
        self.head = torch.nn.Conv2d(width, num_classes, 1)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


def check_reference(reference, name, shape, train, **options):
    norm = options.get("norm", "batch")
    reference = randomize(reference if norm == "batch" else group_norms(reference))
    model = models.create_model(name, num_classes=5, in_channels=shape[1], **options)
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict(), strict=True)
    assert_same(model, reference, shape, train)


TRAIN = pytest.mark.parametrize("train", [True, False])
NORM = pytest.mark.parametrize("norm", ["batch", "group"])


@TRAIN
@NORM
@pytest.mark.parametrize(
    ("shape", "widths", "blocks"),
    [((3, 3, 16, 16), (8, 16, 32), 2), ((2, 1, 11, 19), (4, 8), 3), ((2, 3, 7, 5), (8,), 1)],
)
def test_convnet_equals_plain_torch(shape, widths, blocks, norm, train):
    reference = ReferenceConvNet(5, shape[1], widths, blocks)
    check_reference(reference, "convnet", shape, train, widths=widths, blocks=blocks, norm=norm)


@TRAIN
@NORM
@pytest.mark.parametrize(
    ("shape", "width", "rates"),
    [((2, 3, 16, 16), 8, (1, 2, 4)), ((2, 1, 11, 19), 16, (1, 1, 2, 4, 8, 16, 1))],
)
def test_fcn_equals_plain_torch(shape, width, rates, norm, train):
    reference = ReferenceFCN(5, shape[1], width, rates)
    check_reference(reference, "fcn_dilated", shape, train, width=width, rates=rates, norm=norm)


@pytest.mark.parametrize("rates", [(1, 2, 4), (3,), (1, 1, 2)])
def test_what_a_score_of_the_fcn_sees(rates):
    """Exactly the pixels that the rates reach."""
    model = models.fcn_dilated(num_classes=1, width=8, rates=rates).double().eval()
    for layer in model.layers:
        layer[0].weight.data.abs_()  # so that no ReLU is in the way
    x = torch.ones(1, 3, 31, 31, dtype=torch.float64, requires_grad=True)
    model(x)[0, 0, 15, 15].backward()
    seen = {0}
    for rate in rates:
        seen = {at + step for at in seen for step in (-rate, 0, rate)}
    expected = torch.zeros(31, dtype=torch.bool)
    expected[[15 + at for at in seen]] = True
    assert torch.equal(x.grad[0, 0] != 0, expected[:, None] & expected)


# ---------------------------------------------------------------- structure


def test_keys():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

    def layer(conv, bn):
        return [f"{conv}.weight", *(f"{bn}.{key}" for key in norm)]

    def block(at, *, downsample):
        keys = layer(f"{at}.conv1", f"{at}.bn1") + layer(f"{at}.conv2", f"{at}.bn2")
        more = layer(f"{at}.downsample.0", f"{at}.downsample.1") if downsample else []
        return keys + more

    model = models.convnet(num_classes=2, widths=(4, 8), blocks=2)
    assert list(model.state_dict()) == [
        *layer("stem.0", "stem.1"),
        *block("stages.0.0", downsample=False),
        *block("stages.0.1", downsample=False),
        *block("stages.1.0", downsample=True),
        *block("stages.1.1", downsample=False),
        *("fc.weight", "fc.bias"),
    ]
    model = models.fcn_dilated(num_classes=2, width=4, rates=(1, 2))
    assert list(model.state_dict()) == [
        *layer("layers.0.0", "layers.0.1"),
        *layer("layers.1.0", "layers.1.1"),
        *("head.weight", "head.bias"),
    ]


def test_parameter_count():
    """ResNet-20 for CIFAR-10 of the paper, and what its option B adds to 269,722."""
    with torch.device("meta"):
        model = models.create_model("convnet", num_classes=10)
    more = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sum(p.numel() for p in model.parameters()) == 269_722 + more


@pytest.mark.parametrize(("name", "convolutions"), [("convnet", 21), ("fcn_dilated", 3)])
def test_convolution_and_norm_are_one_call(name, convolutions, monkeypatch):
    calls = recorded_calls(monkeypatch)
    model = models.create_model(name, num_classes=2)
    model(torch.randn(2, 3, 8, 8))
    assert len({conv for conv, *_ in calls}) == len(calls) == convolutions
    residuals = sum(residual is not None for _, _, residual, _ in calls)
    assert residuals == (9 if name == "convnet" else 0)


def test_first_values():
    torch.manual_seed(0)
    for model in (models.convnet(widths=(32, 64)), models.fcn_dilated(num_classes=50)):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d) and name != "head":
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                std = module.weight.std().item()
                assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.06), name
    # Scores start small: torch's own values.
    assert 0.12 < model.head.weight.abs().max() <= 0.125


# ---------------------------------------------------------------- weights files and errors


@pytest.mark.parametrize("name", ["convnet", "fcn_dilated"])
def test_weights_file(tmp_path, name):
    model = randomize(models.create_model(name, num_classes=4))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = models.create_model(name, num_classes=4, weights=tmp_path / "weights.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"has 4 classes in (fc|head)\.weight, num_classes is 3"):
        models.create_model(name, num_classes=3, weights=tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["convnet", "fcn_dilated"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes (0) must be a positive integer"),
        ({"in_channels": 1.0}, "in_channels (1.0) must be a positive integer"),
        ({"norm": "layer"}, 'norm (\'layer\') must be "batch" or "group"'),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        models.create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convnet", {"widths": ()}, "widths (()) must have an entry at least"),
        ("convnet", {"widths": (8, 0)}, "widths[1] (0) must be a positive integer"),
        ("convnet", {"widths": 16}, "widths (16) must be a sequence"),
        ("fcn_dilated", {"rates": 2}, "rates (2) must be a sequence"),
        ("fcn_dilated", {"rates": "12"}, "rates ('12') must be a sequence"),
        ("convnet", {"blocks": 0}, "blocks (0) must be a positive integer"),
        ("fcn_dilated", {"rates": []}, "rates ([]) must have an entry at least"),
        ("fcn_dilated", {"rates": (1, 2.0)}, "rates[1] (2.0) must be a positive integer"),
        ("fcn_dilated", {"width": -1}, "width (-1) must be a positive integer"),
    ],
)
def test_bad_options_of_one(name, options, message):
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        models.create_model(name, **options)


def test_unknown_option():
    with pytest.raises(
        TypeError, match=r"^convnet: option 'width' must be one of blocks, in_chann"
    ):
        models.convnet(width=8)
    with pytest.raises(
        TypeError, match=r"^fcn_dilated: option 'widths' must be one of in_channels"
    ):
        models.fcn_dilated(widths=8)


@TRAIN
@pytest.mark.parametrize("name", ["convnet", "fcn_dilated"])
def test_bad_input(name, train):
    model = models.create_model(name, num_classes=2).train(train)
    assert_refused(
        model, torch.zeros(3, 8, 8), ValueError, rf"^{name}: input shape .* \[N, 3, H, W"
    )
    assert_refused(model, torch.zeros(2, 4, 8, 8), RuntimeError, rf"^{name}: input shape ")
    integers = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert_refused(model, integers, RuntimeError, rf"^{name}: input dtype torch\.uint8 must be ")
    check_no_images(model)


@pytest.mark.parametrize(("name", "side"), [("convnet", 4), ("fcn_dilated", 1)])
def test_one_value_per_channel_in_training(name, side):
    model = models.create_model(name, num_classes=2)
    message = rf"^{name}: .* one value per channel in training; .* a side over {side}$"
    assert_refused(model, torch.randn(1, 3, side, side), ValueError, message)
    for shape in ((1, 3, side + 1, 1), (1, 3, 1, side + 1), (2, 3, 1, 1)):
        assert model(torch.randn(shape)).isfinite().all()
    assert model.eval()(torch.randn(1, 3, side, side)).isfinite().all()


@pytest.mark.parametrize("name", ["convnet", "fcn_dilated"])
def test_it_learns(name):
    """Where, or whether on the left, a square is brighter."""
    torch.manual_seed(0)
    small = {"widths": (8, 16), "blocks": 1} if name == "convnet" else {"width": 8}
    model = models.create_model(name, num_classes=2, **small)
    masks = torch.zeros(8, 12, 12, dtype=torch.long)
    for index in range(8):
        left = 0 if index % 2 else 6
        masks[index, index : index + 4, left : left + 4] = 1
    target = torch.arange(8) % 2 if name == "convnet" else masks
    x = masks.unsqueeze(1).float() + 0.3 * torch.randn(8, 3, 12, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.97
