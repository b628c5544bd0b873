"""optimize(): which layers run as one op, in fp64 against the model that it was given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.optimize import BLOCKS, Block, X, check_as, counts, made, same
from torch import nn as stock

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, inplace):
    norm, act, groups = BLOCKS[name]
    block = Block(norm, act).double()
    twin = copy.deepcopy(block)
    fast = advdl_ops.optimize(block, inplace=inplace)
    assert (fast is block) == inplace
    assert len(advdl_ops.explain(fast, as_dict=True)["fused"]) == groups
    check_as(twin, fast, X)
    assert isinstance(fast, Block)


@pytest.mark.parametrize(
    ("act", "taken"),
    [(stock.ReLU6(), "act"), (F.relu6, "relu6"), (F.silu, "silu"), (torch.relu, "relu"), (stock.Hardtanh(0, 6), "")],
    ids=["module", "relu6", "silu", "relu", "hardtanh"],
)  # fmt: skip
def test_which_activations_are_taken_along(act, taken):
    """Of a function the name is the activation's. Hardtanh, whose subclass ReLU6 is, stays behind."""
    block = Block(stock.BatchNorm2d, act).double()
    fast = advdl_ops.optimize(block)
    groups = advdl_ops.explain(fast, as_dict=True)["fused"]
    ending = f" + {taken}" if taken else ""
    assert groups == [f"conv1 + norm1{ending}", f"conv2 + norm2 + add{ending}"]
    check_as(copy.deepcopy(block), fast, X)


def test_without_fusion():
    fast = advdl_ops.optimize(Block(stock.BatchNorm2d, stock.ReLU()), fuse=False)
    assert counts(fast) == (0, 4, 0)
    assert type(fast) is Block


def test_a_layer_in_two_places_is_not_fused():
    block = Block(stock.BatchNorm2d, stock.ReLU()).double()
    block.norm2 = block.norm1
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (0, 3, 0)
    assert "it stands in two places" in str(advdl_ops.explain(fast))
    check_as(twin, fast, X)


def test_hooks_are_called():
    block, called = Block(stock.BatchNorm2d, stock.ReLU()).double(), []
    block.norm1.register_forward_hook(lambda *_: called.append("norm1"))
    block.register_forward_hook(lambda *_: called.append("block"))
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    # conv1 alone has nothing to be fused with; conv2, norm2, addition and relu have.
    assert counts(fast) == (1, 2, 0)
    check_as(twin, fast, X)
    called.clear()
    fast(X)
    assert called == ["norm1", "block"]


def test_nothing_to_do():
    model = stock.Sequential(stock.Linear(3, 4), stock.ReLU())
    assert counts(advdl_ops.optimize(model)) == (0, 0, 0)
    ours = nn.ConvBNAct(3, 4, 3)
    assert counts(advdl_ops.optimize(ours)) == (0, 0, 0)


class Sums(Block):
    def forward(self, x, y):
        return self.act(self.norm1(self.conv1(x)) + y) + self.act(self.conv2(x) + y)


@pytest.mark.parametrize(
    "other",
    [
        X,
        X[:, :, :1, :1],
        X[:1],
        X[0, 0, 0, 0],
        torch.cat([X, X], 0)[None],
        X.float(),
        2.5,
    ],
    ids=["alike", "channels", "batch", "scalar", "more", "float", "number"],
)
@pytest.mark.parametrize("train", [True, False])
def test_sums_that_broadcast_or_promote(other, train):
    block = made(Sums).train(train)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (2, 1, 0)
    if isinstance(other, torch.Tensor) and other.dim() == 5:
        other = other[:, :2]
    x = X.float() if isinstance(other, torch.Tensor) and other.dtype == torch.float32 else X
    if x.dtype == torch.float32:  # the sum is in double
        twin, fast, other = twin.float(), fast.float(), other.double()
    with torch.set_grad_enabled(train):
        expected, found = twin(x, other), fast(x, other)
    assert found.dtype == expected.dtype
    same(found, expected, 1e-5 if x.dtype == torch.float32 else 1e-9)


class GatedBySigmoid(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        z = self.norm2(self.conv2(x))
        return y * torch.sigmoid(y) + z.sigmoid() * z + x * self.conv1(x).sigmoid()


def test_silu_by_sigmoid():
    block = made(GatedBySigmoid)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    fused = advdl_ops.explain(fast, as_dict=True)["fused"]
    # conv1 is called twice; its norm alone is fused.
    assert fused == ["norm1 + silu", "conv2 + norm2 + silu"]
    check_as(twin, fast, X)


class AddsToItsInput(Block):
    def forward(self, x):
        x += self.norm1(self.conv1(x))
        return x


class WritesItsInput(Block):
    def forward(self, x):
        x = x + 1
        y = self.conv1(x)
        z = x.mul_(2)
        return torch.relu(self.norm1(y) + z)


class WritesAnother(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        z = x * 2
        z += y
        return torch.relu(self.norm2(self.conv2(y))) + z


@pytest.mark.parametrize("kind", [AddsToItsInput, WritesItsInput, WritesAnother])
def test_writes_are_kept(kind):
    block = kind(stock.BatchNorm2d, stock.ReLU()).double()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    for mode in (True, False):
        block.train(mode), twin.train(mode), fast.train(mode)
        a, b = X.clone(), X.clone()
        with torch.no_grad():
            same(fast(a), twin(b))
        assert torch.equal(a, X) == (kind is not AddsToItsInput)
        same(a, b)
