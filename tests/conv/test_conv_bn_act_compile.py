"""ConvBNAct and conv_bn_act under torch.compile and torch.export."""

import copy

import pytest
import torch
from support.compiled import check_steps, exported

from advdl_ops.functional import conv_bn_act
from advdl_ops.nn import BatchNormAct2d, ConvBNAct
from advdl_ops.nn import conv_bn_act as siblings

pytestmark = pytest.mark.usefixtures("fresh_compile", "one_thread")
f64 = torch.float64
OPTIONS = [
    {"act": "relu"},
    {"act": "silu", "padding_mode": "reflect", "bias": True},
    {"act": "gelu", "order": "conv-act-bn", "stride": 2},
    {"momentum": None, "groups": 2},
]


def batch(n, dtype=f64):
    x = torch.randn(n, 4, 9, 8, dtype=dtype)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_backward(options, mode):
    layer = ConvBNAct(4, 6, 3, dtype=f64, **options)
    layer(torch.randn(3, 4, 9, 8, dtype=f64))
    check_steps(layer.train(mode), lambda n: [batch(n).requires_grad_()])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_folded(options):
    layer = ConvBNAct(4, 6, 3, dtype=f64, **options)
    layer(torch.randn(3, 4, 9, 8, dtype=f64))
    with torch.no_grad():
        check_steps(layer.eval(), lambda n: [batch(n)])


def test_folded_sees_new_weights():
    layer = ConvBNAct(4, 6, 3, act="relu", dtype=f64).eval()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 9, 8, dtype=f64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x))
        layer.conv.weight.mul_(2)
        layer.bn.running_mean.data.add_(1)
        torch.testing.assert_close(fast(x), layer(x))


def test_residual_and_siblings():
    conv, bn = torch.nn.Conv2d(4, 6, 1, dtype=f64), BatchNormAct2d(6, act="relu", dtype=f64)
    x, residual = torch.randn(3, 4, 5, 5, dtype=f64), torch.randn(3, 6, 5, 5, dtype=f64)
    for mode in (True, False):
        bn.train(mode)
        fast = torch.compile(
            lambda x, r: siblings(conv, bn, x, r), fullgraph=True, backend="aot_eager"
        )
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(fast(x, residual), bn(conv(x), residual))


def test_function():
    tensors = [torch.randn(6, 4, 3, 3), torch.zeros(6), torch.ones(6), torch.rand(6), torch.rand(6)]
    tensors = [t.double() for t in tensors]
    x = torch.randn(3, 4, 5, 5, dtype=f64)
    for training in (True, False):

        def call(x, *t, training=training):
            return conv_bn_act(x, *t, act="relu", training=training, padding=1)

        fast = torch.compile(call, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(fast(x, *copy.deepcopy(tensors)), call(x, *tensors))


@pytest.mark.slow
def test_inductor_in_fp32():
    layer = ConvBNAct(4, 6, 3, act="relu").eval()
    x = torch.randn(3, 4, 9, 8)
    fast = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x))
    layer.train()
    torch.compiler.reset()
    other = copy.deepcopy(layer)
    out, expected = torch.compile(layer, fullgraph=True)(x), other(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(layer.bn.bias.grad, other.bn.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export(options, grad):
    layer = ConvBNAct(4, 6, 3, dtype=f64, **options)
    layer(torch.randn(3, 4, 9, 8, dtype=f64))
    layer.eval()
    x = torch.randn(3, 4, 9, 8, dtype=f64)
    with torch.no_grad():
        layer(x)  # what is cached must stay out of the graph
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.set_grad_enabled(grad):
        other = exported(layer, (x,), dynamic_shapes=({0: rows},))
    with torch.no_grad():
        for n in (2, 5):
            x = torch.randn(n, 4, 9, 8, dtype=f64)
            torch.testing.assert_close(other(x), layer(x))
