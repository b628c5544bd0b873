"""conv2d on a real GPU, depthwise too: every candidate's values, determinism, graph capture, a second stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.conv2d_cuda import DTYPES, LAYOUTS, SILU, Case, Inputs
from torch import Tensor

import advdl_ops
from advdl_ops import nn, reference, tuning
from advdl_ops._conv import choice
from advdl_ops._conv.choice import APART
from advdl_ops._conv.problem import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    WITH_NORM,
    problem_of,
)
from advdl_ops._schemas import conv2d_format
from advdl_ops.activation import ACTIVATIONS, IDENTITY, Activation
from advdl_ops.functional import conv2d, conv_bn_act

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
EVERY = ("scale", "shift", "residual")


CASES = {
    "3x3": Case((2, 5, 9, 7), (6, 5, 3, 3)),
    "1x1": Case((2, 64, 15, 15), (48, 64, 1, 1), padding=(0, 0)),
    "1x1 stride": Case((2, 33, 15, 14), (65, 33, 1, 1), (2, 2), (0, 0)),
    "stride": Case((2, 33, 28, 27), (65, 33, 3, 5), (2, 1), (1, 2)),
    "dilated": Case((2, 64, 33, 33), (64, 64, 3, 3), (1, 1), (6, 6), (6, 6)),
    "dilated by pairs": Case((2, 16, 33, 30), (24, 16, 3, 3), (1, 2), (4, 0), (3, 1)),
    "groups": Case((2, 96, 28, 28), (192, 32, 3, 3), groups=3),
    "multiplier": Case((2, 16, 14, 15), (32, 1, 3, 3), groups=16),
    "of one position": Case((3, 4, 1, 1), (5, 4, 3, 3)),
    "long sum": Case((2, 1024, 14, 14), (256, 1024, 3, 3), (1, 1), (2, 2), (2, 2)),
    "many positions": Case((16, 64, 56, 56), (64, 64, 3, 3)),
    "depthwise": Case((2, 37, 19, 18), (37, 1, 3, 3), groups=37),
    "depthwise 7x7": Case((8, 96, 28, 28), (96, 1, 7, 7), padding=(3, 3), groups=96),
    "depthwise, dilated": Case((4, 64, 56, 56), (64, 1, 3, 3), (1, 1), (4, 4), (4, 4), 64),
    "depthwise, stride": Case((2, 48, 29, 27), (48, 1, 5, 3), (2, 1), (2, 1), (1, 2), 48),
}
SMALL = [name for name in CASES if name not in ("long sum", "many positions")]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Choices of this test's own, products of fp32 in fp32."""
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_unmeasured", {})
    monkeypatch.setenv("ADVDL_OPS_CACHE", str(tmp_path))
    tuning._store.cache_clear()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    tuning._store.cache_clear()


def make_inputs(case: Case, dtype: torch.dtype, layout: str, seed: int = 0) -> Inputs:
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=DEVICE)

    x, weight = normal(*case.x), normal(*case.weight) / math.prod(case.weight[1:]) ** 0.5
    shape = F.conv2d(x, weight, None, *case.conv).shape
    outputs = case.weight[0]
    tensors = Inputs(
        x, weight, normal(outputs).abs() + 0.5, normal(outputs), normal(*shape), normal(*shape)
    )
    return tensors.each(
        lambda t: t.to(dtype).contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t
    )


def forward(
    case: Case, i: Inputs, act: Activation = SILU, parts: tuple[str, ...] = EVERY
) -> Tensor:
    extras = [getattr(i, name) if name in parts else None for name in EVERY]
    return torch.ops.advdl_ops.conv2d(i.x, i.weight, *extras, *case.conv, act.code, act.param)


def backward(case: Case, i: Inputs) -> list[Tensor]:
    needs = True, True, True
    return list(torch.ops.advdl_ops.conv2d_backward(i.dz, i.x, i.weight, *case.conv, *needs))


def plain_forward(
    case: Case, i: Inputs, act: Activation = SILU, parts: tuple[str, ...] = EVERY
) -> Tensor:
    extras = [getattr(i, name) if name in parts else None for name in EVERY]
    return reference.conv2d(i.x, i.weight, None, *case.conv, *extras, act)


def plain_backward(case: Case, i: Inputs) -> list[Tensor]:
    options = [list(o) if isinstance(o, tuple) else o for o in case.conv]
    *pairs, groups = options
    return list(
        torch.ops.aten.convolution_backward(
            i.dz, i.x, i.weight, [case.weight[0]], *pairs, False, [0, 0], groups, [True] * 3
        )
    )


def terms(case: Case, i: Inputs) -> list[float]:
    """The size of what the output and each gradient are added up from."""
    a = i.each(lambda t: t.double().abs())
    sums = [plain_forward(case, a, IDENTITY), *plain_backward(case, a)]
    return [t.max().item() for t in sums]


def prefer(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[str, str]]:
    """Have ``name`` serve wherever it is a candidate; returns what served, by direction."""
    served: list[tuple[str, str]] = []

    def choose(key: Any, candidates: Any, device: torch.device) -> str:
        chosen = name if name in candidates else next(iter(candidates))
        served.append((key.direction, chosen))
        return chosen

    monkeypatch.setattr(tuning, "choose", choose)
    return served


def ways(case: Case, i: Inputs, direction: str = FORWARD) -> list[str]:
    """The candidates of one direction."""
    problem = problem_of(direction, i.x, i.weight, case.conv)
    return [candidate.name for candidate in choice.candidates(problem, i.x.device)]


def candidates(case: Case, i: Inputs) -> list[str]:
    """Those of every direction."""
    directions = FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
    return list(dict.fromkeys(name for d in directions for name in ways(case, i, d)))


# ---- values ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_candidate(
    case: Case, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    i = make_inputs(case, dtype, layout)
    wide = i.each(Tensor.double)
    exact = [plain_forward(case, wide), *plain_backward(case, wide)]
    stock = [plain_forward(case, i), *plain_backward(case, i)]
    sizes = terms(case, i)
    tried = candidates(case, i)
    assert any(name.startswith("triton") for name in tried)
    for name in tried:
        served = prefer(monkeypatch, name)
        found = [forward(case, i), *backward(case, i)]
        assert any(chosen == name for _, chosen in served)
        for own, e, s, size, what in zip(
            found, exact, stock, sizes, ("out", "dx", "dweight", "dbias"), strict=True
        ):
            assert_accurate(own.to(s.dtype), e, s, size, (name, what))
        assert found[0].is_contiguous(memory_format=conv2d_format(i.x))
        assert found[1].is_contiguous(memory_format=conv2d_format(i.x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SMALL)
def test_fp64(name: str, layout: str) -> None:
    case = CASES[name]
    i = make_inputs(case, torch.float64, layout).each(Tensor.double)
    torch.testing.assert_close(forward(case, i), plain_forward(case, i))
    torch.testing.assert_close(backward(case, i), plain_backward(case, i))
    assert tuning.known() == []


@pytest.mark.parametrize(
    "parts", [(), ("shift",), ("scale",), ("residual",), ("scale", "residual")], ids="+".join
)
@pytest.mark.parametrize("act", [IDENTITY, *ACTIVATIONS.values()], ids=lambda a: a.name)
def test_epilogues(
    parts: tuple[str, ...], act: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dilated", "depthwise"):
        case = CASES[name]
        i = make_inputs(case, torch.bfloat16, "channels_last")
        exact = plain_forward(case, i.each(Tensor.double), act, parts)
        stock, size = plain_forward(case, i, act, parts), terms(case, i)[0]
        for way in ways(case, i)[:2]:  # torch's own, and one of Triton's
            prefer(monkeypatch, way)
            assert_accurate(forward(case, i, act, parts), exact, stock, size, (name, way))


def test_tf32_is_used_only_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["long sum"]
    i = make_inputs(case, torch.float32, "channels_last")
    exact = plain_forward(case, i.each(Tensor.double), IDENTITY, ())
    for name in ways(case, i):
        prefer(monkeypatch, name)
        errors = []
        for allowed in (False, True):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
                out = forward(case, i, IDENTITY, ())
            errors.append(((out.double() - exact).norm() / exact.norm()).item())
        assert errors[0] < 1e-5 < errors[1] < 2e-3, name


# ---- the choice ----


def test_a_choice_is_measured_stored_and_explained(tmp_path: Path) -> None:
    layer = nn.DilatedConv2d(64, 64, 3, 2, device=DEVICE, act="relu")
    x = torch.randn(4, 64, 33, 33, device=DEVICE, requires_grad=True)
    assert "not measured yet" in str(advdl_ops.explain(layer))
    first = layer(x)
    gradients = torch.autograd.grad(first.sum(), [x, layer.weight])
    known = tuning.known()
    assert sorted(key.direction for _, key, _ in known) == [
        "forward", "input_gradient", "weight_gradient",
    ]  # fmt: skip
    for _, key, found in known:
        assert found.name == min(found.seconds, key=found.seconds.__getitem__)
        assert len(found.seconds) > 2 and found.failed == {}, key
    assert len(list(tmp_path.glob("*.json"))) == 1
    text = str(advdl_ops.explain(layer))
    assert "by measurement" in text and "cudnn" in text and "triton" in text
    # As the next process: nothing but the file.
    tuning._choices.clear()
    assert torch.equal(layer(x), first)
    again = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert {key: found for _, key, found in tuning.known()} == {
        key: found for _, key, found in known
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_runs_agree_bit_for_bit(
    case: Case, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    i = make_inputs(case, dtype, layout)
    for name in candidates(case, i):
        prefer(monkeypatch, name)
        runs = [[forward(case, i), *backward(case, i)] for _ in range(3)]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), name


def test_no_position() -> None:
    for weight, groups in (((6, 4, 3, 3), 1), ((4, 1, 3, 3), 4)):
        case = Case((0, 4, 5, 5), weight, groups=groups)
        i = make_inputs(case, torch.float32, "contiguous")
        assert forward(case, i).shape == (0, weight[0], 5, 5)
        dx, dweight, dbias = backward(case, i)
        assert dx.shape == case.x and not dweight.any() and not dbias.any()


# ---- streams and graphs ----

BOTH = ("dilated", "depthwise, dilated")


def assert_right(case: Case, i: Inputs, found: list[Tensor], what: Any) -> None:
    wide = i.each(Tensor.double)
    exact = [plain_forward(case, wide), *plain_backward(case, wide)]
    stock = [plain_forward(case, i), *plain_backward(case, i)]
    for own, e, s, size in zip(found, exact, stock, terms(case, i), strict=True):
        assert_accurate(own.to(s.dtype), e, s, size, what)


@pytest.mark.parametrize("name", BOTH)
def test_second_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate runs on the current stream: behind the work queued there, not beside it."""
    case = CASES[name]
    i = make_inputs(case, torch.float32, "contiguous")
    side = torch.cuda.Stream()
    for way in candidates(case, torch.float32, i.x):
        prefer(monkeypatch, way)
        forward(case, i), backward(case, i)  # compiles
        late = i._replace(x=torch.full_like(i.x, float("nan")))
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.x.copy_(i.x)
            found = [forward(case, late), *backward(case, late)]
        side.synchronize()
        assert_right(case, i, found, way)


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "not measured"])
@pytest.mark.parametrize("name", BOTH)
def test_graph_capture(name: str, measured: bool) -> None:
    case = CASES[name]
    i = make_inputs(case, torch.bfloat16, "channels_last")
    warm = i if measured else make_inputs(CASES["3x3"], torch.bfloat16, "channels_last")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        of = case if measured else CASES["3x3"]
        forward(of, warm), backward(of, warm)
    torch.cuda.current_stream().wait_stream(side)
    before = len(tuning.known())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [forward(case, i), *backward(case, i)]
    assert len(tuning.known()) == before
    other = make_inputs(case, torch.bfloat16, "channels_last", seed=1)
    for mine, new in zip(i, other, strict=True):
        mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_right(case, other, found, name)


@pytest.mark.parametrize("name", ["3x3", "dilated", "groups", "depthwise, dilated"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_function_and_its_gradients(name: str, act: str) -> None:
    """Through autograd, with bias, scale and residual, as measured."""
    case = CASES[name]
    i = make_inputs(case, torch.float32, "channels_last")

    def run(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        x, weight, scale, shift, residual, dout = i.each(
            lambda t: t.detach().to(dtype).requires_grad_()
        )
        bias = torch.linspace(-1, 1, len(scale), device=DEVICE, dtype=dtype).requires_grad_()
        leaves = [x, weight, bias, scale, shift, residual]
        if fused:
            out = conv2d(
                x, weight, bias, *case.conv, act=act, residual=residual, scale=scale, shift=shift
            )
        else:
            out = reference.conv2d(
                x, weight, bias, *case.conv, scale, shift, residual, ACTIVATIONS[act]
            )
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.detach())]

    exact, stock, ours = (
        run(False, torch.float64),
        run(False, torch.float32),
        run(True, torch.float32),
    )
    for e, s, o in zip(exact, stock, ours, strict=True):
        # By norm: a value at relu's kink may fall on either side.
        stock_error, error = ((v.double() - e).norm() / e.norm() for v in (s, o))
        assert error <= stock_error + 4 * torch.finfo(torch.float32).eps


# ---- with the norm behind it, in training ----


def train(case: Case, i: Inputs, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Output, gradients and running statistics of conv_bn_act, or of torch's own, in ``dtype``."""
    per_channel = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, gamma, beta, residual, dout = i.each(
        lambda t: t.detach().to(dtype if t.dim() == 4 else per_channel, copy=True)
    )
    leaves = [t.requires_grad_() for t in (x, weight, gamma, beta, residual)]
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    if fused:
        stride, padding, dilation, groups = case.conv
        out = conv_bn_act(
            x, weight, mean, var, gamma, beta, stride=stride, padding=padding, dilation=dilation,
            groups=groups, training=True, residual=residual, act="silu",
        )  # fmt: skip
    else:
        z = F.conv2d(x, weight, None, *case.conv)
        out = F.silu(F.batch_norm(z, mean, var, gamma, beta, True, 0.1, 1e-5) + residual)
    gradients = torch.autograd.grad(out, leaves, dout.detach())
    return [t.detach() for t in (out, *gradients, mean, var)]


def ways_of_training(case: Case, i: Inputs) -> list[str]:
    found = ways(case, i, WITH_NORM)
    assert found[0] == APART and len(found) > 1
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3x3", "1x1 stride", "dilated", "groups", "many positions"])
def test_training_with_a_norm(
    name: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways: the norm reads its statistics, or is given them; two runs agree bit for bit."""
    case = CASES[name]
    i = make_inputs(case, dtype, layout)
    exact, stock = train(case, i, torch.float64, False), train(case, i, dtype, False)
    names = "out", "dx", "dweight", "dgamma", "dbeta", "dresidual", "mean", "var"
    for way in ways_of_training(case, i):
        served = prefer(monkeypatch, way)
        found, again = train(case, i, dtype, True), train(case, i, dtype, True)
        assert (WITH_NORM, way) in served
        for own, second, e, s, what in zip(found, again, exact, stock, names, strict=True):
            assert torch.equal(own, second), (way, what)
            # By norm: z is rounded on either way, each value its own.
            stock_error, error = ((t.double() - e).norm() / e.norm() for t in (s, own))
            eps = torch.finfo(own.dtype if own.dim() == 4 else dtype).eps
            assert error <= stock_error + 4 * eps, (way, what)


def test_training_with_a_norm_is_measured_once() -> None:
    """The choice of the whole is stored, and measuring it writes no running statistics."""
    layer = nn.ConvBNAct(64, 64, 3, act="relu", device=DEVICE)
    x = torch.randn(4, 64, 33, 33, device=DEVICE)
    first = layer(x)
    (found,) = (c for _, key, c in tuning.known() if key.direction == WITH_NORM)
    assert found.failed == {} and len(found.seconds) > 1
    z = F.conv2d(x, layer.conv.weight, None, 1, 1).detach()
    torch.testing.assert_close(layer.bn.running_mean, 0.1 * z.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        layer.bn.running_var, 0.9 + 0.1 * z.var((0, 2, 3)), rtol=1e-3, atol=1e-5
    )
    assert layer.bn.num_batches_tracked == 1
    assert f"in training {found.name}, by measurement" in str(advdl_ops.explain(layer))
    before = tuning.known()
    tuning._choices.clear()
    assert torch.equal(layer(x), first)
    assert {c.name for _, key, c in tuning.known() if key.direction == WITH_NORM} == {found.name}
    assert len(before) >= len(tuning.known())
