"""The CPU kernels of Winograd's convolution at the edges of their tiles, in all formats, against fp64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, assert_accurate, f64, in_layout
from support.conv2d import Case, make_inputs

from advdl_ops.activation import resolve_activation

OPS = torch.ops.advdl_ops
LAYOUTS = ("contiguous", "channels_last")
# Of the images and of the weight.
FORMATS = [*itertools.product(LAYOUTS, LAYOUTS), ("strided", "strided")]
TILES = {0: "2x2", 1: "2x4", 2: "4x4"}
ALL = ("scale", "shift", "residual")


def winograd(n, c, outputs, h, w, padding=(1, 1), dilation=(1, 1), groups=1):
    return Case((n, c, h, w), outputs, (3, 3), (1, 1), padding, dilation, groups)


# Channels around a vector of 4, 8 and 16 lanes, a panel of 4 vectors and the parts of 16 in which they are summed;
# images around one tile and around a block of 24 and 36 of them.
SIZES = [
    winograd(1, c, outputs, h, w)
    for c, outputs, (h, w) in zip(
        (1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 113, 130),
        (65, 64, 63, 33, 1, 2, 3, 4, 5, 6, 7, 8, 16, 129),
        itertools.cycle(
            ((1, 1), (1, 5), (2, 3), (7, 1), (4, 4), (5, 8), (9, 4), (23, 25), (12, 49), (24, 24))
        ),
        strict=False,
    )
]
OPTIONS = [
    winograd(2, 20, 21, 9, 11, padding, dilation)
    for dilation, padding in (
        ((1, 1), (0, 0)),
        ((1, 1), (2, 1)),
        ((2, 2), (2, 2)),
        ((2, 1), (0, 2)),
        ((1, 3), (1, 6)),
        ((4, 4), (8, 7)),
        ((5, 6), (5, 6)),
        ((12, 40), (24, 40)),
    )
]
# Grids of a dilation that begin in the tile where the one before ends: behind one unused output where both have
# padding, else behind two; in the last tile of a row, and several in one tile.
PACKED = [
    winograd(2, 20, 21, 30, 29, padding, dilation)
    for dilation, padding in (
        ((4, 4), (4, 4)),
        ((6, 5), (6, 5)),
        ((6, 5), (5, 3)),
        ((3, 4), (0, 0)),
        ((12, 25), (12, 25)),
        ((7, 28), (8, 30)),
        ((1, 6), (1, 6)),
        ((6, 1), (6, 1)),
    )
]
# Rows of the widest contiguous dilated images that the kernel reads where they are, and wider ones.
WIDE = [winograd(1, 5, 6, 9, w, (2, 3), (2, 3)) for w in (125, 126, 127, 300)] + [
    winograd(1, 5, 6, 9, w, (2, p), (2, 3)) for w, p in ((124, 4), (126, 4), (128, 2), (130, 1))
]
OTHERS = {
    "many images": winograd(40, 6, 7, 2, 3),
    "many tiles of many panels": winograd(3, 20, 200, 40, 33),
    "weight of several panels, more than 128 tiles": winograd(3, 300, 260, 33, 34),
    "dilated, many tiles of many panels": winograd(3, 20, 200, 40, 33, (4, 4), (4, 4)),
    "dilated, a weight of several panels": winograd(3, 300, 260, 33, 34, (6, 6), (6, 6)),
    "dilation larger than the image": winograd(2, 5, 6, 4, 3, (200000, 1), (200000, 1)),
    "a single output": winograd(2, 9, 10, 3, 3, (0, 0)),
    "no image": winograd(0, 6, 7, 2, 3),
}


def results(p, tile, act="none", packed=False):
    """The output, dx and dweight, by the operators."""
    a = resolve_activation("", ACTIVATIONS[act][0])
    options = p.case.padding, p.case.dilation, p.case.groups
    kept = OPS.winograd_pack(p.weight, p.case.groups, tile) if packed else None
    out = OPS.winograd_conv2d(
        p.x, p.weight, kept, p.scale, p.shift, p.residual, *options, tile, a.code, a.param
    )
    return out, *OPS.winograd_conv2d_backward(
        p.dout, p.x, p.weight, *options, tile, tile, True, True
    )


def stock(p, act="none"):
    x, weight = p.x.detach().requires_grad_(), p.weight.detach().requires_grad_()
    z = F.conv2d(x, weight, **p.case.options)
    gradients = torch.autograd.grad(z, (x, weight), p.dout)
    for value, combine in ((p.scale, torch.mul), (p.shift, torch.add)):
        z = z if value is None else combine(z, value.view(-1, 1, 1))
    z = z if p.residual is None else z + p.residual
    return ACTIVATIONS[act][1](z).detach(), *gradients


def laid(p, images, weight):
    p = p.laid(images)
    p.weight = in_layout(p.weight.contiguous(), weight)
    return p


def check(case, formats, tile, act="none", with_=(), packed=False, dtype=torch.float32):
    p = laid(make_inputs(case, dtype, with_=with_, channel_dtype=torch.float32), *formats)
    exact, sizes = stock(p.to(f64), act), stock(p.map(lambda t: t.to(f64).abs()))
    for name, found, right, plain, size in zip(
        ("out", "dx", "dweight"),
        results(p, tile, act, packed),
        exact,
        stock(p, act),
        sizes,
        strict=True,
    ):
        assert found.shape == right.shape
        if found.numel() > 0:
            is_last = formats[name == "dweight"] == "channels_last"
            memory_format = torch.channels_last if is_last else torch.contiguous_format
            assert found.is_contiguous(memory_format=memory_format)
            what = name, case, formats, TILES[tile]
            assert_accurate(found, right, plain, float(size.max()), what)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("formats", FORMATS)
def test_sizes(formats, tile):
    for at, case in enumerate(SIZES):
        check(case, formats, tile, "relu", ALL, packed=at % 2 == 0)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("formats", FORMATS)
def test_options(formats, tile):
    for case in OPTIONS + PACKED + WIDE:
        check(case, formats, tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, tile):
    for layout, packed in itertools.product(LAYOUTS, (False, True)):
        check(OTHERS[name], (layout, "channels_last"), tile, "silu", ("shift",), packed)


# Channels of a group around a vector and a panel; images around the pixels of a stage: tiles of one row, of parts of a
# row and of several rows.
GROUPED = [
    winograd(2, 3 * c, 3 * outputs, h, w, groups=3)
    for c, outputs, h, w in ((5, 17, 9, 6), (16, 3, 7, 35), (65, 66, 5, 5))
]
STAGED = [
    winograd(2, 5, 70, 20, 17),
    winograd(1, 17, 5, 5, 300),
    winograd(1, 16, 16, 40, 33, (0, 2)),
    winograd(2, 20, 21, 9, 11, (2, 3), (2, 3)),
    winograd(2, 20, 21, 15, 23, (4, 6), (4, 6)),
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_groups_and_half_precision(dtype, formats, tile):
    for case in GROUPED + STAGED:
        for packed in (False, True):
            check(case, formats, tile, "relu", ALL, packed, dtype)
    check(GROUPED[0], formats, tile, "silu", ("scale",), dtype=dtype)


def test_a_dilation_whose_square_is_no_int64():
    x, weight = torch.randn(1, 3, 1, 1), torch.randn(4, 3, 3, 3)
    rate = [2**32, 2**32]
    out = OPS.winograd_conv2d(x, weight, None, None, None, None, rate, rate, 1, 0, 0, 0.0)
    torch.testing.assert_close(out, F.conv2d(x, weight[:, :, 1:2, 1:2]))
    dz = torch.randn(1, 4, 1, 1)
    dx, dweight = OPS.winograd_conv2d_backward(dz, x, weight, rate, rate, 1, 0, 0, True, True)
    torch.testing.assert_close(dx, F.conv_transpose2d(dz, weight[:, :, 1:2, 1:2]))
    expected = torch.zeros_like(weight)
    expected[:, :, 1, 1] = dz[0, :, 0] * x[0, :, 0, 0]
    torch.testing.assert_close(dweight, expected)


NOT_FINITE = [float("inf"), float("-inf"), float("nan"), 3e38]


def check_not_finite(p, tile, value, act="none"):
    """All results, with the infinities and NaN of fp64."""
    exact = stock(p.to(f64), act)
    tolerance = 1e-4 if p.x.dtype == torch.float32 else 3e-2
    for found, right in zip(results(p, tile, act), exact, strict=True):
        right = right.to(found.dtype)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found), kind(right))
        if not math.isfinite(value):  # of 3e38 the whole tile has the rounding error
            rest = torch.isfinite(right)
            torch.testing.assert_close(found[rest], right[rest], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["x", "dout", "weight"])
def test_what_is_not_finite_reaches_what_a_direct_convolution_lets_it_reach(where, value, tile):
    # Stock in fp64 multiplies the zeros of the padding, so nothing that is not finite may meet them.
    padded, dilated = ((0, 0), (0, 0)) if where == "weight" else ((1, 1), (0, 2))
    cases = [winograd(2, 20, 37, 13, 14, padded), winograd(2, 20, 37, 13, 14, dilated, (2, 3))]
    if where != "weight":
        cases.append(winograd(2, 20, 37, 13, 14, (2, 3), (2, 3)))
    for case in cases:
        for formats in FORMATS[:4]:
            p = laid(make_inputs(case), *formats)
            t = getattr(p, where)
            row, column = (2, 0) if where == "weight" else (4, 5)
            t[1, 5, row, column] = value
            t[0, 0, row - 1, column + 1] = value
            check_not_finite(p, tile, value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", NOT_FINITE[:3])
@pytest.mark.parametrize("where", ["x", "dout"])
def test_what_is_not_finite_in_half_precision_and_groups(where, value, layout):
    p = make_inputs(winograd(2, 20, 38, 13, 14, groups=2), torch.bfloat16).laid(layout)
    t = getattr(p, where)
    t[1, 5, 4, 5] = value
    t[0, 17, 3, 6] = value
    check_not_finite(p, 2, value)


@pytest.mark.parametrize("value", NOT_FINITE[:3])
def test_an_epilogue_of_what_is_not_finite(value):
    p = make_inputs(winograd(2, 20, 37, 13, 14), with_=ALL).laid("channels_last")
    p.x[1, 5, 6, 7] = value
    check_not_finite(p, 2, value, "relu")


# By tiles and by panels; with fewer panels than threads, and more.
SHARED = [
    winograd(3, 70, 80, 30, 31),
    winograd(1, 70, 200, 9, 9),
    winograd(3, 300, 260, 17, 16),
    winograd(1, 20, 30, 21, 20),
    winograd(1, 20, 200, 33, 30, (4, 4), (4, 4)),
    winograd(3, 20, 30, 33, 30, (6, 6), (6, 6)),
    winograd(2, 140, 160, 19, 18, groups=2),
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_with_any_number_of_threads(layout, case, tile, threads):
    p = make_inputs(case).laid(layout)

    def run(count, packed):
        torch.set_num_threads(count)
        return results(p, tile, packed=packed)

    first = run(1, False)
    for count, packed in itertools.product((1, 2, 3, 5, 8), (False, True)):
        for a, b in zip(run(count, packed), first, strict=True):
            assert torch.equal(a, b)


def test_each_gradient_alone():
    p = make_inputs(winograd(2, 20, 21, 9, 10))
    options = p.dout, p.x, p.weight, [1, 1], [1, 1], 1, 1, 2
    together = OPS.winograd_conv2d_backward(*options, True, True)
    for i in range(2):
        alone = OPS.winograd_conv2d_backward(*options, i == 0, i == 1)
        assert torch.equal(alone[i], together[i])
        assert alone[1 - i].numel() == 0


def test_errors():
    p = make_inputs(winograd(2, 20, 21, 9, 10))
    a, b = torch.randn(21), torch.randn(20)

    def call(
        x=p.x,
        weight=p.weight,
        packed=None,
        scale=a,
        shift=a,
        residual=None,
        padding=(1, 1),
        groups=1,
        tile=0,
        act=0,
    ):
        return OPS.winograd_conv2d(
            x, weight, packed, scale, shift, residual, padding, [1, 1], groups, tile, act, 0.0
        )  # fmt: skip

    call()
    for message, arguments in {
        r"weight must be \[C_out, C_in / groups, 3, 3\]": {"weight": torch.randn(21, 20, 3, 1)},
        "with the channels of x": {"weight": torch.randn(21, 19, 3, 3)},
        "an output and an input channel": {"weight": torch.randn(0, 20, 3, 3)},
        "must have an output and an input": {"x": p.x[:, :0], "weight": torch.randn(21, 0, 3, 3)},
        "dtype must be float32, float16": {"x": p.x.double(), "weight": p.weight.double()},
        "weight must have the dtype": {"x": p.x.double()},
        "unknown tile": {"tile": 3},
        "groups must be positive": {"groups": 0},
        "divide the output channels": {"groups": 2},
        "scale and shift must have one value": {"scale": b},
        "packed must come from winograd_pack": {"packed": a},
        "residual must have the shape": {"residual": p.x},
        "unknown activation": {"act": 99},
        "kernel must not be larger": {"x": p.x[..., :2, :2], "padding": (0, 0)},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
    out = call(padding=(3, 1))
    with pytest.raises(RuntimeError, match="padding must not exceed the reach"):
        OPS.winograd_conv2d_backward(out, p.x, p.weight, [3, 1], [1, 1], 1, 0, 0, True, False)
