"""Where Winograd's convolution serves: its tiles, the public functions through it, and ``use_convolution``."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import ACTIVATIONS, assert_accurate, f64, in_layout
from support.conv2d import Case, check, fixed_thresholds, make_inputs
from torch.profiler import ProfilerActivity, profile

import advdl_ops
from advdl_ops import models, nn, tuning
from advdl_ops._conv import choice, winograd
from advdl_ops._conv.choice import WINOGRAD
from advdl_ops._conv.problem import (
    CHANNELS_LAST,
    FOLDED,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    Problem,
    problem_of,
)
from advdl_ops._conv.winograd import TILES, outputs_computed, packed_numel, tile_of
from advdl_ops.functional import conv2d, conv_bn_act, conv_transpose2d

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAYOUTS = ("contiguous", "channels_last")
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
FORWARD_OP, BACKWARD_OP = "advdl_ops::winograd_conv2d", "advdl_ops::winograd_conv2d_backward"


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ADVDL_OPS_CACHE", str(tmp_path))
    monkeypatch.delenv("ADVDL_OPS_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_choices", {})
    tuning._store.cache_clear()
    with fixed_thresholds(), advdl_ops.use_convolution("default"):
        yield
    tuning._store.cache_clear()


def winograds(run: Callable[[], Any]) -> set[str]:
    """Which of Winograd's operators ``run`` calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return {e.name for e in found.events() if e.name.startswith("advdl_ops::winograd")}


def problem(
    direction: str,
    x: tuple[int, int, int, int],
    outputs: int = 64,
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> Problem:
    return Problem(
        direction, x, (outputs, x[1], 3, 3), torch.float32, CHANNELS_LAST, CHANNELS_LAST, (1, 1),
        padding, dilation, 1, "none", True, False, 1,
    )  # fmt: skip


# ---- the tile ----

# direction, x, outputs, the tile; the tiles in the comments
CHOSEN: list[tuple[str, tuple[int, int, int, int], int, str]] = [
    # (24 of 2x2 + 12) * 16 = (12 of 2x4 + 12) * 24
    (FORWARD, (2, 64, 2, 24), 64, "2x2"),
    (FORWARD, (2, 64, 2, 28), 64, "2x4"),
    (INPUT_GRADIENT, (2, 64, 2, 24), 64, "2x2"),
    (INPUT_GRADIENT, (2, 64, 2, 28), 64, "2x4"),
    # A kept weight's by those of up to 8 images: (8 * 26 of 2x2 + 100) * 16 and (8 * 13 of 2x4 + 100) * 24.
    (FOLDED, (8, 64, 2, 52), 64, "2x4"),
    (FOLDED, (8, 64, 2, 50), 64, "2x2"),
    (FOLDED, (16, 64, 2, 50), 64, "2x2"),
    # By the tiles of all images.
    (FORWARD, (12, 64, 2, 4), 64, "2x2"),
    (FORWARD, (13, 64, 2, 4), 64, "2x4"),
    # (200 of 2x2 + 100) * 16 = (100 of 2x4 + 100) * 24
    (FOLDED, (1, 64, 2, 400), 64, "2x2"),
    (FOLDED, (1, 64, 2, 404), 64, "2x4"),
    # (24 of 2x4 + 12) * 24 = (12 of 4x4 + 12) * 36
    (FORWARD, (1, 144, 4, 48), 64, "2x4"),
    (FORWARD, (1, 144, 4, 52), 64, "4x4"),
    # (200 of 2x4 + 100) * 24 = (100 of 4x4 + 100) * 36
    (FOLDED, (1, 144, 4, 400), 64, "2x4"),
    (FOLDED, (1, 144, 4, 404), 64, "4x4"),
    # The channels that are summed: with 128 the error of 4x4 is too large.
    (FORWARD, (1, 128, 40, 40), 200, "2x4"),
    (FORWARD, (1, 129, 40, 40), 64, "4x4"),
    (FOLDED, (1, 128, 80, 80), 200, "2x4"),
    (FOLDED, (1, 129, 80, 80), 64, "4x4"),
    (INPUT_GRADIENT, (1, 200, 40, 40), 128, "2x4"),
    (INPUT_GRADIENT, (1, 64, 40, 40), 129, "4x4"),
    (FORWARD, (1, 63, 40, 40), 200, "2x2"),
    (INPUT_GRADIENT, (1, 200, 40, 40), 63, "2x2"),
    # The pixels that are summed: 195 and 196, 783 and 784, 1566 and 1568.
    (WEIGHT_GRADIENT, (1, 200, 15, 13), 64, "None"),
    (WEIGHT_GRADIENT, (1, 200, 14, 14), 64, "2x2"),
    # One image of up to 20,480 numbers.
    (FORWARD, (1, 64, 16, 20), 64, "None"),
    (FORWARD, (1, 64, 16, 21), 64, "2x4"),
    (FORWARD, (2, 64, 16, 10), 64, "2x4"),
    # Fewer channels than 32.
    (FORWARD, (2, 31, 40, 40), 64, "None"),
    (FORWARD, (2, 32, 40, 40), 31, "2x2"),
    (INPUT_GRADIENT, (2, 64, 40, 40), 31, "None"),
    (WEIGHT_GRADIENT, (1, 64, 27, 29), 64, "2x2"),
    (WEIGHT_GRADIENT, (1, 64, 28, 28), 64, "2x4"),
    (WEIGHT_GRADIENT, (1, 64, 27, 58), 64, "2x4"),
    (WEIGHT_GRADIENT, (2, 64, 28, 28), 64, "4x4"),
]


@pytest.mark.parametrize(("direction", "x", "outputs", "tile"), CHOSEN)
def test_the_tile(
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
    x: tuple[int, int, int, int],
    outputs: int,
    tile: str,
) -> None:
    monkeypatch.setattr(winograd, "_torch_has_avx512", lambda: False)
    p = problem(direction, x, outputs)
    assert str(tile_of(p)) == tile


@pytest.mark.parametrize(
    ("channels", "side", "tile"),
    [
        (64, 90, "None"), (64, 91, "2x2"), (64, 181, "2x2"), (64, 182, "2x4"), (64, 255, "2x4"),
        (64, 256, "4x4"), (127, 90, "None"), (128, 55, "None"), (128, 56, "2x2"), (128, 127, "2x2"),
        (128, 128, "2x4"), (191, 39, "None"), (192, 39, "None"), (192, 40, "2x2"), (192, 79, "2x2"),
        (192, 80, "2x4"), (192, 256, "4x4"),
    ],
)  # fmt: skip
def test_with_avx512_the_gradient_of_a_weight_in_channels_last_sums_more_pixels(
    monkeypatch: pytest.MonkeyPatch, channels: int, side: int, tile: str
) -> None:
    monkeypatch.setattr(winograd, "_torch_has_avx512", lambda: True)
    for x, outputs in ((channels, 200), (200, channels)):
        assert str(tile_of(problem(WEIGHT_GRADIENT, (1, x, side, side), outputs))) == tile


def test_tiles_cover_the_output_or_the_gradient_of_x() -> None:
    """With less padding than keeps the size these differ: 2x48 and 4x50. Both need as many products."""
    x = (1, 128, 4, 50)
    assert tile_of(problem(FORWARD, x, padding=(0, 0))) == TILES[0]
    assert tile_of(problem(INPUT_GRADIENT, x, padding=(0, 0))) == TILES[1]
    assert outputs_computed(problem(FORWARD, x, padding=(0, 0))) == (2 * 48, 2 * 48)
    assert outputs_computed(problem(INPUT_GRADIENT, x, padding=(0, 0))) == (4 * 52, 2 * 48)


def test_the_tile_of_groups() -> None:
    """The length of a sum is that of the channels of one group."""
    options: dict[str, Any] = {"weight": (144, 64, 3, 3), "groups": 3}
    p = problem(FORWARD, (2, 192, 40, 40))._replace(**options)
    grouped = {d: str(tile_of(p._replace(direction=d))) for d in (FORWARD, INPUT_GRADIENT)}
    assert grouped == {FORWARD: "2x4", INPUT_GRADIENT: "2x2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tile_in_half_precision(dtype: torch.dtype) -> None:
    """The one that multiplies least."""
    for direction in (FORWARD, FOLDED, INPUT_GRADIENT, WEIGHT_GRADIENT):
        assert str(tile_of(problem(direction, (2, 16, 80, 80), 16)._replace(dtype=dtype))) == "4x4"


@pytest.mark.parametrize(
    ("outputs", "size", "rate", "padding", "tiles"),
    [
        (2, 7, 1, 1, 4),
        (2, 7, 3, 3, 4),  # 3, 2 and 2 outputs: two tiles and one each
        # The tile of the second grid has one output of the third, which needs one more.
        (4, 7, 3, 3, 3),
        (4, 7, 3, 0, 3),  # with two outputs between the grids none shares a tile
        (4, 29, 5, 5, 8),
        (4, 29, 5, 0, 10),
        (4, 26, 5, 0, 8),  # 6, 5, 5, 5 and 5 outputs: a tile of the second has one of the third
        (4, 40, 40, 40, 20),
        (4, 5, 7, 7, 3),
        (2, 5, 7, 7, 5),
        (4, 2**31, 2**30, 2**31, 2**31),  # not counted
    ],
)
def test_tiles_of_a_dilated_axis(
    outputs: int, size: int, rate: int, padding: int, tiles: int
) -> None:
    assert winograd._strips(outputs, size, rate, padding) == tiles


@pytest.mark.parametrize(
    ("dilation", "computed"), [(1, 56 * 56), (4, 56 * 60), (6, 60 * 64), (12, 64 * 64)]
)
def test_outputs_computed_of_a_dilated_convolution(dilation: int, computed: int) -> None:
    """Each grid of pixels has edges of its own."""
    for direction in (FORWARD, INPUT_GRADIENT):
        p = problem(
            direction, (8, 512, 56, 56), 512, padding=(dilation,) * 2, dilation=(dilation,) * 2
        )
        # Of three taps of a row or column, two leave the image in as many outputs as the dilation.
        assert outputs_computed(p) == (8 * computed, 8 * (3 * 56 - 2 * dilation) ** 2 / 9)


# direction, x, dilation, the tile with AVX-512 and without: torch's sums are more exact than without dilation.
DILATED: list[tuple[str, tuple[int, int, int, int], int, str, str]] = [
    (FORWARD, (2, 64, 56, 56), 2, "2x4", "2x4"),
    (FORWARD, (2, 64, 56, 56), 3, "2x2", "2x2"),
    (FORWARD, (2, 40, 56, 56), 3, "None", "None"),
    # 365 and 366 channels, of whose taps (1 - 2 / 3 * 7 / 72)^2 = 0.874 lie inside: 319.1 and 320.0.
    (FORWARD, (2, 365, 72, 72), 7, "2x2", "2x2"),
    (FORWARD, (2, 366, 72, 72), 7, "2x4", "2x4"),
    (INPUT_GRADIENT, (2, 365, 72, 72), 7, "2x2", "2x2"),
    (INPUT_GRADIENT, (2, 366, 72, 72), 7, "2x4", "2x4"),
    (FOLDED, (2, 2048, 72, 72), 7, "4x4", "4x4"),
    (WEIGHT_GRADIENT, (8, 64, 56, 56), 2, "4x4", "2x2"),
    (WEIGHT_GRADIENT, (1, 64, 56, 56), 2, "2x4", "2x2"),
    (WEIGHT_GRADIENT, (1, 64, 50, 50), 2, "2x4", "None"),
    # Of a dilation of 15 at 28x28 a share of 0.413 lies inside, of 13 0.477.
    (FORWARD, (2, 512, 28, 28), 15, "None", "None"),
    (FORWARD, (2, 512, 28, 28), 13, "2x2", "2x2"),
]


@pytest.mark.parametrize(("direction", "x", "dilation", "with_avx512", "without"), DILATED)
def test_the_tile_of_a_dilated_convolution(
    direction: str,
    x: tuple[int, int, int, int],
    dilation: int,
    with_avx512: str,
    without: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = problem(direction, x, x[1], padding=(dilation,) * 2, dilation=(dilation,) * 2)
    for has, tile in ((True, with_avx512), (False, without)):
        monkeypatch.setattr(winograd, "_torch_has_avx512", lambda has=has: has)
        assert str(tile_of(p)) == tile


def test_codes_are_those_of_the_kernels() -> None:
    """The size of a packed weight tells the points of a tile."""
    weight = torch.randn(65, 5, 3, 3)
    for tile in TILES:
        packed = torch.ops.advdl_ops.winograd_pack(weight, 1, tile.code)
        assert packed.numel() == packed_numel(tile, weight.shape, 1) >= tile.points * 65 * 5


REFUSED = {
    "stride": {"stride": (2, 2)},
    "groups of one channel": {"weight": (64, 1, 3, 3), "groups": 64},
    "wide border": {"padding": (3, 1)},
    "dilated, wide border": {"padding": (4, 5), "dilation": (2, 2)},
    "fp64": {"dtype": f64},
    "5x5": {"weight": (64, 64, 5, 5)},
    "3x1": {"weight": (64, 64, 3, 1)},
    "no image": {"x": (0, 64, 40, 40)},
    "exact": {"exact": True},
}


@pytest.mark.parametrize("direction", [FORWARD, FOLDED, INPUT_GRADIENT, WEIGHT_GRADIENT])
def test_what_it_accepts(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    monkeypatch.setattr(winograd, "_torch_has_avx512", lambda: False)

    def accepts(p: Problem) -> bool:
        return WINOGRAD in [candidate.name for candidate in choice.candidates(p, CPU)]

    p = problem(direction, (2, 64, 40, 40))
    assert accepts(p) and accepts(p._replace(padding=(2, 0)))
    assert accepts(p._replace(padding=(4, 6), dilation=(2, 3)))
    assert accepts(p._replace(weight=(64, 32, 3, 3), groups=2))
    assert accepts(p._replace(dtype=torch.bfloat16)) and accepts(p._replace(dtype=torch.float16))
    assert [n for n, options in REFUSED.items() if accepts(p._replace(**options))] == []


# ---- the public functions ----

SERVED = {
    "plain": Case((2, 64, 30, 31), 64, padding=1),
    "no padding": Case((2, 70, 34, 32), 50),
    "dilated": Case((3, 64, 33, 26), 64, padding=2, dilation=2),
    "unbatched": Case((64, 41, 43), 64, padding=1),
    "many channels": Case((2, 144, 30, 31), 140, padding=1),
    "groups": Case((2, 192, 30, 31), 144, padding=1, groups=3),
}


@LAYOUT
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("name", SERVED)
def test_values_and_gradients(name: str, act: str, layout: str) -> None:
    case = SERVED[name]
    p = make_inputs(case, with_=("bias", "scale", "residual"))
    if len(case.x) == 4:
        p = p.laid(layout)
    names = winograds(lambda: check(p, act, what=(case, layout)))
    assert names == {FORWARD_OP, BACKWARD_OP}


@LAYOUT
def test_values_of_a_transposed_convolution(layout: str) -> None:
    """It is the gradient of a convolution, and its own gradients are a convolution and a weight's gradient."""
    g = torch.Generator().manual_seed(0)
    x = in_layout(torch.randn(2, 64, 30, 31, generator=g), layout)
    weight = torch.randn(64, 64, 3, 3, generator=g) / 24
    dout = in_layout(torch.randn(2, 64, 30, 31, generator=g), layout)

    def results(function: Callable[..., torch.Tensor], *t: torch.Tensor) -> list[torch.Tensor]:
        x, weight, dout = t
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = function(x, weight, None, padding=1)
        return [out.detach(), *torch.autograd.grad(out, (x, weight), dout)]

    found: list[torch.Tensor] = []
    names = winograds(lambda: found.extend(results(conv_transpose2d, x, weight, dout)))
    assert names == {FORWARD_OP, BACKWARD_OP}
    stock = torch.nn.functional.conv_transpose2d
    exact = results(stock, x.double(), weight.double(), dout.double())
    plain = results(stock, x, weight, dout)
    sizes = results(stock, *(t.double().abs() for t in (x, weight, dout)))
    for own, e, s, size in zip(found, exact, plain, sizes, strict=True):
        assert_accurate(own, e, s, float(size.max()), layout)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@LAYOUT
def test_what_is_not_finite_reaches_its_window_alone(layout: str, value: float) -> None:
    """In evaluation the tile is computed again from the weight as it is, and the norm follows."""
    p = make_inputs(SERVED["plain"], with_=()).laid(layout)
    p.x[1, 5, 6, 7] = value
    layer = nn.ConvBNAct(64, 64, 3).eval()
    layer.conv.weight.data.copy_(p.weight)
    with torch.no_grad():
        layer.bn.running_var.uniform_(0.5, 2)
        layer.bn.bias.normal_()
    out, folded = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def run() -> None:
        nonlocal out, folded
        out, folded = conv2d(p.x, p.weight, padding=1), layer(p.x)

    assert FORWARD_OP in winograds(run)
    assert list(layer.bn.folded.kept) == [tile_of(problem(FOLDED, (2, 64, 30, 31)))]
    for found in (out, folded):
        reached = torch.zeros(2, 30, 31, dtype=torch.bool)
        reached[1, 5:8, 6:9] = True
        assert torch.equal(~found.isfinite(), reached[:, None].expand_as(found))


@LAYOUT
def test_double_backward(layout: str) -> None:
    p = make_inputs(SERVED["plain"], with_=()).laid(layout)

    def second(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        x, weight = (t.detach().to(dtype).requires_grad_() for t in (p.x, p.weight))
        out = function(x, weight, padding=1)
        first = torch.autograd.grad(out, (x, weight), p.dout.to(dtype), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))

    found: list[torch.Tensor] = []
    assert FORWARD_OP in winograds(lambda: found.extend(second(conv2d, torch.float32)))
    exact, plain = (second(torch.nn.functional.conv2d, dtype) for dtype in (f64, torch.float32))
    for own, e, s in zip(found, exact, plain, strict=True):
        assert_accurate(own, e, s, float(e.abs().max()), layout)


@pytest.mark.usefixtures("fresh_compile")
@LAYOUT
def test_compiled(layout: str) -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1, act="relu")
    x = in_layout(torch.randn(2, 64, 30, 31), layout)
    compiled = torch.compile(layer, fullgraph=True)

    def step(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), (leaf, layer.weight, layer.bias))]

    step(compiled)
    found: list[torch.Tensor] = []
    assert winograds(lambda: found.extend(step(compiled))) == {FORWARD_OP, BACKWARD_OP}
    for own, eager in zip(found, step(layer), strict=True):
        assert own.stride() == eager.stride()
        torch.testing.assert_close(own, eager)


# ---- convolution and norm ----


def block(**options: Any) -> nn.ConvBNAct:
    torch.manual_seed(0)
    layer = nn.ConvBNAct(64, 64, 3, **options)
    with torch.no_grad():
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 2)
        layer.bn.weight.uniform_(0.5, 1.5)
        layer.bn.bias.normal_()
    return layer.eval()


def direct(layer: nn.ConvBNAct, x: torch.Tensor, residual: torch.Tensor | None, act: str) -> Any:
    """In stock PyTorch, in the dtype of ``x``."""
    conv, bn = copy.deepcopy(layer).to(x.dtype).conv, copy.deepcopy(layer).to(x.dtype).bn
    activate = ACTIVATIONS[act][1]
    z = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    inside = layer.order == "conv-act-bn"
    z = activate(z) if inside else z
    z = torch.nn.functional.batch_norm(
        z, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps
    )
    z = z if residual is None else z + residual.to(x.dtype)
    return (z if inside else activate(z)).detach()


def term_size(layer: nn.ConvBNAct, x: torch.Tensor, residual: torch.Tensor | None = None) -> float:
    """Bounds the sum of the absolute terms of each output."""
    with torch.no_grad():
        z = torch.nn.functional.conv2d(x.abs(), layer.conv.weight.abs(), padding=1)
        bn = layer.bn
        scale = bn.weight.abs() * (bn.running_var + bn.eps).rsqrt()
        bias = 0 if layer.conv.bias is None else layer.conv.bias.abs().max()
        size = (z.max() + bias + bn.running_mean.abs().max()) * scale.max() + bn.bias.abs().max()
        return float(size if residual is None else size + residual.abs().max())


@LAYOUT
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("order", ["conv-bn-act", "conv-act-bn"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_a_block_in_evaluation(
    act: str, order: str, with_residual: bool, bias: bool, layout: str
) -> None:
    layer = block(act=ACTIVATIONS[act][0], order=order, bias=bias)
    x, residual = (in_layout(torch.randn(2, 64, 24, 26), layout) for _ in range(2))
    given = residual if with_residual else None
    outs: list[torch.Tensor] = []
    run = torch.no_grad()(lambda: outs.append(layer(x, given)))
    # With an activation between the two, there is no folding, and the images are too small for a weight made each time
    # if contiguous.
    folds = order == "conv-bn-act" or act == "none"
    assert (FORWARD_OP in winograds(run)) == (folds or layout == "channels_last")
    assert (layer.bn.folded is not None) == folds
    run()
    exact, plain = (direct(layer, t, given, act) for t in (x.double(), x))
    size = term_size(layer, x, given)
    for out in outs:
        assert out.stride() == x.stride()
        assert_accurate(out, exact, plain, size, (act, order))


@LAYOUT
def test_the_function_in_evaluation(layout: str) -> None:
    layer, x = block(act="relu"), in_layout(torch.randn(2, 64, 30, 31), layout)
    bn = layer.bn
    outs: list[torch.Tensor] = []

    @torch.no_grad()
    def run() -> None:
        tensors = bn.running_mean, bn.running_var, bn.weight, bn.bias
        outs.append(conv_bn_act(x, layer.conv.weight, *tensors, padding=1, act="relu"))

    assert winograds(run) == {FORWARD_OP}
    exact, plain = (direct(layer, t, None, "relu") for t in (x.double(), x))
    assert_accurate(outs[0], exact, plain, term_size(layer, x), layout)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_no_transformed_weight(how: str) -> None:
    layer, x = block(), torch.randn(1, 64, 32, 32)
    with torch.no_grad():
        layer(x)
    assert layer.bn.folded.kept
    size = len(pickle.dumps(layer))
    other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert other.bn.folded is None
    layer.train()
    assert layer.bn.folded is None and len(pickle.dumps(layer)) == size


@LAYOUT
def test_resnet18_in_evaluation(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 13 layers of 3x3 without a stride, down to 7x7 pixels."""
    t = choice.thresholds()._replace(winograd_pixels_kept=49)
    monkeypatch.setattr(choice, "thresholds", lambda: t)
    model = models.create_model("resnet18").eval()
    x = in_layout(torch.randn(1, 3, 224, 224), layout)
    with torch.no_grad():
        model(x)
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.no_grad():
        model(x)
    names = [e.name for e in found.events()]
    assert names.count(FORWARD_OP) == 13 and "advdl_ops::winograd_pack" not in names
    plain = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Conv2d)
        and (layer.kernel_size, layer.stride) == ((3, 3), (1, 1))
    }
    rows = {row.name: row for row in advdl_ops.explain(model, x)}  # type: ignore[union-attr]
    for name in plain:
        assert "the norm folded into it: CPU C++ kernel" in rows[name].served_by, name
    model.requires_grad_(False)
    found_logits = model(x)
    with advdl_ops.use_convolution("exact"):
        direct_logits = model(x)
    exact = model.double()(x.double())
    assert not torch.equal(found_logits, direct_logits)
    size = float(exact.abs().max())
    assert_accurate(found_logits, exact, direct_logits, size, "logits")


# ---- use_convolution ----


def test_exact_leaves_it_out_from_the_next_call_on() -> None:
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 30, 31)

    def run() -> None:
        layer(x.requires_grad_()).sum().backward()

    assert winograds(run) == {FORWARD_OP, BACKWARD_OP}
    with advdl_ops.use_convolution("exact"):
        assert advdl_ops.get_convolution() == "exact"
        assert winograds(run) == set()
        for row in advdl_ops.explain(layer, x.detach()):  # type: ignore[union-attr]
            assert WINOGRAD not in str(row)
    assert advdl_ops.get_convolution() == "default"
    assert winograds(run) == {FORWARD_OP, BACKWARD_OP}


def test_exact_leaves_a_kept_weight_as_it_is() -> None:
    layer, x = block(), torch.randn(1, 64, 32, 32)
    run = torch.no_grad()(lambda: layer(x))
    assert winograds(run) == {"advdl_ops::winograd_pack", FORWARD_OP}
    folded = layer.bn.folded
    with advdl_ops.use_convolution("exact"):
        assert winograds(run) == set()
        assert layer.bn.folded is folded
    winograds(run)
    assert winograds(run) == {FORWARD_OP} and layer.bn.folded is folded


def test_exact_changes_only_the_problems_of_winograds() -> None:
    """So a choice that was measured for another problem serves in both."""
    x = torch.randn(2, 64, 30, 31)
    shapes: dict[tuple[int, ...], Conv] = {
        (64, 64, 3, 3): Conv(),
        (64, 64, 1, 1): Conv(),
        (64, 1, 3, 3): Conv(groups=64),
        (8, 64, 3, 3): Conv((2, 2)),
        (16, 64, 3, 3): Conv((1, 1), (3, 3)),
    }

    def problems() -> list[Problem]:
        return [problem_of(FORWARD, x, torch.empty(w), conv) for w, conv in shapes.items()]

    default = problems()
    with advdl_ops.use_convolution("exact"):
        same = [a == b for a, b in zip(default, problems(), strict=True)]
    assert same == [False, True, True, True, True]


def test_a_measured_choice_serves_by_default_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def clock(call: Any) -> float:
        name = call.args[0].name
        asked.append(name)
        return {WINOGRAD: 1.0, "torch": 1.5}.get(name, 2.0)

    monkeypatch.setattr(tuning, "cpu_seconds", clock)
    # Too few pixels for the rules of Winograd and torch.
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 20, 20)
    run = torch.no_grad()(lambda: layer(x))
    assert winograds(run) == set()
    with torch.no_grad():
        (row,) = advdl_ops.tune(layer.eval(), x)
    assert row.after == WINOGRAD and WINOGRAD in asked
    for _ in range(2):
        assert winograds(run) == {FORWARD_OP}
        with advdl_ops.use_convolution("exact"):
            assert winograds(run) == set()
            (explained,) = advdl_ops.explain(layer, x)  # type: ignore[misc]
            assert WINOGRAD not in str(explained.choices[0])
        # In another process, which reads the file.
        monkeypatch.setattr(tuning, "_choices", {})
        choice.forget()
    asked.clear()
    with advdl_ops.use_convolution("exact"):
        (row,) = advdl_ops.tune(layer, x)
        assert row.after == "torch" and WINOGRAD not in asked
    # What was measured under the one name is not lost under the other.
    assert winograds(run) == {FORWARD_OP}
    assert len(advdl_ops.tune(layer, x)) == 0


def test_exact_by_the_environment() -> None:
    code = (
        "import torch, advdl_ops\n"
        "from advdl_ops._conv import choice\n"
        "layer = advdl_ops.nn.ConvBNAct(64, 64, 3).eval()\n"
        "with torch.no_grad(): layer(torch.randn(1, 64, 64, 64))\n"
        "print(advdl_ops.get_convolution(), *{choice.expected(p).name for p in choice.met()}, sep=', ')"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ADVDL_OPS_")}
    for name, served in (("exact", "torch"), ("default", WINOGRAD), ("", WINOGRAD)):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
            env={**inherited, "ADVDL_OPS_CONVOLUTION": name},
        )  # fmt: skip
        assert done.stdout == f"{name or 'default'}, {served}\n", done.stderr


# ---- explain ----


def test_explain_names_the_tile_and_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_torch_has_avx512", lambda: False)
    x = in_layout(torch.randn(2, 64, 30, 30), "channels_last")
    (row,) = advdl_ops.explain(nn.Conv2d(64, 64, 3, padding=1), x)  # type: ignore[misc]
    forward, dx, dweight = row.choices
    rule = (
        "by rule: groups of 48 channels or more and {} output pixels or more, of which the tiles compute up to 200 %; "
        f"{choice.reason(choice.ON_CPU[FORWARD][2]).rpartition('; ')[2]}"
    )
    of_dweight = "1521 (or as many as its error asks for, docs/accuracy.md)"
    assert forward.name == dx.name == dweight.name == WINOGRAD
    assert f": winograd, tiles of 2x4 ({rule.format('1200 (contiguous: 1600)')}" in str(forward)
    assert f": winograd, tiles of 2x4 ({rule.format('1200 (contiguous: 1600)')}" in str(dx)
    assert f": winograd, tiles of 4x4 ({rule.format(of_dweight)}" in str(dweight)
    assert row.served_by.startswith("CPU C++ kernel") and ";" not in row.served_by


def test_explain_tells_the_size_of_a_kept_weight() -> None:
    rows = advdl_ops.explain(block(), torch.randn(1, 64, 32, 32))
    (folded,) = rows.layers[0].choices  # type: ignore[union-attr]
    assert (
        ": winograd, tiles of 2x4, which keeps 2.7 times the weight (by rule: groups of 48 channels or more and 900 out"
        in str(folded)
    )


def test_explain_without_an_input_tells_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_torch_has_avx512", lambda: False)

    def served_by(layer: torch.nn.Module) -> str:
        return advdl_ops.explain(layer).layers[0].served_by  # type: ignore[union-attr]

    start, own = "; by Winograd's minimal filtering CPU C++ kernel, ", choice.cpu_capability()
    text = served_by(nn.Conv2d(64, 64, 3, padding=1))
    assert (
        f"{start}{own}: forward and gradient of x at 1200 (contiguous: 1600), gradient of the weight at 1521 pixels "
        "and more"
    ) in text
    assert f"{start}{own}: at 900 pixels and more" in served_by(nn.ConvBNAct(64, 64, 3).eval())
    transposed = served_by(nn.ConvTranspose2d(64, 64, 3))
    assert "; of few pixels, or by Winograd's minimal filtering, CPU C++ kernel" in transposed
    for layer in (
        nn.Conv2d(47, 64, 3), nn.Conv2d(64, 64, 3, 2), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3).double(), nn.ConvBNAct(64, 47, 3), nn.ConvTranspose2d(64, 64, 3, 2),
    ):  # fmt: skip
        assert "Winograd" not in served_by(layer), layer
