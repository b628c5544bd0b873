"""U-Net on ResNets: what every model must do, and segmentation_models_pytorch's."""

from typing import ClassVar

import pytest
import torch
from support.models import ModelTester, assert_refused, assert_same, random_input, randomize
from support.torchvision_stub import torchvision_models

from advdl_ops import models


class TestUNetResNet18(ModelTester):
    name = "unet_resnet18"
    input_shape = (2, 3, 40, 33)
    options: ClassVar = {"decoder_channels": (32, 16, 8, 8, 4)}

    def output_shape(self, shape):
        return (shape[0], self.num_classes, *shape[2:])


# ---------------------------------------------------------------- the original


def original(name, num_classes, decoder=(256, 128, 64, 32, 16)):
    torchvision_models()  # which it imports
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = name.removeprefix("unet_")
    return smp.Unet(encoder, encoder_weights=None, classes=num_classes, decoder_channels=decoder)


@pytest.mark.parametrize("name", ["unet_resnet18", "unet_resnet34", "unet_resnet50"])
def test_keys_of_the_original(name):
    with torch.device("meta"):
        expected = original(name, 2).state_dict()
        state = models.create_model(name, num_classes=2).state_dict()
    assert list(state) == list(expected)
    assert [v.shape for v in state.values()] == [v.shape for v in expected.values()]


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
    reference = randomize(original(name, 5, decoder))
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
    assert model(random_input((1, 3, 21, 32))).shape == (1, 2, 21, 32)


def test_errors():
    with pytest.raises(ValueError, match=r"^unet_resnet18: decoder_channels \(\(8, 4\)\) must hav"):
        models.unet_resnet18(decoder_channels=(8, 4))
    with pytest.raises(ValueError, match=r"^unet_resnet18: decoder_channels \(5\) must be a seq"):
        models.unet_resnet18(decoder_channels=5)
    with pytest.raises(ValueError, match=r"^unet_resnet18: decoder_channels\[1\] \(0\) must be a"):
        models.unet_resnet18(decoder_channels=(8, 0, 8, 8, 8))
    with pytest.raises(TypeError, match=r"^unet_resnet50: option 'stem' must be one of decoder_ch"):
        models.unet_resnet50(stem="small")
    model = models.unet_resnet18(num_classes=2)
    assert_refused(model, torch.zeros(1, 3, 32, 32), ValueError, r"^unet_resnet18: .* one value")
    assert_refused(model, torch.zeros(2, 1, 32, 32), RuntimeError, r"^unet_resnet18: input shape")
