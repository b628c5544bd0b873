"""optimize(): forwards that differ by mode, arguments and attributes, and those that have no graph."""

import collections
import copy

import pytest
import torch
import torch.utils.checkpoint
from support.optimize import AsksForTuple, Block, ByMode, Counting, X, check_as, counts, made, same
from torch import nn as stock

import advdl_ops
from advdl_ops._optimize.trace import variants_of

pytestmark = pytest.mark.usefixtures("one_thread")


class OptionalScale(Block):
    def forward(self, x, scale=None, *, shift=None, **unused):
        y = torch.relu(self.norm1(self.conv1(x)))
        y = y if scale is None else scale * y
        return y if shift is None else y + shift


class OneOrMore(Block):
    def forward(self, x):
        parts = [x] if isinstance(x, torch.Tensor) else x
        return torch.relu(self.norm1(self.conv1(torch.cat(parts, 1))))


class OfValues(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if x.sum() > 0 else -y


class AsksIntermediates(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y[0] if isinstance(y, tuple) else y


class CountsInBuffer(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return torch.relu(self.norm1(self.conv1(x)))


class Keeps(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.kept = {}

    def forward(self, x):
        self.kept["y"] = torch.relu(self.norm1(self.conv1(x)))
        return self.kept["y"]


class InNoGrad(Block):
    def forward(self, x):
        with torch.no_grad():
            y = torch.relu(self.norm1(self.conv1(x)))
        return y + torch.relu(self.norm2(self.conv2(x)))


class Checkpointed(Block):
    reentrant = False

    def body(self, x):
        return torch.relu(self.norm1(self.conv1(x)))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class OfSizes(Block):
    """What takes sizes in C++ must not take a proxy for a tensor."""

    def forward(self, x):
        sizes = x.shape if isinstance(x, torch.Tensor) else x
        return torch.relu(self.norm1(self.conv1(torch.ones(sizes, dtype=torch.float64))))


class OwnConstant(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y * torch.tensor(2.0, dtype=x.dtype)


def test_both_modes():
    block = made(ByMode)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    check_as(twin, fast, X)


@pytest.mark.parametrize("grad", [True, False])
def test_optional_arguments(grad):
    block = made(OptionalScale).eval()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    with torch.set_grad_enabled(grad):
        for args, options in [
            ((), {}),
            ((X,), {}),
            ((), {"shift": X}),
            ((), {"scale": X, "shift": X}),
            ((), {"other": 1}),
            ((2.0,), {}),
        ]:
            same(fast(X, *args, **options), twin(X, *args, **options))
    assert fast.forward.__defaults__ == (None,)


def test_one_optional_argument_of_two_has_a_graph():
    given = {variant.arguments for variant in variants_of(made(OptionalScale))}
    assert given == {("x",), ("x", "scale"), ("x", "shift"), ("x", "scale", "shift")}


def test_one_tensor_or_more():
    block = made(OneOrMore).eval()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    halves = list(X.chunk(2, 1))
    for x in (X, halves):
        same(fast(x), twin(x))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OfValues, "control flow"),
        (AsksIntermediates, "it asks what something is"),
        (Counting, "it assigns self.calls"),
        (Keeps, "it assigns self.kept"),
        (InNoGrad, "it switches gradients"),
        (Checkpointed, "or checkpoints"),
        (CheckpointedReentrant, "it switches gradients"),
    ],
)
def test_what_a_graph_would_not_hold_keeps_its_forward(kind, why):
    block = made(kind)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (0, 4, 0) and type(fast) is kind
    assert why in str(advdl_ops.explain(fast)).splitlines()[1]
    assert block.__dict__.get("kept", {}) == {}
    check_as(twin, fast, X.clone().requires_grad_())


def test_sizes():
    block = made(OfSizes).eval()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    for x in (X, list(X.shape)):
        same(fast(x), twin(x))


def test_constants_of_its_own():
    block = made(OwnConstant)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    check_as(twin, fast, X)


def test_writes_to_buffers_are_kept():
    block = made(CountsInBuffer)
    fast = advdl_ops.optimize(block)
    assert block.calls == 0
    assert counts(fast) == (1, 2, 0)
    fast(X), fast(X)
    assert fast.calls == 2


def test_tracing_leaves_the_model_as_it_is():
    block = Counting(stock.BatchNorm2d, stock.ReLU()).eval()
    advdl_ops.optimize(block)
    assert block.calls == 0 and not block.training


class Ordered(Block):
    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        return collections.OrderedDict(out=y, x=x)


class Tuples(Block):
    def forward(self, x):
        x, skip = x
        y = self.act(self.norm1(self.conv1(x)))
        return y if skip is None else y + skip


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
