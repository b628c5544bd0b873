"""ConvBNAct with another layer in the place of its norm: the residual and the activation stay."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from advdl_ops import nn

f64 = torch.float64


class Frozen(torch.nn.Module):
    """A norm of fixed statistics, as detection networks have it: it takes an image and nothing else."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.rand(channels, dtype=f64) + 0.5)
        self.register_buffer("shift", torch.randn(channels, dtype=f64))

    def forward(self, x):
        return x * self.scale[:, None, None] + self.shift[:, None, None]


def synchronized(layer):
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(layer).bn


NORMS = {
    "identity": lambda layer: torch.nn.Identity(),
    "frozen": lambda layer: Frozen(6),
    "stock batch norm": lambda layer: torch.nn.BatchNorm2d(6, dtype=f64),
    "stock group norm": lambda layer: torch.nn.GroupNorm(2, 6, dtype=f64),
    # In evaluation, as training asks for a GPU and a process group.
    "synchronized": lambda layer: synchronized(copy.deepcopy(layer)),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_knows_no_activation(name, training, residual):
    if name == "synchronized" and training:
        return
    layer = nn.ConvBNAct(4, 6, 3, act="silu", dtype=f64)
    layer.bn = NORMS[name](layer)
    layer.train(training)
    x = torch.randn(2, 4, 9, 8, dtype=f64, requires_grad=True)
    added = torch.randn(2, 6, 9, 8, dtype=f64, requires_grad=True) if residual else None
    norm = copy.deepcopy(layer.bn)
    z = norm(F.conv2d(x, layer.conv.weight, None, 1, 1))
    expected = F.silu(z if added is None else z + added)
    leaves = [t for t in (x, added, layer.conv.weight) if t is not None]
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    for each in (layer, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        found = each(x, added)
        torch.testing.assert_close(found, expected)
        own = [each.conv.weight if t is layer.conv.weight else t for t in leaves]
        for g, e in zip(torch.autograd.grad(found.square().sum(), own), gradients, strict=True):
            torch.testing.assert_close(g, e)
    with torch.no_grad():
        if not training:
            torch.testing.assert_close(layer(x, added), expected)


def test_activation_first():
    layer = nn.ConvBNAct(4, 6, 3, act="relu", order="conv-act-bn", dtype=f64)
    layer.bn = torch.nn.Identity()
    x, residual = torch.randn(2, 4, 9, 8, dtype=f64), torch.randn(2, 6, 9, 8, dtype=f64)
    z = F.conv2d(x, layer.conv.weight, None, 1, 1)
    torch.testing.assert_close(layer(x, residual), F.relu(z) + residual)


@pytest.mark.parametrize("act", [None, "gelu"])
def test_the_activation_of_another_norm_comes_first(act):
    """Whatever takes the place of the norm is called with one argument."""
    layer = nn.ConvBNAct(4, 6, 3, act="relu", dtype=f64)
    layer.bn = nn.GroupNorm(2, 6, act=act, dtype=f64)
    x, residual = torch.randn(2, 4, 9, 8, dtype=f64), torch.randn(2, 6, 9, 8, dtype=f64)
    z = F.group_norm(F.conv2d(x, layer.conv.weight, None, 1, 1), 2)
    z = z if act is None else F.gelu(z)
    torch.testing.assert_close(layer(x, residual), F.relu(z + residual))


def test_siblings_and_another_norm():
    conv, norm = nn.Conv2d(4, 6, 3, dtype=f64), torch.nn.Identity()
    x, residual = torch.randn(2, 4, 9, 8, dtype=f64), torch.randn(2, 6, 7, 6, dtype=f64)
    torch.testing.assert_close(nn.conv_bn_act(conv, norm, x), conv(x))
    found = nn.conv_bn_act(conv, norm, x, residual, act="relu")
    torch.testing.assert_close(found, F.relu(conv(x) + residual))


def test_under_compile():
    layer = nn.ConvBNAct(4, 6, 3, act="silu", dtype=f64)
    layer.bn = torch.nn.Identity()
    x = torch.randn(2, 4, 9, 8, dtype=f64)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x), layer(x))
