"""optimize(): forwards whose graph says less than their code give the values of before."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from support.optimize import AsksForTuple, Block, X, check_as, counts, made, same
from torch import nn as stock

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread")


class Chained(Block):
    def forward(self, x):
        h = self.act(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + h)


class ChainedInPlace(Block):
    def forward(self, x):
        h = self.conv1(x) + self.norm1(x)
        h += self.norm2(self.conv2(h))
        return h


class WritesInBody(Block):
    """Between convolution and norm a submodule writes what the convolution reads."""

    def __init__(self, *args):
        super().__init__(*args)
        self.body = stock.Sequential(stock.ReLU(inplace=True), stock.Conv2d(8, 8, 1))

    def forward(self, x):
        x = x * 1
        s = self.conv1(x.detach())
        y = self.body(x)
        return F.relu(self.norm1(s) + y)


class IntoView(Block):
    def forward(self, x):
        b = x * 1
        v = b.view_as(b)
        v += self.norm1(self.conv1(x))
        return b + 1


class IntoBuffer(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("total", torch.zeros_like(X))

    def forward(self, x):
        y = self.norm1(self.conv1(x)).detach()
        return self.act(self.total.add_(y)) + 0 * self.norm2(self.conv2(x))


class ReadsStatistics(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        mean = self.norm1.running_mean.clone()
        return self.act(y) + mean.view(1, -1, 1, 1)


class EnablesAutocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.act(self.norm1(self.conv1(x)))


class EnablesGradients(Block):
    def forward(self, x):
        with torch.enable_grad():
            return self.act(self.norm1(self.conv1(x)))


class DropsByChild(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop = stock.Dropout(0.5)

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        return F.dropout(y, self.drop.p, self.drop.training)


class DrawsNumbers(Block):
    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        return y * random.random() if torch.rand(()) < 2 else y


class KeepsInChild(Block):
    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        self.conv1.last = y
        return y


class FreezesChild(Block):
    def forward(self, x):
        self.norm1.eval()
        return self.act(self.norm1(self.conv1(x)))


class CountsInTensor(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.calls = torch.zeros(())

    def forward(self, x):
        self.calls += 1
        return self.act(self.norm1(self.conv1(x)))


class MarksTensor(Block):
    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        y.seen = True
        return y


class AsksTorch(Block):
    def forward(self, x):
        x = x if torch.is_tensor(x) else x[0]
        return self.act(self.norm1(self.conv1(x)))


class OtherNames(Block):
    def forward(this, before):
        return this.act(this.norm1(this.conv1(before)))


class Strict(Block):
    def __init_subclass__(cls, *, name):
        pass


class GateReadAgain(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        gate = y.sigmoid()
        return y * gate + self.norm2(gate)


class GateWritten(Block):
    """In place of the gate, not of what it is made of."""

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        z = y.sigmoid().mul_(y)
        return z + self.norm2(y)


class WrittenByItsGate(Block):
    """By another name too."""

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        other = y.view_as(y)
        y.mul_(y.sigmoid())
        return self.norm2(other)


class AddsItself(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        z = F.relu(y + y)
        return F.relu(self.norm2(self.conv2(z)) + z)


class AddsTwice(Block):
    def forward(self, x):
        return F.relu(torch.add(self.norm1(self.conv1(x)), self.norm2(x), alpha=2))


class ReadsWhatIsAddedTo(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        z = x * 2
        also = z
        z += y
        return self.norm2(self.conv2(z)) + also


class WrittenAfterItsGate(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        gate = y.sigmoid()
        y.add_(1)
        return self.norm2(y * gate)


class WritesOut(Block):
    """What the convolution reads is written between it and its norm."""

    def forward(self, x):
        x = x * 1
        y = self.conv1(x)
        torch.mul(x, 2, out=x)
        return F.relu(self.norm1(y)) + x


class WritesOutInChild(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.child = Doubled()

    def forward(self, x):
        x = x * 1
        y = self.conv1(x)
        self.child(x)
        return F.relu(self.norm1(y)) + x


class Doubled(stock.Module):
    def forward(self, x):
        return torch.add(x * 1, x * 1, out=x)


class WritesIfTold(Block):
    """The child's graph is of another call, that writes nothing."""

    def __init__(self, *args):
        super().__init__(*args)
        self.child = DoublesIfTold()

    def forward(self, x):
        x = x * 1
        y = self.conv1(x)
        self.child(x, True)
        return F.relu(self.norm1(y)) + x


class DoublesIfTold(stock.Module):
    def forward(self, x, writes=False):
        return x.mul_(2) if writes else x * 2


class WrittenByPreHook(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.conv2.register_forward_pre_hook(lambda _, args: args[0].mul_(2) is None or None)

    def forward(self, x):
        x = x * 1
        y = self.conv1(x)
        z = self.conv2(x)
        return F.relu(self.norm1(y)) + z


class WrittenByHook(WrittenByPreHook):
    def __init__(self, *args):
        Block.__init__(self, *args)
        self.conv2.register_forward_hook(lambda _, args, __: args[0].mul_(2) is None or None)


KINDS = [
    Chained, ChainedInPlace, WritesInBody, IntoView, IntoBuffer, ReadsStatistics, DropsByChild,
    EnablesAutocast, EnablesGradients, KeepsInChild, FreezesChild, CountsInTensor, MarksTensor,
    AsksForTuple, AsksTorch, OtherNames, Strict, GateReadAgain, GateWritten, WrittenByItsGate, WrittenAfterItsGate,
    AddsItself, AddsTwice, ReadsWhatIsAddedTo, WritesOut, WritesOutInChild, WritesIfTold, WrittenByPreHook,
    WrittenByHook,
]  # fmt: skip


# Of the first one every call counts, of the others torch refuses the gradients.
WITHOUT_GRADIENTS = (
    IntoBuffer, ChainedInPlace, WritesInBody, GateWritten, WritesOut, WritesOutInChild, WritesIfTold, WrittenByPreHook,
    WrittenByHook,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_kept(kind):
    block = made(kind)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    before = [dict(vars(layer)) for layer in block.modules()]
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert [dict(vars(layer)) for layer in block.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            fast.eval(), twin.eval()
            same(fast(X).detach(), twin(X).detach())
    if kind not in WITHOUT_GRADIENTS:
        check_as(twin, fast, X)


def test_both_halves_of_a_chain_are_fused():
    assert counts(advdl_ops.optimize(made(Chained)))[0] == 2


@pytest.mark.parametrize("kind", [EnablesAutocast, EnablesGradients])
def test_contexts_are_kept(kind):
    block = made(kind).float()
    fast = advdl_ops.optimize(block)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == block(x).dtype
    with torch.no_grad():
        assert fast(x).requires_grad == block(x).requires_grad
    with torch.no_grad():  # whatever holds where optimize is called
        other = advdl_ops.optimize(made(kind))
    with torch.no_grad():
        assert other(X).requires_grad == (kind is EnablesGradients)


def test_random_numbers_are_drawn_anew():
    block = made(DrawsNumbers).eval()
    torch.manual_seed(0), random.seed(0)
    fast = advdl_ops.optimize(block)
    expected = torch.rand(()), random.random()
    torch.manual_seed(0), random.seed(0)
    assert (torch.rand(()), random.random()) == expected
    assert "it draws random numbers" in str(advdl_ops.explain(fast))
    assert not torch.equal(fast(X), fast(X))


def test_side_effects_are_kept():
    fast = advdl_ops.optimize(made(CountsInTensor))
    assert fast.calls == 0
    fast(X)
    assert fast.calls == 1
    assert advdl_ops.optimize(made(MarksTensor))(X).seen
