"""optimize(): the trace is seen by nobody but the traced forward, and what other code asks of a proxy is refused."""

import builtins
import collections.abc
import copy
import functools
import threading

import pytest
import torch
from support.optimize import Block, X, check_as, counts, made, same
from torch import nn as stock

import advdl_ops
from advdl_ops._optimize.proxies import Untraceable
from advdl_ops._optimize.trace import variants_of

pytestmark = pytest.mark.usefixtures("one_thread")


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


# ---- isinstance ----


class Meets(Block):
    """Its forward waits for another thread, and asks for a type before and after."""

    def forward(self, x):
        x = x if isinstance(x, torch.Tensor) else x[0]
        meeting.traced.set()
        assert meeting.looked.wait(60)
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if isinstance(x, torch.Tensor) else -y


class Meeting:
    def __init__(self):
        self.traced, self.looked = threading.Event(), threading.Event()


meeting = Meeting()


def test_another_thread_sees_the_isinstance_of_before():
    original, seen = builtins.isinstance, []

    def look():
        assert meeting.traced.wait(60)
        seen.append(builtins.isinstance is original)
        seen.append(isinstance(X, torch.Tensor) and not isinstance(3, torch.Tensor))
        meeting.looked.set()

    thread = threading.Thread(target=look)
    thread.start()
    block = made(Meets)
    fast = advdl_ops.optimize(block)
    thread.join()
    assert seen == [True, True]
    assert counts(fast) == (1, 2, 0)
    assert "isinstance" not in globals() and builtins.isinstance is original
    check_as(copy.deepcopy(block), fast, X)


def asks(x):
    return x if isinstance(x, torch.Tensor) else x[0]


def asks_an_abstract_class(x):
    return x[0] if isinstance(x, collections.abc.Sequence) else x


def asks_torch(x):
    return x if torch.is_tensor(x) else x[0]


def asks_for_a_parameter(x):
    return 2 * x if isinstance(x, stock.Parameter) else x


def reads_the_class(x):
    return x if x.__class__ is torch.Tensor else x[0]


def matches(x):
    match x:
        case torch.Tensor():
            return x
    return x[0]


@functools.singledispatch
def dispatches(x):
    return x[0]


@dispatches.register
def _(x: torch.Tensor):
    return x


def calling(helper):
    class Calls(Block):
        def forward(self, x):
            return torch.relu(self.norm1(self.conv1(helper(x))))

    return Calls


HELPERS = [
    asks, asks_an_abstract_class, asks_torch, asks_for_a_parameter, reads_the_class, matches, dispatches,
]  # fmt: skip


@pytest.mark.parametrize("helper", HELPERS)
def test_what_only_a_helper_asks_is_refused(helper):
    block = made(calling(helper))
    with pytest.raises(Untraceable, match="it asks what something is"):
        variants_of(block)
    fast = advdl_ops.optimize(block)
    assert counts(fast) == (0, 4, 0)
    same(fast.eval()(X), block.eval()(X))


class MatchesItself(Block):
    def forward(self, x):
        match x:
            case torch.Tensor():
                return torch.relu(self.norm1(self.conv1(x)))
        return x


class ReadsTheClass(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if x.__class__ is torch.Tensor else -y


class AsksForAnAttribute(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if isinstance(x.shape, torch.Size) else -y


class AsksByBuiltins(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if builtins.isinstance(x, torch.Tensor) else -y


class Base(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if isinstance(x, torch.Tensor) else -y


class AsksInItsBase(Base):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    "kind", [MatchesItself, ReadsTheClass, AsksForAnAttribute, AsksByBuiltins, AsksInItsBase]
)
def test_other_ways_to_ask_are_refused(kind):
    block = made(kind)
    with pytest.raises(Untraceable):
        variants_of(block)
    fast = advdl_ops.optimize(block)
    same(fast.eval()(X), block.eval()(X))


class AsksInAFunction(Block):
    """Of a function that the forward defines, its globals are the forward's."""

    def forward(self, x):
        def tensor(x):
            return x if isinstance(x, torch.Tensor) else x[0]

        return torch.relu(self.norm1(self.conv1(tensor(x))))


class AsksTorch(Block):
    def forward(self, x):
        x = x if torch.is_tensor(x) else x[0]
        return torch.relu(self.norm1(self.conv1(x)))


class Asks(Block):
    """With default values of both kinds, `super()` and a variable of the enclosing scope."""

    def forward(self, x, scale=2.0, *, shift=1.0):
        y = torch.relu(self.norm1(super().__getattr__("conv1")(x)))
        return scale * y + shift if isinstance(x, torch.Tensor) else made


@pytest.mark.parametrize("kind", [AsksInAFunction, AsksTorch, Asks])
def test_what_the_forward_itself_asks_is_answered(kind):
    block = made(kind)
    fast = advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    check_as(copy.deepcopy(block), fast, X)


# ---- globals ----

calls = 0
factor = 1.0


class CountsInGlobal(Block):
    def forward(self, x):
        def count():
            global calls
            calls += 1

        count()
        return torch.relu(self.norm1(self.conv1(x)))


def doubles_the_factor():
    global factor
    factor *= 2


class ReadsAGlobalThatChanges(Block):
    def forward(self, x):
        doubles_the_factor()
        return factor * torch.relu(self.norm1(self.conv1(x)))


def test_an_assigned_global_is_the_modules():
    fast = advdl_ops.optimize(made(CountsInGlobal))
    assert "its forward assigns a global" in str(advdl_ops.explain(fast))
    before = calls
    fast(X)
    assert calls == before + 1


class ReadsItInAFunction(Block):
    def forward(self, x):
        doubles_the_factor()
        return (lambda y: factor * y)(torch.relu(self.norm1(self.conv1(x))))


@pytest.mark.parametrize("kind", [ReadsAGlobalThatChanges, ReadsItInAFunction])
def test_a_global_that_a_helper_assigns_is_read_anew(kind):
    global factor
    block = made(kind).eval()
    fast = advdl_ops.optimize(block)
    assert "the global factor changes while it runs" in str(advdl_ops.explain(fast))
    factor = 1.0
    first, second = fast(X), fast(X)
    assert factor == 4.0
    same(second, 2 * first)


# ---- attributes of tensors ----


class WritesByAnAttribute(Block):
    """A transposed tensor is a view: what is added to it is added to x."""

    def forward(self, x):
        x = x * 1
        y = self.conv1(x)
        z = x.mT
        z += 1
        return torch.relu(self.norm1(y)) + x


def test_writes_to_an_attribute_are_kept():
    block = made(WritesByAnAttribute).eval()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    with torch.no_grad():
        same(fast(X), twin(X))
