"""conv_bn_act in training on CUDA: the convolution gives the norm its statistics, or does not; on CPU tensors.

The CPU is called the GPU here, the Triton launchers are a fake over torch, see ``support/conv2d_cuda.py``. It computes
in fp64 too, so that what is wrong does not hide behind roundings.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, LAYOUTS, assert_accurate, in_layout
from support.conv2d_cuda import FAST, NAMES, Launchers, Tuner, serve_as_on_cuda
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import advdl_ops
from advdl_ops import nn, reference, tuning
from advdl_ops._conv import cuda
from advdl_ops._conv.choice import APART
from advdl_ops._conv.problem import WITH_NORM, Problem
from advdl_ops._schemas import conv2d_format
from advdl_ops.activation import IDENTITY
from advdl_ops.functional import conv_bn_act

pytestmark = pytest.mark.usefixtures("one_thread")
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CHANNELS = 6
JOINED = f"{NAMES[0]} with statistics"
WAYS = pytest.mark.parametrize("way", [JOINED, APART])
OPTIONS = {
    "plain": {"padding": 1},
    "stride": {"stride": 2, "padding": (1, 0)},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "multiplier": {"groups": 3, "padding": 1},
    "same": {"padding": "same"},
}


class Gpu(Tuner):
    """What was asked of the tuner, and which kernels ran."""

    def __init__(self) -> None:
        super().__init__()
        self.launchers = Launchers(depthwise=False)

    def keys(self) -> list[Problem]:
        return [key for key, _ in self.asked if key.direction == WITH_NORM]

    def last_forward(self) -> str:
        return next(name for name, _ in reversed(self.launchers.called) if "forward" in name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(tuning, "choose", made.choose)
    serve_as_on_cuda(monkeypatch, made.launchers, Launchers(depthwise=True))
    monkeypatch.setattr(cuda, "TRITON_DTYPES", (f64, f32, bf16, f16))
    module = sys.modules["advdl_ops.functional.conv_bn_act"]
    monkeypatch.setattr(module, "STATISTICS_DEVICE", "cpu")
    return made


def make(dtype: torch.dtype = f64, groups: int = 1, **_: Any) -> dict[str, Tensor]:
    """Every tensor of the function, those of one value per channel in fp32 beside a half-precision x."""
    wide = f64 if dtype == f64 else f32
    channels = groups if 4 % groups else 4
    return {
        "input": torch.randn(3, channels, 9, 8).to(dtype),
        "weight": (torch.randn(CHANNELS, channels // groups, 3, 3) / 3).to(dtype),
        "running_mean": torch.randn(CHANNELS).to(wide),
        "running_var": (torch.rand(CHANNELS) + 0.5).to(wide),
        "bn_weight": (torch.rand(CHANNELS) + 0.5).to(wide),
        "bn_bias": torch.randn(CHANNELS).to(wide),
        "bias": torch.randn(CHANNELS).to(wide),
    }


def stock(t: dict[str, Tensor], act: str, residual: Tensor | None, **options: Any) -> Tensor:
    z = F.conv2d(t["input"], t["weight"], t["bias"].to(t["input"].dtype), **options)
    running = t["running_mean"], t["running_var"]
    y = F.batch_norm(z, *running, t["bn_weight"], t["bn_bias"], True, 0.3, 1e-3)
    return ACTIVATIONS[act][1](y if residual is None else y + residual)


def ours(t: dict[str, Tensor], act: str, residual: Tensor | None, **options: Any) -> Tensor:
    more = {"training": True, "momentum": 0.3, "eps": 1e-3, "act": ACTIVATIONS[act][0]}
    return conv_bn_act(**t, residual=residual, **more, **options)


def results(
    function: Any, t: dict[str, Tensor], dtype: torch.dtype, act: str, residual: bool, **options
) -> dict[str, Tensor]:
    """Output, gradients and running statistics, of the same values in ``dtype``."""
    generator = torch.Generator().manual_seed(1)
    own = {
        n: v.detach().clone().to(dtype if n in ("input", "weight") or dtype == f64 else f32)
        for n, v in t.items()
    }
    with torch.no_grad():
        like = stock({n: v.clone() for n, v in own.items()}, act, None, **options)
    r = torch.randn(like.shape, generator=generator).to(t["input"].dtype).to(dtype)
    dout = torch.randn(like.shape, generator=generator).to(t["input"].dtype).to(dtype)
    leaves = {n: v.requires_grad_() for n, v in own.items() if "running" not in n}
    if residual:
        leaves["residual"] = r = r.requires_grad_()
    out = function(own, act, r if residual else None, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    found = {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    running = {n: own[n].detach() for n in ("running_mean", "running_var")}
    return {"out": out.detach(), **found, **running}


# ---- values ----


@WAYS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_in_fp64(name: str, layout: str, way: str, gpu: Gpu) -> None:
    gpu.wish, options = way, OPTIONS[name]
    for act in ("relu", "silu", "none"):
        for residual in (True, False):
            t = make(**options)
            t["input"] = in_layout(t["input"], layout)
            expected = results(stock, t, f64, act, residual, **options)
            found = results(ours, t, f64, act, residual, **options)
            assert gpu.last_forward() == ("forward with statistics" if way == JOINED else "forward")
            like = torch.empty_like(found["out"], memory_format=conv2d_format(t["input"]))
            assert found["out"].stride() == like.stride()
            for what, e in expected.items():
                message = f"{what}, {act}"
                torch.testing.assert_close(
                    found[what], e, rtol=1e-9, atol=1e-9, msg=lambda m, w=message: f"{w}: {m}"
                )


@WAYS
def test_values_in_fp32(way: str, gpu: Gpu) -> None:
    gpu.wish = way
    t, options = make(f32), OPTIONS["plain"]
    exact = results(stock, t, f64, "silu", True, **options)
    plain = results(stock, t, f32, "silu", True, **options)
    # All terms of the sums, of a convolution of 36 products and a norm: none is larger than a few tens.
    for what, found in results(ours, t, f32, "silu", True, **options).items():
        assert_accurate(found, exact[what], plain[what], 50.0, what)


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_in_half_precision_the_statistics_are_those_of_what_is_stored(
    dtype: torch.dtype, gpu: Gpu
) -> None:
    gpu.wish = JOINED
    t = make(dtype)
    options = (1, 1), (0, 0), (1, 1), 1
    z = reference.conv2d(t["input"], t["weight"], None, *options, None, t["bias"], None, IDENTITY)
    names = "running_mean", "running_var", "bn_weight", "bn_bias"

    def stock_norm(dtype_of_z: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
        mean, var, weight, bias = (t[n].to(dtype, copy=True) for n in names)
        out = F.batch_norm(z.to(dtype_of_z), mean, var, weight, bias, True, 0.3, 1e-3)
        return [F.silu(out), mean, var]

    exact, plain = stock_norm(f64, f64), stock_norm(dtype, f32)
    found = [ours(t, "silu", None), t["running_mean"], t["running_var"]]
    for own, e, p, what in zip(found, exact, plain, ("out", *names), strict=False):
        assert_accurate(own, e, p, 50.0, what)


@WAYS
def test_gradgradcheck(way: str, gpu: Gpu) -> None:
    gpu.wish = way
    t = {n: v[:2].double() for n, v in make().items()}
    t["input"] = t["input"][:, :, :4, :3].clone()
    residual = torch.randn(2, 2, 2, 1, dtype=f64)
    names = ["input", "weight", "bn_weight", "bn_bias", "bias"]

    def function(residual: Tensor, *leaves: Tensor) -> Tensor:
        tensors = {**t, **dict(zip(names, leaves, strict=True))}
        return conv_bn_act(**tensors, training=True, momentum=0.0, act="silu", residual=residual)

    inputs = [v.detach().clone().requires_grad_() for v in (residual, *(t[n] for n in names))]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    assert gpu.last_forward() == ("forward with statistics" if way == JOINED else "forward")


def test_optional_tensors(gpu: Gpu) -> None:
    gpu.wish = JOINED
    t = make()
    for left_out in (["bias"], ["running_mean", "running_var"], ["bn_weight", "bn_bias"]):
        given = {n: v.clone() for n, v in t.items()} | dict.fromkeys(left_out)
        z = F.conv2d(given["input"], given["weight"], given["bias"])
        running = (None if v is None else v.clone() for v in list(given.values())[2:4])
        expected = F.batch_norm(z, *running, given["bn_weight"], given["bn_bias"], True)
        torch.testing.assert_close(conv_bn_act(**given, training=True), expected)
        assert gpu.last_forward() == "forward with statistics"


def test_running_statistics_in_half_precision_are_rounded_once(gpu: Gpu) -> None:
    gpu.wish = JOINED
    t = make(bf16)
    expected = {n: v.clone() for n, v in t.items()}
    for n in ("running_mean", "running_var"):
        t[n] = t[n].to(bf16)
        expected[n] = t[n].float()
    version = t["running_mean"]._version
    ours(t, "none", None), stock({**expected}, "none", None)
    assert gpu.last_forward() == "forward with statistics" and t["running_mean"]._version > version
    for n in ("running_mean", "running_var"):
        # Statistics of z as it is stored, in bf16.
        torch.testing.assert_close(t[n], expected[n].to(bf16), rtol=2**-8, atol=0)


def test_autocast(gpu: Gpu) -> None:
    gpu.wish = JOINED
    t = make(f32)
    by_hand = {n: v.to(bf16) if n in ("input", "weight") else v.clone() for n, v in t.items()}
    t["weight"].requires_grad_()
    with torch.autocast("cpu", bf16):
        own = ours(t, "silu", None)
    assert gpu.last_forward() == "forward with statistics" and gpu.keys()[0].dtype == bf16
    expected = ours(by_hand, "silu", None)
    assert own.dtype == bf16 and torch.equal(own, expected)
    assert torch.equal(t["running_var"], by_hand["running_var"])
    own.sum().backward()
    assert t["weight"].grad is not None and t["weight"].grad.dtype == f32


# ---- the choice ----


def test_the_key(gpu: Gpu) -> None:
    gpu.wish = JOINED
    t = make(f32)
    residual = torch.randn(3, CHANNELS, 7, 6)

    def key(act: str = "relu", r: Tensor | None = None, **changes: Any) -> Problem:
        options = {n: changes.pop(n) for n in ("stride",) if n in changes}
        ours(
            {n: v if v is None else v.clone() for n, v in {**t, **changes}.items()},
            act,
            r,
            **options,
        )
        return gpu.keys()[-1]

    assert key() == key()
    assert key().direction == WITH_NORM and key().epilogue == "shift+norm+running+relu"
    ways = next(ways for key, ways in gpu.asked if key.direction == WITH_NORM)
    assert ways == [APART, *(f"{name} with statistics" for name in NAMES)]
    keys = [
        key(),
        key(act="none"),
        key(r=residual),
        key(bias=None),
        key(running_mean=None, running_var=None),
        key(stride=2),
        key(input=t["input"].to(bf16), weight=t["weight"].to(bf16)),
        key(input=in_layout(t["input"], "channels_last")),
        key(input=t["input"][:2]),
    ]
    assert len(set(keys)) == len({tuning._text(k) for k in keys}) == len(keys)


def test_measuring_leaves_the_running_statistics_alone(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = make()
    before = {n: v.clone() for n, v in t.items()}

    def choose(key: Any, candidates: dict[str, Any], device: Any) -> str:
        for call in candidates.values():
            assert not call().requires_grad  # nor makes a graph
            versions = [t[n]._version for n in ("running_mean", "running_var")]
            assert versions == [0, 0]
        assert all(torch.equal(v, before[n]) for n, v in t.items())
        return next(iter(candidates)) if key.direction != WITH_NORM else JOINED

    monkeypatch.setattr(tuning, "choose", choose)
    t["weight"].requires_grad_()
    ours(t, "relu", None)
    assert not torch.equal(t["running_mean"], before["running_mean"])


def test_a_known_choice_asks_nothing(gpu: Gpu) -> None:
    t = make(f32)
    ours(t, "relu", None)
    tuning._choices[t["input"].device, gpu.keys()[0]] = tuning.Choice(JOINED, {}, {})
    del gpu.asked[:], gpu.launchers.called[:]
    ours(t, "relu", None)
    assert gpu.asked == [] and gpu.launchers.called == [("forward with statistics", FAST)]


def test_where_nothing_is_measured_the_norm_stays_apart(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(tuning, "choose", CHOOSE)
    monkeypatch.setenv("ADVDL_OPS_TUNE", "0")
    monkeypatch.setenv("ADVDL_OPS_CACHE", str(tmp_path))
    tuning._store.cache_clear()
    t = make()
    expected = results(stock, t, f64, "relu", True)
    found = results(ours, t, f64, "relu", True)
    tuning._store.cache_clear()
    assert gpu.launchers.called == [] and tuning._choices == {} and not list(tmp_path.iterdir())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


CHOOSE = tuning.choose


class Subclass(Tensor):
    """What may want to see every operator."""


def others(gpu: Gpu, case: str) -> None:
    """Calls that are served as on any other device."""
    t = make(f32)
    if case == "evaluation":
        t["weight"].requires_grad_()
        conv_bn_act(**t, training=False)
    elif case == "subclass":
        conv_bn_act(**{**t, "weight": t["weight"].as_subclass(Subclass)}, training=True)
    elif case == "subclass of the norm":
        conv_bn_act(**{**t, "bn_bias": t["bn_bias"].as_subclass(Subclass)}, training=True)
    elif case == "order":
        conv_bn_act(**t, training=True, order="conv-act-bn", act="relu")
    elif case == "depthwise":
        x = torch.randn(2, CHANNELS, 5, 5)
        conv_bn_act(
            **{**t, "input": x, "weight": torch.randn(CHANNELS, 1, 3, 3)},
            groups=CHANNELS,
            training=True,
        )
    elif case == "reference":
        with advdl_ops.use_backend("reference"):
            conv_bn_act(**t, training=True)
    elif case == "residual of another dtype":
        conv_bn_act(**t, training=True, residual=torch.randn(3, CHANNELS, 7, 6, dtype=f64))
    elif case == "strided running statistics":
        t["running_var"] = torch.ones(2 * CHANNELS)[::2]
        conv_bn_act(**t, training=True)
    elif case == "empty":
        conv_bn_act(**{**t, "input": t["input"][:0]}, training=True)
    elif case == "functorch":
        x = t.pop("input")
        t["running_mean"] = t["running_var"] = None
        torch.func.jvp(lambda x: conv_bn_act(x, **t, training=True), (x,), (x,))
    else:
        assert case == "compiled"
        torch.compile(conv_bn_act, backend="eager", fullgraph=True)(**t, training=True)


@pytest.mark.usefixtures("no_native_required")
@pytest.mark.parametrize(
    "case",
    [
        "evaluation", "subclass", "subclass of the norm", "order", "depthwise", "reference",
        "residual of another dtype",
        "strided running statistics", "empty", "functorch", "compiled",
    ],
)  # fmt: skip
def test_what_is_served_as_elsewhere(case: str, gpu: Gpu) -> None:
    gpu.wish = JOINED
    others(gpu, case)
    assert gpu.keys() == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "batch_norm_act: eps"),
        ({"momentum": None}, TypeError, "batch_norm_act: momentum"),
        ({"running_var": None}, ValueError, "batch_norm_act: running_var"),
        ({"bn_weight": torch.ones(3)}, RuntimeError, "batch_norm_act: weight"),
        ({"bias": torch.ones(3)}, RuntimeError, "conv2d: bias"),
        ({"input": torch.ones(1, 4, 3, 3)}, ValueError, "batch_norm_act: x"),
        ({"residual": torch.ones(1)}, ValueError, "batch_norm_act: residual"),
        ({"weight": None}, TypeError, "conv2d: weight"),
        ({"groups": 3}, RuntimeError, "conv2d: groups"),
    ],
    ids=str,
)
def test_errors_are_those_of_the_two_functions_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str, gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # As where the choice is known from an earlier call.
    monkeypatch.setattr(
        tuning, "recall", lambda key, _: JOINED if key.direction == WITH_NORM else None
    )
    t = make(f32)
    before = t["running_mean"].clone()
    with pytest.raises(error, match=message):
        conv_bn_act(**{"training": True, **t, **changes})
    assert torch.equal(t["running_mean"], before)


# ---- layers ----


@WAYS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None, "act": "relu"},
        {"track_running_stats": False},
        {"affine": False, "bias": True, "act": "silu"},
        {"padding_mode": "circular"},
        {"padding": "same", "dilation": 2},
        {"groups": 2, "stride": 2},
    ],
    ids=str,
)
def test_layers(options: dict[str, Any], way: str, gpu: Gpu) -> None:
    gpu.wish = way
    layer = nn.ConvBNAct(4, CHANNELS, 3, dtype=f64, **options)
    plain = copy.deepcopy(layer)
    for step in range(3):
        x = torch.randn(3, 4, 9, 8, dtype=f64)
        found = layer(x)
        assert gpu.last_forward() == ("forward with statistics" if way == JOINED else "forward")
        with advdl_ops.use_backend("reference"):
            expected = plain(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(layer.state_dict(), plain.state_dict())
        found.sum().backward(), expected.sum().backward()
        if layer.bn.track_running_stats:
            assert layer.bn.num_batches_tracked == step + 1
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_hooks_are_honoured(gpu: Gpu) -> None:
    gpu.wish = JOINED
    layer = nn.ConvBNAct(4, CHANNELS, 3, dtype=f64)
    seen: list[torch.Size] = []
    layer.conv.register_forward_hook(lambda _module, _args, out: seen.append(out.shape))
    layer(torch.randn(3, 4, 9, 8, dtype=f64))
    assert seen == [(3, CHANNELS, 9, 8)] and gpu.keys() == []


INTERPRETED = """
import sys
import torch
import torch.nn.functional as F
from advdl_ops import tuning
from advdl_ops._conv import choice
from advdl_ops.functional import conv_bn_act

def choose(key, candidates, device):
    return next((n for n in candidates if n.endswith("with statistics")), next(iter(candidates)))
tuning.choose = choose
on_cpu = choice.chosen

def chosen(problem, device, trial):
    if problem.direction != "forward with norm":
        return on_cpu(problem, device, trial)
    found = choice.candidates(problem, torch.device("cuda"))
    return choice._by_measurement(problem, found, device, trial)
choice.chosen, choice.keep = chosen, lambda key, x, plan: plan
sys.modules["advdl_ops.functional.conv_bn_act"].STATISTICS_DEVICE = "cpu"

torch.manual_seed(0)
x, weight, residual = torch.randn(2, 4, 7, 6), torch.randn(4, 2, 3, 3), torch.randn(2, 4, 4, 4)
channels = [torch.rand(4) + 0.5 for _ in range(5)]
options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3), "groups": 2}

def run(fused, dtype):
    t = [v.to(dtype, copy=True) for v in (x, weight, residual, *channels)]
    mean, var, *affine, bias = t[3:]
    leaves = [v.requires_grad_() for v in (*t[:3], *affine, bias)]
    if fused:
        out = conv_bn_act(t[0], t[1], mean, var, *affine, bias=bias, training=True, residual=t[2],
                          act="silu", **options)
        assert "GivenStatistics" in out.grad_fn.name()
    else:
        z = F.conv2d(t[0], t[1], bias, **options)
        out = F.silu(F.batch_norm(z, mean, var, *affine, True) + t[2])
    return [out, *torch.autograd.grad(out.square().sum(), leaves), mean, var]

# The gradients of the convolution are those of the CPU.
for own, exact in zip(run(True, torch.float32), run(False, torch.float64), strict=True):
    torch.testing.assert_close(own.double(), exact, rtol=1e-4, atol=1e-4)
"""


def test_the_real_launcher() -> None:
    """By Triton's interpreter; tolerances of fp32, as values have tests of their own."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
