"""FCN and DeepLabV3: what every model must do, and torchvision's models, in fp64."""

import operator
import re
from typing import ClassVar

import pytest
import torch
from support.models import (
    ModelTester,
    assert_refused,
    assert_same_state,
    check_export,
    check_no_images,
    random_input,
    randomize,
    recorded_calls,
    relative_error,
)
from support.torchvision_stub import torchvision_models

from advdl_ops import models, nn

NAMES = ["fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_resnet101"]
CLASSES = 5


class SegmentationTester(ModelTester):
    """Of one block per stage; whole networks are compared with torchvision's below."""

    kind: ClassVar[type[torch.nn.Module]]
    input_shape = (2, 3, 24, 17)

    def make(self, dtype=torch.float64, **options):
        torch.manual_seed(0)
        model = self.kind((1, 1, 1, 1), self.num_classes, **{**self.options, **options})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):  # or no two calls would agree in training
                module.p = 0.0
        return randomize(model).to(dtype)

    def scores(self, output):
        return torch.cat(list(output.values()), 1)

    def output_shape(self, shape):
        outputs = 2 if self.options.get("aux_loss") else 1
        return (shape[0], outputs * self.num_classes, *shape[2:])

    @pytest.mark.slow
    def test_compile(self, model):
        super().test_compile(model)


class TestFCNResNet50(SegmentationTester):
    name = "fcn_resnet50"
    kind = models.FCN
    options: ClassVar = {"aux_loss": True}


class TestDeepLabV3ResNet50(SegmentationTester):
    name = "deeplabv3_resnet50"
    kind = models.DeepLabV3


class TestDeepLabV3ResNet101(SegmentationTester):
    """Group norm and another channel count."""

    name = "deeplabv3_resnet101"
    kind = models.DeepLabV3
    input_shape = (2, 1, 24, 17)
    odd_shapes = ((1, 1, 33, 47), (2, 1, 1, 1), (1, 1, 7, 50))
    options: ClassVar = {"aux_loss": True, "norm": "group", "in_channels": 1}

    @pytest.mark.slow
    def test_export(self, model):
        super().test_export(model)


# ---------------------------------------------------------------- torchvision's


def original(name, **options):
    build = getattr(torchvision_models().segmentation, name)
    return build(weights=None, weights_backbone=None, **options)


def cut(model, *blocks):
    """Leaves so many blocks of each stage of the backbone."""
    stages = (model.backbone.get_submodule(f"layer{index}") for index in range(1, 5))
    for stage, number in zip(stages, blocks, strict=True):
        del stage[number:]
    return model


def pair(name, blocks, **options):
    """Our model and torchvision's, the same random weights, fp64."""
    reference = original(name, num_classes=CLASSES, **options)
    model = models.create_model(name, num_classes=CLASSES, **options)
    if blocks:
        cut(model, *blocks), cut(reference, *blocks)
    randomize(reference).double()
    model.double().load_state_dict(reference.state_dict(), strict=True)
    return model, reference


def check_outputs(output, expected, tolerance):
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    for key, value in expected.items():
        assert value.abs().max() > 1e-3, key  # a signal that came through
        assert relative_error(output[key].detach(), value.detach()) < tolerance, key


def check_backward(model, reference, shape, seed):
    """Outputs and all gradients, with the same dropout."""
    outputs, inputs = [], []
    for network in (model, reference):
        network.zero_grad()
        x = random_input(shape, seed=seed).requires_grad_()
        torch.manual_seed(seed)
        output = network(x)
        sum((out * random_input(out.shape, seed=1)).sum() for out in output.values()).backward()
        outputs.append(output), inputs.append(x)
    check_outputs(*outputs, tolerance=1e-9)
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-7
    twins = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        assert relative_error(parameter.grad, twins[key].grad) < 1e-7, key


# The second block of a dilated stage has another dilation than the first, the third has the second's.
SHALLOW = (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("name", "aux_loss", "blocks"),
    [
        ("fcn_resnet50", True, SHALLOW),
        ("deeplabv3_resnet50", False, SHALLOW),
        pytest.param("fcn_resnet50", False, SHALLOW, marks=pytest.mark.extra),
        pytest.param("fcn_resnet50", True, None, marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet101", True, None, marks=pytest.mark.slow),
    ],
)
def test_equals_the_original(name, aux_loss, blocks):
    model, reference = pair(name, blocks, aux_loss=aux_loss)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (model, reference)]
    for step in range(2):
        # Of two values per channel batch norm leaves the sign, and a gradient of rounding errors: a batch of 3.
        check_backward(model, reference, (3, 3, 33, 24), seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_state(model, reference, 2)

    model.eval(), reference.eval()
    # So wide that the convolution dilated by 36 sees more than its centre: 39 of its pixels.
    check_backward(model, reference, (1, 3, 9, 312), seed=2)
    with torch.no_grad():
        for shape in ((2, 3, 32, 32), (1, 3, 1, 1), (1, 3, 9, 63)):
            x = random_input(shape)
            check_outputs(model(x), reference(x), tolerance=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_the_original(name):
    for options in ({}, {"aux_loss": True}, {"num_classes": 3}):
        with torch.device("meta"):
            expected = original(name, **options)
            model = getattr(models, name)(**options)
        state = model.state_dict()
        assert list(state) == list(expected.state_dict())  # the order, too
        for key, value in expected.state_dict().items():
            assert (state[key].shape, state[key].dtype) == (value.shape, value.dtype), key
        names = [key for key, _ in expected.named_parameters()]
        assert [key for key, _ in model.named_parameters()] == names


@pytest.mark.parametrize("name", NAMES[:2])
def test_same_seed_same_weights(name):
    torch.manual_seed(0)
    model = models.create_model(name, num_classes=CLASSES, aux_loss=True)
    torch.manual_seed(0)
    reference = original(name, num_classes=CLASSES, aux_loss=True)
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


# ---------------------------------------------------------------- structure and options


def tiny(kind=models.FCN, num_classes=2, **options):
    torch.manual_seed(0)
    return kind((1, 1, 1, 1), num_classes, name="tiny", **options)


@pytest.mark.parametrize("kind", [models.FCN, models.DeepLabV3])
def test_convolution_and_norm_are_one_call(monkeypatch, kind):
    model = tiny(kind, aux_loss=True)
    calls = recorded_calls(monkeypatch)
    model(torch.randn(2, 3, 16, 16))
    norms = {m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {bn for _, bn, *_ in calls} == norms
    assert len(calls) == len(norms)


def test_layers_are_replaced_as_torchvisions():
    model = tiny(aux_loss=True)
    assert model.classifier[4].weight.shape == (2, 512, 1, 1)
    model.classifier[4] = nn.Conv2d(512, 7, 1)
    model.aux_classifier = None
    output = model(torch.randn(2, 3, 16, 16))
    assert {key: out.shape for key, out in output.items()} == {"out": (2, 7, 16, 16)}


@pytest.mark.extra
def test_export_with_other_sizes():
    model = randomize(tiny(models.DeepLabV3)).double().eval()
    check_export(model, ((16, 16), (31, 10)), 9, operator.itemgetter("out"))


# ---------------------------------------------------------------- weights files


def test_weights_file(tmp_path):
    donor = randomize(tiny(num_classes=4, aux_loss=True))
    path = tmp_path / "fcn.pth"
    torch.save(donor.state_dict(), path)
    model = tiny(num_classes=4, aux_loss=True)
    models.load_weights(model, path)
    for key, value in donor.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    message = r"has 4 classes in classifier\.4\.weight, num_classes is 2: .* replace its "
    with pytest.raises(ValueError, match=message + r"'classifier\.4' and 'aux_classifier\.4'$"):
        models.load_weights(tiny(aux_loss=True), path)
    # Torchvision's files have the auxiliary head, whoever asks for it.
    with pytest.raises(
        ValueError,
        match=r"must fit tiny; unexpected keys \(8\): aux_classifier.*: create the model with aux_loss=True$",
    ):
        models.load_weights(tiny(num_classes=4), path)
    with pytest.raises(
        ValueError,
        match=r"num_classes is 2: create the model with num_classes=4 and aux_loss=True, then replace its "
        r"'classifier\.4' and 'aux_classifier\.4'$",
    ):
        models.load_weights(tiny(), path)
    with pytest.raises(
        ValueError,
        match=r"unexpected keys \(8\): aux_.*; other shapes \(1\): backbone\.conv1.*: create .* aux_loss=True$",
    ):
        models.load_weights(tiny(num_classes=4, in_channels=1), path)
    del donor.aux_classifier
    torch.save(donor.state_dict(), path)
    with pytest.raises(ValueError, match=message + r"'classifier\.4'$"):
        models.load_weights(tiny(), path)


@pytest.mark.parametrize("name", NAMES)
def test_weights_option(name, tmp_path):
    with torch.device("meta"), pytest.raises(FileNotFoundError, match=rf"^{name}: weights "):
        getattr(models, name)(weights=tmp_path / "none.pth")


def test_backbone_takes_a_classifiers_file(tmp_path):
    classifier = randomize(models.ResNet(models.Bottleneck, (1, 1, 1, 1), 10))
    torch.save(classifier.state_dict(), tmp_path / "resnet.pth")
    model = tiny()
    models.load_weights(model.backbone, tmp_path / "resnet.pth")
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[key]), key


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes (0) must be a positive integer"),
        ({"in_channels": 1.0}, "in_channels (1.0) must be a positive integer"),
        ({"aux_loss": "no"}, "aux_loss ('no') must be True or False"),
        ({"norm": "layer"}, 'norm (\'layer\') must be "batch" or "group"'),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: {message}")):
        models.create_model(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option(name):
    known = "aux_loss, in_channels, norm, num_classes, weights"
    with pytest.raises(TypeError, match=rf"^{name}: option 'stem' must be one of {known}$"):
        models.create_model(name, stem="small")


@pytest.mark.parametrize("kind", [models.FCN, models.DeepLabV3])
@pytest.mark.parametrize("train", [True, False])
def test_bad_input(kind, train):
    model = tiny(kind).train(train)
    for shape in ((3, 32, 32), (1, 32, 32), ()):
        assert_refused(model, torch.zeros(shape), ValueError, r"^tiny: input shape .* \[N, 3, H, W")
    assert_refused(model, torch.zeros(2, 4, 32, 32), RuntimeError, r"^tiny: input shape .* \[N, 3")
    integers = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert_refused(model, integers, RuntimeError, r"^tiny: input dtype torch\.uint8 must be ")
    check_no_images(model)


def test_one_value_per_channel_in_training():
    message = r"^tiny: input shape .* leaves one value per channel in training; it must have a "
    model = tiny()
    for shape in ((1, 3, 8, 8), (1, 3, 1, 1)):
        assert_refused(
            model, torch.randn(shape), ValueError, message + "batch over 1 or a side .* 8$"
        )
    for shape in ((1, 3, 9, 1), (2, 3, 1, 1)):
        assert model(torch.randn(shape))["out"].isfinite().all()
    model = tiny(models.DeepLabV3)
    for shape in ((1, 3, 32, 32), (1, 3, 1, 1)):
        assert_refused(model, torch.randn(shape), ValueError, message + "batch over 1$")
    assert model(torch.randn(2, 3, 1, 1))["out"].isfinite().all()
    # Norms in eval mode inside a model in train mode: nothing to refuse.
    model.classifier.eval()
    assert model(torch.randn(1, 3, 32, 32))["out"].isfinite().all()
    assert tiny(models.DeepLabV3, norm="group")(torch.randn(1, 3, 1, 1))["out"].isfinite().all()
    assert model.eval()(torch.randn(1, 3, 1, 1))["out"].isfinite().all()
    # And the other way round.
    model.classifier.train()
    assert_refused(model, torch.randn(1, 3, 32, 32), ValueError, message + "batch over 1$")
