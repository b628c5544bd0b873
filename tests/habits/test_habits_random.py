"""Monte Carlo dropout: random numbers fall where stock's fall, in every combination of modes."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import advdl_ops
from advdl_ops import models


class Block(torch.nn.Module):
    """Dropout of elements as a layer, and in the code of the forward."""

    def __init__(self, by_layer):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.drop = torch.nn.Dropout(0.5) if by_layer else None

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        return F.dropout(x, 0.5, self.training) if self.drop is None else self.drop(x)


def network(by_layer):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), Block(by_layer), Block(by_layer), torch.nn.Conv2d(8, 2, 1)
    )


def sample(model, x, grad):
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        out = model(x).detach()
    return out, torch.rand(3)


@pytest.mark.parametrize("modes", [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("by_layer", [True, False])
def test_modes(by_layer, modes):
    stock = network(by_layer)
    fast = advdl_ops.optimize(network(by_layer))
    for model in (stock, fast):
        for part, training in zip((model, model[1], model[2]), modes, strict=True):
            part.train(training)
            for norm in model.modules():
                if isinstance(norm, torch.nn.BatchNorm2d):
                    norm.eval()
    x = torch.randn(2, 3, 9, 10)
    for grad in (False, True):
        expected, state = sample(stock, x, grad)
        found, own_state = sample(fast, x, grad)
        assert torch.equal(own_state, state)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_dropout_of_a_network_in_evaluation(name):
    """The head's dropout draws in the order of contiguous features, as without gradients the network would not."""
    torch.manual_seed(0)
    model = models.create_model(name).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.train()
    x = torch.randn(1, 3, 32, 32)
    found, _ = sample(lambda t: model(t)["out"], x, False)
    with advdl_ops.use_backend("reference"):  # which converts nothing
        expected, _ = sample(lambda t: model(t)["out"], x, False)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize("name", ["resnet18", "unet", "unet_resnet18", "convnet", "fcn_dilated"])
def test_random_layers_of_ones_own_in_the_zoo(name):
    model = models.create_model(name).eval()
    parent = next(m for m in model.modules() if isinstance(m, torch.nn.Sequential) and len(m) > 1)
    parent[0] = torch.nn.Sequential(parent[0], Noise().train())
    x = torch.randn(1, 3, 32, 32)
    found, _ = sample(model, x, False)
    with advdl_ops.use_backend("reference"):  # which converts nothing
        expected, _ = sample(model, x, False)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
