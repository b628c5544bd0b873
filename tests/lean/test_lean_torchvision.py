"""``optimize(model, lean=...)`` of torchvision's networks: the bits of ``optimize(model)``."""

import pytest
import torch
from support.lean import LEVELS, assert_same_bits, assert_same_values, counted, step
from support.torchvision_stub import torchvision_models

import advdl_ops

torchvision = torchvision_models()

extra = pytest.mark.extra
NAMES = ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "mnasnet0_5"]


def made(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return advdl_ops.optimize(getattr(torchvision, name)(num_classes=5).to(dtype), **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [pytest.param(name, marks=extra) for name in NAMES])
def test_bits(name, dtype, layout):
    x = torch.randn(2, 3, 35, 33, dtype=dtype).contiguous(memory_format=layout)
    assert_same_bits(made(name, dtype), x)


@extra
@pytest.mark.parametrize("name", NAMES)
def test_bits_under_autocast(name):
    x = torch.randn(2, 3, 65, 65)
    assert_same_bits(made(name), x, context=lambda: torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=extra)])
def test_levels_that_optimize_sets(name, level):
    """Also with the layers one by one, where ReLU writes in place what could be made again."""
    x = torch.randn(2, 3, 33, 33)
    for fuse in (True, False):
        expected = step(made(name, fuse=fuse), x)
        with counted() as kinds:
            assert_same_values(step(made(name, fuse=fuse, lean=level), x), expected)
        assert len(kinds) > 4 or not fuse


@pytest.mark.parametrize("level", ["block", "deepest"])
def test_restored_models_are_torchs(level):
    torch.manual_seed(0)
    original = torchvision.resnet18(num_classes=5)
    model = advdl_ops.optimize(original, inplace=True, lean=level)
    assert model is original
    keys = list(model.state_dict())
    advdl_ops.restore(model)
    torch.manual_seed(0)
    stock = torchvision.resnet18(num_classes=5)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in stock.modules()]
    assert keys == list(stock.state_dict())
    assert not [name for layer in model.modules() for name in vars(layer) if "advdl" in name]
    x = torch.randn(2, 3, 33, 33)
    with counted() as kinds:
        assert_same_values(step(model, x), step(stock, x))
    assert not kinds
