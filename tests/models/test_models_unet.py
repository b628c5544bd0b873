"""The U-Net: what every model must do, and milesial's model restated in plain torch to compare with."""

import re
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.models import (
    ImageTester,
    assert_refused,
    assert_same,
    check_compiled,
    check_export,
    check_no_images,
    group_norms,
    random_input,
    randomize,
    recorded_calls,
    relative_error,
)

from advdl_ops import models


class TestUNet(ImageTester):
    name = "unet"
    input_shape = (2, 3, 33, 47)
    odd_shapes = ((1, 3, 16, 16), (2, 3, 17, 31), (1, 3, 50, 19))
    options: ClassVar = {"base_channels": 4}


class TestUNetBilinear(ImageTester):
    """Interpolation, dilated bottleneck, group norm, another depth and another channel count, all at once."""

    name = "unet"
    input_shape = (2, 1, 13, 18)
    odd_shapes = ((2, 1, 4, 4), (1, 1, 5, 8), (1, 1, 30, 6))
    options: ClassVar = {
        "in_channels": 1,
        "base_channels": 4,
        "depth": 2,
        "bilinear": True,
        "dilated_bottleneck": True,
        "norm": "group",
    }


# ---------------------------------------------------------------- the original


class Reference(torch.nn.Module):
    """milesial's UNet by its keys, written down from its structure: one dict of layers, one loop."""

    def __init__(self, in_channels, num_classes, bilinear, base=64, depth=4, dilated=False):
        super().__init__()
        self.depth, self.bilinear = depth, bilinear
        factor = 2 if bilinear else 1

        def double(channels, middle, out):
            return torch.nn.Sequential(
                torch.nn.Conv2d(channels, middle, 3, padding=1, bias=False),
                torch.nn.BatchNorm2d(middle),
                torch.nn.ReLU(),
                torch.nn.Conv2d(middle, out, 3, padding=1, bias=False),
                torch.nn.BatchNorm2d(out),
                torch.nn.ReLU(),
            )

        self._at("inc.double_conv", double(in_channels, base, base))
        channels = base
        for level in range(1, depth + 1):
            out = channels * 2 // (factor if level == depth else 1)
            self._at(f"down{level}.maxpool_conv.1.double_conv", double(channels, out, out))
            channels *= 2
        if dilated:
            width = channels // factor
            layers = [
                torch.nn.Conv2d(width, width, 3, padding=rate, dilation=rate) for rate in (1, 2, 4)
            ]
            self._at("bottleneck", torch.nn.Sequential(*layers))
        for level in range(1, depth + 1):
            out = channels // 2 // (1 if level == depth else factor)
            if not bilinear:
                self._at(f"up{level}.up", torch.nn.ConvTranspose2d(channels, channels // 2, 2, 2))
            middle = channels // 2 if bilinear else out
            self._at(f"up{level}.conv.double_conv", double(channels, middle, out))
            channels //= 2
        self._at("outc.conv", torch.nn.Conv2d(base, num_classes, 1))

    def _at(self, path, module):
        *parents, last = path.split(".")
        at = self
        for name in parents:
            if name not in at._modules:
                at.add_module(name, torch.nn.Module())
            at = at._modules[name]
        at.add_module(last, module)

    def forward(self, x):
        x = self.get_submodule("inc.double_conv")(x)
        features = [x]
        for level in range(1, self.depth + 1):
            block = self.get_submodule(f"down{level}.maxpool_conv.1.double_conv")
            x = block(F.max_pool2d(x, 2))
            features.append(x)
        for layer in getattr(self, "bottleneck", ()):
            x = F.relu(layer(x))
        for level in range(1, self.depth + 1):
            skip = features[self.depth - level]
            if self.bilinear:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            else:
                x = self.get_submodule(f"up{level}.up")(x)
            rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            left, top = columns // 2, rows // 2
            x = F.pad(x, (left, columns - left, top, rows - top))
            x = self.get_submodule(f"up{level}.conv.double_conv")(torch.cat((skip, x), 1))
        return self.get_submodule("outc.conv")(x)


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_keys_and_first_weights_of_the_original(bilinear, in_channels):
    torch.manual_seed(0)
    reference = Reference(in_channels, 2, bilinear)
    torch.manual_seed(0)
    model = models.unet(num_classes=2, in_channels=in_channels, bilinear=bilinear)
    expected = reference.state_dict()
    assert list(model.state_dict()) == list(expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    model.load_state_dict(expected, strict=True)


def test_known_keys():
    keys = list(models.unet(num_classes=2, base_channels=2).state_dict())
    assert keys[:2] == ["inc.double_conv.0.weight", "inc.double_conv.1.weight"]
    assert "down1.maxpool_conv.1.double_conv.3.weight" in keys
    assert "down4.maxpool_conv.1.double_conv.4.num_batches_tracked" in keys
    assert "up1.up.bias" in keys
    assert "up4.conv.double_conv.4.running_var" in keys
    assert keys[-2:] == ["outc.conv.weight", "outc.conv.bias"]


@pytest.mark.parametrize(("bilinear", "parameters"), [(False, 31_037_698), (True, 17_263_042)])
def test_parameter_count(bilinear, parameters):
    with torch.device("meta"):
        model = models.create_model("unet", num_classes=2, bilinear=bilinear)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 32, 48), {}),
        ((2, 3, 37, 63), {}),
        ((3, 3, 9, 14), {"depth": 3}),
        ((2, 3, 27, 21), {"depth": 1, "dilated": True}),
    ],
)
def test_equals_the_original(shape, options, bilinear, train):
    reference = randomize(Reference(3, 5, bilinear, base=6, **options))
    dilated = options.pop("dilated", False)
    model = models.unet(
        num_classes=5, bilinear=bilinear, base_channels=6, dilated_bottleneck=dilated, **options
    )
    options.update({"dilated": True} if dilated else {})
    model.load_state_dict(reference.state_dict(), strict=True)
    assert_same(model, reference, shape, train)


@pytest.mark.parametrize("bilinear", [False, True])
def test_group_norm_equals_torchs(bilinear):
    reference = randomize(group_norms(Reference(3, 5, bilinear, base=16, depth=2)))
    model = models.unet(num_classes=5, bilinear=bilinear, base_channels=16, depth=2, norm="group")
    model.load_state_dict(reference.state_dict(), strict=True)
    assert_same(model, reference, (2, 3, 11, 14), True)


# ---------------------------------------------------------------- structure and options


def test_convolution_and_norm_are_one_call(monkeypatch):
    calls = recorded_calls(monkeypatch)
    models.unet(num_classes=2, base_channels=4)(torch.randn(2, 3, 32, 32))
    assert len({conv for conv, *_ in calls}) == 18
    assert all(type(act) is torch.nn.ReLU for *_, act in calls)


def test_bottleneck_keys_come_besides():
    plain = models.unet(num_classes=2, base_channels=4).state_dict()
    dilated = models.unet(num_classes=2, base_channels=4, dilated_bottleneck=True)
    more = [key for key in dilated.state_dict() if key not in plain]
    assert more == [f"bottleneck.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert [key for key in dilated.state_dict() if key in plain] == list(plain)
    assert [layer.dilation[0] for layer in dilated.bottleneck] == [1, 2, 4]
    other = models.unet(num_classes=2, base_channels=4, dilated_bottleneck=True, rates=(1, 2))
    assert len(other.bottleneck) == 2


def test_compile_with_other_sizes():
    """One graph for sizes that need padding and sizes that do not."""
    torch._dynamo.reset()
    model = randomize(models.unet(num_classes=2, base_channels=2, depth=2)).double().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((12, 16), (13, 18), (31, 9)):
        x = random_input((2, 3, *size))
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) < 1e-10


def test_export_with_other_sizes():
    model = randomize(models.unet(num_classes=2, base_channels=2, depth=2)).double().eval()
    check_export(model, ((12, 16), (31, 9)), 8)


@pytest.mark.slow
def test_compile_inductor():
    model = randomize(models.unet(num_classes=2, base_channels=4, depth=1)).double()
    check_compiled(model, random_input((2, 3, 13, 10)), "inductor")


# ---------------------------------------------------------------- weights files


def test_weights_of_milesials_training_script(tmp_path):
    reference = randomize(Reference(3, 2, False, base=4))
    state = {**reference.state_dict(), "mask_values": [0, 255]}
    torch.save(state, tmp_path / "unet.pth")
    model = models.create_model(
        "unet", num_classes=2, base_channels=4, weights=tmp_path / "unet.pth"
    )
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"has 2 classes in outc\.conv\.weight, num_classes is 3"):
        models.unet(num_classes=3, base_channels=4, weights=tmp_path / "unet.pth")
    # Nothing but that key is left aside.
    torch.save({**state, "other": [0]}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"must hold tensors only; these are none: other$"):
        models.unet(num_classes=2, base_channels=4, weights=tmp_path / "other.pth")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes (0) must be a positive integer"),
        ({"in_channels": 1.0}, "in_channels (1.0) must be a positive integer"),
        ({"base_channels": -1}, "base_channels (-1) must be a positive integer"),
        ({"depth": 0}, "depth (0) must be a positive integer"),
        ({"bilinear": 1}, "bilinear (1) must be True or False"),
        ({"dilated_bottleneck": None}, "dilated_bottleneck (None) must be True or False"),
        ({"rates": 2}, "rates (2) must be a sequence"),
        ({"norm": "layer"}, 'norm (\'layer\') must be "batch" or "group"'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(f"unet: {message}")):
        models.unet(**options)


def test_unknown_option():
    with pytest.raises(TypeError, match=r"^unet: option 'stem' must be one of base_channels, "):
        models.unet(stem="small")


@pytest.mark.parametrize("train", [True, False])
def test_bad_input(train):
    model = models.unet(num_classes=2, base_channels=2).train(train)
    assert_refused(model, torch.zeros(3, 32, 32), ValueError, r"^unet: input shape .* \[N, 3, H, W")
    assert_refused(model, torch.zeros(2, 4, 32, 32), RuntimeError, r"^unet: input shape ")
    integers = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert_refused(model, integers, RuntimeError, r"^unet: input dtype torch\.uint8 must be ")
    check_no_images(model)
    for shape in ((2, 3, 15, 32), (2, 3, 32, 15)):
        assert_refused(model, torch.zeros(shape), ValueError, r"must have sides of at least 16")


def test_one_value_per_channel_in_training():
    model = models.unet(num_classes=2, base_channels=2)
    assert_refused(model, torch.randn(1, 3, 31, 31), ValueError, r"^unet: .* one value per channel")
    for shape in ((1, 3, 32, 16), (1, 3, 16, 32), (2, 3, 16, 16)):
        assert model(torch.randn(shape)).isfinite().all()
    assert model.eval()(torch.randn(1, 3, 16, 16)).isfinite().all()
    grouped = models.unet(num_classes=2, base_channels=4, norm="group")
    assert grouped(torch.randn(1, 3, 16, 16)).isfinite().all()


def test_it_learns():
    """Which pixels lie in a bright square."""
    torch.manual_seed(0)
    model = models.unet(num_classes=2, base_channels=4, depth=2)
    target = torch.zeros(4, 16, 16, dtype=torch.long)
    for index in range(4):
        target[index, index : index + 6, 2 * index : 2 * index + 6] = 1
    x = target.unsqueeze(1).float() + 0.3 * torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.97
