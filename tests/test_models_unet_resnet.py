"""U-Net on ResNets: what every model must do, and segmentation_models_pytorch's model restated in plain torch."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from models_base import ModelTester, random_input, randomize
from test_models_unet import assert_refused, assert_same

from advdl_ops import models


class TestUNetResNet18(ModelTester):
    name = "unet_resnet18"
    input_shape = (2, 3, 40, 33)
    options: ClassVar = {"decoder_channels": (32, 16, 8, 8, 4)}

    def output_shape(self, shape):
        return (shape[0], self.num_classes, *shape[2:])


# ---------------------------------------------------------------- the original

BLOCKS = {
    "unet_resnet18": (1, (2, 2, 2, 2)),
    "unet_resnet34": (1, (3, 4, 6, 3)),
    "unet_resnet50": (4, (3, 4, 6, 3)),
}


class Reference(torch.nn.Module):
    """Layers in one flat list in the order of the original's keys; the walk over them is in `forward`."""

    def __init__(self, name, num_classes, in_channels=3, decoder=(256, 128, 64, 32, 16)):
        super().__init__()
        self.expansion, self.layers = BLOCKS[name]
        self._conv("encoder.conv1", "encoder.bn1", in_channels, 64, 7, 2)
        channels = 64
        for stage, blocks in enumerate(self.layers):
            width = 64 * 2**stage
            for block in range(blocks):
                at = f"encoder.layer{stage + 1}.{block}"
                stride = 2 if stage and not block else 1
                if self.expansion == 1:
                    self._conv(f"{at}.conv1", f"{at}.bn1", channels, width, 3, stride)
                    self._conv(f"{at}.conv2", f"{at}.bn2", width, width, 3)
                else:
                    self._conv(f"{at}.conv1", f"{at}.bn1", channels, width, 1)
                    self._conv(f"{at}.conv2", f"{at}.bn2", width, width, 3, stride)
                    self._conv(f"{at}.conv3", f"{at}.bn3", width, width * 4, 1)
                out = width * self.expansion
                if stride > 1 or channels != out:
                    self._conv(f"{at}.downsample.0", f"{at}.downsample.1", channels, out, 1, stride)
                channels = out
        skips = [out // 2, out // 4, out // 8, 64, 0]
        for block, (skip, out) in enumerate(zip(skips, decoder, strict=True)):
            at = f"decoder.blocks.{block}"
            self._conv(f"{at}.conv1.0", f"{at}.conv1.1", channels + skip, out, 3)
            self._conv(f"{at}.conv2.0", f"{at}.conv2.1", out, out, 3)
            channels = out
        self._at("segmentation_head.0", torch.nn.Conv2d(channels, num_classes, 3, padding=1))

    def _at(self, path, module):
        *parents, last = path.split(".")
        at = self
        for name in parents:
            if name not in at._modules:
                at.add_module(name, torch.nn.Module())
            at = at._modules[name]
        at.add_module(last, module)

    def _conv(self, path, norm, channels, out, size, stride=1):
        layer = torch.nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
        self._at(path, layer)
        self._at(norm, torch.nn.BatchNorm2d(out))

    def _run(self, path, norm, x):
        return self.get_submodule(norm)(self.get_submodule(path)(x))

    def _block(self, at, x):
        names = self.get_submodule(at)._modules
        last = 2 if self.expansion == 1 else 3
        y = x
        for index in range(1, last + 1):
            y = self._run(f"{at}.conv{index}", f"{at}.bn{index}", y)
            if index < last:
                y = y.relu()
        if "downsample" in names:
            x = self._run(f"{at}.downsample.0", f"{at}.downsample.1", x)
        return (x + y).relu()

    def forward(self, x):
        image = x
        x = self._run("encoder.conv1", "encoder.bn1", x).relu()
        features = [x]
        x = F.max_pool2d(x, 3, 2, 1)
        for stage, blocks in enumerate(self.layers, start=1):
            for block in range(blocks):
                x = self._block(f"encoder.layer{stage}.{block}", x)
            features.append(x)
        skips = [*features[-2::-1], None]
        for block, skip in enumerate(skips):
            if image.size(2) % 32 == 0 and image.size(3) % 32 == 0:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            else:
                x = F.interpolate(x, (image if skip is None else skip).shape[2:], mode="nearest")
            x = x if skip is None else torch.cat((x, skip), 1)
            for index in (1, 2):
                at = f"decoder.blocks.{block}.conv{index}"
                x = self._run(f"{at}.0", f"{at}.1", x).relu()
        return self.get_submodule("segmentation_head.0")(x)


@pytest.mark.parametrize("name", BLOCKS)
def test_keys_of_the_original(name):
    with torch.device("meta"):
        expected = Reference(name, 2).state_dict()
        state = models.create_model(name, num_classes=2).state_dict()
    assert list(state) == list(expected)
    assert [v.shape for v in state.values()] == [v.shape for v in expected.values()]
    assert "decoder.blocks.4.conv2.1.num_batches_tracked" in state
    assert "encoder.layer4.1.bn2.running_mean" in state
    assert not any("fc." in key for key in state)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("unet_resnet18", (2, 3, 32, 64)),
        ("unet_resnet18", (2, 3, 37, 50)),
        ("unet_resnet34", (2, 3, 33, 32)),
        # Of two values per channel batch norm leaves the sign, and a gradient of rounding errors: a larger image.
        ("unet_resnet50", (3, 3, 64, 64)),
    ],
)
def test_equals_the_original(name, shape, train):
    decoder = (24, 16, 8, 8, 4)
    reference = randomize(Reference(name, 5, decoder=decoder))
    model = models.create_model(name, num_classes=5, decoder_channels=decoder)
    model.load_state_dict(reference.state_dict(), strict=True)
    assert_same(model, reference, shape, train)


# ---------------------------------------------------------------- options, weights, errors


def test_first_weights():
    """The encoder's are those of the ResNet from the same seed."""
    torch.manual_seed(0)
    model = models.unet_resnet18(num_classes=2)
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=1000).state_dict()
    shapes = {key: value.shape for key, value in model.encoder.state_dict().items()}
    assert shapes == {k: v.shape for k, v in plain.items() if not k.startswith("fc.")}
    weight = model.decoder.blocks[0].conv1[0].weight
    bound = (6 / weight[0].numel()) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert (model.segmentation_head[0].bias == 0).all()


def test_encoder_takes_a_classifiers_file(tmp_path):
    classifier = randomize(models.resnet18(num_classes=10))
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    model = models.unet_resnet18(num_classes=2)
    models.load_weights(model.encoder, tmp_path / "resnet18.pth")
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[key]), key


def test_group_norm():
    model = randomize(models.unet_resnet18(num_classes=2, norm="group")).double()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, torch.nn.ReLU) for m in model.modules())
    assert model(random_input((1, 3, 21, 32))).shape == (1, 2, 21, 32)


def test_errors():
    with pytest.raises(ValueError, match=r"^unet_resnet18: decoder_channels \(\(8, 4\)\) must hav"):
        models.unet_resnet18(decoder_channels=(8, 4))
    with pytest.raises(ValueError, match=r"^unet_resnet18: decoder_channels\[1\] \(0\) must be a"):
        models.unet_resnet18(decoder_channels=(8, 0, 8, 8, 8))
    with pytest.raises(TypeError, match=r"^unet_resnet50: option 'stem' must be one of decoder_ch"):
        models.unet_resnet50(stem="small")
    model = models.unet_resnet18(num_classes=2)
    assert_refused(model, torch.zeros(1, 3, 32, 32), ValueError, r"^unet_resnet18: .* one value")
    assert_refused(model, torch.zeros(2, 1, 32, 32), RuntimeError, r"^unet_resnet18: input shape")
