"""conv_transpose2d: values and gradients against its definition in long double, error at most stock PyTorch's."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, LAYOUTS, assert_accurate, in_layout
from support.conv_transpose2d import (
    LAYERS,
    bf16,
    collect,
    exactly,
    f16,
    f32,
    f64,
    make,
    same,
    term_sizes,
)
from torch.utils._python_dispatch import TorchDispatchMode

from advdl_ops.functional import conv_transpose2d

# The name in the package is the function's.
MODULE = importlib.import_module("advdl_ops.functional.conv_transpose2d")
pytestmark = pytest.mark.usefixtures("one_thread")


def check(name, dtype, layout="contiguous", act="none", shape=(2, 5, 4)):
    """Every result of one layer of LAYERS by the rule of support/accuracy.py; returns them."""
    options = LAYERS[name][3]
    t = make(name, dtype, shape)
    size = F.conv_transpose2d(t["x"].double(), t["weight"].double(), **options).shape
    dout = torch.randn(size, dtype=f64).to(dtype)
    exact = exactly(t, dout, act, **options)
    sizes = term_sizes(t, dout, **options)
    laid = {**t, "x": in_layout(t["x"], layout)}
    dout = in_layout(dout, layout)
    spelled, stock_act = ACTIVATIONS[act]
    peer, dpeer = laid, dout
    if name == "one":  # where channels_last ends the process or gives garbage: docs/stock_faults.md
        peer, dpeer = {key: t.contiguous() for key, t in laid.items()}, dout.contiguous()
    stock = collect(F.conv_transpose2d, peer, dpeer, stock_act, **options)
    found = collect(conv_transpose2d, laid, dout, same, act=spelled, **options)
    with torch.no_grad():
        found["out without gradients"] = conv_transpose2d(*laid.values(), act=spelled, **options)
    exact["out without gradients"], stock["out without gradients"] = exact["out"], stock["out"]
    sizes["out without gradients"] = sizes["out"]
    for key, value in exact.items():
        assert found[key].dtype == dtype, key
        assert_accurate(found[key], value, stock[key], sizes[key], (key, name, dtype, layout, act))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(backend, name, layout):
    for dtype in (f32, f64, bf16, f16):
        for act in ("none", "relu", "silu"):
            found = check(name, dtype, layout, act)
            if backend == "fused":
                expected = "contiguous" if layout == "strided" else layout
                for key in ("out", "out without gradients", "dx"):
                    assert found[key].stride() == in_layout(found[key], expected).stride(), key


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(backend, act):
    for dtype in (f32, f64, bf16, f16):
        for layout in LAYOUTS[:2]:
            check("double", dtype, layout, act, (3, 4, 5))


@pytest.mark.parametrize("shape", [(0, 5, 4), (1, 1, 1), (3, 1, 7), (1, 13, 11)], ids=str)
def test_sizes(backend, shape):
    for name in ("double", "double-rounding", "groups", "depthwise"):
        for layout in LAYOUTS[:2]:
            check(name, f32, layout, "relu", shape)


def test_unbatched(backend):
    for name, (*_, options) in LAYERS.items():
        t = make(name)
        for act in (None, "relu", "silu"):
            one = {**t, "x": t["x"][0]}
            torch.testing.assert_close(
                conv_transpose2d(*one.values(), act=act, **options),
                conv_transpose2d(*t.values(), act=act, **options)[0],
                rtol=1e-13, atol=1e-13,
            )  # fmt: skip


def test_arguments_in_torchs_order(backend):
    x, weight, bias = make("groups").values()
    given = (x, weight, bias, (2, 3), (1, 0), (0, 2), 2, [2, 1])
    assert torch.equal(conv_transpose2d(*given), F.conv_transpose2d(*given))
    assert torch.equal(
        conv_transpose2d(x, weight, stride=[2], groups=2),
        F.conv_transpose2d(x, weight, stride=[2], groups=2),
    )


def test_the_weights_format_does_not_decide():
    for name, layout, act in itertools.product(("double", "one"), LAYOUTS[:2], (None, "relu")):
        x, weight, bias = make(name).values()
        laid = weight.to(memory_format=torch.channels_last)
        xs = in_layout(x, layout).requires_grad_()
        out = conv_transpose2d(xs, laid, bias, 2, act=act)
        assert out.stride() == in_layout(out, layout).stride()
        expected = conv_transpose2d(xs, weight, bias, 2, act=act)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        (dx,) = torch.autograd.grad(out.sum(), xs)
        assert dx.stride() == xs.stride()


@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_the_format_of_one_channel(act):
    """Of one channel both formats look alike: the result is contiguous, whatever the strides say."""
    x = torch.randn(2, 1, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    assert x.stride() == (20, 1, 4, 1) and x.is_contiguous()
    weight = torch.randn(1, 6, 2, 2)
    assert conv_transpose2d(x, weight, stride=2, act=act).is_contiguous()
    with torch.no_grad():
        assert conv_transpose2d(x, weight, stride=2, act=act).is_contiguous()


def test_inputs_are_not_written(backend):
    for act in ACTIVATIONS:
        t = make("double", f32)
        kept = {name: v.clone() for name, v in t.items()}
        with torch.no_grad():
            conv_transpose2d(*t.values(), stride=2, act=ACTIVATIONS[act][0])
        dout = torch.ones(2, 6, 10, 8)
        collect(conv_transpose2d, t, dout, same, stride=2, act=ACTIVATIONS[act][0])
        assert all(torch.equal(t[name], v) for name, v in kept.items())


@pytest.mark.parametrize("name", ["double", "depthwise"])
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_autocast(backend, dtype, name):
    options = LAYERS[name][3]
    for act, layout in itertools.product(("none", "relu", "silu"), LAYOUTS[:2]):
        spelled, stock_act = ACTIVATIONS[act]
        t = make(name, f32)
        t["x"] = in_layout(t["x"], layout)
        dout = torch.randn(F.conv_transpose2d(t["x"], t["weight"], **options).shape).to(dtype)
        with torch.autocast("cpu", dtype):
            found = collect(conv_transpose2d, t, dout, same, act=spelled, **options)
            stock = collect(F.conv_transpose2d, t, dout, stock_act, **options)
        exact = exactly({n: v.to(dtype) for n, v in t.items()}, dout, act, **options)
        sizes = term_sizes(t, dout, **options)
        for key, value in exact.items():
            assert found[key].dtype == stock[key].dtype, key
            # Every result was of autocast's dtype before a gradient was cast to its parameter's.
            found[key], stock[key] = found[key].to(dtype), stock[key].to(dtype)
            assert_accurate(found[key], value, stock[key], sizes[key], (key, layout, act))


class Recorded(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LAYERS)
def test_which_operators_run(backend, name):
    """Depthwise layers by this package's kernels, forward and backward, and only those."""
    options = LAYERS[name][3]
    t = make(name, f32)
    dout = torch.randn(F.conv_transpose2d(*t.values(), **options).shape)
    with Recorded() as recorded:
        collect(conv_transpose2d, t, dout, same, act="relu", **options)
    own = {"advdl_ops.conv2d.default", "advdl_ops.conv2d_backward.default"}
    expected = own if backend == "fused" and name == "depthwise" else set()
    assert {n for n in recorded.names if n.startswith("advdl_ops")} == expected
    stock = any("convolution" in n or "conv_transpose" in n for n in recorded.names)
    assert stock == (not expected), recorded.names


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_as_on_cuda(monkeypatch, name, layout):
    """There every layer is a gradient of this package's convolution; on CPU its operators compute the same."""
    monkeypatch.setattr(MODULE, "_has_own_operators", MODULE._is_gradient)
    for dtype, act in ((f32, "silu"), (f64, "relu"), (bf16, "none")):
        with Recorded() as recorded:
            found = check(name, dtype, layout, act)
        expected = "contiguous" if layout == "strided" else layout
        for key in ("out", "out without gradients", "dx"):
            assert found[key].stride() == in_layout(found[key], expected).stride(), key
        own = any(n.startswith("advdl_ops.conv2d") for n in recorded.names)
        assert own == ("wide" not in name), recorded.names


def test_cudnn_is_deterministic_where_there_is_no_such_gradient():
    """What a CUDA tensor would be given, by a stand-in that says that it is one."""

    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

    t = {key: v.as_subclass(OnCuda) for key, v in make("wide", f32).items()}
    options = MODULE.Options((1, 1), (0, 0), (2, 0), 1, (3, 3))
    out = F.conv_transpose2d(*make("wide", f32).values(), **LAYERS["wide"][3])
    seen = []

    class Flags(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._convolution.default:
                seen.append(args[9:11])
            if function is torch.ops.aten.convolution_backward.default:
                seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), torch.backends.cudnn.flags(benchmark=True, deterministic=False), Flags():
        found = MODULE._convolve_transposed(*t.values(), options, False)
        MODULE._dense_gradients(out, t["x"], t["weight"], options, (True, True, True))
        assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    torch.testing.assert_close(found.as_subclass(torch.Tensor), out)
    assert seen == [(False, True)] * 2


def test_two_runs_are_equal():
    t = make("overlapping", f32, (4, 17, 15))
    t["x"] = in_layout(t["x"], "channels_last")
    dout = torch.randn(4, 6, 34, 30)
    runs = [
        collect(conv_transpose2d, t, dout, same, stride=2, padding=1, act="silu") for _ in range(2)
    ]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
