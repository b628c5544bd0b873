"""NaN and Inf in evaluation arrive where stock has them: a relu that gives 0 for NaN hides a broken input or weight."""

import pytest
import torch
from support.torchvision_stub import torchvision_models

import advdl_ops
from advdl_ops import models, nn

stocks = torchvision_models()
BROKEN = float("nan"), float("inf")


class Block(torch.nn.Module):
    def __init__(self, channels, out_channels, kernel_size, stride, groups, act):
        super().__init__()
        padding = kernel_size // 2
        self.conv = torch.nn.Conv2d(
            channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.bn = torch.nn.BatchNorm2d(out_channels)
        self.act = act

    def forward(self, x, residual=None):
        y = self.bn(self.conv(x))
        return self.act(y if residual is None else y + residual)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("act", [torch.nn.ReLU(), torch.nn.ReLU6(), torch.nn.LeakyReLU()])
@pytest.mark.parametrize(
    "sizes", [(64, 64, 1, 1, 1), (64, 128, 1, 2, 1), (64, 64, 3, 1, 1), (3, 64, 7, 2, 1), (64, 64, 3, 1, 4)]
)  # fmt: skip
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_one_layer(sizes, act, value, memory_format):
    torch.manual_seed(0)
    stock = Block(*sizes, act).eval()
    fast = advdl_ops.optimize(stock)
    x = torch.randn(2, sizes[0], 28, 28).to(memory_format=memory_format)
    with torch.no_grad():
        residual = torch.randn_like(stock(x))
        for tensor in (x, residual, stock.conv.weight):
            place = (1, 2, 0, tensor.shape[-1] - 1)
            before = tensor[place].item()
            tensor[place] = value
            for further in ((), (residual,)):
                expected, found = stock(x, *further), fast(x, *further)
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.isinf(), expected.isinf())
            tensor[place] = before
        assert fast(x, residual).isfinite().all()


@pytest.mark.parametrize("place", ["pixel", "weight"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_in_a_network(name, place):
    torch.manual_seed(0)
    stock = getattr(stocks, name)().eval()
    made = [advdl_ops.optimize(stock)]
    if hasattr(models, name):
        zoo = getattr(models, name)().eval()
        zoo.load_state_dict(stock.state_dict())
        made.append(zoo)
    x = torch.randn(2, 3, 64, 64)
    if place == "pixel":
        x[1, 2, 63, 0] = float("nan")
    else:
        for model in (stock, *made[1:]):
            first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
            first.weight.data[3, 1, 0, 2] = float("nan")
    with torch.no_grad():
        expected = stock(x).isnan()
        assert expected[1].all() and expected[0].any() == (place == "weight")
        for model in made:
            assert torch.equal(model(x).isnan(), expected)


def test_in_a_layer_with_an_activation_of_its_own():
    layer = nn.ConvBNReLU(16, 16, 1).eval()
    x = torch.randn(1, 16, 8, 8)
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        assert layer(x).isnan().sum() == 16
