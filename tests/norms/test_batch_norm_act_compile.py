"""batch_norm_act and BatchNormAct2d under torch.compile and torch.export."""

import pytest
import torch
from support.accuracy import ACTIVATIONS
from support.compiled import batch_of, check_export, check_steps, check_without_gradients, compiled

import advdl_ops
from advdl_ops.functional import batch_norm_act
from advdl_ops.nn import BatchNormAct2d

pytestmark = pytest.mark.usefixtures("fresh_compile", "one_thread")
f64 = torch.float64


def batch(n, layout="contiguous", dtype=f64):
    return batch_of(n, 5, 4, 6, layout=layout, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}],
    ids=["default", "momentum=None", "no-tracking", "no-affine"],
)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_module(mode, options):
    for act in (None, "relu", "silu"):
        torch.compiler.reset()
        module = BatchNormAct2d(5, **options, act=act, dtype=f64).train(mode)
        module(torch.randn(3, 5, 4, 6, dtype=f64))
        check_steps(module, lambda n: [batch(n)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_residual(act, layout):
    module = BatchNormAct2d(5, act=act, dtype=f64)
    check_steps(module, lambda n: [batch(n, layout), batch(n, layout)])


def test_every_activation():
    for act in ACTIVATIONS.values():
        torch.compiler.reset()
        x = batch(3)
        fast = compiled(lambda x, a=act[0]: batch_norm_act(x, None, None, training=True, act=a))
        expected = act[1](torch.nn.functional.batch_norm(x, None, None, training=True))
        torch.testing.assert_close(fast(x), expected)


def test_function_updates_running_statistics():
    x, mean, var = batch(3), torch.zeros(5, dtype=f64), torch.ones(5, dtype=f64)
    expected = torch.nn.BatchNorm2d(5, dtype=f64)
    expected(x)
    compiled(lambda x, m, v: batch_norm_act(x, m, v, training=True, act="relu"))(x, mean, var)
    torch.testing.assert_close(mean, expected.running_mean)
    torch.testing.assert_close(var, expected.running_var)


def test_without_gradients():
    check_without_gradients(BatchNormAct2d(5, act="relu", dtype=f64), batch)


def test_autocast_inside():
    module = BatchNormAct2d(5, act="relu")
    x = torch.randn(3, 5, 4, 6)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x.bfloat16())

    assert compiled(call)(x).dtype == call(x).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor(layout):
    module = torch.nn.Sequential(
        BatchNormAct2d(5, act="relu", dtype=f64), BatchNormAct2d(5, momentum=None, dtype=f64)
    )
    check_steps(module, lambda n: [batch(n, layout)], backend="inductor")


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_export(mode):
    module = BatchNormAct2d(5, act="gelu", dtype=f64).train(mode)
    check_export(module, lambda n: torch.randn(2, n, 5, 4, 6, dtype=f64).unbind(), rows=0)


def test_transforms_under_compile(monkeypatch):
    """The inputs of a transformed function do not say that they need a gradient."""
    monkeypatch.setattr(advdl_ops.backend, "_require_native", False)  # the reference serves them

    def loss(w, x):
        return batch_norm_act(x, None, None, w, training=True, act="silu").square().sum()

    def tangent(w, x):
        return torch.func.jvp(loss, (w, x), (torch.ones_like(w), x))

    w, x = torch.rand(5, dtype=f64) + 0.5, batch(3).detach()
    for function in (torch.func.grad(loss), torch.func.grad(loss, argnums=1), tangent):
        found = compiled(function)(w, x)
        torch.testing.assert_close(found, function(w, x))
        assert found[0].abs().max() > 1e-3
