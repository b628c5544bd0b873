"""Every layer twice in a row: torch.jit.trace, and torch.compile with every number dynamic, under gradients."""

import copy

import pytest
import torch

from advdl_ops import nn

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

LAYERS = {
    "Conv2d": lambda: nn.Conv2d(8, 8, 3, padding=1, act="leaky_relu"),
    "DepthwiseConv2d": lambda: nn.DepthwiseConv2d(8, 3, act="silu"),
    "HybridDilatedConv": lambda: nn.HybridDilatedConv(8),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, act="elu"),
    "ConvTranspose2d, depthwise": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8, act="elu"),
    "ConvBNAct": lambda: nn.ConvBNAct(8, 8, 3, act="leaky_relu"),
    "BatchNormAct2d": lambda: nn.BatchNormAct2d(8, act="leaky_relu"),
    "GroupNorm": lambda: nn.GroupNorm(2, 8, act="silu"),
    "LayerNorm2d": lambda: nn.LayerNorm2d(8),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True, act="leaky_relu"),
}  # fmt: skip


def two(name):
    torch.manual_seed(0)
    return torch.nn.Sequential(LAYERS[name](), LAYERS[name]()).double()


def results(network, x):
    x = x.clone().requires_grad_()
    out = network(x)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_with_every_number_dynamic(name):
    network = two(name)
    twin = copy.deepcopy(network)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 3):
        x = torch.randn(size, 8, 9, 10, dtype=torch.float64)
        for network_ in (network, twin):
            network_.zero_grad(set_to_none=True)
        expected = results(network, x)
        x = x.clone().requires_grad_()
        out = compiled(x)
        out.square().sum().backward()
        for a, b in zip([out, x.grad, *(p.grad for p in twin.parameters())], expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_jit_trace(name):
    network = two(name)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    traced = torch.jit.trace(copy.deepcopy(network), x)
    assert "advdl_ops::" not in str(traced.inlined_graph)
    for a, b in zip(results(traced, x), results(network, x), strict=True):
        torch.testing.assert_close(a, b)
