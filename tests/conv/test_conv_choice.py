"""Which candidate serves a convolution on CPU: by the rules, by a measurement, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conv2d import THRESHOLDS, fixed_thresholds

import advdl_ops
from advdl_ops import nn, tuning
from advdl_ops._conv import choice
from advdl_ops._conv.problem import (
    BOTH,
    CHANNELS_LAST,
    CONTIGUOUS,
    FOLDED,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    Problem,
    problem_of,
)
from advdl_ops._library import cpu_capability

CPU = torch.device("cpu")
DIRECTIONS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ADVDL_OPS_CACHE", str(tmp_path))
    monkeypatch.delenv("ADVDL_OPS_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_choices", {})
    tuning._store.cache_clear()
    with fixed_thresholds():
        yield
    tuning._store.cache_clear()


def problem(
    direction: str = FORWARD,
    x: tuple[int, ...] = (4, 64, 40, 40),
    outputs: int = 64,
    kernel: int = 3,
    layout: str = CONTIGUOUS,
    weight_layout: str = CONTIGUOUS,
    **conv: Any,
) -> Problem:
    conv = {"padding": (1, 1), **conv}
    weight = outputs, x[1] // conv.get("groups", 1), kernel, kernel
    options = Conv(**conv)
    return Problem(
        direction, x, weight, torch.float32, layout, weight_layout, *options, "none", True, False, 2
    )  # fmt: skip


def served(p: Problem) -> str:
    return choice.by_rule(p, choice.candidates(p, CPU)).name


# ---- thresholds ----

LAST = {"layout": CHANNELS_LAST}
WEIGHT_LAST = {"weight_layout": CHANNELS_LAST}
DEPTHWISE = {"groups": 64, "outputs": 64}


def pixels(n: int, channels: int = 64, **options: Any) -> dict[str, Any]:
    """An image whose 1x1 convolution has so many output pixels."""
    return {"x": (1, channels, 1, n), "kernel": 1, "padding": (0, 0), **options}


def rectangle(pixels: int) -> tuple[int, int]:
    """The sides of the most square image of so many pixels: its tiles overhang least."""
    height = next(n for n in range(math.isqrt(pixels), 0, -1) if pixels % n == 0)
    return height, pixels // height


# name of the threshold, direction, what serves below and above it, problem of a value
EDGES: dict[str, tuple[str, str, str, Any]] = {
    "small": (FORWARD, "torch", "onednn", lambda n: {"x": (1, 1, 1, n), "outputs": 8}),
    "few_channels": (
        FORWARD, "torch", "dense kernel",
        lambda n: pixels(256, n - 1, outputs=512, layout=CHANNELS_LAST),
    ),
    "few_pixels": (INPUT_GRADIENT, "torch", "dense kernel", lambda n: pixels(n - 1, **LAST)),
    "pixels": (INPUT_GRADIENT, "dense kernel", "torch", lambda n: pixels(n, **LAST)),
    "pixels_contiguous": (INPUT_GRADIENT, "dense kernel", "torch", lambda n: pixels(n)),
    "pixels_contiguous_many": (
        FORWARD, "dense kernel", "torch", lambda n: pixels(n, 128, outputs=512),
    ),
    "pixels_weight_last": (
        FORWARD, "dense kernel", "torch", lambda n: {"x": (1, 64, 1, n), **WEIGHT_LAST},
    ),
    "pixels_strided": (
        INPUT_GRADIENT, "dense kernel", "torch",
        lambda n: {"x": (1, 64, 1, 2 * n), "kernel": 1, "padding": (0, 0), "stride": (2, 2)},
    ),
    "pixels_dweight": (
        WEIGHT_GRADIENT, "dense kernel", "torch",
        lambda n: {"x": (1, 128, 1, n), "outputs": 128, **LAST},
    ),
    "pixels_dweight_contiguous": (
        WEIGHT_GRADIENT, "dense kernel", "torch", lambda n: {"x": (1, 128, 1, n), "outputs": 128},
    ),
    "pixels_dweight_weight_last": (
        WEIGHT_GRADIENT, "dense kernel", "torch",
        lambda n: {"x": (1, 128, 1, n), "outputs": 128, **WEIGHT_LAST},
    ),
    "pixels_dweight_1x1": (
        WEIGHT_GRADIENT, "dense kernel", "torch", lambda n: pixels(n, 128, outputs=128),
    ),
    "many_channels": (
        WEIGHT_GRADIENT, "torch", "dense kernel",
        lambda n: {"x": (1, n - 1, 1, 512), "outputs": 512, **LAST},
    ),
    "pixels_dweight_dilated": (
        WEIGHT_GRADIENT, "dense kernel", "torch in channels_last",
        lambda n: pixels(n, dilation=(64, 64)),
    ),
    "large_dilation": (
        FORWARD, "onednn", "onednn in channels_last",
        lambda n: {"kernel": 5, "dilation": (n - 1, 1), "padding": (n - 1, 1)},
    ),
    "short_row": (
        FOLDED, "depthwise kernel in channels_last", "depthwise kernel",
        lambda n: {"x": (8, 64, 8, n), **DEPTHWISE},
    ),
    "short_row_dweight": (
        WEIGHT_GRADIENT, "depthwise kernel in channels_last", "depthwise kernel",
        lambda n: {"x": (8, 64, 8, n), **DEPTHWISE},
    ),
    "short_row_large": (
        FOLDED, "torch", "depthwise kernel",
        lambda n: {"x": (4096, 64, 8, n), **DEPTHWISE},
    ),
    "depthwise_cached_bytes": (
        INPUT_GRADIENT, "depthwise kernel in channels_last", "torch",
        lambda n: {"x": (1, 64, 1, n // 256), "stride": (2, 2), **DEPTHWISE},
    ),
    "depthwise_strided_bytes": (
        FORWARD, "onednn", "depthwise kernel",
        lambda n: {"x": (1, 64, 1, n // 256), "stride": (2, 2), **DEPTHWISE},
    ),
    "depthwise_strided_dx_bytes": (
        INPUT_GRADIENT, "torch", "depthwise kernel",
        lambda n: {"x": (1, 64, 1, n // 256), "stride": (2, 2), **DEPTHWISE},
    ),
    "depthwise_strided_dweight_bytes": (
        WEIGHT_GRADIENT, "torch", "depthwise kernel",
        lambda n: {"x": (1, 64, 1, n // 256), "stride": (2, 2), **DEPTHWISE},
    ),
    "large_dilation_dweight": (
        WEIGHT_GRADIENT, "torch", "torch in channels_last",
        lambda n: {"x": (16, 64, 40, 40), "kernel": 1, "dilation": (n - 1, 1), "padding": (0, 0)},
    ),
    "winograd_channels": (
        FORWARD, "onednn", "winograd", lambda n: {"x": (4, n - 1, 40, 40), "outputs": 200},
    ),
    "winograd_pixels": (
        INPUT_GRADIENT, "torch", "winograd", lambda n: {"x": (1, 64, *rectangle(n - 1)), **LAST},
    ),
    "winograd_pixels_contiguous": (
        FORWARD, "onednn", "winograd", lambda n: {"x": (1, 64, *rectangle(n - 1))},
    ),
    "winograd_pixels_kept": (
        FOLDED, "onednn, prepacked", "winograd", lambda n: {"x": (1, 64, *rectangle(n - 1)), **LAST},
    ),
    "winograd_pixels_dweight": (
        WEIGHT_GRADIENT, "torch", "winograd", lambda n: {"x": (1, 64, *rectangle(n - 1))},
    ),
    # Of each of n - 84 grids the tiles compute two rows. For 200 rows (3 * 200 - 2 * (n - 84)) / 3 are needed, for 16
    # columns 46 / 3: with 200 % of them 116.9 grids would be computed.
    "winograd_waste": (
        FOLDED, "winograd", "onednn, prepacked",
        lambda n: {"x": (2, 256, 200, 16), "dilation": (n - 84, 1), "padding": (n - 84, 1), **LAST},
    ),
}  # fmt: skip


def test_every_threshold_is_looked_at() -> None:
    assert set(EDGES) == set(choice.Thresholds._fields)


@pytest.mark.parametrize("name", EDGES)
def test_an_edge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right at a threshold the other candidate takes over."""
    direction, below, above, options = EDGES[name]
    # Apart from the others, so that it alone decides.
    value = {
        "few_channels": 40, "many_channels": 200, "short_row": 9, "short_row_dweight": 9, "short_row_large": 6,
        "depthwise_strided_bytes": 1 << 26, "depthwise_strided_dx_bytes": 1 << 26,
        "depthwise_strided_dweight_bytes": 1 << 26, "winograd_waste": 200,
    }.get(name)  # fmt: skip
    value = value or getattr(THRESHOLDS, name)
    monkeypatch.setattr(choice, "thresholds", lambda: THRESHOLDS._replace(**{name: value}))
    step = 256 if name.endswith("_bytes") else 1
    assert served(problem(direction, **options(value))) == below
    assert served(problem(direction, **options(value + step))) == above


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_each_capability_has_its_table_and_record(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {**dict.fromkeys(choice.THRESHOLDS, THRESHOLDS), capability: "mine"}
    # Undone before `_own_store` puts the tables of the machine back.
    with monkeypatch.context() as patch:
        patch.setattr(choice, "cpu_capability", lambda: capability)
        patch.setattr(choice, "THRESHOLDS", tables)
        assert choice.thresholds() == "mine" and choice.RECORDS[capability]


@pytest.mark.parametrize("direction", [*DIRECTIONS, FOLDED])
def test_a_rule_names_its_thresholds_by_value(direction: str) -> None:
    for candidate in choice.ON_CPU[direction]:
        assert not set("{}") & set(choice.reason(candidate)), candidate.name


# ---- the lists ----


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST, BOTH, "strided"])
@pytest.mark.parametrize("direction", [*DIRECTIONS, FOLDED])
def test_a_candidate_without_a_rule_accepts_everything(direction: str, layout: str) -> None:
    """So that a choice never fails."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for conv in ({}, {"groups": 2}, {"stride": (2, 2)}, {"dilation": (9, 9)}):
            p = problem(direction, layout=layout, **conv)._replace(dtype=dtype, library=False)
            *_, final = choice.candidates(p, CPU)
            assert final.rule is None


@pytest.mark.parametrize("direction", [*DIRECTIONS, FOLDED])
def test_names_tell_candidates_apart(direction: str) -> None:
    names = [candidate.name for candidate in choice.ON_CPU[direction]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_a_problem_has_no_data(name: str) -> None:
    layer = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
    x = torch.randn(2, 4, 9, 8)
    p = problem_of(FORWARD, x, layer.weight, Conv((2, 2), (1, 1)))
    assert p.out_size == tuple(layer(x).shape[2:]) and p.pixels == 2 * 5 * 4
    assert hash(p) == hash(p._replace()) and isinstance(getattr(p, name), tuple)


def every_case() -> list[tuple[torch.Tensor, torch.Tensor, Conv]]:
    """Shapes that every candidate of the lists accepts somewhere, in both formats."""
    found = []
    for channels, outputs, groups, stride, dilation in (
        (32, 32, 1, 1, 1), (32, 48, 1, 2, 1), (32, 32, 1, 1, 9), (8, 8, 8, 1, 1), (8, 8, 8, 2, 1),
        (8, 8, 2, 1, 1),
    ):  # fmt: skip
        x = torch.randn(3, channels, 11, 10)
        weight = torch.randn(outputs, channels // groups, 3, 3) / 10
        conv = Conv((stride,) * 2, (dilation, 1), (dilation,) * 2, groups)
        if 11 + 2 * dilation >= 2 * dilation + 1 and 2 * dilation < 12:
            found.append((x, weight, conv))
        else:
            found.append((x, weight, conv._replace(padding=(dilation, dilation))))
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("at", range(6))
def test_every_candidate_computes_the_same(at: int, memory_format: torch.memory_format) -> None:
    """Whoever accepts a problem: its result against fp64, within fp32 roundings of the sums."""
    from advdl_ops._conv.operators import gradients, output
    from advdl_ops._conv.problem import Epilogue

    x, weight, conv = every_case()[at]
    x = x.contiguous(memory_format=memory_format)
    shift = torch.randn(weight.shape[0])
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), shift.double(), *conv)
    dz = torch.randn(exact.shape).contiguous(memory_format=memory_format)
    with torch.no_grad():
        p = problem_of(FORWARD, x, weight, conv, "shift")
        for candidate in choice.candidates(p, CPU):
            out = output(candidate, memory_format, x, weight, conv, Epilogue(shift=shift))
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)
            assert out.is_contiguous(memory_format=memory_format), candidate.name
        expected = torch.ops.aten.convolution_backward(
            dz.double(), x.double(), weight.double(), [weight.shape[0]], *conv[:3], False, [0, 0],
            conv.groups, [True] * 3,
        )  # fmt: skip
        for direction, needs in (
            (INPUT_GRADIENT, (True, False, True)), (WEIGHT_GRADIENT, (False, True, True)),
        ):  # fmt: skip
            p = problem_of(direction, x, weight, conv, "contiguous")
            for candidate in choice.candidates(p, CPU):
                found = gradients(candidate, memory_format, dz, x, weight, conv, needs)
                assert [g is not None for g in found] == list(needs), candidate.name
                for own, e in zip(found, expected, strict=True):
                    if own is not None:
                        torch.testing.assert_close(own.double(), e, rtol=1e-4, atol=1e-3)


# ---- measured ----


def test_a_stored_choice_wins_over_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 28, 28)
    with torch.no_grad():
        layer(x)
    (p,) = choice.met()
    assert choice.expected(p).name == "onednn"
    monkeypatch.setattr(
        tuning, "cpu_seconds", lambda call: 1.0 if call.args[0].name == "dense kernel" else 2.0
    )
    with choice.every_direction_asked(), tuning.on(), torch.no_grad():
        layer(x)
    assert choice.expected(p).name == "dense kernel"
    # In another process, which reads the file.
    monkeypatch.setattr(tuning, "_choices", {})
    choice.forget()
    called = []
    dense = next(c for c in choice.ON_CPU[FORWARD] if c.name == "dense kernel")
    monkeypatch.setattr(
        choice, "ON_CPU",
        {**choice.ON_CPU, FORWARD: tuple(
            c._replace(run=lambda *a: called.append(1) or dense.run(*a)) if c is dense else c
            for c in choice.ON_CPU[FORWARD]
        )},
    )  # fmt: skip
    with torch.no_grad():
        layer(x), layer(x)
    assert called == [1, 1]


def test_nothing_is_measured_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "cpu_seconds", lambda call: pytest.fail("measured"))
    layer, x = nn.Conv2d(32, 32, 3), torch.randn(1, 32, 9, 9, requires_grad=True)
    layer(x).sum().backward()
    assert not list(tmp_path.iterdir())


def test_tuning_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVDL_OPS_TUNE", "1")
    measured = []
    monkeypatch.setattr(tuning, "cpu_seconds", lambda call: measured.append(call) or 1.0)
    layer, x = nn.Conv2d(32, 32, 3), torch.randn(2, 32, 20, 20, requires_grad=True)
    layer(x).sum().backward()
    count = len(measured)
    assert count > 6  # three directions, of two candidates or more, three rounds each
    layer(x).sum().backward()
    assert len(measured) == count


# ---- tune and explain ----


class Faster:
    """In place of the clock: one candidate by name takes half the time."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, call: Any) -> float:
        call()
        return 1.0 if call.args[0].name in self.names else 2.0


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.ConvBNReLU(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.DepthwiseConv2d(32, 3),
        nn.ConvTranspose2d(32, 8, 2, 2),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_tune(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cpu_seconds", Faster("dense kernel"))
    net, x = model().train(training), torch.randn(2, 3, 20, 20)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    random = torch.get_rng_state()
    tuned = advdl_ops.tune(net, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    directions = {row.problem.direction for row in tuned}
    assert directions == ({*DIRECTIONS} if training else {FORWARD, FOLDED, INPUT_GRADIENT})
    assert {row.after for row in tuned.changed} == {"dense kernel"}
    assert all(row.speedup == 2.0 for row in tuned.changed)
    text = str(tuned)
    assert text.startswith(f"{len(tuned)} convolutions measured, {len(tuned.changed)} served by")
    assert len(text.splitlines()) == 1 + len(tuned.changed) > 2
    # It holds from now on, and is not measured again.
    for row in tuned:
        assert choice.expected(row.problem).name == row.after
    assert len(advdl_ops.tune(net, x)) == 0


def test_tune_changes_what_runs_not_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cpu_seconds", Faster("dense kernel", "torch in channels_last"))
    net, x = model(), torch.randn(2, 3, 20, 20)
    reference = net(x)
    advdl_ops.tune(net, x)
    torch.testing.assert_close(net(x), reference, rtol=1e-4, atol=1e-4)


def test_hooks_are_not_run_by_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cpu_seconds", Faster())
    net = model()
    net[1].register_forward_hook(lambda *_: pytest.fail("called"))
    advdl_ops.tune(net, torch.randn(2, 3, 8, 8))


def test_what_tune_refuses() -> None:
    with pytest.raises(TypeError, match=r"^tune: model \(function\) must be a torch.nn.Module"):
        advdl_ops.tune(model, torch.randn(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^tune: inputs \(none\) must be"):
        advdl_ops.tune(model())


def test_explain_says_by_which_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 28, 28)
    (row,) = advdl_ops.explain(layer, x)  # type: ignore[misc]
    forward, dx, dweight = row.choices
    assert [c.problem.direction for c in row.choices] == list(DIRECTIONS)
    t = choice.thresholds()
    assert str(forward) == (
        "forward of 2x64x28x28 float32 contiguous, epilogue shift: onednn "
        f"(by rule: x of more than {t.small} numbers, and more than the weight's; "
        f"{choice.RECORDS[cpu_capability()]}; also accepted by winograd, dense kernel, onednn in channels_last, "
        "torch in channels_last, torch)"
    )
    assert dx.why == "by rule: none before it applies" and dx.name == "torch"
    monkeypatch.setattr(tuning, "cpu_seconds", Faster("dense kernel"))
    advdl_ops.tune(layer, x)
    (row,) = advdl_ops.explain(layer, x)  # type: ignore[misc]
    assert row.served_by.startswith("CPU C++ kernel")
    assert "dense kernel (dense kernel 1000000.0 us; onednn 2000000.0 us; " in str(row)
    assert dweight.problem in {c.problem for c in row.choices}


def test_what_was_measured_is_not_asked_again_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ``ADVDL_OPS_TUNE=1`` for all of a training: the look at what serves is kept once all is measured."""
    monkeypatch.setenv("ADVDL_OPS_TUNE", "1")
    monkeypatch.setattr(tuning, "cpu_seconds", lambda call: 1.0)
    layers = nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
    x = torch.randn(2, 8, 9, 9)
    for layer in layers:
        layer(x.requires_grad_()).square().sum().backward()
        layer(x).square().sum().backward()
    asked: list[Problem] = []
    monkeypatch.setattr(choice, "expected", lambda p: asked.append(p))
    monkeypatch.setattr(choice, "is_open", lambda p: asked.append(p))
    for layer in layers:
        layer(x).square().sum().backward()
    assert asked == []


def test_what_has_no_choice_is_not_measured() -> None:
    layer, x = nn.Conv2d(4, 4, 3, dtype=torch.float64), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    assert len(advdl_ops.tune(layer.eval(), x)) == 0 and tuning._choices == {}
