"""advdl_ops.explain: a row for every layer of ours, what serves it, what was measured."""

from __future__ import annotations

import pytest
import torch
from support.conv2d import fixed_thresholds
from support.torchvision_stub import torchvision_models

import advdl_ops
from advdl_ops import _library, nn, tuning
from advdl_ops._conv import problem
from advdl_ops._conv.choice import APART
from advdl_ops._conv.problem import WITH_NORM, Problem
from advdl_ops._optimize import report

CUDA = torch.device("cuda", 0)


def served_by(module: torch.nn.Module) -> str:
    (row,) = advdl_ops.explain(module)
    return row.served_by


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.LayerNorm2d(4),
        nn.InstanceNorm2d(4),
        nn.BatchNormAct2d(4),
        nn.LSTM(3, 4),
        nn.LSTMCell(3, 4),
        nn.DepthwiseConv2d(4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 4, 2, groups=4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_has_a_kernel_of_ours(layer: torch.nn.Module) -> None:
    assert served_by(layer).startswith("CPU C++ kernel")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.DilatedConv2d(4, 4, 3),
        nn.DepthwiseConv2d(4, 3, multiplier=2),
        nn.ConvTranspose2d(4, 4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_torch_serves(layer: torch.nn.Module) -> None:
    text = served_by(layer)
    if isinstance(layer, nn.ConvTranspose2d):
        text, _, own = text.partition("; of few pixels ")
        assert own.startswith("CPU C++ kernel")
    assert text == "oneDNN or torch's own"


def test_pixels_that_a_kernel_of_ours_serves() -> None:
    with fixed_thresholds():
        check_pixels()


def check_pixels() -> None:
    text = served_by(nn.Conv2d(32, 32, 3))
    known, _, own = text.partition("; by pixels of the output CPU C++ kernel")
    assert known == "oneDNN or torch's own"
    assert own.endswith(
        ": forward and gradient of x at 48 to 256 (contiguous: 48 to 128), gradient of the weight at 48 to 256"
    )
    in_float32 = ", in float32" if problem.computes_in_float32(torch.bfloat16) else ""
    assert served_by(nn.Conv2d(32, 32, 3).bfloat16()) == known + in_float32


def test_the_capability_is_told() -> None:
    c = pytest.importorskip("advdl_ops._C")
    assert served_by(nn.GroupNorm(2, 4)) == f"CPU C++ kernel, {c.cpu.capability()}"


def test_layers_by_name_and_no_others() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), nn.ConvBNReLU(4, 4, 3), torch.nn.ReLU(), nn.HybridDilatedConv(4)
    )
    explanation = advdl_ops.explain(model)
    found = [(row.name, row.kind) for row in explanation]
    assert found == [
        ("1", "ConvBNReLU"),
        ("1.conv", "Conv2d"),
        ("1.bn", "BatchNormAct2d"),
        *((f"3.{i}", "DilatedConv2d") for i in range(3)),
    ]
    assert len(explanation) == 6
    lines = str(explanation).splitlines()
    assert lines[:3] == [
        "Sequential",
        "  0  Conv2d",
        "      left as it was: optimize was not called",
    ]
    assert lines[3].startswith("  1  ConvBNReLU: in training its two layers; in evaluation wit")
    assert lines[5].startswith("    bn  BatchNormAct2d: CPU C++ kernel")
    assert lines[6] == "  3  HybridDilatedConv" and len(lines) == 10


def test_a_model_without_our_layers() -> None:
    assert str(advdl_ops.explain(torch.nn.ReLU())) == "no layer of advdl_ops"


def test_the_reference_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with advdl_ops.use_backend("reference"):
        assert "reference" in served_by(nn.GroupNorm(2, 4))
        assert "asked for" in served_by(nn.GroupNorm(2, 4))
    monkeypatch.setitem(_library._status, "cpu", "the CPU library was not built")
    assert served_by(nn.LSTM(3, 4)).endswith("plain PyTorch: the CPU library was not built")


def test_no_data() -> None:
    assert served_by(nn.Conv2d(3, 4, 3, device="meta")) == "nothing: it has no data"


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"explain: module \(int\) must be a torch.nn.Module"):
        advdl_ops.explain(3)  # type: ignore[arg-type]


def test_inputs_run_a_copy() -> None:
    model = torch.nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNormAct2d(4), torch.nn.Dropout())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    calls: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        assert len(advdl_ops.explain(model, torch.randn(2, 3, 8, 8))) == 2
    finally:
        hook.remove()
    assert len(calls) == 4  # it was run
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.set_rng_state(random)
    torch.randn(2, 3, 8, 8)
    after = torch.rand(1)
    torch.set_rng_state(random)
    advdl_ops.explain(model, torch.randn(2, 3, 8, 8))
    assert torch.equal(torch.rand(1), after)


# ---- choices ----


def key(**changes: object) -> Problem:
    made = Problem(
        "forward", (2, 4, 8, 8), (6, 4, 3, 3), torch.float32, "contiguous", "contiguous",
        (1, 1), (2, 2), (2, 2), 1, "shift+relu", True, True, 0,
    )  # fmt: skip
    return made._replace(**changes)


TIMES = {"cudnn": 30e-6, "triton 64x64x32 w4 s3": 20.5e-6}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kernels for CUDA were loaded; layers stay on the CPU, which `_layer` is told to be a GPU."""
    monkeypatch.setitem(_library._status, "cuda", None)
    monkeypatch.setattr(_library, "unsupported_gpu", lambda index: None)
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_unmeasured", {})


def on_gpu(layer: torch.nn.Module) -> report.Layer:
    row = report._layer("conv", layer, CUDA)
    assert row is not None
    return row


def test_not_measured_yet(gpu: None) -> None:
    assert on_gpu(nn.DilatedConv2d(4, 6, 3)).served_by == "not measured yet: run a forward"


def test_what_was_measured(gpu: None) -> None:
    choice = tuning.Choice("triton 64x64x32 w4 s3", TIMES, {"triton big": "OutOfResources: shared"})
    tuning._choices[CUDA, key()] = choice
    row = on_gpu(nn.DilatedConv2d(4, 6, 3))
    assert row.served_by == "triton 64x64x32 w4 s3, by measurement"
    assert str(row).splitlines() == [
        "conv  DilatedConv2d: triton 64x64x32 w4 s3, by measurement",
        "    forward of 2x4x8x8 float32 contiguous, epilogue shift+relu: triton 64x64x32 w4 s3 "
        "(triton 64x64x32 w4 s3 20.5 us; cudnn 30.0 us; triton big failed (OutOfResources: shared))",
    ]


def test_a_convolution_measured_with_its_norm(gpu: None) -> None:
    name = "triton 64x64x32 w4 s3 with statistics"
    joined = key(direction=WITH_NORM, epilogue="norm+running+relu")
    tuning._choices[CUDA, joined] = tuning.Choice(name, {APART: 30e-6, name: 20.5e-6}, {})
    layer = nn.ConvBNReLU(4, 6, 3, dilation=2)
    row = on_gpu(layer)
    assert row.served_by.startswith(f"in training {name}, by measurement; in evaluation without")
    assert [choice.problem for choice in row.choices] == [joined]
    assert f"epilogue norm+running+relu: {name} ({name} 20.5 us; {APART} 30.0 us)" in str(row)
    # Siblings have no row of their own.
    assert on_gpu(layer.conv).served_by == f"{name}, by measurement"


def test_a_convolution_apart_from_its_norm(gpu: None) -> None:
    joined = key(direction=WITH_NORM, epilogue="norm+running+relu")
    tuning._choices[CUDA, joined] = tuning.Choice(APART, {APART: 30e-6}, {})
    layer = nn.ConvBNReLU(4, 6, 3, dilation=2)
    assert on_gpu(layer.conv).served_by == "not measured yet: run a forward"
    tuning._choices[CUDA, key()] = tuning.Choice("cudnn", TIMES, {})
    assert on_gpu(layer.conv).served_by == "cudnn, by measurement"
    assert on_gpu(layer).served_by.startswith("in training convolution, then norm, by")
    assert len(on_gpu(layer).choices) == 1 and len(on_gpu(layer.conv).choices) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"weight": (6, 4, 1, 1)},
        {"dilation": (1, 1)},
        {"stride": (2, 2)},
        {"dtype": torch.float64},
        {"groups": 2},
        {"x": (2, 6, 8, 8)},  # of a transposed convolution
    ],
    ids=str,
)
def test_choices_of_another_layer_are_left_out(gpu: None, other: dict[str, object]) -> None:
    tuning._choices[CUDA, key(**other)] = tuning.Choice("cudnn", TIMES, {})
    assert on_gpu(nn.DilatedConv2d(4, 6, 3)).choices == ()


def test_choices_of_another_device_are_left_out(gpu: None) -> None:
    tuning._choices[torch.device("cuda", 1), key()] = tuning.Choice("cudnn", TIMES, {})
    assert on_gpu(nn.DilatedConv2d(4, 6, 3)).choices == ()


def test_a_transposed_convolution_is_a_gradient(gpu: None) -> None:
    layer = nn.ConvTranspose2d(6, 4, 3, dilation=2)
    tuning._choices[CUDA, key(direction="input_gradient")] = tuning.Choice("cudnn", TIMES, {})
    assert on_gpu(layer).served_by == "cudnn, by measurement"
    tuning._choices[CUDA, key(x=(2, 6, 8, 8), weight=(6, 4, 3, 3))] = tuning.Choice("b", TIMES, {})
    assert len(on_gpu(layer).choices) == 1


def test_under_autocast(gpu: None) -> None:
    tuning._choices[CUDA, key(dtype=torch.bfloat16)] = tuning.Choice("cudnn", TIMES, {})
    assert on_gpu(nn.DilatedConv2d(4, 6, 3)).served_by == "cudnn, by measurement"
    assert on_gpu(nn.DilatedConv2d(4, 6, 3).half()).choices == ()


def test_where_nothing_was_measured(gpu: None) -> None:
    tuning._unmeasured[CUDA, key()] = tuning.Choice("cudnn", {}, {})
    assert on_gpu(nn.DilatedConv2d(4, 6, 3)).served_by == "cudnn, nothing was measured"


def test_hooks_are_not_run() -> None:
    called: list[int] = []
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda *_: called.append(1))
    advdl_ops.explain(layer, torch.randn(1, 3, 4, 4))
    assert called == []


def test_kernels_of_ours_on_cuda(gpu: None) -> None:
    assert on_gpu(nn.GroupNorm(2, 4)).served_by == "CUDA C++ kernel"
    assert on_gpu(nn.LSTM(3, 4)).served_by == "CUDA C++ kernels, matrix products by torch's own"
    hooked = nn.ConvBNReLU(4, 6, 3)
    assert "in evaluation" in on_gpu(hooked).served_by
    hooked.bn.register_forward_hook(lambda *_: None)
    assert on_gpu(hooked).served_by == "in training its two layers; in evaluation its two layers"
    assert on_gpu(nn.Conv2d(3, 4, 3, dtype=torch.float64)).served_by.endswith("(fp64)")
    no_gradient = nn.ConvTranspose2d(3, 4, 3, output_padding=1, dilation=2)
    assert on_gpu(no_gradient).served_by == "cuDNN or torch's own"


def test_a_gpu_that_the_kernels_do_not_serve(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "unsupported_gpu", lambda index: "GPU 0 is too old")
    assert on_gpu(nn.Conv2d(3, 4, 3)).served_by.endswith("GPU 0 is too old")


def test_exchanged_layers_are_told():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = (
                torch.nn.Conv2d(3, 4, 1),
                torch.nn.BatchNorm2d(4),
                torch.nn.ReLU(),
            )

        def forward(self, x):
            return self.act(self.bn(self.conv(x)))

    fast = advdl_ops.optimize(torch.nn.Sequential(Net()))
    assert "warning" not in str(advdl_ops.explain(fast))
    fast[0].bn = torch.nn.GroupNorm(2, 4)
    text = str(advdl_ops.explain(fast))
    assert "warning: bn was exchanged since; it is GroupNorm now, and runs by itself" in text
    assert "lost" not in text
    del fast[0].conv
    assert "warning: conv was exchanged since; it is nothing now" in str(advdl_ops.explain(fast))


def test_a_lost_activation_is_told():
    torchvision_models()  # before timm, which imports it
    norm_act = pytest.importorskip("timm.layers.norm_act")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), norm_act.BatchNormAct2d(4))
    fast = advdl_ops.optimize(model)
    fast[1] = torch.nn.BatchNorm2d(4)  # a converter that knows torch's class alone
    text = str(advdl_ops.explain(fast))
    assert "The activation of the layer before it (relu) is lost" in text
