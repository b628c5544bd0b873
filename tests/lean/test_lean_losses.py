"""Whole trainings: the losses at a level are those without it, to the last bit, and those of stock up to rounding."""

import copy

import pytest
import torch
from support.lean import LEVELS, leaned, tiny_net
from torch.nn.functional import cross_entropy

from advdl_ops import models, set_lean
from benchmarks.stock_resnet import StockResNet

f64 = torch.float64


def batches(count, dtype, size=16):
    """Images of three classes that differ in the color of a corner."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        target = torch.randint(3, (8,), generator=generator)
        x = torch.randn(8, 3, size, size, generator=generator, dtype=f64)
        x[torch.arange(8), target, : size // 2, : size // 2] += 1
        yield x.to(dtype), target


def losses(net, count, dtype=torch.float32, rate=0.05):
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    found = []
    for x, target in batches(count, dtype):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=pytest.mark.extra) for level in LEVELS[:3]] + ["deepest"]
)
def test_200_steps_are_those_without_a_level(level, one_thread):
    plain = tiny_net(blocks=1)
    lean = leaned(plain, level)
    expected, found = losses(plain, 200), losses(lean, 200)
    assert found == expected
    assert sum(found[-20:]) < 0.5 * sum(found[:20])  # it learns
    for (key, t), other in zip(plain.state_dict().items(), lean.state_dict().values(), strict=True):
        assert t.equal(other), key


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_level_that_changes_from_step_to_step(one_thread):
    plain = tiny_net(blocks=1)
    lean = copy.deepcopy(plain)
    turn = iter((None, *LEVELS) * 3)

    def next_level(*_):
        set_lean(lean, next(turn))

    lean.register_full_backward_hook(next_level)
    expected = losses(plain, 15)
    assert losses(lean, 15) == expected
    assert next(turn, "done") == "done"


@pytest.mark.parametrize("bottleneck", [False, pytest.param(True, marks=pytest.mark.extra)])
def test_the_losses_of_stock(bottleneck, one_thread):
    """fp64: the first losses differ by rounding, 1e-15, and each step multiplies a difference by less than 10."""
    layers = (1, 1, 1, 1)
    stock = StockResNet(layers, bottleneck, 3).to(f64)
    kind = models.Bottleneck if bottleneck else models.BasicBlock
    ours = models.ResNet(kind, layers, 3).to(f64)
    stock.load_state_dict(ours.state_dict())
    expected = losses(stock, 6, f64, rate=0.01)
    for level in ("block", "deepest"):
        lean = leaned(ours, level)
        found = losses(lean, 6, f64, rate=0.01)
        assert found == pytest.approx(expected, rel=1e-10)
        assert found[:2] == pytest.approx(expected[:2], rel=1e-13)
