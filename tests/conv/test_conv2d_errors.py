"""conv2d: bad input is refused as torch refuses it, by name, before anything is computed."""

import re

import pytest
import torch
import torch.nn.functional as F

import advdl_ops
from advdl_ops.functional import conv2d
from advdl_ops.nn import Conv2d, DepthwiseConv2d, DilatedConv2d, HybridDilatedConv

X = (2, 4, 6, 6)
# What torch's own function refuses: the arguments that differ, and the one that the message names.
CASES = {
    "rank 2": ({"input": torch.randn(6, 6)}, "x"),
    "rank 5": ({"input": torch.randn(2, 4, 3, 6, 6)}, "x"),
    "channels of x": ({"input": torch.randn(2, 5, 6, 6)}, "x"),
    "channels of an image": ({"input": torch.randn(5, 6, 6)}, "x"),
    "x too small": ({"input": torch.randn(2, 4, 2, 6)}, "weight"),
    "too small for the dilation": ({"dilation": (1, 3)}, "weight"),
    "x of fp64": ({"input": torch.randn(X).double()}, "weight"),
    "x of bf16": ({"input": torch.randn(X).bfloat16()}, "weight"),
    "x of integers": ({"input": torch.ones(X, dtype=torch.int64)}, "x"),
    "weight of bf16": ({"weight": torch.randn(6, 4, 3, 3).bfloat16()}, "weight"),
    "weight of rank 3": ({"weight": torch.randn(6, 4, 3)}, "weight"),
    "no output channel": ({"weight": torch.randn(0, 4, 3, 3)}, "weight"),
    "empty kernel": ({"weight": torch.randn(6, 4, 0, 3)}, "weight"),
    "length of bias": ({"bias": torch.zeros(5)}, "bias"),
    "rank of bias": ({"bias": torch.zeros(6, 1)}, "bias"),
    "bias of fp64": ({"bias": torch.zeros(6).double()}, "bias"),
    "groups that do not divide the channels": ({"groups": 3}, "groups"),
    "groups that do not divide the outputs": (
        {"groups": 4, "weight": torch.randn(6, 1, 3, 3)},
        "groups",
    ),
    "groups of another weight": ({"groups": 2}, "x"),
    "no groups": ({"groups": 0}, "groups"),
    "negative groups": ({"groups": -2}, "groups"),
    "fractional groups": ({"groups": 1.5}, "groups"),
    "stride 0": ({"stride": 0}, "stride"),
    "negative stride": ({"stride": (1, -1)}, "stride"),
    "three strides": ({"stride": (1, 1, 1)}, "stride"),
    "fractional stride": ({"stride": 1.5}, "stride"),
    "dilation 0": ({"dilation": (0, 1)}, "dilation"),
    "negative dilation": ({"dilation": -1}, "dilation"),
    "a string for dilation": ({"dilation": "2"}, "dilation"),
    "negative padding": ({"padding": -1}, "padding"),
    "negative padding of one side": ({"padding": (1, -1)}, "padding"),
    "unknown padding": ({"padding": "full"}, "padding"),
    "no padding": ({"padding": None}, "padding"),
    "same with a stride": ({"padding": "same", "stride": 2}, "stride"),
    "no x": ({"input": None}, "x"),
    "no weight": ({"weight": None}, "weight"),
    "a list for x": ({"input": [1.0]}, "x"),
    "a number for bias": ({"bias": 1.0}, "bias"),
}
OUT = (2, 6, 4, 4)
OWN = {
    "act": ({"act": "mish"}, ValueError, "act"),
    "act module": ({"act": torch.nn.Softplus()}, TypeError, "act"),
    "residual's shape": ({"residual": torch.randn(2, 6, 4, 3)}, ValueError, "residual"),
    "residual to broadcast": ({"residual": torch.randn(6, 1, 1)}, ValueError, "residual"),
    "residual of x's shape": ({"residual": torch.randn(X)}, ValueError, "residual"),
    "residual of bf16": ({"residual": torch.randn(OUT).bfloat16()}, RuntimeError, "residual"),
    "residual of integers": (
        {"residual": torch.ones(OUT, dtype=torch.int32)},
        RuntimeError,
        "residual",
    ),
    "residual elsewhere": ({"residual": torch.randn(OUT, device="meta")}, RuntimeError, "residual"),
    "residual as a number": ({"residual": 1.0}, TypeError, "residual"),
    "residual of a batch": (
        {"input": torch.randn(X[1:]), "residual": torch.randn(1, *OUT[1:])},
        ValueError,
        "residual",
    ),
    "scale's length": ({"scale": torch.ones(4)}, RuntimeError, "scale"),
    "scale to broadcast": ({"scale": torch.ones(1)}, RuntimeError, "scale"),
    "shift's length": ({"shift": torch.ones(7)}, RuntimeError, "shift"),
    "scale of fp64": ({"scale": torch.ones(6).double()}, RuntimeError, "scale"),
    "shift of bf16": ({"shift": torch.ones(6).bfloat16()}, RuntimeError, "shift"),
    "scale elsewhere": ({"scale": torch.ones(6, device="meta")}, RuntimeError, "scale"),
    "scale as a number": ({"scale": 2.0}, TypeError, "scale"),
    "weight elsewhere": (
        {"weight": torch.randn(6, 4, 3, 3, device="meta")},
        RuntimeError,
        "weight",
    ),
}


def arguments(changed):
    given = {"input": torch.randn(X), "weight": torch.randn(6, 4, 3, 3), "bias": torch.zeros(6)}
    return given | changed


@pytest.fixture(params=["fused", "reference", "fused, gradients"])
def _path(request):
    backend, *grad = request.param.split(", ")
    with advdl_ops.use_backend(backend), torch.set_grad_enabled(bool(grad)):
        yield


@pytest.fixture
def _computes_nothing(monkeypatch):
    """Any convolution would fail by an error of another type."""

    def refuse(*_args, **_options):
        raise AssertionError("computed")

    module = advdl_ops.functional.conv2d.__globals__
    for name in ("_dense_op", "_depthwise_op", "_apply_eagerly"):
        monkeypatch.setitem(module, name, refuse)
    monkeypatch.setattr(advdl_ops.reference, "conv2d", refuse)


@pytest.mark.usefixtures("_path", "_computes_nothing")
@pytest.mark.parametrize("name", CASES)
def test_as_torch_refuses(name):
    changed, argument = CASES[name]
    given = arguments(changed)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        F.conv2d(given["input"], given["weight"], given["bias"], **{
            n: v for n, v in given.items() if n not in ("input", "weight", "bias")
        })  # fmt: skip
    with pytest.raises(Exception) as found:  # noqa: PT011
        conv2d(**given)
    # NotImplementedError, of a dtype that no kernel takes, is one kind of torch's RuntimeError.
    assert issubclass(found.type, expected.type), (repr(found.value), repr(expected.value))
    assert found.type in (expected.type, NotImplementedError)
    assert re.match(rf"conv2d: {argument} \(.*\) must ", str(found.value), re.S), str(found.value)


@pytest.mark.usefixtures("_path", "_computes_nothing")
@pytest.mark.parametrize("name", OWN)
def test_own_arguments(name):
    changed, expected, argument = OWN[name]
    with pytest.raises(expected) as found:
        conv2d(**arguments(changed))
    assert found.type is expected
    assert re.match(rf"conv2d: {argument} \(.*\) must ", str(found.value), re.S), str(found.value)


@pytest.mark.usefixtures("_computes_nothing")
def test_of_a_depthwise_convolution():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 1, 3, 3)
    for bad in (
        {"weight": torch.randn(4, 2, 3, 3)},
        {"weight": torch.randn(6, 1, 3, 3)},
        {"stride": 0},
        {"dilation": 3},
        {"bias": torch.zeros(3)},
        {"residual": torch.zeros(2, 4, 5, 5)},
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"conv2d: \w+ \(.*\) must "):
            conv2d(**({"input": x, "weight": weight, "groups": 4} | bad))


def test_the_message():
    with pytest.raises(
        RuntimeError, match=r"^conv2d: groups \(3\) must divide the channels \(16\)$"
    ):
        conv2d(torch.randn(1, 16, 5, 5), torch.randn(6, 5, 3, 3), groups=3)


def test_bf16_bias_beside_fp32_is_refused_in_autocast_no_more():
    """Autocast casts all of them to one dtype."""
    x, weight = torch.randn(X), torch.randn(6, 4, 3, 3).bfloat16()
    with pytest.raises(RuntimeError, match="conv2d: weight"):
        conv2d(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, weight, torch.zeros(6).half()).dtype == torch.bfloat16


def test_modules_refuse():
    for call, error, message in (
        (lambda: Conv2d(4, 6, 3, act="rellu"), ValueError, r"Conv2d: act \('rellu'\) must be"),
        (lambda: Conv2d(4, 6, 3, groups=3), ValueError, "in_channels must be divisible by groups"),
        (lambda: Conv2d(4, 6, 3, padding="full"), ValueError, "padding"),
        (lambda: Conv2d(4, 6, 3, 2, padding="same"), ValueError, "same"),
        (lambda: Conv2d(4, 6, 3, padding_mode="mirror"), ValueError, "padding_mode"),
        (
            lambda: DilatedConv2d(4, 6, 2, 3),
            ValueError,
            r"DilatedConv2d: kernel_size \(2\) must be odd or dilation \(3\) even",
        ),
        (lambda: DilatedConv2d(4, 6, (3, 2), (2, 1)), ValueError, r"kernel_size \(\(3, 2\)\) must"),
        (lambda: DepthwiseConv2d(4, 4), ValueError, r"DepthwiseConv2d: kernel_size \(4\) must be"),
        (
            lambda: DepthwiseConv2d(4, 3, multiplier=0),
            ValueError,
            r"DepthwiseConv2d: multiplier \(0\) must be at least 1",
        ),
        (lambda: HybridDilatedConv(4, ()), ValueError, r"HybridDilatedConv: rates \(\(\)\) must"),
        (lambda: HybridDilatedConv(4, (1, 0)), ValueError, r"rates \(\(1, 0\)\) must be numbers"),
        (lambda: HybridDilatedConv(4, kernel_size=2), ValueError, r"kernel_size \(2\) must be odd"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("rates", [(2, 2, 2), (2,), (2, 4, 8), (1, 2, 9), (5, 1), (3, 3), (1, 4)])
def test_rates_that_leave_holes_are_refused(rates):
    with pytest.raises(
        ValueError, match=r"HybridDilatedConv: rates \(\(.*\)\) must leave no holes"
    ):
        HybridDilatedConv(4, rates)


@pytest.mark.parametrize("make", [lambda: Conv2d(4, 6, 3), lambda: DepthwiseConv2d(4, 3)])
def test_modules_refuse_inputs(make):
    module = make()
    for x, residual in (
        (torch.randn(2, 3, 6, 6), None),
        (torch.randn(X).double(), None),
        (torch.randn(4, 6), None),
        (torch.randn(X), torch.randn(2, 6, 5, 6)),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"conv2d: \w+ \(.*\) must "):
            module(x, residual)
