"""conv2d: first and second derivatives, what is saved for them, and determinism."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as fwd
from support.accuracy import ACTIVATIONS, SMOOTH
from support.checks import check_deterministic_mode, check_gradients_with_a_graph
from support.conv2d import (
    CASES,
    NAMES,
    Case,
    before_act,
    call_ours,
    call_stock,
    make_inputs,
    results,
)
from torch.autograd import gradcheck, gradgradcheck

from advdl_ops.functional import conv2d
from benchmarks.memory import held_and_peak

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = ("bias", "scale", "shift", "residual")
f64 = torch.float64
SMALL = {
    "dense": Case((2, 2, 3, 2), 2, (2, 3), padding=1),
    "dilated": Case((1, 2, 5, 5), 2, padding=2, dilation=2, stride=2),
    "groups": Case((1, 4, 3, 3), 4, (2, 2), groups=2),
    "same": Case((1, 2, 3, 3), 2, (2, 2), padding="same"),
    "multiplier": Case((1, 2, 3, 2), 4, padding=1, groups=2),
    "depthwise": Case((2, 2, 3, 2), 2, padding=1, groups=2),
    "depthwise, dilated": Case((1, 2, 5, 5), 2, padding=2, dilation=2, stride=2, groups=2),
}
CASE = pytest.mark.parametrize("name", SMALL)


def function_and_inputs(case, act, with_=ALL, layout="contiguous"):
    """A function of the differentiable inputs alone, and fp64 inputs with every |z| well above gradcheck's step."""
    for seed in range(1000):
        p = make_inputs(case, f64, with_=with_, seed=seed)
        z = before_act(case, *(getattr(p, n) for n in NAMES)).abs()
        distances = z.min(), (z - 3).abs().min(), (z - 6).abs().min()
        if act in SMOOTH or min(distances) > 0.005:
            break
    else:
        raise AssertionError("no inputs away from the kinks")
    p = p.laid(layout)
    given = [n for n in NAMES if getattr(p, n) is not None]

    def function(*tensors):
        options = dict(zip(given, tensors, strict=True))
        return call_ours(case, *(options.get(n) for n in NAMES), act)

    return function, [getattr(p, n).detach().requires_grad_() for n in given]


@CASE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradcheck(name, layout):
    for act, with_ in itertools.product(
        ("none", "relu", "silu"), (("bias",), ("scale", "residual"), ALL)
    ):
        assert gradcheck(*function_and_inputs(SMALL[name], act, with_, layout))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck_of_every_activation(act):
    for name, with_ in itertools.product(
        ("dense", "depthwise"), (ALL, ("bias",), ("shift", "residual"))
    ):
        assert gradcheck(*function_and_inputs(SMALL[name], act, with_))


@CASE
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_gradgradcheck(name, act):
    for with_ in (("bias",), ALL):
        assert gradgradcheck(*function_and_inputs(SMALL[name], act, with_))


@pytest.mark.parametrize(
    "frozen", [(), ("scale", "shift"), ("weight",), ("x",), ("residual", "bias")]
)
@pytest.mark.parametrize("act", ["none", "relu", "silu", "GELU(tanh)"])
@pytest.mark.parametrize("name", ["3x3", "dilated", "depthwise"])
def test_create_graph_equals_stock(name, act, frozen):
    for with_ in ((), ("bias",), ("scale",), ("bias", "residual"), ("scale", "shift"), ALL):
        p = make_inputs(CASES[name], f64, with_=with_)
        leaves = [n for n in NAMES if n not in frozen and getattr(p, n) is not None]

        def second(call, p=p, leaves=leaves):
            q = replace(p, **{n: getattr(p, n).detach().requires_grad_() for n in leaves})
            inputs = [getattr(q, n) for n in leaves]
            out = call(q.case, *(getattr(q, n) for n in NAMES), act)
            first = torch.autograd.grad(out, inputs, p.dout, create_graph=True)
            penalty = sum(g.square().sum() for g in first) + out.square().sum()
            return *first, *torch.autograd.grad(penalty, inputs)

        for found, exact in zip(second(call_ours), second(call_stock), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channel_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_gradients_with_a_graph(channel_dtype):
    for name, act, with_ in itertools.product(
        ("3x3", "depthwise"), ("none", "relu", "silu"), (("bias",), ALL)
    ):
        p = make_inputs(CASES[name], torch.bfloat16, with_=with_, channel_dtype=channel_dtype)
        leaves = [getattr(p, n).requires_grad_() for n in NAMES if getattr(p, n) is not None]
        out = call_ours(p.case, *(getattr(p, n) for n in NAMES), act)
        for g, t in zip(
            torch.autograd.grad(out, leaves, p.dout, create_graph=True), leaves, strict=True
        ):
            assert g.dtype == t.dtype


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["3x3", "dilated", "multiplier", "depthwise"])
def test_first_gradients_are_the_same_with_and_without_a_graph_and_twice(name, layout):
    for act, with_ in itertools.product(("relu", "silu", "none"), (("bias",), ALL)):
        p = make_inputs(CASES[name], f64, with_=with_).laid(layout)
        leaves = [getattr(p, n).requires_grad_() for n in NAMES if getattr(p, n) is not None]
        out = call_ours(p.case, *(getattr(p, n) for n in NAMES), act)
        check_gradients_with_a_graph(out, leaves, p.dout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["3x3", "dilated", "depthwise"])
def test_only_wanted_gradients(name, layout):
    for act, with_ in itertools.product(("none", "relu", "silu"), (ALL, ("shift", "residual"))):
        p = make_inputs(CASES[name], f64, with_=with_).laid(layout)
        given = [n for n in NAMES if getattr(p, n) is not None]
        expected = results(call_ours, p, act)
        for count in range(1, len(given)):
            for wanted in itertools.combinations(given, count):
                found = results(call_ours, p, act, wanted)
                assert found.keys() == {"out", *("d" + n for n in wanted)}
                for key, t in found.items():
                    torch.testing.assert_close(
                        t, expected[key], rtol=1e-12, atol=1e-12, msg=f"{key} {act} {wanted}"
                    )


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("scale", ["none", "fixed", "learned"])
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu"])
def test_saved_for_backward(name, act, scale, residual):
    """x and the weight; relu's output; z for the other activations and for the gradient of a scale."""
    case = replace(CASES[name], x=(4, 8, 12, 12), outputs=8, groups=8 if name == "depthwise" else 1)
    with_ = ("shift",) + ("residual",) * residual + ("scale",) * (scale != "none")
    p = make_inputs(case, with_=with_)
    leaves = [
        n for n in NAMES if getattr(p, n) is not None and (n != "scale" or scale == "learned")
    ]
    for n in leaves:
        getattr(p, n).requires_grad_()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    def forward():
        return call_ours(case, *(getattr(p, n) for n in NAMES), act)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    images = {t.data_ptr() for t in saved if t.dim() == 4 and t.shape != p.weight.shape}
    needs_z = scale == "learned" or act in ("leaky_relu", "silu")
    known = {p.x.data_ptr()}
    if act == "relu" and not (needs_z and not residual):
        known.add(out.data_ptr())
    if act in ("leaky_relu", "silu") and residual:
        known.add(p.residual.data_ptr())
    assert known <= images
    assert len(images) == len(known) + needs_z
    small = {t.data_ptr(): t.numel() for t in saved if t.dim() == 1}
    assert sum(small.values()) <= 2 * 8
    # Nothing hides on the context beside what autograd knows of.
    assert not [
        v for v in getattr(out.grad_fn, "__dict__", {}).values() if isinstance(v, torch.Tensor)
    ]
    # And counted by the allocator: the output, and z.
    size = out.numel() * out.element_size()

    def backward(out):
        return torch.autograd.grad(out, [getattr(p, n) for n in leaves], p.dout)

    backward(forward())
    held, _ = held_and_peak(forward, backward, torch.device("cpu"))
    assert size * (1 + needs_z) <= held < size * (1.1 + needs_z)


@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "dilation"), [(torch.float32, 1), (torch.float32, 8), (torch.bfloat16, 1)]
)
def test_the_weights_gradient_has_its_memory_format(of_x, of_weight, dtype, dilation):
    """Autograd would copy another one into it, which for ResNet-18 takes some percent of a step."""
    x = torch.randn(2, 4, 20, 20, dtype=dtype).contiguous(memory_format=of_x)
    weight = torch.randn(6, 4, 3, 3, dtype=dtype).contiguous(memory_format=of_weight)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(conv2d(x, weight, dilation=dilation).sum(), weight)
    assert gradient.stride() == weight.stride()


def test_input_may_not_change_before_backward():
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    y = torch.randn(2, 4, 5, 5).requires_grad_() * 1
    out = conv2d(y, weight, act="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    y = torch.randn(2, 4, 5, 5)
    out = conv2d(y, weight, act="relu")
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["3x3", "dilated", "groups", "multiplier", "depthwise"])
def test_two_runs_are_bitwise_equal(threads, name, dtype):
    case = replace(CASES[name], x=(3, *CASES[name].x[1:2], 33, 31))
    for layout, act, count in itertools.product(
        ("contiguous", "channels_last"), ("none", "silu"), (1, 2)
    ):
        torch.set_num_threads(count)
        p = make_inputs(case, dtype, with_=ALL).laid(layout)
        first, second = results(call_ours, p, act), results(call_ours, p, act)
        for key, t in first.items():
            assert torch.equal(t, second[key]), (key, layout, act, count)


def test_deterministic_mode_needs_no_special_case():
    for name in ("3x3", "dilated", "depthwise"):
        p = make_inputs(CASES[name], with_=ALL)
        check_deterministic_mode(lambda p=p: results(call_ours, p, "relu"))


@pytest.mark.parametrize("name", ["3x3", "dilated", "depthwise"])
def test_inputs_are_left_alone(name):
    for layout, act in itertools.product(("contiguous", "channels_last"), ("none", "relu", "silu")):
        p = make_inputs(CASES[name], with_=ALL).laid(layout)
        kept = p.map(torch.clone)
        for wanted in (NAMES, ()):
            results(call_ours, p, act, wanted)
        for n in (*NAMES, "dout"):
            assert torch.equal(getattr(p, n), getattr(kept, n)), n


@pytest.mark.parametrize("name", ["3x3", "dilated", "depthwise"])
def test_func_transforms_through_the_reference(no_native_required, name):
    p = make_inputs(CASES[name], f64, with_=ALL)
    rest = p.bias, p.scale, p.shift, p.residual

    def loss(call):
        return lambda x, weight: call(p.case, x, weight, *rest, "silu").square().sum()

    def per_sample(call):
        def of_image(weight, x):
            return call(p.case, x, weight, p.bias, p.scale, p.shift, None, "silu").square().sum()

        return torch.func.vmap(torch.func.grad(of_image), in_dims=(None, 0))(p.weight, p.x)

    for transform in (
        lambda call: torch.func.grad(loss(call), (0, 1))(p.x, p.weight),
        lambda call: torch.func.jvp(
            lambda x: call(p.case, x, p.weight, *rest, "silu"), (p.x,), (torch.ones_like(p.x),)
        ),
        per_sample,
    ):
        torch.testing.assert_close(transform(call_ours), transform(call_stock))


def test_forward_ad_through_the_reference(no_native_required):
    p = make_inputs(CASES["dilated"], f64, with_=ALL)
    rest = p.weight, p.bias, p.scale, p.shift, p.residual
    with fwd.dual_level():
        x = fwd.make_dual(p.x, torch.ones_like(p.x))
        found, exact = (c(p.case, x, *rest, "silu") for c in (call_ours, call_stock))
        torch.testing.assert_close(fwd.unpack_dual(found).tangent, fwd.unpack_dual(exact).tangent)


def test_weight_of_groups_dilated_in_half_precision():
    """Stock torch 2.13 gives garbage in channels_last, mostly what freed memory held."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for _ in range(5):
            for size in range(8, 20):  # what is freed is garbage
                torch.full((1 << size,), float("nan"), dtype=torch.bfloat16)
            x = torch.randn(3, 8, 20, 32).bfloat16().contiguous(memory_format=layout)
            weight = torch.randn(16, 2, 1, 1).bfloat16().requires_grad_()
            out = conv2d(x, weight, None, 1, 0, 12, 4)
            dout = torch.randn(out.shape).bfloat16()
            (found,) = torch.autograd.grad(out, weight, dout)
            twin = weight.detach().double().requires_grad_()
            true = torch.nn.functional.conv2d(x.double(), twin, None, 1, 0, 12, 4)
            (expected,) = torch.autograd.grad(true, twin, dout.double())
            assert (found - expected).abs().max() < 0.01 * expected.abs().max()
