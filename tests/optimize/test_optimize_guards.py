"""optimize(): forwards whose graph says less than their code, and what is changed after it."""

import collections
import copy
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from support.optimize import Block, X, check_as, counts, made, same
from torch import nn as stock

import advdl_ops
from advdl_ops import nn

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


class Ordered(Block):
    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        return collections.OrderedDict(out=y, x=x)


class Tuples(Block):
    def forward(self, x):
        x, skip = x
        y = self.act(self.norm1(self.conv1(x)))
        return y if skip is None else y + skip


class AsksForTuple(Block):
    def forward(self, x):
        if isinstance(x, tuple):
            x = torch.cat(x, 1)
        return self.act(self.norm1(self.conv1(x)))


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
    AddsItself, AddsTwice, ReadsWhatIsAddedTo, WritesOut, WritesOutInChild, WrittenByPreHook, WrittenByHook,
]  # fmt: skip
# Of the first one every call counts, of the others torch refuses the gradients.
WITHOUT_GRADIENTS = (
    IntoBuffer, ChainedInPlace, WritesInBody, GateWritten, WritesOut, WritesOutInChild, WrittenByPreHook, WrittenByHook,
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


@pytest.mark.parametrize("skip", [None, X])
def test_arguments_taken_apart(skip):
    block = made(Tuples)
    same(advdl_ops.optimize(block)((X, skip)), block((X, skip)))


def test_tuples_that_are_asked_for():
    block = made(AsksForTuple)
    fast = advdl_ops.optimize(block)
    same(fast(X.chunk(2, 1)), block(X.chunk(2, 1)))
    same(fast(X), block(X))


def test_dicts_come_as_they_are():
    block = made(Ordered)
    found, expected = advdl_ops.optimize(block)(X), block(X)
    assert counts(advdl_ops.optimize(block))[0] == 1
    assert type(found) is collections.OrderedDict and list(found) == list(expected)
    assert "\n    channels_last on CPU" in str(advdl_ops.explain(advdl_ops.optimize(block)))
    same(found["out"], expected["out"])


# ---- what is changed afterwards ----


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


def test_restore_after_the_class_has_changed():
    fast = advdl_ops.optimize(made(Block))
    stock.utils.parametrizations.weight_norm(fast.conv1)
    with pytest.raises(ValueError, match=r"restore: model \(conv1\) must be of the class"):
        advdl_ops.restore(fast)
    assert isinstance(fast.norm1, nn.BatchNormAct2d)


def test_other_kinds_of_numbers_are_left():
    model = stock.Sequential(stock.Conv2d(2, 2, 1, dtype=torch.complex64))
    left = advdl_ops.explain(advdl_ops.optimize(model), as_dict=True)["left"]
    assert left == {"0": "its weight is torch.complex64"}


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


def test_two_threads_at_once():
    found = []
    model = made(Block)
    threads = [
        threading.Thread(target=lambda: found.append(counts(advdl_ops.optimize(model))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(2, 0, 0)] * 4
