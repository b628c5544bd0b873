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
FORMATS = list(itertools.product(LAYOUTS, LAYOUTS))  # of the images and of the weight
TILES = {0: "2x2", 1: "2x4", 2: "4x4"}
ALL = ("scale", "shift", "residual")


def winograd(n, c, outputs, h, w, padding=(1, 1), dilation=(1, 1)):
    return Case((n, c, h, w), outputs, (3, 3), (1, 1), padding, dilation)


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
OTHERS = {
    "many images": winograd(40, 6, 7, 2, 3),
    "many tiles of many panels": winograd(3, 20, 200, 40, 33),
    "a single output": winograd(2, 9, 10, 3, 3, (0, 0)),
    "no image": winograd(0, 6, 7, 2, 3),
}


def results(p, tile, act="none", packed=False):
    """The output, dx and dweight, by the operators."""
    a = resolve_activation("", ACTIVATIONS[act][0])
    options = p.case.padding, p.case.dilation
    kept = OPS.winograd_pack(p.weight, tile, False) if packed else None
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


def check(case, formats, tile, act="none", with_=(), packed=False):
    p = laid(make_inputs(case, with_=with_), *formats)
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
            assert found.is_contiguous(
                memory_format=torch.channels_last
                if formats[name == "dweight"] == "channels_last"
                else torch.contiguous_format
            )
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
    for case in OPTIONS:
        check(case, formats, tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, tile):
    check(OTHERS[name], FORMATS[-1], tile, "silu", ("shift",))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_what_is_not_finite_reaches_the_outputs_of_its_window_alone(value, tile):
    p = make_inputs(winograd(2, 20, 37, 13, 14)).laid("channels_last")
    p.x[1, 5, 6, 7] = value
    p.x[0, 0, 0, 0] = value
    expected = stock(p)[0]
    found = results(p, tile)[0]
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(found), kind(expected))
    if not math.isfinite(value):  # of 3e38 the whole tile has the rounding error
        rest = torch.isfinite(expected)
        torch.testing.assert_close(found[rest], expected[rest])


@pytest.mark.parametrize("tile", TILES)
def test_same_bits_with_any_number_of_threads(tile, threads):
    p = make_inputs(winograd(3, 70, 80, 30, 31)).laid("channels_last")

    def run(count):
        torch.set_num_threads(count)
        return results(p, tile)

    first = run(1)
    for count in (2, 3):
        for a, b in zip(run(count), first, strict=True):
            assert torch.equal(a, b)


def test_each_gradient_alone():
    p = make_inputs(winograd(2, 20, 21, 9, 10))
    options = p.dout, p.x, p.weight, [1, 1], [1, 1], 1, 2
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
        tile=0,
        act=0,
    ):
        return OPS.winograd_conv2d(
            x, weight, packed, scale, shift, residual, padding, [1, 1], tile, act, 0.0
        )  # fmt: skip

    call()
    for message, arguments in {
        r"weight must be \[C_out, C_in, 3, 3\]": {"weight": torch.randn(21, 20, 3, 1)},
        "with the channels of x": {"weight": torch.randn(21, 19, 3, 3)},
        "dtype must be float32": {"x": p.x.double(), "weight": p.weight.double()},
        "weight must have the dtype": {"x": p.x.double()},
        "unknown tile": {"tile": 3},
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
        OPS.winograd_conv2d_backward(out, p.x, p.weight, [3, 1], [1, 1], 0, 0, True, False)
