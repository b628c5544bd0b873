"""ResNets with timm's ``features_only=True``, as encoders of other networks."""

import itertools

import pytest
import torch
from support.torchvision_stub import torchvision_models

from advdl_ops import models

stocks = torchvision_models()


def stages(model, x):
    """The features of torchvision's ResNet."""
    x = model.relu(model.bn1(model.conv1(x)))
    found = [x]
    x = model.maxpool(x)
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        found.append(x)
    return found


@pytest.mark.parametrize("indices", [None, (0,), (1, 3), (-2, -1), (2,)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_values_and_what_is_told(name, indices, tmp_path):
    torch.manual_seed(0)
    original = getattr(stocks, name)(weights=None).double().eval()
    file = tmp_path / "weights.pth"
    torch.save(original.state_dict(), file)
    options = {} if indices is None else {"out_indices": indices}
    model = models.create_model(name, features_only=True, weights=file, **options).double().eval()
    x = torch.randn(1, 3, 65, 72, dtype=torch.float64)
    wanted = [i % 5 for i in (range(5) if indices is None else indices)]
    with torch.no_grad():
        expected = [stages(original, x)[i] for i in wanted]
        found = model(x)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    info = model.feature_info
    assert info.out_indices == tuple(wanted)
    assert info.channels() == [t.shape[1] for t in expected]
    assert info.reduction() == [2 << i for i in wanted]
    assert info.module_name() == [
        ["relu", "layer1", "layer2", "layer3", "layer4"][i] for i in wanted
    ]
    assert info.channels(4) == original.fc.in_features
    assert info.reduction([0, 4]) == [2, 32]
    assert not any(hasattr(model, f"layer{i}") for i in range(wanted[-1] + 1, 5))


def test_strides_are_told_as_they_are():
    small = models.create_model("resnet18", features_only=True, stem="small")
    assert small.feature_info.reduction() == [1, 1, 2, 4, 8]
    dilated = models.create_model(
        "resnet50", features_only=True, replace_stride_with_dilation=(False, True, True)
    )
    assert dilated.feature_info.reduction() == [2, 4, 8, 8, 8]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for model in (small.eval(), dilated.eval()):
            sides = [64 // t.shape[2] for t in model(x)]
            assert sides == model.feature_info.reduction()


@pytest.mark.parametrize("indices", [(5,), (-6,), (1, 1), (2, 1), ()])
def test_bad_indices(indices):
    with pytest.raises(ValueError, match=r"^resnet18: out_indices \("):
        models.create_model("resnet18", features_only=True, out_indices=indices)


def test_not_for_other_networks():
    with pytest.raises(TypeError, match=r"^unet: option 'features_only'"):
        models.create_model("unet", features_only=True)
    with pytest.raises(TypeError, match=r"^resnet18: option 'out_indices'"):
        models.create_model("resnet18", out_indices=(1, 2))


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50", "unet_resnet18", "unet"])
def test_the_outermost_model_chooses_the_memory_format(name):
    """A hook behind the encoder makes the encoder run contiguous images too."""
    model = models.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    last = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    seen = []
    with torch.no_grad():
        model(x)
        handle = last.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        model(x)
        handle.remove()
    for t in itertools.chain(*seen):
        assert t.is_contiguous()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_features_have_the_format_of_the_image(memory_format):
    model = models.create_model("resnet18", features_only=True).eval()
    x = torch.randn(2, 3, 64, 64).to(memory_format=memory_format)
    with torch.no_grad():
        for feature in model(x):
            assert feature.is_contiguous(memory_format=memory_format)


def test_traced_by_fx():
    model = models.create_model("resnet18", features_only=True, out_indices=(1, 2)).eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for a, b in zip(graph(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
