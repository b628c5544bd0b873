"""One weight changed through ``.data`` in evaluation, at a corner of every kernel, as fault injection does."""

import contextlib
import itertools

import pytest
import torch

import advdl_ops
from advdl_ops import nn
from advdl_ops._conv.folded import _checksum

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
    layer, x = layer_and_image(56, 128, kernel_size, dtype)
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
@pytest.mark.parametrize(
    "shape", [(3, 5, 1, 1), (3, 5, 3, 3), (4, 6, 1, 3), (2, 2, 2, 2), (5, 41, 3, 3)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_checksum_holds_every_value(shape, dtype, memory_format):
    weight = torch.zeros(shape, dtype=dtype).to(memory_format=memory_format)
    tiny = torch.finfo(dtype).tiny
    met = {_checksum(weight)}
    for place in itertools.product(*map(range, shape)):
        weight[place] = tiny
        met.add(_checksum(weight))
        weight[place] = 0
    assert len(met) == 1 + weight.numel()  # the place counts, too
    part = torch.zeros(1 + weight.numel(), dtype=dtype)[1:].view(shape)  # not aligned
    assert _checksum(part) == _checksum(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("numel", [16384, 16385, 70001, 2_000_003])
def test_the_checksum_of_large_weights(numel):
    """Of several blocks, whose number does not depend on the threads."""
    weight = torch.randn(1, 1, 1, numel)
    before = _checksum(weight)
    for threads in (1, 2, 3):
        with threads_of(threads):
            assert _checksum(weight) == before
    for place in (0, 16383, 16384, numel // 2, numel - 1):
        if place < numel:
            weight.view(-1)[place] *= -1
            assert _checksum(weight) != before
            weight.view(-1)[place] *= -1
    assert _checksum(weight) == before


@contextlib.contextmanager
def threads_of(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def exchange(weight):
    weight[1, 2, 0, 0], weight[1, 2, 0, -1] = (
        weight[1, 2, 0, -1].clone(),
        weight[1, 2, 0, 0].clone(),
    )


def flip_two_signs(weight):
    weight.view(-1)[1] *= -1
    weight.view(-1)[3] *= -1


CHANGES = {
    "two values exchanged": exchange,
    "two signs": flip_two_signs,
    "mirrored": lambda weight: weight.copy_(weight.flip(2, 3).clone()),
    "rolled": lambda weight: weight.copy_(weight.roll(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("check", ["default", "full"])
def test_values_in_other_places(check, change):
    layer, x = layer_and_image(56, 64)
    with torch.no_grad(), advdl_ops.use_weight_check(check):
        before = layer(x)
        CHANGES[change](layer.conv.weight.data)
        assert not torch.equal(layer(x), before)
        fresh = nn.ConvBNReLU(64, 64, 3).eval()
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), fresh(x))


def test_every_pair_of_signs_is_noticed():
    weight = torch.randn(4, 3, 2, 2)
    before = _checksum(weight)
    for one, other in itertools.combinations(range(weight.numel()), 2):
        changed = weight.clone()
        changed.view(-1)[[one, other]] *= -1
        assert _checksum(changed) != before


def test_capabilities(cpu):
    weight = torch.randn(7, 5, 3, 3)
    met = set()
    for place in range(weight.numel()):
        weight.view(-1)[place] += 1
        met.add(_checksum(weight))
    assert len(met) == weight.numel()


def test_what_is_not_dense_is_refused():
    with pytest.raises(RuntimeError, match="checksum: x must be contiguous"):
        torch.ops.advdl_ops.checksum(torch.randn(4, 6)[:, ::2])
