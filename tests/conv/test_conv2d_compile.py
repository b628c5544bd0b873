"""conv2d and its modules under torch.compile and torch.export."""

import pytest
import torch
from support.accuracy import ACTIVATIONS
from support.compiled import (
    batch_of,
    check_dynamic_positions,
    check_export,
    check_steps,
    check_without_gradients,
)
from support.conv2d import CASES, call_ours, make_inputs

import advdl_ops
from advdl_ops.functional import conv2d
from advdl_ops.nn import Conv2d, DepthwiseConv2d, DilatedConv2d, HybridDilatedConv

pytestmark = pytest.mark.usefixtures("fresh_compile", "one_thread")
f64 = torch.float64

MODULES = {
    "dense": lambda act: Conv2d(6, 4, 3, 2, act=act, dtype=f64),
    "same": lambda act: Conv2d(6, 6, (2, 3), padding="same", act=act, dtype=f64),
    "reflect": lambda act: Conv2d(6, 4, 3, padding=1, padding_mode="reflect", act=act, dtype=f64),
    "dilated": lambda act: DilatedConv2d(6, 4, 3, bias=False, act=act, dtype=f64),
    "depthwise": lambda act: DepthwiseConv2d(6, 3, 2, act=act, dtype=f64),
    "multiplier": lambda act: DepthwiseConv2d(6, 3, multiplier=2, act=act, dtype=f64),
}
NAMES = pytest.mark.parametrize("name", MODULES)


def batch(n, layout="contiguous", dtype=f64, channels=6, size=(8, 7)):
    return batch_of(n, channels, *size, layout=layout, dtype=dtype)


@NAMES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_module(name, layout):
    for act in (None, "relu", "silu"):
        torch.compiler.reset()
        check_steps(MODULES[name](act), lambda n: [batch(n, layout)])


@pytest.mark.parametrize("act", ["relu", "gelu"])
@NAMES
def test_residual(name, act):
    module = MODULES[name](act)
    size = module(batch(1)).shape[1:]
    check_steps(module, lambda n: [batch(n), batch(n, channels=size[0], size=size[1:])])


def test_stack():
    check_steps(HybridDilatedConv(6, dtype=f64), lambda n: [batch(n)])


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
def test_function_with_scale_and_shift(name):
    p = make_inputs(CASES[name], f64, with_=("bias", "scale", "shift", "residual"))
    tensors = [t.requires_grad_() for t in (p.x, p.weight, p.bias, p.scale, p.shift, p.residual)]
    for act in ("none", "relu", "silu"):
        torch.compiler.reset()

        def call(*tensors, act=act):
            return call_ours(p.case, *tensors, act)

        fast = torch.compile(call, fullgraph=True, backend="aot_eager")
        found, expected = (
            (out, *torch.autograd.grad(out, tensors, p.dout))
            for out in (fast(*tensors), call(*tensors))
        )
        torch.testing.assert_close(found, expected)


def test_raw_operators_stay_whole():
    """A compiler sees one operator, not what it is made of."""
    seen = []

    def backend(graph, inputs):
        seen.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    module = Conv2d(4, 4, 3, act="relu")
    with torch.no_grad():
        torch.compile(module, fullgraph=True, backend=backend)(torch.randn(2, 4, 5, 5))
    operators = [t for t in seen if isinstance(t, torch._ops.OpOverload)]
    assert operators == [torch.ops.advdl_ops.conv2d.default]


def test_dynamic_positions():
    for make in MODULES.values():
        check_dynamic_positions(make, 6, ((8, 7), (9, 11), (12, 12)))


def test_every_activation():
    x, weight = torch.randn(2, 3, 6, 6, dtype=f64), torch.randn(4, 3, 3, 3, dtype=f64)
    for own, stock in ACTIVATIONS.values():
        torch.compiler.reset()
        fast = torch.compile(
            lambda x, a=own: conv2d(x, weight, act=a), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(fast(x), stock(torch.nn.functional.conv2d(x, weight)))


@NAMES
def test_without_gradients(name):
    check_without_gradients(MODULES[name]("relu"), batch)


def test_autocast_inside():
    module = Conv2d(6, 4, 3, act="relu")

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    x = torch.randn(3, 6, 4, 5)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, call(x))


def test_refused_while_compiling():
    weight = torch.randn(4, 6, 3, 3)
    for call in (
        lambda x: conv2d(x, weight, groups=4),
        lambda x: conv2d(x, weight, torch.ones(5)),
        lambda x: conv2d(x[:, :, :1, :1], weight),
    ):
        torch.compiler.reset()
        with pytest.raises(Exception, match="must"):
            torch.compile(call, fullgraph=True, backend="aot_eager")(torch.randn(3, 6, 4, 5))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor(layout):
    module = torch.nn.Sequential(
        DilatedConv2d(6, 6, 3, act="relu", dtype=f64), DepthwiseConv2d(6, 3, act="silu", dtype=f64)
    )
    check_steps(module, lambda n: [batch(n, layout)], backend="inductor")


@NAMES
def test_export(name):
    module = MODULES[name]("gelu")

    def inputs(n):
        x = torch.randn(n, 6, 8, 7, dtype=f64)
        return x, torch.randn_like(module(x))

    check_export(module, inputs, rows=0)


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
def test_transforms_under_compile(monkeypatch, name):
    """The inputs of a transformed function do not say that they need a gradient."""
    monkeypatch.setattr(advdl_ops.backend, "_require_native", False)  # the reference serves them
    p = make_inputs(CASES[name], f64)

    def loss(w, x):
        return call_ours(p.case, x, w, None, None, None, None, "silu").square().sum()

    def tangent(w, x):
        return torch.func.jvp(loss, (w, x), (torch.ones_like(w), torch.ones_like(x)))

    for function in (torch.func.grad(loss), torch.func.grad(loss, argnums=1), tangent):
        fast = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = fast(p.weight, p.x)
        torch.testing.assert_close(found, function(p.weight, p.x))
        assert found[0].abs().max() > 1e-3


def test_use_backend_reference_compiles():
    module = DilatedConv2d(6, 4, 3, act="silu", dtype=f64)
    with advdl_ops.use_backend("reference"):
        check_steps(module, lambda n: [batch(n)])
