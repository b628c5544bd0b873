"""Max-pooling that keeps small positions: the bits of torch's, and the bytes that it keeps."""

import pytest
import torch
from support.lean import leaned
from torch.nn import MaxPool2d

from advdl_ops import set_lean
from advdl_ops._lean import max_pool2d, saving

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last

OPTIONS = {
    "2": {"kernel_size": 2},
    "3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "overlapping": {"kernel_size": 3, "stride": 1, "padding": 1},
    "dilated": {"kernel_size": 3, "stride": 2, "dilation": 2},
    "ceil": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "pairs": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    "list": {"kernel_size": [3, 2], "stride": [2, 1]},
}


class Net(torch.nn.Module):
    """The pooled image is not a leaf, as behind a convolution."""

    def __init__(self, **options):
        super().__init__()
        self.pool = MaxPool2d(**options)

    def forward(self, x):
        return self.pool(x * 1)


def values(net, x):
    x = x.detach().requires_grad_()
    out = net(x)
    dout = torch.linspace(-1, 2, out.numel()).reshape(out.shape).to(out.dtype)
    (dx,) = torch.autograd.grad(out, x, dout)
    return out.detach(), dx


def saved_by(net, x):
    """Dtypes and sizes of what is saved, which a hook for saved tensors below the level's would not see."""
    x = x.detach().requires_grad_()
    function = net(x).grad_fn
    return [(t.dtype, t.shape) for t in function.saved_tensors]


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values(name, dtype, layout):
    plain = Net(**OPTIONS[name])
    lean = leaned(plain, "block")
    for shape in ((2, 3, 13, 10), (1, 1, 7, 8), (2, 8, 5, 5)):
        # Rounded: equal numbers within a window show which of them is taken.
        x = torch.randn(shape).mul(2).round().to(dtype).contiguous(memory_format=layout)
        for expected, found in zip(values(plain, x), values(lean, x), strict=True):
            assert expected.equal(found)
            assert expected.stride() == found.stride()
        assert [dtype for dtype, _ in saved_by(lean, x)] == [torch.uint16]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((256, 256), torch.uint16), ((257, 256), torch.int32), ((1, 65537), torch.int32)],
)
def test_largest_positions(size, dtype):
    """The last pixel of the plane is the maximum of its window: its position is the largest there is."""
    plain = Net(kernel_size=(1, size[1]), stride=1)
    lean = leaned(plain, "block")
    x = torch.arange(float(size[0] * size[1])).reshape(1, 1, *size)
    for expected, found in zip(values(plain, x), values(lean, x), strict=True):
        assert expected.equal(found)
    assert values(lean, x)[1][0, 0, -1, -1] != 0
    assert saved_by(lean, x) == [(dtype, (1, 1, size[0], 1))]


def test_numbers_that_are_not_finite():
    plain = Net(kernel_size=2)
    lean = leaned(plain, "block")
    x = torch.randn(1, 2, 6, 6)
    x[0, 0, 0, 0] = x[0, 1, 2:4, 2:4] = torch.nan
    x[0, 0, 2:4, 2:4] = -torch.inf
    for expected, found in zip(values(plain, x), values(lean, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_strided_images_and_gradients():
    """Neither layout: a crop of a transposed image, and a gradient that is expanded."""
    plain = MaxPool2d(3, 2, 1)
    lean = set_lean(MaxPool2d(3, 2, 1), "block")
    found = []
    for pool in (plain, lean):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 12, 11).requires_grad_()
        out = pool(x.transpose(2, 3)[:, :, 1:, ::2])
        out.sum((0, 1)).sum().backward()
        found.append((out.detach(), x.grad))
    for expected, other in zip(*found, strict=True):
        assert expected.equal(other)


def test_second_derivatives():
    for pool in (MaxPool2d(2), leaned(MaxPool2d(2), "block")):
        x = torch.randperm(2 * 2 * 6 * 4).reshape(2, 2, 6, 4).to(f64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, pool=pool: pool(x * x), (x,), eps=1e-6, atol=1e-4)
        assert torch.autograd.gradgradcheck(
            lambda x, pool=pool: pool(x * x), (x,), eps=1e-6, atol=1e-4
        )


def test_what_is_left_to_torch():
    """Positions that are returned, unbatched images, no gradients, evaluation under ``no_grad``, and errors."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    net = set_lean(MaxPool2d(2, return_indices=True), "block")
    for expected, found in zip(MaxPool2d(2, return_indices=True)(x), net(x), strict=True):
        assert expected.equal(found)
    net = set_lean(torch.nn.Sequential(MaxPool2d(2)), "block")
    for given in (x[0], x.detach(), x[:0]):
        out, expected = net(given), MaxPool2d(2)(given)
        assert out.equal(expected) and out.requires_grad == expected.requires_grad
    with torch.no_grad():
        assert net(x).equal(MaxPool2d(2)(x)) and not net(x).requires_grad
    for given in (x[0, 0], torch.ones(1, 3, 1, 1, requires_grad=True)):
        with pytest.raises(RuntimeError) as expected:
            MaxPool2d(2)(given)
        with pytest.raises(RuntimeError) as found:
            net(given)
        assert str(found.value) == str(expected.value)


def test_outside_of_a_level_it_is_torchs():
    """A pool of a model at a level that is called by itself, and a level of ``None`` for its part."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    net = set_lean(torch.nn.Sequential(MaxPool2d(2), MaxPool2d(2)), {"": "block", "1": None})
    assert isinstance(net[0], max_pool2d.MaxPool2d) and isinstance(net[0], MaxPool2d)
    assert "MaxPool2DWithIndices" in net[0](x).grad_fn.name()
    assert "MaxPool2DWithIndices" in net(x).grad_fn.name()
    with saving("block"):
        assert "MaxPool2dFunction" in net[0](x).grad_fn.name()
    assert type(set_lean(net, None)[0]) is MaxPool2d
