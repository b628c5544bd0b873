"""One weight changed through ``.data`` in evaluation, at a corner of every kernel, as fault injection does."""

import itertools

import pytest
import torch

import advdl_ops
from advdl_ops import nn
from advdl_ops._conv.folded import _sum_of

CORNERS = [*itertools.product((0, -1), repeat=4)]


def layer_and_image(size, channels, kernel_size=3, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.ConvBNReLU(channels, channels, kernel_size).to(dtype).eval()
    return layer, torch.randn(1, channels, size, size).to(dtype)


def changes_at_every_corner(layer, x):
    noticed = []
    with torch.no_grad():
        for corner in CORNERS:
            before = layer(x)
            layer.conv.weight.data[corner] += 8
            noticed.append(not torch.equal(layer(x), before))
    return noticed


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_layers_notice(kernel_size, dtype):
    layer, x = layer_and_image(56, 64, kernel_size, dtype)
    assert all(changes_at_every_corner(layer, x))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_small_layers_notice_on_demand(kernel_size):
    layer, x = layer_and_image(8, 16, kernel_size)
    with advdl_ops.use_weight_check("full"):
        assert all(changes_at_every_corner(layer, x))
    assert advdl_ops.get_weight_check() == "default"
    with pytest.raises(ValueError, match="use_weight_check: name"):
        advdl_ops.use_weight_check("always")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 1, 1), (3, 5, 3, 3), (4, 6, 1, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_sum_holds_every_value(shape, dtype, memory_format):
    weight = torch.zeros(shape, dtype=dtype).to(memory_format=memory_format)
    tiny = torch.finfo(dtype).tiny
    nothing = _sum_of((weight,))
    for place in itertools.product(*map(range, shape)):
        weight[place] = tiny
        assert _sum_of((weight,)) != nothing
        weight[place] = 0
    part = torch.zeros(1 + weight.numel(), dtype=dtype)[1:].view(shape)  # not aligned
    assert _sum_of((part,)) == nothing
    part[-1, -1, -1, -1] = tiny
    assert _sum_of((part,)) != nothing
