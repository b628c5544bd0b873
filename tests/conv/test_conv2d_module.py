"""Conv2d, DilatedConv2d, DepthwiseConv2d and HybridDilatedConv beside torch.nn's: constructors, state, copies."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, in_layout
from support.checks import copies_of

from advdl_ops import nn
from advdl_ops.activation import Activation

pytestmark = pytest.mark.usefixtures("one_thread")

f64 = torch.float64
# ours, and the same by torch.nn.Conv2d.
PAIRS = {
    "dense": (lambda **o: nn.Conv2d(6, 8, 3, **o), lambda **o: torch.nn.Conv2d(6, 8, 3, **o)),
    "all by position": (
        lambda **o: nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), (1, 3), 2, False, "reflect", **o),
        lambda **o: torch.nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), (1, 3), 2, False, "reflect", **o),
    ),
    "same": (
        lambda **o: nn.Conv2d(6, 8, 4, padding="same", **o),
        lambda **o: torch.nn.Conv2d(6, 8, 4, padding="same", **o),
    ),
    "dilated": (
        lambda **o: nn.DilatedConv2d(6, 8, 3, **o),
        lambda **o: torch.nn.Conv2d(6, 8, 3, dilation=2, padding=2, **o),
    ),
    "dilated, all by position": (
        lambda **o: nn.DilatedConv2d(6, 8, (3, 5), (3, 1), 2, (1, 0), 2, False, "circular", **o),
        lambda **o: torch.nn.Conv2d(6, 8, (3, 5), 2, (1, 0), (3, 1), 2, False, "circular", **o),
    ),
    "dilated, even kernel": (
        lambda **o: nn.DilatedConv2d(6, 8, 2, 4, **o),
        lambda **o: torch.nn.Conv2d(6, 8, 2, dilation=4, padding=2, **o),
    ),
    "depthwise": (
        lambda **o: nn.DepthwiseConv2d(6, 3, **o),
        lambda **o: torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, **o),
    ),
    "depthwise, all by position": (
        lambda **o: nn.DepthwiseConv2d(6, 5, 2, 1, (2, 1), False, "replicate", **o),
        lambda **o: torch.nn.Conv2d(6, 6, 5, 2, 1, (2, 1), 6, False, "replicate", **o),
    ),
    "multiplier": (
        lambda **o: nn.DepthwiseConv2d(6, (3, 5), multiplier=2, **o),
        lambda **o: torch.nn.Conv2d(6, 12, (3, 5), padding=(1, 2), groups=6, **o),
    ),
}
NAMES = pytest.mark.parametrize("name", PAIRS)


def pair(name, dtype=f64, **options):
    """Ours and stock's, the same random weights."""
    own, stock = PAIRS[name]
    own, stock = own(dtype=dtype, **options), stock(dtype=dtype)
    stock.load_state_dict(own.state_dict())
    return own, stock


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@NAMES
def test_as_torchs_layer(backend, name, layout):
    for act, residual in itertools.product(("none", "relu", "silu"), (False, True)):
        own, stock = pair(name, act=ACTIVATIONS[act][0])
        x = in_layout(torch.randn(2, 6, 11, 10, dtype=f64), layout).requires_grad_()
        y = stock(x)
        added = torch.randn_like(y).requires_grad_() if residual else None
        expected = ACTIVATIONS[act][1](y if added is None else y + added)
        out = own(x, added)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(expected)
        leaves = [x] + ([added] if residual else [])
        found = torch.autograd.grad(out, [*leaves, *own.parameters()], dout)
        exact = torch.autograd.grad(expected, [*leaves, *stock.parameters()], dout)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(own(x, added), expected)
        torch.testing.assert_close(own(x[0]), ACTIVATIONS[act][1](stock(x[0])))


@NAMES
def test_the_same_random_numbers_initialise_it(name):
    own, stock = PAIRS[name]
    torch.manual_seed(3)
    own = own()
    torch.manual_seed(3)
    for (key, a), (other, b) in zip(
        own.state_dict().items(), stock().state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(a, b)


@NAMES
def test_same_attributes_and_state_both_ways(name):
    own, stock = pair(name)
    assert isinstance(own, torch.nn.Conv2d)
    assert isinstance(own, nn.Conv2d)
    for key in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    ):  # fmt: skip
        assert getattr(own, key) == getattr(stock, key), key
    with torch.no_grad():
        stock.weight.add_(1)
    own.load_state_dict(stock.state_dict())
    assert torch.equal(own.weight, stock.weight)
    assert list(own.state_dict()) == list(stock.state_dict())


def test_constructor_has_torchs_signature():
    own = inspect.signature(nn.Conv2d).parameters
    stock = inspect.signature(torch.nn.Conv2d).parameters
    assert list(own)[: len(stock)] == list(stock)
    for key, parameter in stock.items():
        assert own[key].default == parameter.default, key
    assert [own[n].kind for n in list(own)[len(stock) :]] == [inspect.Parameter.KEYWORD_ONLY]
    for cls in (nn.DilatedConv2d, nn.DepthwiseConv2d):
        kinds = {n: p.kind for n, p in inspect.signature(cls).parameters.items()}
        only = [n for n, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY]
        assert only == (["act"] if cls is nn.DilatedConv2d else ["multiplier", "act"])


@NAMES
def test_copies(name):
    own, _ = pair(name, act=torch.nn.LeakyReLU(0.3))
    x = torch.randn(2, 6, 11, 10, dtype=f64)
    expected = own(x)
    for other in copies_of(own).values():
        assert type(other) is type(own)
        assert other.act == Activation("leaky_relu", 2, 0.3)
        assert torch.equal(other(x), expected)
        assert other.weight.data_ptr() != own.weight.data_ptr()


@NAMES
def test_functional_call(name):
    own, _ = pair(name, act="relu")
    x = torch.randn(2, 6, 11, 10, dtype=f64)
    other = {k: torch.randn_like(t) for k, t in own.state_dict().items()}
    found = torch.func.functional_call(own, other, (x,))
    assert not torch.equal(found, own(x))
    own.load_state_dict(other)
    assert torch.equal(found, own(x))


@NAMES
def test_to_and_channels_last(name):
    own, stock = pair(name, torch.float32, act="relu")
    own, stock = own.to(memory_format=torch.channels_last), stock.double()
    x = torch.randn(2, 6, 11, 10).to(memory_format=torch.channels_last)
    out = own(x)
    torch.testing.assert_close(out, F.relu(stock(x.double())).float())
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    assert own.weight.grad.shape == own.weight.shape
    assert own.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@NAMES
def test_parametrized_weight(name):
    own, _ = pair(name, act="relu")
    x = torch.randn(2, 6, 11, 10, dtype=f64)
    before = own(x)
    torch.nn.utils.parametrizations.weight_norm(own)
    torch.testing.assert_close(own(x), before)


def test_repr():
    assert repr(nn.Conv2d(3, 4, 3, act="relu")) == (
        "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), act='relu')"
    )
    assert "act" not in repr(nn.Conv2d(3, 4, 3))
    assert repr(nn.DilatedConv2d(3, 4, 3, 4)) == (
        "DilatedConv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(4, 4), dilation=(4, 4))"
    )
    assert repr(nn.DepthwiseConv2d(4, 3, bias=False, act=torch.nn.SiLU())) == (
        "DepthwiseConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4, "
        "bias=False, act='silu')"
    )


def test_act_may_be_assigned():
    own, stock = pair("dense")
    own.act = "relu"
    x = torch.randn(2, 6, 9, 9, dtype=f64)
    torch.testing.assert_close(own(x), F.relu(stock(x)))
    assert "act='relu'" in repr(own)


@pytest.mark.parametrize("rates", [(1, 2, 4), (1, 2, 5), (1,), (1, 1), (3, 1), (1, 2, 3, 1)])
def test_stack(backend, rates):
    stack = nn.HybridDilatedConv(4, rates, act="silu", dtype=f64)
    assert isinstance(stack, torch.nn.Sequential)
    assert [layer.dilation for layer in stack] == [(r, r) for r in rates]
    x = torch.randn(2, 4, 17, 16, dtype=f64)
    expected = x
    for layer, rate in zip(stack, rates, strict=True):
        z = F.conv2d(expected, layer.weight, layer.bias, padding=rate, dilation=rate)
        expected = F.silu(z)
    out = stack(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, expected)
    assert list(stack.state_dict()) == [
        f"{i}.{n}" for i in range(len(rates)) for n in ("weight", "bias")
    ]
    assert torch.equal(copy.deepcopy(stack)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(stack))(x), out)
    without = nn.HybridDilatedConv(4, rates, bias=False, act=None)
    assert all(layer.bias is None and layer.act.code == 0 for layer in without)


@pytest.mark.parametrize(("rates", "kernel"), [((1, 2, 4), 3), ((1, 2, 5), 3), ((1, 2, 5), 5)])
def test_a_stack_sees_every_position(rates, kernel):
    """What the refusal is about: the gradient of one output reaches its whole field."""
    stack = nn.HybridDilatedConv(1, rates, kernel, act=None, bias=False, dtype=f64)
    with torch.no_grad():
        for layer in stack:
            layer.weight.fill_(1)
    half = sum(rates) * (kernel // 2)
    size = 2 * half + 5
    x = torch.zeros(1, 1, size, size, dtype=f64, requires_grad=True)
    stack(x)[0, 0, size // 2, size // 2].backward()
    seen = x.grad[0, 0] != 0
    inside = seen[2:-2, 2:-2]
    assert inside.all()
    assert seen.sum() == inside.numel()


def test_conv_forward_of_a_subclass_is_called():
    class Doubled(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, 2 * weight, bias)

    layer, x = Doubled(3, 4, 3, bias=False, act="relu"), torch.randn(2, 3, 6, 6)
    stock = torch.nn.functional.conv2d(x, 2 * layer.weight).relu()
    torch.testing.assert_close(layer(x), stock)
    block = nn.ConvBNAct(3, 4, 3, padding=0).eval()
    block.conv = Doubled(3, 4, 3, bias=False)
    with torch.no_grad():
        torch.testing.assert_close(block(x), block.bn(block.conv(x)))
