"""The tiles of the Winograd convolution (csrc/cpu/winograd_conv2d.cpp), and which of them a convolution takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._library import cpu_capability
from .._schemas import conv2d_shape
from .problem import FOLDED, INPUT_GRADIENT, WEIGHT_GRADIENT, Conv, Problem


class Tile(NamedTuple):
    """A tile of outputs.

    Attributes:
        code: of the operators.
        rows, columns: of outputs.
    """

    code: int
    rows: int
    columns: int

    @property
    def points(self) -> int:
        """Numbers of the transformed tile, and of the transformed filter in place of its nine."""
        return (self.rows + 2) * (self.columns + 2)

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


TILES = Tile(0, 2, 2), Tile(1, 2, 4), Tile(2, 4, 4)
# From how long a sum on each tile's error is at most that of torch (docs/accuracy.md): over channels, and over pixels
# for the gradient of the weight. In channels_last with AVX-512 torch sums pixels in many parts, and is more exact; how
# many, depends on the channels.
_ANY_LENGTH = 0, 0, 0
_LEAST_CHANNELS = 32, 64, 129
_LEAST_PIXELS = 196, 784, 1568
_LEAST_PIXELS_AVX512_LAST = {
    192: (1568, 6272, 65536),
    128: (3136, 16384, 65536),
    0: (8192, 32768, 65536),
}
# Grids of a dilation whose tiles are counted. With more, each output has its own.
_MOST_GRIDS = 1 << 16
# With a dilation of 3 or more (gradient of the weight: of 2) torch sums in another order, mostly a more exact one, and
# leaves out the taps outside of the image: sums count with the share of their taps inside, which must not be small.
_LEAST_INSIDE, _NEVER = 0.45, 1 << 30
_LEAST_CHANNELS_DILATED = 40, 320, 1400
_LEAST_PIXELS_DILATED_AVX512 = 400, 784, 3136
_LEAST_PIXELS_DILATED = 2560, _NEVER, _NEVER
# torch computes one image of up to so many numbers by its own matrix product, which is more exact than oneDNN.
_SMALL_IMAGE = 20480
# Tiles whose work the transform of the weight takes. For a kept weight there is no such work. The number then bounds
# the memory: large tiles, whose weight is larger, only where there are many. More images of a batch do not count.
_PACKING, _KEEPING, _IMAGES_COUNTED = 12, 100, 8


def tile_of(problem: Problem) -> Tile | None:
    """Of the tiles that are as exact as torch for a problem of Winograd's form, the one that multiplies least."""
    p = problem
    return tile_for(p.direction, p.dtype, p.x, p.weight, p.conv, p.is_channels_last)


def tile_for(
    direction: str,
    dtype: torch.dtype,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    conv: Conv,
    is_last: bool,
) -> Tile | None:
    """As :func:`tile_of`. ``is_last``: of x."""
    channels = min(weight[1], weight[0] // conv.groups)
    least = least_lengths(direction, dtype, channels, is_last, max(conv.dilation))
    return _tile(direction, x, weight, conv, least)


def least_lengths(
    direction: str, dtype: torch.dtype, channels: int, is_last: bool, dilation: int
) -> tuple[int, ...]:
    """For each tile, from how long a sum on it is exact enough.

    Args:
        direction: a gradient of the weight sums over output pixels, the others over channels of a group.
        dtype: in half precision any length will do: of numbers of similar size the rounding of the result is the
            larger error.
        channels: of a group, the fewer of input and output.
        is_last: of x.
        dilation: the larger one.
    """
    if dtype != torch.float32:
        return _ANY_LENGTH
    dilates = _dilates(direction, dilation)
    if direction != WEIGHT_GRADIENT:
        return _LEAST_CHANNELS_DILATED if dilates else _LEAST_CHANNELS
    if dilates:
        return _LEAST_PIXELS_DILATED_AVX512 if _torch_has_avx512() else _LEAST_PIXELS_DILATED
    if not (is_last and _torch_has_avx512()):
        return _LEAST_PIXELS
    return next(least for of, least in _LEAST_PIXELS_AVX512_LAST.items() if channels >= of)


def _dilates(direction: str, dilation: int) -> bool:
    """Whether torch sums otherwise than without dilation."""
    return dilation >= (2 if direction == WEIGHT_GRADIENT else 3)


@functools.cache
def _torch_has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.lru_cache(maxsize=4096)
def _tile(
    direction: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    conv: Conv,
    least: tuple[int, ...],
) -> Tile | None:
    """``least``: of :func:`least_lengths`."""
    if x[0] == 1 and math.prod(x) <= _SMALL_IMAGE and least != _ANY_LENGTH:
        return None
    covered = _covered(direction, x, weight, conv)
    images = x[0]
    length: float
    if direction == WEIGHT_GRADIENT:
        length = images * math.prod(size for size, _, _ in covered)
    else:
        length = weight[0] // conv.groups if direction == INPUT_GRADIENT else weight[1]
    if least != _ANY_LENGTH and _dilates(direction, max(conv.dilation)):
        inside, pairs = _taps_inside(x, weight, conv)
        if inside < _LEAST_INSIDE * pairs:
            return None
        length *= inside / pairs
    further = _PACKING
    if direction == FOLDED:
        images, further = min(images, _IMAGES_COUNTED), _KEEPING
    return min(
        (tile for tile, shortest in zip(TILES, least, strict=True) if length >= shortest),
        key=lambda tile: (images * _count(tile, covered) + further) * tile.points,
        default=None,
    )


def _taps_inside(x: tuple[int, ...], weight: tuple[int, ...], conv: Conv) -> tuple[int, int]:
    """Pairs of an output and a tap of one image and channel whose input lies in the image; and all pairs."""
    outputs = conv2d_shape(x, weight, *conv[:3])[2:]
    inside = 1
    for size, out, rate, padding in zip(x[2:], outputs, conv.dilation, conv.padding, strict=True):
        # Of each tap the outputs that reach the image.
        inside *= sum(
            len(range(max(0, padding - k * rate), min(out, size + padding - k * rate)))
            for k in range(3)
        )
    return inside, 9 * math.prod(outputs)


def packed_numel(tile: Tile, weight: Sequence[int], groups: int) -> int:
    """Numbers of a transformed weight: panels of four vectors of output channels, with a row more each."""
    panel = {"avx512": 64, "avx2": 32, "default": 16}[cpu_capability()]
    panels = _ceil_div(weight[0] // groups, panel)
    return groups * tile.points * panel * panels * (weight[1] + 1)


def outputs_computed(problem: Problem) -> tuple[int, float]:
    """Outputs per channel that the tiles compute; and those of a direct convolution of as many products as are needed.

    Tiles overhang the edges, and multiply the zeros outside of the image.
    """
    images = problem.x[0]
    tile = tile_of(problem)
    assert tile is not None
    covered = _covered(problem.direction, problem.x, problem.weight, problem.conv)
    inside, _ = _taps_inside(problem.x, problem.weight, problem.conv)
    return images * _count(tile, covered) * tile.rows * tile.columns, images * inside / 9


def _covered(
    direction: str, x: tuple[int, ...], weight: tuple[int, ...], conv: Conv
) -> tuple[tuple[int, int, int], ...]:
    """What the tiles cover: of height and width the outputs, the dilation and the padding.

    The gradient of x is a convolution whose outputs are the pixels of x.
    """
    if direction == INPUT_GRADIENT:
        padding = tuple(2 * rate - p for rate, p in zip(conv.dilation, conv.padding, strict=True))
        return tuple(zip(x[2:], conv.dilation, padding, strict=True))
    sizes = conv2d_shape(x, weight, *conv[:3])[2:]
    return tuple(zip(sizes, conv.dilation, conv.padding, strict=True))


def _count(tile: Tile, covered: tuple[tuple[int, int, int], ...]) -> int:
    """Tiles of an image."""
    return math.prod(
        _strips(outputs, *axis)
        for outputs, axis in zip((tile.rows, tile.columns), covered, strict=True)
    )


def _strips(outputs: int, size: int, rate: int, padding: int) -> int:
    """Tiles of one axis, as csrc/cpu/winograd_conv2d_grid.h divides it.

    Args:
        outputs: of a tile.
        size: outputs of the axis.
        rate: the dilation. The convolution is one without dilation on each of as many grids of pixels. Each begins in
            the last tile of the one before, behind a gap of one or two outputs.
        padding: of the axis.
    """
    if min(rate, size) > _MOST_GRIDS:
        return size
    gap = 1 if padding >= rate else 2
    count = free = 0  # tiles, and unused outputs of the last one
    for first in range(min(rate, size)):
        rest = _ceil_div(size - first, rate) - max(0, free - gap)
        count += _ceil_div(max(0, rest), outputs)
        free = -rest % outputs if rest > 0 else -rest
    return count


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
