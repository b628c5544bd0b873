"""Convolutions in half precision on a CPU that has no instructions for it: computed in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import LAYOUTS, f64, in_layout
from support.conv2d import CASES, THRESHOLDS, Case, check, make_inputs

import advdl_ops
from advdl_ops import nn
from advdl_ops._conv import choice, problem
from advdl_ops._conv.choice import IN_FLOAT32, TORCH, WINOGRAD
from advdl_ops._conv.problem import (
    FOLDED,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    computes_in_float32,
    problem_of,
)
from advdl_ops._conv.winograd import Tile, packed_numel, tile_of
from advdl_ops._schemas import HALF
from advdl_ops.functional import conv_transpose2d

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPE = pytest.mark.parametrize("dtype", HALF, ids=str)
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
# Winograd serves these.
LARGE = {
    "winograd": Case((2, 24, 14, 13), 20, padding=1),
    "winograd, dilated": Case((2, 20, 15, 14), 24, padding=2, dilation=2),
    "winograd, groups": Case((2, 40, 14, 13), 48, padding=1, groups=2),
}


@pytest.fixture(autouse=True)
def _without_instructions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(problem, "_INSTRUCTIONS", dict.fromkeys(HALF, False))
    table = THRESHOLDS._replace(
        winograd_channels=16, winograd_pixels=100, winograd_pixels_contiguous=100,
        winograd_pixels_kept=100, winograd_pixels_dweight=100, winograd_waste=300,
    )  # fmt: skip
    monkeypatch.setattr(choice, "thresholds", lambda: table)
    choice.forget()
    yield
    choice.forget()


def serving(case: Case, dtype: torch.dtype) -> set[str]:
    p = make_inputs(case, dtype)
    conv = Conv((1, 1), (case.padding,) * 2, (case.dilation,) * 2, case.groups)
    directions = FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
    return {choice.expected(problem_of(d, p.x, p.weight, conv)).name for d in directions}


@LAYOUT
@DTYPE
@pytest.mark.parametrize("name", CASES | LARGE)
def test_values(name: str, dtype: torch.dtype, layout: str) -> None:
    case = (CASES | LARGE)[name]
    for with_, act in (
        ((), "none"),
        (("bias", "residual"), "relu"),
        (("scale", "shift", "residual"), "silu"),
    ):
        p = make_inputs(case, dtype, with_=with_).laid(layout)
        check(p, act, what=with_)
        check(p, act, wanted=(), what="without gradients")


@DTYPE
def test_what_serves(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in LARGE.values():
        assert serving(case, dtype) == {WINOGRAD}
    one_tap = Case((2, 24, 14, 13), 20, (1, 1))
    assert serving(one_tap, dtype) == {IN_FLOAT32}
    with advdl_ops.use_convolution("exact"):
        assert serving(LARGE["winograd"], dtype) == {IN_FLOAT32}
    monkeypatch.setattr(problem, "_INSTRUCTIONS", dict.fromkeys(HALF, True))
    choice.forget()
    for case in (*LARGE.values(), one_tap):
        assert serving(case, dtype) == {TORCH}


@LAYOUT
@DTYPE
def test_a_folded_norm(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    for channels, size in ((24, 20), (24, 6)):
        layer = nn.ConvBNAct(channels, 40, 3, bias=True, act="relu").to(dtype)
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 2)
        layer.eval()
        x = in_layout(torch.randn(3, channels, size, size).to(dtype), layout)
        residual = in_layout(torch.randn(3, 40, size, size).to(dtype), layout)
        with torch.no_grad():
            out = layer(x, residual)
            assert out.dtype == dtype
            exact = layer.double()(x.double(), residual.double())
            layer.to(dtype)
            # One rounding of the result, where two layers have three.
            assert (out - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()
            layer(x, residual)
        of_kept = problem_of(FOLDED, x, layer.conv.weight, Conv((1, 1), (1, 1)))
        tile = tile_of(of_kept)
        ((form, kept),) = layer.bn.folded.kept.items()
        assert kept.dtype == torch.float32
        if size == 20:
            assert isinstance(form, Tile) and form == tile
            assert kept.numel() == packed_numel(tile, layer.conv.weight.shape, 1)
            told = advdl_ops.explain(layer, x, residual)
            times = 4 * kept.numel() / (2 * layer.conv.weight.numel())
            assert f"which keeps {times:.1f} times the weight" in str(told)
        else:
            assert "in float32" in str(advdl_ops.explain(layer, x, residual))


@DTYPE
def test_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.ConvBNAct(24, 24, 3, act="relu")
    x = torch.randn(2, 24, 14, 14)
    for training in (True, False):
        layer.train(training)
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(training):
            out = layer(x)
        with torch.set_grad_enabled(training):
            plain = layer(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), plain, rtol=3e-2, atol=3e-2)


@LAYOUT
@DTYPE
def test_transposed(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    x = in_layout(torch.randn(2, 24, 14, 13).to(dtype), layout)
    weight = (torch.randn(24, 20, 3, 3) / 15).to(dtype)
    for options in ({"padding": 1}, {"stride": 2, "padding": 1}):
        found = conv_transpose2d(x, weight, **options)
        exact = F.conv_transpose2d(x.double(), weight.double(), **options)
        assert (found - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("has_instructions", [False, True])
@DTYPE
def test_a_compiled_pair(
    dtype: torch.dtype, has_instructions: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation, as one graph; export asks for the same."""
    monkeypatch.setattr(problem, "_INSTRUCTIONS", dict.fromkeys(HALF, has_instructions))
    torch.manual_seed(0)
    layer = nn.ConvBNAct(24, 24, 3, act="relu").eval()
    x = torch.randn(2, 24, 14, 14)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        found, eager = compiled(x), layer(x)
        torch.export.export(layer, (x,), strict=True)
    assert found.dtype == eager.dtype == dtype
    torch.testing.assert_close(found, eager, rtol=3e-2, atol=3e-2)


def test_which_cpus_have_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    has = problem._has_instructions
    present: set[str] = set()
    capability, machine = ["AVX512"], ["x86_64"]
    monkeypatch.setattr(problem, "_cpu_has", lambda name: name in present)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability[0])
    monkeypatch.setattr(problem.platform, "machine", lambda: machine[0])
    monkeypatch.setattr(problem, "_onednn_has_fp16", lambda: "fp16" in present)

    def both() -> tuple[bool, bool]:
        return has(torch.bfloat16), has(torch.float16)

    assert both() == (False, False)
    for names, expected in {
        ("avx512_bf16",): (True, False),
        ("amx_tile",): (True, False),
        ("avx512_bf16", "fp16"): (True, True),
        ("amx_fp16",): (False, True),
    }.items():
        present.clear()
        present.update(names)
        assert both() == expected
    capability[0] = "AVX2"
    assert both() == (False, False)
    machine[0] = "aarch64"
    assert both() == (True, True)
    assert not computes_in_float32(torch.float32) and not computes_in_float32(f64)
