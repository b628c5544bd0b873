"""conv2d: every output and gradient against fp64, by the rule of support/accuracy.py."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, LAYOUTS, channels_last
from support.conv2d import (
    CASES,
    DTYPES,
    NAMES,
    THRESHOLDS,
    Case,
    call_ours,
    check,
    make_inputs,
    results,
)

import advdl_ops
from advdl_ops._conv import choice
from advdl_ops.functional import conv2d

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = ("bias", "scale", "shift", "residual")
BACKENDS = pytest.mark.parametrize("backend", ["fused", "reference"])


@pytest.fixture
def by_onednn(monkeypatch):
    """As if the images of these tests were not small ones, which torch's own kernels serve."""
    table = THRESHOLDS._replace(small=0, pixels=0, pixels_contiguous=0)
    monkeypatch.setattr(choice, "thresholds", lambda: table)
    choice.forget()
    yield
    choice.forget()


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_shapes_dtypes_layouts(name, dtype, layout, backend):
    for with_, act in (
        ((), "none"),
        (("bias",), "relu"),
        (ALL, "silu"),
        (("scale", "shift"), "relu"),
    ):
        p = make_inputs(CASES[name], DTYPES[dtype], with_=with_).laid(layout)
        check(p, act, backend=backend, what=with_)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, dtype, backend):
    for name, with_, layout in (
        ("3x3", ("bias",), "contiguous"),
        ("dilated", ("bias", "residual"), "channels_last"),
        ("depthwise", ("shift",), "channels_last"),
    ):
        p = make_inputs(CASES[name], DTYPES[dtype], with_=with_).laid(layout)
        check(p, act, backend=backend)
        check(p, act, wanted=(), backend=backend, what="without gradients")


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_small_images_by_onednn(name, layout):
    for with_, act in itertools.product(((), ("bias",), ("scale", "residual"), ALL), ACTIVATIONS):
        p = make_inputs(CASES[name], with_=with_).laid(layout)
        check(p, act, wanted=(), what=with_)
    check(p, "silu", what="with gradients")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["groups", "dilated", "depthwise"])
def test_every_combination_of_what_follows_the_convolution(name, layout):
    for dtype, count in itertools.product(("fp32", "bf16"), range(5)):
        for with_ in itertools.combinations(ALL, count):
            p = make_inputs(CASES[name], DTYPES[dtype], with_=with_).laid(layout)
            for act, wanted in itertools.product(
                ("none", "relu", "gelu"), (NAMES, (), ("x", "weight", "bias", "shift", "residual"))
            ):
                check(p, act, wanted, what=(with_, wanted, dtype))


@BACKENDS
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_parameters_beside_half_precision(dtype, backend):
    for name, act, with_ in itertools.product(
        ("3x3", "depthwise"), ("none", "relu", "silu"), (ALL, ("bias",), ("scale",))
    ):
        p = make_inputs(CASES[name], DTYPES[dtype], with_=with_, channel_dtype=torch.float32)
        check(p, act, backend=backend)
        check(p, act, (), backend=backend)


@pytest.mark.parametrize("channel_dtype", [torch.float32, torch.bfloat16])
def test_scale_and_shift_of_different_dtypes(channel_dtype):
    p = make_inputs(CASES["3x3"], torch.bfloat16, with_=("scale", "shift"))
    p.scale = p.scale.to(channel_dtype)
    p.shift = p.shift.float()
    for backend in ("fused", "reference"):
        found = check(p, "silu", backend=backend)
        assert found["dscale"].dtype == channel_dtype
        assert found["dshift"].dtype == torch.float32


@BACKENDS
@pytest.mark.parametrize("name", ["3x3", "dilated", "same", "multiplier", "depthwise"])
def test_unbatched(name, backend):
    case = CASES[name]
    image = Case(case.x[1:], case.outputs, case.kernel, **case.options)
    for with_, act in ((("bias",), "relu"), (ALL, "silu")):
        check(make_inputs(image, with_=with_), act, backend=backend)
        check(make_inputs(image, with_=with_), act, (), backend=backend)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["3x3", "dilated", "groups", "depthwise"])
def test_empty_batch(name, layout, backend):
    case = CASES[name]
    case = Case((0, *case.x[1:]), case.outputs, case.kernel, **case.options)
    for act, dtype in (("none", "fp32"), ("relu", "bf16"), ("silu", "fp32")):
        found = check(
            make_inputs(case, DTYPES[dtype], with_=ALL).laid(layout), act, backend=backend
        )
        for name in ("dweight", "dbias", "dscale", "dshift"):
            assert found[name].eq(0).all()


def test_sizes_as_networks_have_them():
    """Large enough that oneDNN takes its blocked and Winograd paths, if it does."""
    for case, layout in itertools.product(
        (
            Case((2, 64, 28, 28), 64, padding=1),
            Case((1, 128, 14, 14), 64, (1, 1)),
            Case((1, 64, 28, 28), 64, padding=2, dilation=2),
            Case((2, 3, 65, 65), 32, (7, 7), stride=2, padding=3),
            Case((2, 64, 28, 28), 64, padding=1, groups=64),
        ),
        LAYOUTS[:2],
    ):
        for dtype in ("fp32", "bf16"):
            check(make_inputs(case, DTYPES[dtype], with_=("bias", "residual")).laid(layout), "relu")


@BACKENDS
def test_nan_and_infinity_go_through(backend):
    check_nan_and_infinity(backend)


@pytest.mark.usefixtures("by_onednn")
def test_nan_and_infinity_go_through_onednn():
    check_nan_and_infinity("fused")


def check_nan_and_infinity(backend):
    for name, act, dtype in itertools.product(
        ("3x3", "dilated", "depthwise"),
        ("none", "relu", "relu6", "leaky_relu", "silu"),
        ("fp32", "bf16"),
    ):
        p = make_inputs(CASES[name], DTYPES[dtype])
        for value in (float("nan"), float("inf")):
            for layout in (torch.Tensor.contiguous, channels_last):
                x = p.x.clone()
                x[0, 0, 2, 2] = value
                x = layout(x)
                exact = ACTIVATIONS[act][1](F.conv2d(x, p.weight, p.bias, **p.case.options))
                if act != "relu6" or value != value:  # of an infinity it makes 0 or 6
                    assert not exact.isfinite().all()
                with advdl_ops.use_backend(backend):
                    found = conv2d(
                        x, p.weight, p.bias, **p.case.options, act=act if act != "none" else None
                    )
                if value != value:
                    assert torch.equal(found.isnan(), exact.isnan()), (name, act, dtype)
                else:
                    assert torch.equal(found.isfinite(), exact.isfinite()), (name, act, dtype)


def test_a_residual_of_another_layout():
    for name, layout, other in itertools.product(("3x3", "dilated", "depthwise"), LAYOUTS, LAYOUTS):
        p = make_inputs(CASES[name], with_=("residual",)).laid(layout)
        p.residual, p.dout = (p.laid(other).residual, p.laid(other).dout)
        for act in ("none", "relu", "silu"):
            check(p, act)
            check(p, act, ())


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """As if x, weight and residual were of autocast's dtype; what is per channel stays in fp32."""
    p = make_inputs(CASES["3x3"], with_=("bias", "residual"))
    leaves = "x", "weight", "bias"
    with torch.autocast("cpu", dtype), advdl_ops.use_backend(backend):
        expected = F.conv2d(p.x, p.weight, p.bias, padding=1)
        out = conv2d(p.x, p.weight, p.bias, padding=1)
        assert out.dtype == expected.dtype == dtype
        found = results(call_ours, p, "silu", leaves)
        double = (getattr(p.to(torch.float64), n) for n in NAMES)
        assert call_ours(p.case, *double, "relu").dtype == torch.float64
    halves = replace(p, x=p.x.to(dtype), weight=p.weight.to(dtype), residual=p.residual.to(dtype))
    with advdl_ops.use_backend(backend):
        plain = results(call_ours, halves, "silu", leaves)
        assert torch.equal(out, conv2d(halves.x, halves.weight, p.bias, padding=1))
    for name, t in found.items():
        assert t.dtype == (dtype if name == "out" else torch.float32), name
        assert torch.equal(t.to(plain[name].dtype), plain[name]), name
