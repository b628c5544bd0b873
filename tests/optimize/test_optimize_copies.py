"""optimize(): the new tree of modules beside the given one, its copies and pickles, and restore()."""

import collections
import copy

import pytest
import torch
from support.checks import copies_of
from support.optimize import BLOCKS, Block, Holds, X, check_as, counts, made, same
from torch import nn as stock

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", BLOCKS)
def test_restore(name):
    norm, act, _ = BLOCKS[name]
    block = Block(norm, act).double()
    classes = [type(layer) for layer in block.modules()]
    attributes = [set(vars(layer)) for layer in block.modules()]
    fast = advdl_ops.restore(advdl_ops.optimize(block))
    assert [type(layer) for layer in fast.modules()] == classes
    assert [set(vars(layer)) for layer in fast.modules()] == attributes
    assert [type(layer) for layer in block.modules()] == classes
    check_as(copy.deepcopy(block), fast, X)


class NamesTorch(Block):
    """Its fused forward has the module `torch` among its names."""

    def forward(self, x):
        return torch.flatten(self.act(self.norm1(self.conv1(x))), 1)


@pytest.mark.parametrize("kind", [Block, NamesTorch])
def test_copies_and_pickles(kind):
    block = kind(stock.BatchNorm2d, stock.ReLU()).double()
    twin = copy.deepcopy(block)
    fast = advdl_ops.optimize(block)
    for other in copies_of(fast).values():
        assert counts(other) == counts(fast)
        check_as(copy.deepcopy(twin), other, X)


def test_the_given_tree_is_left_as_it_is():
    block = Block(stock.BatchNorm2d, stock.ReLU())
    before = [(type(layer), dict(vars(layer))) for layer in block.modules()]
    fast = advdl_ops.optimize(block)
    fast.conv1.register_forward_hook(lambda *_: None)
    fast.eval()
    fast.conv1 = stock.Conv2d(8, 8, 1)
    after = [(type(layer), dict(vars(layer))) for layer in block.modules()]
    assert [kind for kind, _ in after] == [kind for kind, _ in before]
    for (_, a), (_, b) in zip(after, before, strict=True):
        assert a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    assert block.training and not block.conv1._forward_hooks


def test_attributes_that_hold_modules_hold_the_new_ones():
    block = made(Holds)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert fast.layers[0] is fast.conv1 and fast.last is fast.norm2
    assert block.layers[0] is block.conv1 and block.last is block.norm2
    check_as(twin, fast, X)
    assert not fast.norm1.training and block.norm1.training


class Frozen(dict):
    """As diffusers has it: a copy() of it is none of its kind."""


def test_attributes_that_are_dicts_of_their_own_kind_are_shared():
    block = Block(stock.BatchNorm2d, stock.ReLU())
    block._config = Frozen(channels=8)
    assert advdl_ops.optimize(block)._config is block._config


def test_optimizers_go_on():
    model = stock.Sequential(Block(stock.BatchNorm2d, stock.ReLU())).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    advdl_ops.optimize(model, inplace=True)
    before = model[0].conv1.weight.clone()
    model(X).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].conv1.weight, before)


def test_restore_after_the_class_has_changed():
    fast = advdl_ops.optimize(made(Block))
    stock.utils.parametrizations.weight_norm(fast.conv1)
    with pytest.raises(ValueError, match=r"restore: model \(conv1\) must be of the class"):
        advdl_ops.restore(fast)
    assert isinstance(fast.norm1, nn.BatchNormAct2d)


class Registry(Block):
    """Modules under names of their own, in every kind of place."""

    def __init__(self, *args):
        super().__init__(*args)
        self.by_name = {"norm": self.norm1}
        self.steps = collections.deque([self.conv1, self.norm1])
        self.calls = [self.body]
        self.hooked = []
        self.norm1.register_forward_hook(self.note)

    def note(self, *_):
        self.hooked = [*self.hooked, len(self.hooked)]

    def body(self, x):
        for layer in self.steps:
            x = layer(x)
        return self.by_name["norm"](x)

    def forward(self, x):
        return self.calls[0](x) if x.sum() > 0 else self.calls[0](-x)


def test_modules_held_elsewhere_are_the_new_ones():
    block = made(Registry)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    fast.eval(), twin.eval()
    mean = block.norm1.running_mean.clone()
    same(fast(X), twin(X))
    assert torch.equal(block.norm1.running_mean, mean)
    assert fast.hooked == [0, 1] and block.hooked == []
