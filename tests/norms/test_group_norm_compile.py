"""The group norms under torch.compile and torch.export."""

import pytest
import torch
from support.accuracy import ACTIVATIONS
from support.compiled import (
    batch_of,
    check_dynamic_positions,
    check_export,
    check_steps,
    check_without_gradients,
    compiled,
)
from support.group_norm import INSTANCE, POSITION, call_ours, call_stock, problem_of

import advdl_ops
from advdl_ops.functional import instance_norm
from advdl_ops.nn import GroupNorm, InstanceNorm2d, LayerNorm2d

pytestmark = pytest.mark.usefixtures("fresh_compile", "one_thread")
f64 = torch.float64

MODULES = {
    "group": lambda act: GroupNorm(2, 6, act=act, dtype=f64),
    "group, no affine": lambda act: GroupNorm(6, 6, affine=False, act=act, dtype=f64),
    "layer": lambda act: LayerNorm2d(6, act=act, dtype=f64),
    "instance": lambda act: InstanceNorm2d(6, act=act, dtype=f64),
    "instance, running": lambda act: InstanceNorm2d(
        6, affine=True, track_running_stats=True, act=act, dtype=f64
    ),
}
NAMES = pytest.mark.parametrize("name", MODULES)


def batch(n, layout="contiguous", dtype=f64):
    return batch_of(n, 6, 4, 5, layout=layout, dtype=dtype)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@NAMES
def test_module(name, mode):
    for act in (None, "silu"):
        torch.compiler.reset()
        module = MODULES[name](act).train(mode)
        module(torch.randn(3, 6, 4, 5, dtype=f64))
        check_steps(module, lambda n: [batch(n)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
@NAMES
def test_residual(name, act, layout):
    check_steps(MODULES[name](act), lambda n: [batch(n, layout), batch(n, layout)])


def test_dynamic_positions():
    for make in MODULES.values():
        check_dynamic_positions(make, 6, ((4, 5), (7, 3), (9, 9)))


def test_every_activation():
    p = problem_of(2, (3, 6, 4, 5), "fp64")
    normalized = call_stock(2, p.x, None, None, None, None, p)
    for own, stock in ACTIVATIONS.values():
        torch.compiler.reset()
        fast = compiled(lambda x, a=own: call_ours(2, x, None, None, None, None, p, act=a))
        torch.testing.assert_close(fast(p.x), stock(normalized))


def test_function_updates_running_statistics():
    x, mean, var = batch(3), torch.zeros(6, dtype=f64), torch.ones(6, dtype=f64)
    expected = torch.nn.InstanceNorm2d(6, track_running_stats=True, dtype=f64)
    expected(x)
    compiled(lambda x, m, v: instance_norm(x, m, v, act="relu"))(x, mean, var)
    torch.testing.assert_close(mean, expected.running_mean)
    torch.testing.assert_close(var, expected.running_var)


@NAMES
def test_without_gradients(name):
    check_without_gradients(MODULES[name]("relu"), batch)


def test_autocast_inside():
    module = GroupNorm(2, 6, act="relu")

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x.bfloat16())

    x = torch.randn(3, 6, 4, 5)
    assert compiled(call)(x).dtype == call(x).dtype == torch.bfloat16


def test_refused_while_compiling():
    for call in (
        lambda x: advdl_ops.functional.group_norm(x, 4),
        lambda x: advdl_ops.functional.group_norm(x, 2, torch.ones(5)),
        lambda x: instance_norm(x[:, :, :1, :1]),
    ):
        torch.compiler.reset()
        with pytest.raises(Exception, match="must"):
            compiled(call)(torch.randn(3, 6, 4, 5))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor(layout):
    module = torch.nn.Sequential(*(make("relu") for make in MODULES.values()))
    check_steps(module, lambda n: [batch(n, layout)], backend="inductor")


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@NAMES
def test_export(name, mode):
    module = MODULES[name]("gelu").train(mode)
    check_export(
        module, lambda n: torch.randn(2, n, 6, 4, n + 4, dtype=f64).unbind(), rows=0, width=3
    )


@pytest.mark.parametrize("norm", [2, POSITION, INSTANCE])
def test_transforms_under_compile(monkeypatch, norm):
    """The inputs of a transformed function do not say that they need a gradient."""
    monkeypatch.setattr(advdl_ops.backend, "_require_native", False)  # the reference serves them
    p = problem_of(norm, (3, 6, 4, 5), "fp64", running=False)

    def loss(w, x):
        return call_ours(norm, x, None, None, w, None, p, act="silu").square().sum()

    def tangent(w, x):
        return torch.func.jvp(loss, (w, x), (torch.ones_like(w), p.dout))

    for function in (torch.func.grad(loss), torch.func.grad(loss, argnums=1), tangent):
        found = compiled(function)(p.weight, p.x)
        torch.testing.assert_close(found, function(p.weight, p.x))
        assert found[0].abs().max() > 1e-3
