"""conv_transpose2d: first and second derivatives, what backward holds, and transforms."""

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, LAYOUTS, in_layout
from support.conv_transpose2d import LAYERS, bf16, collect, f32, f64, make
from torch.autograd import gradcheck, gradgradcheck

from advdl_ops.functional import conv_transpose2d

pytestmark = pytest.mark.usefixtures("one_thread")


def leaves(name="double", dtype=f64, layout="contiguous", shape=(2, 3, 2)):
    t = make(name, dtype, shape)
    t["x"] = in_layout(t["x"], layout)
    return [v.detach().requires_grad_() for v in t.values()]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_of_layers(backend, name, layout):
    options = LAYERS[name][3]
    for act in ("none", "silu"):

        def call(x, weight, bias=None, act=act):
            return conv_transpose2d(x, weight, bias, act=ACTIVATIONS[act][0], **options)

        given = leaves(name, layout=layout, shape=(1, 3, 3))
        assert gradcheck(call, given, fast_mode=True)
        assert gradgradcheck(call, given, fast_mode=True)
        assert gradcheck(call, given[:2], fast_mode=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck_of_activations(backend, act):
    def call(x, weight, bias):
        return conv_transpose2d(x, weight, bias, 2, act=ACTIVATIONS[act][0])

    assert gradcheck(call, leaves(shape=(1, 3, 2)))
    if act not in ("relu", "leaky_relu", "LeakyReLU(0.2)", "hardswish"):  # torch's have none
        assert gradgradcheck(call, leaves(shape=(1, 2, 2)))


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_only_what_is_asked_for(backend, act):
    for layout in LAYOUTS[:2]:
        every = collect_gradients(leaves(layout=layout), act)
        for needed in range(1, 8):
            given = leaves(layout=layout)
            for i, t in enumerate(given):
                t.requires_grad_(bool(needed >> i & 1))
            for t, found, expected in zip(given, collect_gradients(given, act), every, strict=True):
                assert (found is None) == (not t.requires_grad)
                assert found is None or torch.allclose(found, expected, rtol=1e-13, atol=1e-13)


def collect_gradients(given, act):
    out = conv_transpose2d(*given, 2, act=ACTIVATIONS[act][0])
    g = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=g, dtype=out.dtype))
    return [t.grad for t in given]


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_gradient_of_a_sum(backend, act):
    """Whose gradient is one number, expanded."""
    for layout in LAYOUTS[:2]:
        x, weight, bias = leaves(layout=layout)
        found = torch.autograd.grad(
            conv_transpose2d(x, weight, bias, 2, act=act).sum(), (x, weight, bias)
        )
        expected = torch.autograd.grad(
            ACTIVATIONS[act][1](F.conv_transpose2d(x, weight, bias, 2)).sum(), (x, weight, bias)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def held(function, given):
    """The storages that backward holds besides those of ``given``, and the output."""
    stored = {}

    def pack(t):
        stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*given)
    for t in given:
        stored.pop(t.untyped_storage().data_ptr(), None)
    own = out.untyped_storage()
    return sum(stored.values()), sum(stored.values()) + (
        0 if own.data_ptr() in stored else own.nbytes()
    )


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_memory_held(backend, act):
    """What backward and the owner of the output hold: never more than with stock, where possible one output."""
    spelled, stock_act = ACTIVATIONS[act]
    for layout in LAYOUTS[:2]:
        given = leaves(dtype=f32, layout=layout)
        one = 4 * 2 * 6 * 6 * 4
        saved, found = held(lambda x, w, b: conv_transpose2d(x, w, b, 2, act=spelled), given)
        _, stock = held(lambda x, w, b: stock_act(F.conv_transpose2d(x, w, b, 2)), given)
        assert found <= stock
        masked = backend == "fused" and act in ("relu6", "leaky_relu", "LeakyReLU(0.2)")
        assert saved == (0 if act == "none" else one // 4 if masked else one)
        if backend == "fused":
            from_output = act in ("none", "relu", "sigmoid", "tanh")
            assert found == (one if from_output else one + saved)


def test_autocast_holds_its_dtype():
    given = leaves(dtype=f32)
    with torch.autocast("cpu", bf16):
        saved, _ = held(lambda x, w, b: conv_transpose2d(x, w, b, 2, act="relu"), given)
    assert saved == 2 * (2 * 4 * 3 * 2 + 4 * 6 * 4 + 6 + 2 * 6 * 6 * 4)  # x, weight, bias, output


def test_an_output_that_was_written_over_is_noticed():
    x, weight, bias = leaves()
    out = conv_transpose2d(x, weight, bias, 2, act="relu")
    out += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    for act in (None, "silu"):
        out = conv_transpose2d(x, weight, bias, 2, act=act)
        out += 1
        out.sum().backward()


def test_negative_slope():
    """Whose output does not say which side the pre-activation was on."""
    given = leaves(dtype=f64)
    act = torch.nn.LeakyReLU(-0.3)
    found = torch.autograd.grad(conv_transpose2d(*given, 2, act=act).sum(), given)
    expected = torch.autograd.grad(act(F.conv_transpose2d(*given, 2)).sum(), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_nan_and_infinity_stay(backend):
    for layout in LAYOUTS[:2]:
        t = make("double", f32)
        t["x"][0, 0, 0, 0], t["x"][1, 1, 1, 1] = float("nan"), float("inf")
        t["x"] = in_layout(t["x"], layout)
        for act in ("relu", "leaky_relu", "silu"):
            spelled, stock_act = ACTIVATIONS[act]
            dout = torch.ones(2, 6, 10, 8)
            found = collect(conv_transpose2d, t, dout, stride=2, act=spelled)
            stock = collect(F.conv_transpose2d, t, dout, stock_act, stride=2)
            for key in stock:
                torch.testing.assert_close(found[key], stock[key], equal_nan=True)


@pytest.mark.usefixtures("no_native_required")
def test_transforms(backend):
    x, weight, bias = (t.detach() for t in leaves("groups"))

    def call(x):
        return conv_transpose2d(x, weight, bias, 2, groups=2, act="silu")

    rows = torch.stack([x, 2 * x])
    found = torch.func.vmap(call)(rows)
    torch.testing.assert_close(found, torch.stack([call(x), call(2 * x)]))
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(call, (x,), (direction,))
    numeric = (call(x + 1e-6 * direction) - call(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-6)


def test_groups_dilated_in_half_precision():
    """Stock torch 2.13 gives garbage where x or the weight is channels_last, mostly what freed memory held."""
    for of_x, of_weight in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for _ in range(5):
            for size in range(8, 20):  # what is freed is garbage
                torch.full((1 << size,), float("nan"), dtype=torch.bfloat16)
            given = [
                in_layout(torch.randn(shape).bfloat16(), LAYOUTS[layout]).requires_grad_()
                for shape, layout in (((3, 4, 5, 32), of_x), ((4, 2, 4, 4), of_weight))
            ]
            out = conv_transpose2d(*given, None, 1, (1, 2), 0, 4, (3, 1))
            dout = torch.randn(out.shape).bfloat16()
            found = torch.autograd.grad(out, given, dout)
            twins = [t.detach().double().requires_grad_() for t in given]
            true = F.conv_transpose2d(*twins, None, 1, (1, 2), 0, 4, (3, 1))
            for a, b in zip(found, torch.autograd.grad(true, twins, dout.double()), strict=True):
                assert (a - b).abs().max() < 0.01 * b.abs().max()
