"""conv_bn_act: training and evaluation, folded and not, against fp64 and stock PyTorch."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, LAYOUTS, ULPS, acc_dtype, error, in_layout, largest
from torch.autograd import gradcheck, gradgradcheck

from advdl_ops._conv.choice import PREPACKED
from advdl_ops.functional import conv_bn_act
from advdl_ops.functional.conv_bn_act import scale_and_shift
from advdl_ops.nn import BatchNormAct2d, Conv2d, ConvBNAct, ConvBNReLU, DepthwiseConv2d
from advdl_ops.nn import conv_bn_act as siblings

pytestmark = pytest.mark.usefixtures("one_thread")
f32, f64 = torch.float32, torch.float64
CHANNELS = 8
OPTIONS = {
    "plain": {"padding": 1},
    "none": {"padding": 0},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "multiplier": {"groups": 4, "padding": 1},
    "depthwise": {"groups": 8, "padding": 1},
    "depthwise-stride": {"groups": 8, "padding": (1, 2), "stride": 2, "dilation": (1, 2)},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "uneven": {"padding": (0, 2), "stride": (2, 1)},
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS[:2])


def make(dtype=f32, kernel=3, seed=0, **options):
    """Inputs of the function: x, and a dict of its tensors."""
    g = torch.Generator().manual_seed(seed)
    groups = options.get("groups", 1)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=f64)

    tensors = {
        "weight": normal(CHANNELS, max(4 // groups, 1), kernel, kernel) / 3,
        "running_mean": 0.3 * normal(CHANNELS),
        "running_var": torch.rand(CHANNELS, generator=g, dtype=f64) + 0.5,
        "bn_weight": torch.rand(CHANNELS, generator=g, dtype=f64) + 0.5,
        "bn_bias": 0.3 * normal(CHANNELS),
        "bias": 0.3 * normal(CHANNELS),
    }
    return normal(3, max(4, groups), 9, 8).to(dtype), {n: t.to(dtype) for n, t in tensors.items()}


def stock(x, tensors, residual=None, act="none", order="conv-bn-act", training=False, **options):
    t = tensors
    y = F.conv2d(x, t["weight"], t["bias"], **options)
    apply = ACTIVATIONS[act][1]
    if order == "conv-act-bn":
        y = apply(y)
    y = F.batch_norm(y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"], training)
    y = y if residual is None else y + residual
    return y if order == "conv-act-bn" else apply(y)


def as_fp64(tensors):
    return {n: t.detach().double() for n, t in tensors.items()}


def term_size(x, tensors, training=False, **options):
    """Of the sums in a convolution and the norm after it: its value with all terms positive."""
    t = {n: v.abs() for n, v in as_fp64(tensors).items()}
    y = F.conv2d(x.double().abs(), t["weight"], t["bias"], **options)
    if training:
        var = F.conv2d(x.double(), tensors["weight"].double(), **options).var((0, 2, 3))
        mean = y.mean((0, 2, 3))
    else:
        mean, var = t["running_mean"], t["running_var"]
    scale = t["bn_weight"] * (var + 1e-5).rsqrt()
    y = (y + mean[:, None, None]) * scale[:, None, None] + t["bn_bias"][:, None, None]
    return y.max().item()


def assert_accurate(found, exact, plain, size, what):
    """The rule of support/accuracy.py; oneDNN's folded weight is rounded once more, in its own dtype."""
    eps = torch.finfo(found.dtype).eps
    limit = error(plain, exact) + ULPS * eps * max(largest(exact), size)
    assert error(found, exact) <= limit, what


@LAYOUT
@pytest.mark.parametrize("name", OPTIONS)
def test_eval_folds_to_the_same_values(backend, name, layout):
    options = OPTIONS[name]
    for dtype, act in itertools.product((f32, f64, torch.bfloat16), ACTIVATIONS):
        x, t = make(dtype, **options)
        x = in_layout(x, layout)
        exact = stock(x.double(), as_fp64(t), act=act, **options)
        residual = in_layout(torch.randn(exact.shape).to(dtype), layout)
        for r in (None, residual):
            exact = stock(x.double(), as_fp64(t), None if r is None else r.double(), act, **options)
            plain = stock(x, t, r, act, **options)
            with torch.no_grad():
                found = conv_bn_act(x, **t, residual=r, act=ACTIVATIONS[act][0], **options)
            assert found.dtype == dtype
            size = term_size(x, t, **options)
            assert_accurate(found, exact, plain, size, (dtype, act, r is not None))
            if min(found.shape) > 1:
                assert found.stride() == in_layout(found, layout).stride()


@LAYOUT
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_folded_module_in_every_activation(act, layout):
    """In channels_last by oneDNN's call, which has most activations of its own; with values on both sides of 6."""
    x, t = make()
    t["bn_weight"] *= 4
    layer = ConvBNAct(4, CHANNELS, 3, bias=True, act=ACTIVATIONS[act][0]).eval()
    layer.load_state_dict(
        {"conv." + n: t[n] for n in ("weight", "bias")}
        | {"bn." + n: t["bn_" + n] for n in ("weight", "bias")}
        | {"bn." + n: t[n] for n in ("running_mean", "running_var")},
        strict=False,
    )
    x, options = in_layout(x, layout), OPTIONS["plain"]
    exact = stock(x.double(), as_fp64(t), act=act, **options)
    plain = stock(x, t, act=act, **options)
    with torch.no_grad():
        found = layer(x)
    if layout == "channels_last":
        assert list(layer.bn.folded.kept) == [PREPACKED]
    assert_accurate(found, exact, plain, term_size(x, t, **options), act)


@LAYOUT
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(backend, name, training, layout):
    options = OPTIONS[name]
    for act, order in itertools.product(("relu", "silu", "none"), ("conv-bn-act", "conv-act-bn")):
        x, t = make(f64, **options)
        results = []
        dout = residual = None
        for function in (stock, conv_bn_act):
            leaf = in_layout(x, layout).detach().requires_grad_()
            own = {n: v.clone().requires_grad_("running" not in n) for n, v in t.items()}
            name_of_act = act if function is stock else ACTIVATIONS[act][0]
            if dout is None:
                out = stock(leaf, {n: v.detach().clone() for n, v in t.items()}, **options)
                dout, residual = torch.randn(2, *out.shape, dtype=f64).unbind()
            r = residual.clone().requires_grad_()
            more = {"residual": r, "act": name_of_act, "order": order, "training": training}
            if function is stock:
                out = stock(leaf, own, **more, **options)
            else:
                out = conv_bn_act(leaf, **own, **more, **options)
            leaves = [leaf, r, *(v for v in own.values() if v.requires_grad)]
            results.append(
                [
                    out,
                    *torch.autograd.grad(out, leaves, dout),
                    own["running_mean"],
                    own["running_var"],
                ]
            )
        for own, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(training):
    x, t = make(f64)
    x, weight = x[:2, :, :4, :3].clone(), t["weight"][:2].clone()
    t = {n: v[:2].clone() for n, v in t.items()}
    inputs = [x, weight, t["bn_weight"], t["bn_bias"], t["bias"]]

    def function(x, weight, bn_weight, bn_bias, bias):
        return conv_bn_act(
            x, weight, t["running_mean"], t["running_var"], bn_weight, bn_bias, bias=bias,
            training=training, momentum=0.0, act="silu",
        )  # fmt: skip

    inputs = [v.detach().requires_grad_() for v in inputs]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_order_conv_act_bn(backend):
    for act, training, grad in itertools.product(ACTIVATIONS, (True, False), (True, False)):
        x, t = make(f64)
        residual = torch.randn(3, CHANNELS, 7, 6, dtype=f64)
        expected = stock(x, copy.deepcopy(t), residual, act, "conv-act-bn", training)
        with torch.set_grad_enabled(grad):
            found = conv_bn_act(
                x, **t, residual=residual, act=ACTIVATIONS[act][0], order="conv-act-bn",
                training=training,
            )  # fmt: skip
        torch.testing.assert_close(found, expected)


def test_optional_tensors(backend):
    x, t = make(f64)
    for missing in itertools.product((True, False), repeat=3):
        own = dict(t)
        for name, gone in zip(("bias", "bn_weight", "bn_bias"), missing, strict=True):
            own[name] = None if gone else own[name]
        with torch.no_grad():
            torch.testing.assert_close(conv_bn_act(x, **own, act="relu"), stock(x, own, act="relu"))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_beside_fp32_norm(x_dtype):
    x, t = make()
    for name in ("weight", "bias"):
        t[name] = t[name].to(x_dtype)
    x = x.to(x_dtype)
    with torch.no_grad():
        found = conv_bn_act(x, **t, act="relu")
        exact = stock(x.double(), as_fp64(t), act="relu")
        plain = stock(x, t, act="relu")
    assert found.dtype == x_dtype
    assert_accurate(found, exact, plain, term_size(x, t), x_dtype)


def test_empty_batch_and_strided_input(backend):
    x, t = make()
    with torch.no_grad():
        for cut in (x[:0], x[::2], x[..., ::2], x.transpose(2, 3)):
            torch.testing.assert_close(
                conv_bn_act(cut, **t, act="relu"), stock(cut, t, act="relu"), rtol=1e-4, atol=1e-5
            )


def module_pair(dtype=f64, **options):
    """ConvBNAct and its stock counterpart with the same weights."""
    act = options.pop("act", None)
    channels = max(4, options.get("groups", 1))
    own = ConvBNAct(channels, CHANNELS, 3, dtype=dtype, act=act, **options)
    order = options.pop("order", "conv-bn-act")
    bn = {k: options.pop(k) for k in ("eps", "momentum", "affine") if k in options}
    options = {"padding": 1, "bias": False, **options}
    conv = torch.nn.Conv2d(channels, CHANNELS, 3, **options, dtype=dtype)
    stock_module = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(CHANNELS, **bn, dtype=dtype))
    stock_module[0].load_state_dict(own.conv.state_dict())
    with torch.no_grad():
        if own.bn.affine:
            own.bn.weight.uniform_(0.5, 1.5)
            own.bn.bias.uniform_(-1, 1)
    stock_module[1].load_state_dict(own.bn.state_dict())

    def run(x, residual=None):
        y = stock_module[0](x)
        apply = (lambda z: z) if act is None else getattr(F, act)
        if order == "conv-act-bn":
            y = stock_module[1](apply(y))
            return y if residual is None else y + residual
        y = stock_module[1](y)
        return apply(y if residual is None else y + residual)

    return own, stock_module, run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act": "relu", "bias": True},
        {"act": "gelu", "stride": 2},
        {"act": "silu", "order": "conv-act-bn"},
        {"padding_mode": "reflect", "act": "relu"},
        {"padding_mode": "circular"},
        {"padding_mode": "replicate", "padding": 2},
        {"padding_mode": "reflect", "padding": "same", "dilation": 2},
        {"padding": "same", "act": "relu"},
        {"groups": 4, "eps": 1e-3, "momentum": None},
        {"groups": 8, "act": "relu", "bias": True},
        {"groups": 8, "act": "silu", "stride": 2, "padding_mode": "circular"},
        {"groups": 8, "act": "gelu", "order": "conv-act-bn"},
        {"affine": False, "act": "relu"},
    ],
    ids=str,
)
def test_module_trains_and_evaluates_as_stock(backend, options):
    own, stock_module, run = module_pair(**dict(options))
    for _ in range(3):
        x = torch.randn(3, own.conv.in_channels, 9, 8, dtype=f64)
        torch.testing.assert_close(own(x), run(x))
    stock_state = stock_module.state_dict()
    for key, t in own.state_dict().items():
        renamed = key.replace("conv.", "0.").replace("bn.", "1.")
        torch.testing.assert_close(t, stock_state[renamed])
    own.eval(), stock_module.eval()
    residual = torch.randn_like(own(x))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(own(x), run(x))
            torch.testing.assert_close(own(x, residual), run(x, residual))
            torch.testing.assert_close(own(x, residual), run(x, residual))  # from the cache


@LAYOUT
@pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16])
def test_module_keeps_the_memory_format(dtype, layout):
    modes = {"padding_mode": "reflect"}, {"padding_mode": "circular"}
    for options in ({}, {"stride": 2}, *modes, {"groups": 2}, {"groups": 8}):
        channels = max(4, options.get("groups", 1))
        for act, mode in itertools.product((None, "relu", "elu"), (True, False)):
            own = ConvBNAct(channels, CHANNELS, 3, dtype=dtype, act=act, **options).train(mode)
            if layout == "channels_last":
                own = own.to(memory_format=torch.channels_last)
            x = in_layout(torch.randn(2, channels, 6, 6, dtype=dtype), layout)
            with torch.no_grad():
                shape = own(x).shape
                for r in (None, in_layout(torch.randn(shape, dtype=dtype), layout)):
                    for _ in range(2):
                        out = own(x, r)
                        assert out.stride() == in_layout(out, layout).stride(), (options, act, mode)


@pytest.mark.parametrize("order", ["conv-bn-act", "conv-act-bn"])
def test_state_dict_both_ways(order):
    own = ConvBNAct(4, CHANNELS, 3, bias=True, act="relu", order=order)
    stock_module = torch.nn.Sequential(
        torch.nn.Conv2d(4, CHANNELS, 3, padding=1), torch.nn.BatchNorm2d(CHANNELS)
    )
    stock_module(torch.randn(2, 4, 5, 5))
    renamed = {
        k.replace("0.", "conv.", 1).replace("1.", "bn.", 1): v
        for k, v in stock_module.state_dict().items()
    }
    assert list(renamed) == list(own.state_dict())
    own.load_state_dict(renamed, strict=True)
    x = torch.randn(2, 4, 5, 5)
    apply = torch.nn.ReLU()
    conv, bn = stock_module.eval()
    expected = apply(bn(conv(x))) if order == "conv-bn-act" else bn(apply(conv(x)))
    torch.testing.assert_close(own.eval()(x), expected)
    own.train()(x)
    back = {k.replace("conv.", "0.").replace("bn.", "1."): v for k, v in own.state_dict().items()}
    stock_module.load_state_dict(back, strict=True)
    assert torch.equal(stock_module[1].running_var, own.bn.running_var)


def test_constructor():
    own = ConvBNAct(4, CHANNELS, (3, 5), (1, 2), None, (2, 1), 2, True, "zeros", None, f64)
    assert type(own.conv) is Conv2d
    assert isinstance(own.bn, BatchNormAct2d)
    assert own.conv.padding == (2, 2)
    assert (own.conv.stride, own.conv.groups, own.conv.bias.dtype) == ((1, 2), 2, f64)
    assert ConvBNAct(4, 4, 3).conv.bias is None
    relu = ConvBNReLU(4, CHANNELS, 3, padding=0)
    assert (relu.act.name, relu.bn.act.name) == ("relu", "identity")
    assert relu.conv.padding == (0, 0)
    with pytest.raises(TypeError, match="act is fixed"):
        ConvBNReLU(4, CHANNELS, 3, act="silu")
    for kernel, dilation in itertools.product((1, 3, 5, 7), (1, 2, 3)):
        layer = ConvBNAct(4, CHANNELS, kernel, dilation=dilation)
        assert layer(torch.randn(2, 4, 9, 9)).shape == (2, CHANNELS, 9, 9)
    assert "conv-act-bn" in repr(ConvBNAct(4, 4, 3, act="relu", order="conv-act-bn"))


@pytest.mark.parametrize(
    "conv",
    [
        torch.nn.Conv2d(8, CHANNELS, 3),
        Conv2d(8, CHANNELS, 3),
        Conv2d(8, CHANNELS, 3, act="silu"),
        DepthwiseConv2d(8, 3),
        DepthwiseConv2d(8, 3, act="silu"),
    ],
    ids=str,
)
def test_sibling_layers(conv):
    bn = BatchNormAct2d(CHANNELS, act="relu")
    x = torch.randn(3, 8, 6, 6)
    for mode, grad in itertools.product((True, False), (True, False)):
        bn.train(mode)
        other = copy.deepcopy(bn)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(siblings(conv, bn, x), other(conv(x)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bn.running_var, other.running_var)


def test_autocast_gives_the_dtypes_of_stock():
    own, stock_module, run = module_pair(f32, act="relu")
    for x_dtype, mode, grad in itertools.product(
        (f32, torch.bfloat16), (True, False), (True, False)
    ):
        own.train(mode), stock_module.train(mode)
        x = torch.randn(3, 4, 9, 8).to(x_dtype)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            found, expected = own(x), run(x)
            assert found.dtype == expected.dtype, (x_dtype, mode, grad)
            found = own(x, expected.float())
            assert found.dtype == run(x, expected.float()).dtype
    # What a cache filled outside of autocast holds must not be mistaken inside it.
    own.eval(), stock_module.eval()
    x = torch.randn(3, 4, 9, 8)
    with torch.no_grad():
        before = own(x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = own(x)
        assert inside.dtype == torch.bfloat16
        torch.testing.assert_close(inside.float(), before, rtol=0.02, atol=0.02 * largest(before))
        assert torch.equal(own(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, f32, f64])
def test_scale_and_shift_are_not_rounded_to_half(dtype):
    # In the accumulation dtype, as running_var + eps loses eps in bf16.
    x, t = make(dtype)
    t["running_var"] = torch.full((CHANNELS,), 1e-4).to(dtype)
    norm = [t[n] for n in ("running_mean", "running_var", "bn_weight", "bn_bias")]
    found = scale_and_shift(x, CHANNELS, *norm, 1e-5)
    exact = scale_and_shift(x.double(), CHANNELS, *(v.double() for v in norm), 1e-5)
    acc = torch.finfo(acc_dtype(dtype)).eps
    for own, truth, terms in zip(found, exact, (exact[0], exact[1].abs() + 100), strict=True):
        assert own.dtype == acc_dtype(dtype)
        assert ((own.double() - truth).abs() <= ULPS * acc * terms.abs()).all()


def test_one_channel_in_contiguous_memory_stays_contiguous():
    # Such memory is channels_last too.
    layer = ConvBNAct(1, CHANNELS, 3, act="relu").eval()
    x = torch.randn(2, 1, 6, 6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer(x).is_contiguous()
