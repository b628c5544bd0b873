"""Layers of MONAI's networks: dropout of probability 0 between norm and activation, one block by two paths."""

import pytest
import torch

import advdl_ops

f64 = torch.float64


class ADN(torch.nn.Sequential):
    def __init__(self, channels, between):
        super().__init__()
        self.add_module("N", torch.nn.InstanceNorm2d(channels, affine=True))
        self.add_module("D", between)
        self.add_module("A", torch.nn.LeakyReLU(0.1))


class Block(torch.nn.Module):
    def __init__(self, between):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.adn = ADN(4, between)

    def forward(self, x):
        return self.adn(self.conv(x))


def pair(between):
    torch.manual_seed(0)
    stock = Block(between).to(f64)
    return stock, advdl_ops.optimize(stock), torch.randn(2, 4, 5, 6, dtype=f64)


PASSING = [torch.nn.Dropout(0.0), torch.nn.Dropout2d(0), torch.nn.Identity()]


@pytest.mark.parametrize("between", PASSING, ids=str)
def test_fused(between):
    stock, fast, x = pair(between)
    assert advdl_ops.explain(fast, as_dict=True)["fused"] == ["adn.N + A"]
    for training in (True, False):
        torch.testing.assert_close(fast.train(training)(x), stock.train(training)(x))


def test_dropout_switched_on_later():
    stock, fast, x = pair(torch.nn.Dropout(0.0))
    fast.adn.D.p = 0.5  # the children of a copy are copies
    assert stock.adn.D.p == 0
    stock.adn.D.p = 0.5
    outs = []
    for model in (stock, fast):
        torch.manual_seed(3)
        outs.append(model(x))
    assert (outs[0] == 0).any()
    torch.testing.assert_close(outs[1], outs[0])


def test_exchanged_or_watched_later():
    _, fast, x = pair(torch.nn.Identity())
    calls = []
    handle = fast.adn.D.register_forward_hook(lambda *_: calls.append(1))
    fast(x)
    handle.remove()
    fast(x)
    assert calls == [1]
    fast.adn.D = torch.nn.Tanh()
    expected = fast.adn.A(torch.tanh(fast.adn.N(fast.conv(x))))
    torch.testing.assert_close(fast(x), expected)


def test_other_dropout_is_kept_with_a_reason():
    _, fast, _ = pair(torch.nn.Dropout(0.2))
    text = str(advdl_ops.explain(fast))
    assert "one op" not in text and "not fused: D (Dropout) follows" in text


class Tree(torch.nn.Module):
    """As MONAI's DynUNet: a flat list of the blocks, and a nested module that calls them."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(ConvNorm() for _ in range(2))
        self.nested = Nested(self.blocks[0], Nested(self.blocks[1], None))

    def forward(self, x):
        return self.nested(x)


class ConvNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        self.act = torch.nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Nested(torch.nn.Module):
    def __init__(self, block, inner):
        super().__init__()
        self.block, self.inner = block, inner

    def forward(self, x):
        x = self.block(x)
        return x if self.inner is None else self.inner(x)


def test_one_block_by_two_paths():
    torch.manual_seed(0)
    stock = Tree().to(f64)
    fast = advdl_ops.optimize(stock)
    assert fast.blocks[1] is fast.nested.inner.block
    assert str(advdl_ops.explain(fast)).count("one op: conv + norm + act") == 2
    x = torch.randn(2, 4, 5, 6, dtype=f64)
    for training in (True, False):
        torch.testing.assert_close(fast.train(training)(x), stock.train(training)(x))


@pytest.mark.extra
def test_monai():
    nets = pytest.importorskip("monai.networks.nets")
    x = torch.randn(1, 1, 64, 64)
    for make, fused in (
        (lambda: nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]), 10),
        (lambda: nets.BasicUNet(2, 1, 2, (16, 16, 32, 32, 32, 16)), 18),
    ):
        stock = make().eval()
        fast = advdl_ops.optimize(stock)
        assert len(advdl_ops.explain(fast, as_dict=True)["fused"]) == fused
        with torch.no_grad():
            torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)
