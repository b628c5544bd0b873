"""What stock allows to be written after a layer may be written: its output, before backward."""

import copy

import pytest
import torch
from torch import nn as stock

import advdl_ops
from advdl_ops import nn

f64 = torch.float64
ACTIVATIONS = [
    stock.LeakyReLU(0.2), stock.LeakyReLU(-0.2), stock.ReLU6(), stock.ELU(), stock.SiLU(), stock.GELU(),
    stock.Hardswish(), stock.ReLU(), stock.Sigmoid(), stock.Tanh(),
]  # fmt: skip
WRITES = {
    "mul_": lambda y: y.mul_(2),
    "relu_": lambda y: y.relu_(),
    "+=": lambda y: y.__iadd__(1),
    "slice": lambda y: y[:, :1].zero_(),
}
LAYERS = {
    "transposed": lambda: stock.ConvTranspose2d(3, 4, 3, 2),
    "convolution": lambda: stock.Conv2d(3, 4, 3),
    "depthwise": lambda: stock.Conv2d(3, 3, 3, groups=3),
    "batch norm": lambda: stock.BatchNorm2d(3),
    "group norm": lambda: stock.GroupNorm(3, 3),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_are_written(layer, act, write):
    torch.manual_seed(0)
    model = stock.Sequential(LAYERS[layer](), act).to(f64)
    fast = advdl_ops.optimize(copy.deepcopy(model))
    x = torch.randn(2, 3, 7, 6, dtype=f64)
    results = []
    for each in (model, fast):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        try:
            WRITES[write](y)
            y.square().sum().backward()
        except RuntimeError:  # stock refuses it for activations that keep their output
            results.append(None)
            continue
        results.append([leaf.grad, *(p.grad for p in each.parameters())])
    expected, found = results
    if expected is None:
        return  # more may be allowed than in stock
    assert found is not None
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("value", [float("nan"), 0.0, 6.0, -1.0, 7.0])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_gradients_at_special_values(act, value):
    """Also of what is kept as a mask."""
    layer = nn.ConvTranspose2d(1, 1, 1, bias=False, act=act)
    with torch.no_grad():
        layer.weight.fill_(1)
    x = torch.full((1, 1, 2, 2), value, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    layer(x).sum().backward()
    act(twin * 1).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"bidirectional": True}])
def test_outputs_of_an_lstm_are_written(options):
    original, ours = stock.LSTM(3, 5, **options), nn.LSTM(3, 5, **options)
    ours.load_state_dict(original.state_dict())
    gradients = []
    for layer in (original, ours):
        x = torch.linspace(-1, 1, 24).view(4, 2, 3).requires_grad_()
        y, (h, c) = layer(x)
        y.mul_(2)
        y[0].zero_()
        h.mul_(3)
        try:
            (y.sum() + h.sum() + c.sum()).backward()
        except RuntimeError:
            # Stock allows it with a projection, and in fp64; else its own operator has kept the output.
            assert "proj_size" not in options
            return
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    for e, f in zip(*gradients, strict=True):
        torch.testing.assert_close(f, e)
