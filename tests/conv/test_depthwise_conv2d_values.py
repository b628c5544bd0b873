"""The CPU kernels of the depthwise convolution at the edges of their blocks, both layouts, against fp64."""

import itertools

import pytest
import torch
from support.accuracy import f64
from support.conv2d import DTYPES, Case, check, make_inputs

ALL = ("bias", "scale", "shift", "residual")
LAYOUTS = ("contiguous", "channels_last")


def depthwise(n, c, h, w, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
    return Case((n, c, h, w), c, kernel, stride, padding, dilation, c)


# Widths and channels around a vector of 4, 8 and 16 lanes and around blocks of 4 of them and of 8 columns; heights
# around blocks of 2 and 4 rows.
SIZES = [
    depthwise(2, c, h, w)
    for c, h, w in zip(
        (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 130),
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 4, 5, 1, 2, 3),
        (63, 64, 65, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 49),
        strict=True,
    )
]
OPTIONS = [
    depthwise(2, 6, 13, 15, kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product(
        ((3, 3), (5, 2), (1, 7)),
        ((1, 1), (2, 2), (3, 1), (1, 3)),
        ((0, 0), (2, 4)),
        ((1, 1), (2, 1), (1, 2)),
    )
]
OTHERS = {
    "padding beyond the reach": depthwise(1, 3, 5, 6, padding=(7, 6)),
    "only the border": depthwise(2, 5, 3, 3, (7, 7), padding=(3, 3)),
    "rates of DeepLab": depthwise(1, 4, 20, 33, padding=(6, 18), dilation=(6, 18)),
    "seven rows of taps": depthwise(2, 20, 19, 21, (7, 7), padding=(3, 3)),
    **{
        # Columns that all taps reach: from 1 to a few more than a block.
        f"runs of {size} taps, {inside} inside": depthwise(
            1, 70, 9, inside + size - 1, (size, size), padding=(size // 2, size // 2)
        )
        for size, inside in itertools.product((5, 7), (1, 3, 4, 5, 8, 9, 13))
    },
    **{
        f"runs of {size} taps, dilation {dilation}, {width} wide": depthwise(
            2, 20, 7, width, (size, size), (1, 1), (padding, padding), (height, dilation)
        )
        for (size, dilation, padding, height), width in itertools.product(
            ((3, 2, 2, 2), (3, 2, 4, 1), (3, 3, 1, 3), (5, 2, 4, 2), (7, 2, 5, 1)), (3, 6, 15, 17)
        )
        if width + 2 * padding > (size - 1) * dilation
    },
    **{
        # 1024 channels: columns are 2 or 4 KB apart, and share sets of the L1 cache.
        f"columns in the same sets, {size}x{size}, stride {stride}, dilation {dilation}": depthwise(
            2, 1024, height, width, (size, size), stride, (padding, padding), dilation
        )
        for size, stride, dilation, padding, height, width in (
            (3, (1, 1), (1, 1), 1, 8, 7),
            (3, (1, 1), (1, 1), 0, 5, 40),
            (3, (1, 1), (2, 2), 2, 9, 14),
            (3, (2, 2), (1, 1), 1, 9, 11),
            (3, (2, 1), (1, 1), 2, 9, 10),
            (3, (1, 2), (1, 1), 1, 6, 15),
            (5, (1, 1), (1, 1), 2, 7, 9),
            (7, (1, 1), (1, 1), 3, 7, 8),
        )
    },
    "columns in the same sets, taps far apart": depthwise(
        1, 1024, 8, 9, padding=(2**36, 1), dilation=(2**36, 1)
    ),
    "weights of 4 KB": depthwise(1, 1008, 5, 9),
    "past the caches": depthwise(1, 64, 130, 131),
    "large, but not aligned": depthwise(1, 66, 130, 131),
    "many taps": depthwise(1, 2, 20, 19, (17, 17), padding=(8, 8)),
    "strips": depthwise(1, 2, 150, 700, (5, 5), padding=(2, 2), dilation=(3, 1)),
    "strips, stride": depthwise(1, 2, 301, 601, (3, 3), (2, 3)),
    "reach far beyond the image": depthwise(2, 20, 8, 9, padding=(400, 300), dilation=(400, 300)),
    "reach of any size": depthwise(1, 2, 8, 8, padding=(200000, 200000), dilation=(200000, 200000)),
    "stride, by way of channels_last": depthwise(2, 20, 21, 22, (5, 3), (2, 2)),
    "stride 3, by way of channels_last": depthwise(2, 33, 21, 22, (3, 3), (3, 2)),
    "stride beyond the image": depthwise(2, 4, 8, 8, stride=(2**31, 2**33)),
    "stride and dilation of any size": depthwise(
        2, 4, 8, 8, (1, 3), (2**62, 2**40), dilation=(2**62, 1)
    ),
    "stride as large as the padding": depthwise(1, 2, 4, 5, (1, 1), (5000, 7000), (5000, 7000)),
    "a large stride": depthwise(2, 3, 17, 16, (3, 3), (5, 4)),
    **{
        f"stride {stride}, {size}x{size}": depthwise(1, 16, 66, 66, (size, size), (stride, stride))
        for stride, size in itertools.product((21, 22, 41), (1, 3))
    },
    **{
        f"one output, {width} wide, {size}x{size}": depthwise(
            2, 20, width, width, (size, size), (width, width), (padding, padding)
        )
        for width, size, padding in ((4, 3, 0), (6, 3, 0), (9, 5, 1), (9, 7, 2))
    },
    **{
        # Contiguous rows of more than 16,384 outputs are cut.
        f"long rows, {width} wide, stride {stride}, dilation {dilation}, {height} high": depthwise(
            2, 2, height, width, (size, 5), (1, stride), (size // 2, 2 * dilation), (1, dilation)
        )
        for width, stride, dilation, height, size in (
            (16383, 1, 1, 1, 1),
            (16384, 1, 1, 5, 3),
            (16385, 1, 1, 2, 3),
            (50001, 1, 3, 1, 1),
            (50001, 1, 1, 7, 3),
            (50001, 2, 1, 6, 3),
            (70003, 3, 2, 1, 1),
        )
    },
    "many images, few channels": depthwise(70, 1, 3, 4),
    "parts by channels": depthwise(1, 160, 3, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sizes(dtype, layout):
    for case in SIZES:
        check(make_inputs(case, DTYPES[dtype], with_=ALL).laid(layout), "relu", what=case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "fp16"])
def test_options(dtype, layout):
    for case in OPTIONS:
        check(make_inputs(case, DTYPES[dtype]).laid(layout), what=case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, layout):
    # In bf16 and channels_last stock torch 2.13 crashes on some of them, or gives NaN (backward, wide padding).
    for dtype in ("fp32", "fp16"):
        check(make_inputs(OTHERS[name], DTYPES[dtype]).laid(layout), "silu", what=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [depthwise(6, 40, 30, 31), depthwise(3, 512, 15, 14)])
def test_same_bits_with_any_number_of_threads(case, layout, threads):
    p = make_inputs(case).laid(layout)
    ops = torch.ops.advdl_ops
    options = [1, 1], [1, 1], [1, 1]

    def run(count):
        torch.set_num_threads(count)
        out = ops.depthwise_conv2d(p.x, p.weight, None, None, None, *options, 0, 0.0)
        gradients = ops.depthwise_conv2d_backward(p.dout, p.x, p.weight, *options, True, True, True)
        return out, *gradients

    first = run(1)
    for count in (2, 3):
        for a, b in zip(run(count), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 20000, 4, 0), (2, 0, 8, 9), (0, 16, 8, 9)])
def test_nothing_to_read(shape):
    x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    weight, shift = torch.ones(shape[1], 1, 3, 3), torch.ones(shape[1])
    options = [1, 1], [1, 2], [1, 1]
    out = torch.ops.advdl_ops.depthwise_conv2d(x, weight, None, shift, None, *options, 0, 0.0)
    assert out.shape == (*shape[:2], shape[2], shape[3] + 2)
    assert torch.equal(out, torch.ones_like(out))
    gradients = torch.ops.advdl_ops.depthwise_conv2d_backward(
        out, x, weight, *options, True, True, True
    )
    assert [g.shape for g in gradients] == [x.shape, weight.shape, shift.shape]
    assert torch.equal(gradients[1], torch.zeros_like(weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_gradient_alone(layout):
    p = make_inputs(depthwise(2, 20, 9, 10), f64).laid(layout)
    op = torch.ops.advdl_ops.depthwise_conv2d_backward
    options = p.dout, p.x, p.weight, [1, 1], [1, 1], [1, 1]
    together = op(*options, True, True, True)
    for i in range(3):
        alone = op(*options, *(i == k for k in range(3)))
        assert torch.equal(alone[i], together[i])
        assert all(alone[k].numel() == 0 for k in range(3) if k != i)


@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES.values()])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (1, 16, 4, 4), (2, 33, 9, 15), (1, 1, 3, 3), (0, 2, 3, 4), (3, 70, 1, 129)],
)
def test_layouts_are_exchanged(shape, dtype):
    x = torch.randint(0, 200, shape).to(dtype)
    last = torch.ops.advdl_ops.convert_layout(x, True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, x)
    back = torch.ops.advdl_ops.convert_layout(last, False)
    assert back.is_contiguous()
    assert torch.equal(back, x)
    every_other = x[..., ::2]
    assert torch.equal(torch.ops.advdl_ops.convert_layout(every_other, True), every_other)
