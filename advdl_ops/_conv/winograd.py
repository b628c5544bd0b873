"""The tiles of the Winograd convolution (csrc/cpu/winograd_conv2d.cpp), and which of them a convolution takes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from .._schemas import conv2d_shape
from .problem import FOLDED, INPUT_GRADIENT, WEIGHT_GRADIENT, Problem


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
# The error of 4x4 is at most that of a direct convolution only for longer sums than this, over channels
# (docs/accuracy.md), and for the gradient of the weight, over pixels, from this number on.
_SHORT_SUM = 128
_LONG_SUM_OF_PIXELS = 2048
# Tiles whose work the transform of the weight takes. For a kept weight there is no such work. The number then bounds
# the memory: large tiles, whose weight is larger, only where there are many.
_PACKING, _KEEPING = 12, 100

_Pair = tuple[int, int]


def tile_of(problem: Problem) -> Tile:
    return tile_for(problem.direction, problem.x, problem.weight, problem.padding, problem.dilation)


@functools.lru_cache(maxsize=4096)
def tile_for(
    direction: str, x: tuple[int, ...], weight: tuple[int, ...], padding: _Pair, dilation: _Pair
) -> Tile:
    """Of the tiles that are as exact as a direct convolution, the one that multiplies least."""
    images, height, width = _outputs(direction, x, weight, padding, dilation)
    if direction == WEIGHT_GRADIENT:
        allows_large = images * height * width >= _LONG_SUM_OF_PIXELS
    else:
        allows_large = weight[0 if direction == INPUT_GRADIENT else 1] > _SHORT_SUM
    further = _KEEPING if direction == FOLDED else _PACKING
    return min(
        TILES if allows_large else TILES[:2],
        key=lambda tile: (_count(tile, images, height, width, dilation) + further) * tile.points,
    )


def outputs_computed(problem: Problem) -> tuple[int, int]:
    """Outputs per channel that the tiles compute, and those that are needed: tiles overhang the edges."""
    images, height, width = _outputs(
        problem.direction, problem.x, problem.weight, problem.padding, problem.dilation
    )
    tile = tile_of(problem)
    count = _count(tile, images, height, width, problem.dilation)
    return count * tile.rows * tile.columns, images * height * width


def _outputs(
    direction: str, x: tuple[int, ...], weight: tuple[int, ...], padding: _Pair, dilation: _Pair
) -> tuple[int, int, int]:
    """Images, height and width of what the tiles cover: the gradient of x, else the output."""
    if direction == INPUT_GRADIENT:
        return x[0], x[2], x[3]
    _, _, height, width = conv2d_shape(x, weight, (1, 1), padding, dilation)
    return x[0], height, width


def _count(tile: Tile, images: int, height: int, width: int, dilation: _Pair) -> int:
    """Tiles. A dilated convolution is one on each of dilation x dilation grids of pixels, with an edge of its own."""
    sides = (height, tile.rows, dilation[0]), (width, tile.columns, dilation[1])
    return images * math.prod(
        rate * _ceil_div(_ceil_div(size, rate), outputs) for size, outputs, rate in sides
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
