"""Which ops serve a layer; where folding must stand back: what it cannot see, differentiate or compute."""

import importlib

import pytest
import torch
from support.accuracy import ULPS, error, largest
from support.conv2d_cuda import NAMES, Launchers, Tuner, serve_as_on_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from advdl_ops import backend, functional, nn, tuning
from advdl_ops._conv import problem
from advdl_ops.activation import ACTIVATIONS
from advdl_ops.functional.conv_bn_act import ORDERS
from advdl_ops.reference.activation import activate

X = (2, 3, 9, 9)
SILU = ACTIVATIONS["silu"].code


def block(**options):
    torch.manual_seed(0)
    layer = nn.ConvBNAct(3, 8, 3, **options)
    torch.nn.init.uniform_(layer.bn.running_mean)
    torch.nn.init.uniform_(layer.bn.running_var, 0.5, 2)
    return layer.eval().requires_grad_(False)


def unfolded(layer, x):
    return activate(layer.bn(layer.conv(x)), layer.act)


@pytest.fixture
def reference_allowed(monkeypatch):
    monkeypatch.setattr(backend, "_require_native", False)


def test_forward_mode_derivative(reference_allowed):
    layer = block(act="silu")
    x, v = torch.randn(X), torch.randn(X)
    out, tangent = torch.func.jvp(layer, (x,), (v,))
    expected = (layer(x + 1e-3 * v) - layer(x - 1e-3 * v)) / 2e-3
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(tangent, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out, unfolded(layer, x), rtol=1e-4, atol=1e-5)


def test_vmap(reference_allowed):
    layer = block(act="relu")
    x = torch.randn(4, *X)
    torch.testing.assert_close(
        torch.func.vmap(layer)(x), torch.stack([layer(y) for y in x]), rtol=1e-4, atol=1e-5
    )
    assert layer.bn.folded is None or not torch._C._functorch.is_batchedtensor(layer.bn.folded.bias)


def test_own_conv_forward_is_called():
    class Silent(torch.nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight * 0, bias)

    layer = block()
    layer.conv.__class__ = Silent
    x = torch.randn(X)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), unfolded(layer, x))
        assert layer(x).std((0, 2, 3)).max() == 0


def test_parametrized_weight_is_never_stale():
    class Double(torch.nn.Module):
        def forward(self, weight):
            return weight * 2

    layer = block()
    torch.nn.utils.parametrize.register_parametrization(layer.conv, "weight", Double())
    x = torch.randn(X)
    with torch.no_grad():
        for _ in range(3):
            layer.conv.parametrizations.weight.original[:, 0, 0, 0] += 1
            torch.testing.assert_close(layer(x), unfolded(layer, x))


def test_inference_mode_parameters_are_never_stale():
    with torch.inference_mode():
        layer = block()
        x = torch.randn(X)
        for _ in range(2):
            layer.conv.weight[:, 0, 0, 0] += 1
            torch.testing.assert_close(layer(x), unfolded(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(8, 3, 3)}, "weight"),
        ({"bias": torch.ones(1)}, "bias"),
        ({"bias": torch.ones(8, dtype=torch.float64)}, "bias"),
        ({"bias": torch.ones(8, device="meta")}, "bias"),
        ({"residual": torch.ones(2, 8, 1, 7)}, "residual"),
    ],
)
def test_folding_refuses_what_a_convolution_refuses(change, message):
    arguments = {"input": torch.randn(X), "weight": torch.randn(8, 3, 3, 3), **change}
    with pytest.raises((RuntimeError, ValueError), match=rf"^(conv_bn_act|conv2d): {message} \("):
        functional.conv_bn_act(
            running_mean=torch.zeros(8), running_var=torch.ones(8), act="relu", **arguments
        )


def test_unbatched_image_is_refused_alike_with_and_without_gradients():
    for grad in (True, False):
        weight = torch.randn(8, 3, 3, 3, requires_grad=grad)
        with pytest.raises(ValueError, match="must be"):
            functional.conv_bn_act(torch.randn(3, 10, 9), weight, torch.zeros(8), torch.ones(8))


def test_stride_as_a_sequence_of_one():
    x, weight = torch.randn(X), torch.randn(8, 3, 3, 3)
    statistics = torch.zeros(8), torch.ones(8)
    residual = torch.randn(2, 8, 4, 4)
    out = functional.conv_bn_act(x, weight, *statistics, stride=(2,), residual=residual)
    expected = functional.conv_bn_act(x, weight, *statistics, stride=2, residual=residual)
    torch.testing.assert_close(out, expected)


# ---- which ops serve ----


class Ops(TorchDispatchMode):
    """Names of the operators of ours and of oneDNN that are called, and the activation that each is given."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace in ("advdl_ops", "mkldnn") and name not in ("convert_layout", "checksum"):
            codes = [
                v for v, a in zip(args, func._schema.arguments, strict=False) if a.name == "act"
            ]
            self.called.append((name.partition(".")[0], *codes))
        return func(*args, **(kwargs or {}))


def called(layer, x, residual=None):
    with Ops() as ops:
        layer(x, residual)
    return ops.called


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_depthwise_evaluation_is_one_op(dtype, memory_format):
    layer = nn.ConvBNAct(4, 4, 3, groups=4, act="silu", dtype=dtype).eval().requires_grad_(False)
    x = torch.randn(2, 4, 9, 9, dtype=dtype).contiguous(memory_format=memory_format)
    # What is folded is kept in fp32 alone; of the others the operator of every convolution is seen.
    name = "depthwise_conv2d" if dtype == torch.float32 else "conv2d"
    for residual in (None, x):
        assert called(layer, x, residual) == [(name, SILU)]


def test_dense_evaluation_is_one_op_in_fp32(monkeypatch):
    layer, x = block(act="silu"), torch.randn(X)
    last = x.contiguous(memory_format=torch.channels_last)
    layer(last)
    assert called(layer, last) == [("_convolution_pointwise",)]
    layer(x)
    assert called(layer, x) == []  # torch's convolution, and its activation in place
    # In half precision that the CPU has instructions for, the norm is a pass of its own in any case.
    monkeypatch.setattr(problem, "_INSTRUCTIONS", {})
    expected = [("conv2d", 0), ("batch_norm_act", SILU)]
    assert names(called(layer.bfloat16(), x.bfloat16())) == names(expected)


def names(calls):
    return [(name.rstrip("_"), *codes) for name, *codes in calls]


@pytest.fixture
def convolutions(monkeypatch):
    """The activation that each call of the layers' and of the function's ``functional.conv2d`` is given."""
    given = []

    def conv2d(*args, **kwargs):
        act = kwargs.get("act")
        given.append(act if act is None else act.name)
        return functional.conv2d(*args, **kwargs)

    for module in ("nn.conv2d", "functional.conv_bn_act"):
        monkeypatch.setattr(importlib.import_module(f"advdl_ops.{module}"), "conv2d", conv2d)
    return given


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("order", "inside"), [(ORDERS[0], "identity"), (ORDERS[1], "silu")])
def test_training_and_gradients_use_our_convolution(order, inside, training, groups, convolutions):
    layer = nn.ConvBNAct(4, 4, 3, groups=groups, act="silu", order=order).train(training)
    x = torch.randn(2, 4, 9, 9)
    expected = layer(x)
    assert expected.requires_grad
    conv, bn = layer.conv, layer.bn
    found = functional.conv_bn_act(
        x, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, padding=1,
        groups=groups, training=training, act="silu", order=order,
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    assert convolutions == [inside, inside]


@pytest.mark.parametrize("training", [True, False])
def test_conv_act_bn_has_its_activation_in_the_convolution(training):
    layer = nn.ConvBNAct(4, 4, 3, act="silu", order="conv-act-bn", groups=4).train(training)
    assert (layer.conv.act.name, layer.act.name, layer.bn.act.name) == (
        "identity",
        "silu",
        "identity",
    )
    with torch.no_grad():
        found = called(layer, torch.randn(2, 4, 9, 9))
    assert names(found) == [("conv2d", SILU), ("batch_norm_act", 0)]


@pytest.mark.parametrize("way", ["native", *NAMES])
@pytest.mark.parametrize(
    ("groups", "dtype"),
    [(1, torch.float32), (8, torch.float32), (8, torch.bfloat16)],
    ids=["dense", "depthwise", "depthwise, bf16"],
)
def test_cuda_folds_into_one_op(groups, dtype, way, monkeypatch):
    """The Python of the CUDA operators, on CPU tensors."""
    tuner = Tuner()
    tuner.wish = way
    monkeypatch.setattr(tuning, "choose", tuner.choose)
    serve_as_on_cuda(monkeypatch, Launchers(False), Launchers(True))
    # No folded weight is kept on CUDA.
    monkeypatch.setattr(
        importlib.import_module("advdl_ops.nn.conv_bn_act"), "problem_of_kept", lambda *_: None
    )

    layer = nn.ConvBNAct(8, 8, 3, groups=groups, bias=True, act="silu").eval()
    layer.bn.running_mean.normal_()
    layer.bn.running_var.uniform_(0.5, 2)
    layer.conv.to(dtype)
    x, residual = torch.randn(2, 2, 8, 9, 9, dtype=dtype)
    with torch.no_grad():
        found = layer(x, residual)
    ((key, _),) = tuner.asked
    assert key.epilogue == "scale+shift+residual+silu"
    exact = layer.double()(x.double(), residual.double()).detach()
    terms = 10 * largest(exact)
    assert error(found, exact) <= ULPS * torch.finfo(dtype).eps * terms
