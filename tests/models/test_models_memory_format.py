"""In which memory format the models convolve, and in which their output comes."""

import pytest
import torch
from support.models import random_input, randomize, relative_error

from advdl_ops import models
from advdl_ops.backend import use_backend

LAST, FIRST = torch.channels_last, torch.contiguous_format
# A convolution behind which nothing but the output comes.

pytestmark = pytest.mark.usefixtures("formats_unwatched")

CASES = {
    "unet": (lambda **o: models.UNet(2, base_channels=4, depth=2, **o), "outc.conv"),
    "unet_bilinear": (lambda **o: models.UNet(2, True, base_channels=4, depth=2, **o), "outc.conv"),
    "unet_resnet": (lambda **o: _unet_resnet(**o), "segmentation_head.0"),
    "fcn_dilated": (lambda **o: models.FCNDilated(2, width=8, **o), "head"),
    "fcn": (lambda **o: models.FCN((1, 1, 1, 1), 2, **o), "classifier.4"),
    "deeplabv3": (lambda **o: models.DeepLabV3((1, 1, 1, 1), 2, **o), "classifier.4"),
}


def _unet_resnet(**options):
    decoder = (16, 8, 8, 8, 8)
    return models.UNetResNet(
        models.BasicBlock, (1, 1, 1, 1), 2, decoder_channels=decoder, **options
    )


def make(name, in_channels=3, norm="batch"):
    build, layer = CASES[name]
    torch.manual_seed(0)
    model = randomize(build(in_channels=in_channels, norm=norm))
    formats = []

    def record(_, inputs):
        formats.append(LAST if inputs[0].is_contiguous(memory_format=LAST) else FIRST)

    model.get_submodule(layer).register_forward_pre_hook(record)
    return model, formats


def image(model, x):
    output = model(x)
    return output["out"] if isinstance(output, dict) else output


def strides(shape, memory_format):
    return torch.empty(shape).contiguous(memory_format=memory_format).stride()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_in_channels_last(name, in_channels, norm):
    model, formats = make(name, in_channels, norm)
    x = random_input((2, in_channels, 40, 48), torch.float32)
    model.eval()
    with torch.no_grad(), use_backend("reference"):
        expected = image(model, x)
    with torch.no_grad():
        out = image(model, x)
    assert formats == [FIRST, LAST]
    assert out.stride() == expected.stride() == strides(out.shape, FIRST)
    assert relative_error(out, expected) < 1e-4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_training_is_in_channels_last(name, training):
    """But for dilated networks with dropout, whose random numbers would fall on other pixels."""
    model, formats = make(name)
    x = random_input((2, 3, 40, 48), torch.float32)
    stays = name in ("fcn", "deeplabv3")
    found = []
    for backend in ("reference", "fused"):
        model.train(training)
        with use_backend(backend):
            torch.manual_seed(1)
            out = image(model, x)
            out.square().mean().backward()
        assert out.stride() == strides(out.shape, FIRST)
        found.append([out.detach(), *(p.grad for p in model.parameters())])
        for p in model.parameters():
            assert p.grad.stride() == p.stride()
        model.zero_grad()
    assert formats == [FIRST, FIRST if stays else LAST]
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_format_stays_where_conversion_does_not_pay(name):
    model, formats = make(name)
    x = random_input((2, 3, 40, 48), torch.float32)
    model.eval()
    with torch.no_grad(), use_backend("reference"):
        image(model, x)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert image(model, x).is_contiguous()
    assert image(model.double(), x.double()).is_contiguous()
    assert formats == [FIRST] * 3


@pytest.mark.parametrize("name", CASES)
def test_channels_last_stays(name):
    model, formats = make(name)
    model.eval()
    x = random_input((2, 3, 40, 48), torch.float32).contiguous(memory_format=LAST)
    with torch.no_grad():
        out = image(model, x)
    assert out.stride() == strides(out.shape, LAST)
    assert out.stride() == image(model, x).stride()
    assert formats == [LAST, LAST]


@pytest.mark.parametrize("name", CASES)
def test_gradients_behind_frozen_layers(name):
    """What is converted on the way goes back through autograd."""
    model, formats = make(name)
    model.eval().double().requires_grad_(False)
    x = random_input((2, 3, 40, 48))
    parameter = list(model.parameters())[-1].requires_grad_()
    image(model, x).square().sum().backward()
    found, parameter.grad = parameter.grad, None
    with use_backend("reference"):
        image(model, x).square().sum().backward()
    assert relative_error(found, parameter.grad) < 1e-10
    assert formats == [LAST, FIRST]


@pytest.mark.parametrize("in_channels", [1, 3])
def test_resnet_is_in_channels_last(in_channels):
    model = models.ResNet(models.BasicBlock, (1, 1, 1, 1), 2, in_channels=in_channels).eval()
    formats = []
    model.layer1.register_forward_pre_hook(lambda _, x: formats.append(x[0].is_contiguous()))
    x = random_input((2, in_channels, 40, 48), torch.float32)
    with torch.no_grad():
        model(x)
    model(x)
    model.double()(x.double())
    assert formats == [False, False, True]
