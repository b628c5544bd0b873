"""The CPU kernel of the dense convolution at the edges of its tiles, in all formats; and what it serves."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, assert_accurate, f64, in_layout
from support.conv2d import Case, check, fixed_thresholds, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from advdl_ops._conv import choice
from advdl_ops._conv.choice import DENSE
from advdl_ops._conv.problem import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    problem_of,
)
from advdl_ops.activation import resolve_activation

OPS = torch.ops.advdl_ops
LAYOUTS = ("contiguous", "channels_last")
FORMATS = list(itertools.product(LAYOUTS, LAYOUTS))  # of the images and of the weight


def dense(n, c, outputs, h, w, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
    return Case((n, c, h, w), outputs, kernel, stride, padding, dilation)


# Channels around a vector of 4, 8 and 16 lanes, a panel of 4 vectors, tiles of 3 and 6 rows, and a depth of 128;
# pixels around tiles and blocks of 44 of them.
SIZES = [
    dense(1, c, outputs, h, w)
    for c, outputs, (h, w) in zip(
        (1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 113, 127, 128, 129, 130, 257),
        (65, 64, 63, 33, 1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 12, 13, 130, 1),
        itertools.cycle(
            ((1, 1), (1, 5), (2, 3), (7, 1), (11, 12), (12, 11), (2, 66), (3, 88), (5, 53))
        ),
        strict=False,
    )
]
OPTIONS = [
    dense(2, 20, 21, 9, 11, kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product(
        ((3, 3), (1, 1), (2, 5)),
        ((1, 1), (2, 2), (3, 1), (1, 2)),
        ((0, 0), (1, 3)),
        ((1, 1), (2, 1), (1, 2)),
    )
]
OTHERS = {
    "most taps": dense(1, 5, 6, 10, 9, (8, 8), padding=(4, 4)),
    "a long filter": dense(1, 5, 6, 3, 90, (1, 64), padding=(0, 20)),
    "only the border": dense(2, 5, 70, 3, 3, (7, 7), padding=(3, 3)),
    "taps beside the image": dense(2, 66, 70, 5, 6, padding=(7, 6), dilation=(7, 6)),
    "one tap inside": dense(2, 20, 20, 5, 6, padding=(400, 300), dilation=(400, 300)),
    "no tap inside": dense(1, 20, 9, 3, 3, (1, 1), (1, 1), (9, 9)),
    "none in most phases": dense(2, 20, 9, 9, 8, (1, 1), (3, 4), (0, 0)),
    "phases of a filter": dense(2, 20, 9, 13, 12, (3, 3), (4, 5)),
    "stride beyond the image": dense(2, 4, 8, 5, 5, stride=(2**31, 2**33)),
    "two rows, far apart": dense(1, 4, 5, 2, 3, (1, 1), (2**20, 1), (2**19, 0)),
    "many panels": dense(1, 70, 330, 4, 5),
    "many pixels": dense(3, 20, 70, 40, 33),
    "many images": dense(70, 6, 7, 2, 3),
    "no image": dense(0, 6, 7, 2, 3),
}


def raw(p, act="none", needs=(True, True)):
    """The output, dx and dweight, by the operators."""
    options = p.case.stride, p.case.padding, p.case.dilation
    a = resolve_activation("", ACTIVATIONS[act][0])
    out = OPS.dense_conv2d(p.x, p.weight, p.bias, p.residual, *options, a.code, a.param)
    return out, *OPS.dense_conv2d_backward(p.dout, p.x, p.weight, *options, *needs)


def stock(p, act="none"):
    x, weight = p.x.detach().requires_grad_(), p.weight.detach().requires_grad_()
    z = F.conv2d(x, weight, **p.case.options)
    gradients = torch.autograd.grad(z, (x, weight), p.dout)
    z = z if p.bias is None else z + p.bias.view(-1, 1, 1)
    z = z if p.residual is None else z + p.residual
    return ACTIVATIONS[act][1](z).detach(), *gradients


def laid(p, images, weight):
    p = p.laid(images)
    p.weight = in_layout(p.weight.contiguous(), weight)
    return p


def check_raw(case, formats, dtype=torch.float32, act="none", with_=()):
    p = laid(make_inputs(case, dtype, with_=with_), *formats)
    exact, sizes = stock(p.to(f64), act), stock(p.map(lambda t: t.to(f64).abs()))
    for name, found, right, plain, size in zip(
        ("out", "dx", "dweight"), raw(p, act), exact, stock(p, act), sizes, strict=True
    ):
        assert found.shape == right.shape
        assert found.dtype == dtype
        if found.numel() > 0:
            assert_accurate(found, right, plain, float(size.max()), (name, case, formats))


@pytest.mark.parametrize("formats", FORMATS)
def test_sizes(formats):
    for case in SIZES:
        check_raw(case, formats, act="relu", with_=("bias", "residual"))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_options(dtype, formats):
    for case in OPTIONS:
        check_raw(case, formats, dtype)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, formats):
    check_raw(OTHERS[name], formats, act="silu", with_=("bias",))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act):
    check_raw(dense(1, 20, 70, 5, 6), ("channels_last",) * 2, act=act, with_=("bias", "residual"))


@pytest.mark.parametrize("formats", FORMATS)
def test_same_bits_with_any_number_of_threads(formats, threads):
    p = laid(make_inputs(dense(3, 70, 150, 11, 12, stride=(1, 2))), *formats)

    def run(count):
        torch.set_num_threads(count)
        return raw(p)

    first = run(1)
    for count in (2, 3, 5):
        assert all(map(torch.equal, run(count), first))


def test_each_gradient_alone():
    p = make_inputs(dense(2, 20, 9, 5, 6))
    _, dx, dweight = raw(p)
    _, alone, empty = raw(p, needs=(True, False))
    assert torch.equal(alone, dx)
    assert empty.shape == (0,)
    _, empty, alone = raw(p, needs=(False, True))
    assert torch.equal(alone, dweight)
    assert empty.shape == (0,)


def test_other_strides_are_copied():
    p = make_inputs(dense(2, 20, 9, 10, 12), with_=("bias", "residual"))
    right = raw(p)
    every_other = p.map(lambda t: torch.stack((t, t), -1)[..., 0])
    assert not every_other.x.is_contiguous()
    assert all(map(torch.equal, raw(every_other), right))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(
    "case", [*SIZES[:4], OTHERS["no image"], dense(2, 1, 5, 4, 4), dense(2, 5, 1, 4, 4, (1, 1))]
)
def test_fake_outputs_equal_real_ones(case, formats):
    p = laid(make_inputs(case), *formats)
    with FakeTensorMode() as mode:
        fake = raw(p.map(mode.from_tensor))
    for r, f in zip(raw(p), fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_opcheck():
    p = laid(make_inputs(dense(2, 5, 6, 4, 4)), "channels_last", "contiguous")
    options = [1, 1], [1, 1], [1, 1]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = p.x, p.weight, p.bias, None, *options, 4, 0.0
    torch.library.opcheck(OPS.dense_conv2d.default, forward, test_utils=tests)
    backward = p.dout, p.x, p.weight, *options, True, True
    torch.library.opcheck(OPS.dense_conv2d_backward.default, backward, test_utils=tests)


def test_errors():
    x, weight, o = torch.zeros(1, 3, 9, 9), torch.zeros(4, 3, 3, 3), ([1, 1], [0, 0], [1, 1])
    dz = torch.zeros(1, 4, 7, 7)
    for message, call in {
        "must have 4 dimensions": lambda: OPS.dense_conv2d(x[0], weight, None, None, *o, 0, 0.0),
        "channels of x": lambda: OPS.dense_conv2d(x, weight[:, :2], None, None, *o, 0, 0.0),
        "dtype and device of x": lambda: OPS.dense_conv2d(
            x, weight.double(), None, None, *o, 0, 0.0
        ),
        "float32 or float64": lambda: OPS.dense_conv2d(
            x.half(), weight.half(), None, None, *o, 0, 0.0
        ),
        "at most 64 taps": lambda: OPS.dense_conv2d(
            x, torch.zeros(4, 3, 9, 8), None, None, *o, 0, 0.0
        ),
        "one value per output channel": lambda: OPS.dense_conv2d(
            x, weight, torch.zeros(3), None, *o, 0, 0.0
        ),
        "shape of the output": lambda: OPS.dense_conv2d(x, weight, None, x, *o, 0, 0.0),
        "unknown activation": lambda: OPS.dense_conv2d(x, weight, None, None, *o, 99, 0.0),
        "larger than the padded": lambda: OPS.dense_conv2d(
            x[..., :2], weight, None, None, *o, 0, 0.0
        ),
        "dz must have": lambda: OPS.dense_conv2d_backward(dz[:, :3], x, weight, *o, True, True),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# ---- what conv2d leaves to it ----

LAST = {"memory_format": torch.channels_last}
SERVED = [
    # images, weight, stride, channels_last -> out, dx, dweight
    ((8, 512, 4, 4), (512, 512, 3, 3), 1, False, (True, True, True)),
    ((16, 512, 4, 4), (512, 512, 3, 3), 1, False, (False, False, True)),
    ((16, 512, 4, 4), (512, 512, 3, 3), 1, True, (True, True, True)),
    ((200, 64, 1, 1), (64, 64, 1, 1), 1, False, (True, True, True)),
    ((4, 64, 8, 8), (64, 64, 3, 3), 1, True, (True, True, True)),
    ((4, 64, 8, 9), (64, 64, 3, 3), 1, True, (False, False, False)),
    ((4, 128, 8, 9), (128, 128, 3, 3), 1, True, (False, False, True)),
    ((16, 128, 14, 14), (256, 128, 3, 3), 2, True, (False, True, True)),
    ((16, 128, 14, 14), (256, 128, 3, 3), 2, False, (False, True, False)),
    ((16, 128, 28, 28), (256, 128, 3, 3), 2, True, (False, False, False)),
    ((1, 64, 6, 7), (64, 64, 3, 3), 1, True, (False, False, False)),
    ((4, 16, 8, 8), (64, 16, 3, 3), 1, True, (False, False, False)),
    ((1, 64, 8, 8), (64, 64, 9, 9), 1, True, (False, False, False)),
]


@pytest.fixture
def _fixed_thresholds():
    with fixed_thresholds():
        yield


def served(x, weight, conv):
    """Whether the kernel serves the output, the gradient of x and that of the weight."""
    found = []
    for direction in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT):
        problem = problem_of(direction, x, weight, conv)
        accepting = choice.candidates(problem, x.device)
        found.append(choice.by_rule(problem, accepting).name == DENSE)
    return tuple(found)


def used(call):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return sorted({e.name for e in found.events() if "dense_conv2d" in e.name})


@pytest.mark.usefixtures("_fixed_thresholds")
@pytest.mark.parametrize(("shape", "filters", "stride", "last", "expected"), SERVED)
def test_what_it_serves(shape, filters, stride, last, expected):
    from advdl_ops.functional import conv2d

    size = filters[-1]
    padding = size // 2
    x, weight = torch.randn(shape), torch.randn(filters) / (filters[1] * size**2) ** 0.5
    x = x.contiguous(**LAST) if last else x
    conv = Conv((stride,) * 2, (padding,) * 2, (1, 1), 1)
    assert served(x, weight, conv) == expected
    for other in (x.double(), x.bfloat16()):
        assert not any(served(other, weight.to(other.dtype), conv))
    x.requires_grad_()
    weight.requires_grad_()
    names = used(lambda: conv2d(x, weight, None, stride, padding).sum().backward())
    assert ("advdl_ops::dense_conv2d" in names) == expected[0]
    assert ("advdl_ops::dense_conv2d_backward" in names) == any(expected[1:])
    with torch.no_grad():
        assert bool(used(lambda: conv2d(x, weight, None, stride, padding))) == expected[0]


@pytest.mark.usefixtures("_fixed_thresholds")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        Case((4, 64, 8, 8), 64, padding=1),
        Case((4, 128, 8, 9), 128, padding=1),
        Case((2, 64, 16, 17), 128, padding=1, stride=2),
        Case((2, 40, 9, 9), 33, padding=12, dilation=12),
        Case((64, 50, 1, 1), 70, (1, 1)),
    ],
)
def test_values_of_what_it_serves(case, layout):
    p = make_inputs(case, with_=("bias", "scale", "residual")).laid(layout)
    pairs = (
        (v, v) if isinstance(v, int) else v for v in (case.stride, case.padding, case.dilation)
    )
    assert any(served(p.x, p.weight, Conv(*pairs)))
    for act in ("none", "relu", "silu"):
        check(p, act, what=(case, layout))


def test_nan_stays():
    x, weight = torch.randn(4, 64, 8, 8), torch.randn(64, 64, 1, 1)
    x[0, 3, 2, 1] = float("nan")
    from advdl_ops.functional import conv2d

    assert conv2d(x, weight, act="relu").isnan().sum() == 64
