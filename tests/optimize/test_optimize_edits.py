"""optimize(): what is changed in the model afterwards counts."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from support.optimize import Block, X, check_as, counts, made, same
from torch import nn as stock

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Configured(Block):
    skip = None

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = 1.0
        self.sizes = (1, 2)
        self.down = None

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        y = y * self.scale if self.scale != 1.0 and self.sizes == (1, 2) else y
        return y if self.down is None else self.down(y)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "scale", 0.5),
        lambda m: (setattr(m, "scale", 0.5), setattr(m, "sizes", (2, 2))),
        lambda m: setattr(m, "down", stock.ReLU()),
        lambda m: setattr(m, "act", stock.SiLU()),
        lambda m: setattr(m, "act", stock.Mish()),
        lambda m: setattr(m, "norm1", stock.Identity()),
        lambda m: setattr(m, "norm1", stock.InstanceNorm2d(8)),
        lambda m: setattr(m, "conv1", stock.Identity()),
        lambda m: m.norm1.register_forward_hook(lambda _, __, y: 2 * y),
        lambda m: m.act.register_forward_hook(lambda _, __, y: 2 * y),
        lambda m: m.conv1.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
        lambda m: stock.utils.prune.l1_unstructured(m.conv1, "weight", 0.5),
        lambda m: stock.utils.parametrizations.weight_norm(m.conv1),
    ],
)
def test_what_is_changed_afterwards_counts(change):
    block = made(Configured)
    block.act = stock.SiLU()  # twice would be seen
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    fast = copy.deepcopy(fast)
    change(twin), change(fast)
    check_as(twin, fast, X)


def layers():
    return [stock.Conv2d(8, 8, 1), stock.BatchNorm2d(8), stock.ReLU(), stock.Conv2d(8, 8, 1)]


class Listed(stock.Module):
    def __init__(self):
        super().__init__()
        self.layers = stock.ModuleList(layers())
        self.named = stock.ModuleDict({"a": stock.BatchNorm2d(8)})
        self.first = stock.Conv2d(8, 8, 1)
        self.norm = stock.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(self.first(x))
        for layer in self.layers:
            x = layer(x)
        for layer in self.named.values():
            x = layer(x)
        return x * getattr(self, "scale", 1) if hasattr(self, "scale") else x


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.append(stock.Tanh()),
        lambda m: m.insert(1, stock.Tanh()),
        lambda m: m.add_module("more", stock.Tanh()),
        lambda m: m.pop(1),
        lambda m: m.__delitem__(3),
        lambda m: m.__setitem__(1, nn.BatchNormAct2d(8, act="leaky_relu").double()),
        lambda m: setattr(m[1], "forward", lambda x: 2 * x),
        lambda m: setattr(m[0], "_conv_forward", lambda x, w, b: 2 * x),
        lambda m: setattr(m[2], "forward", lambda x: 2 * x),
        lambda m: stock.utils.parametrizations.spectral_norm(m[0]),
    ],
)
def test_an_edited_sequence_counts(change):
    torch.manual_seed(0)
    model = stock.Sequential(*layers()).double()
    twin = copy.deepcopy(model)
    fast = advdl_ops.optimize(model)
    for network in (twin, fast):
        torch.manual_seed(0)
        change(network)
    check_as(twin, fast, X)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layers.append(stock.Tanh()),
        lambda m: m.named.update({"b": stock.Tanh()}),
        lambda m: setattr(m, "scale", 3),
        lambda m: setattr(type(m), "scale", 3),
    ],
)
def test_an_edited_container_counts(change):
    kind = type("Own", (Listed,), {})
    model = kind().double()
    twin = copy.deepcopy(model)
    fast = advdl_ops.optimize(model)
    assert counts(fast)[0] == 3
    change(twin), change(fast)
    check_as(twin, fast, X)


def test_slices_of_a_fused_sequence():
    model = stock.Sequential(*layers()).double().eval()
    fast = advdl_ops.optimize(model)
    same(fast[:2](X), model[:2](X))
    same(fast[1:](X), model[1:](X))


def test_numbers_that_become_parameters():
    class Scaled(Block):
        def forward(self, x):
            return self.act(self.norm1(self.conv1(x))) * self.scale

    block = made(Scaled)
    block.scale = 1.0
    fast = advdl_ops.optimize(block)
    del fast.scale
    fast.scale = stock.Parameter(torch.ones((), dtype=torch.float64))
    fast(X).sum().backward()
    assert fast.scale.grad is not None
