"""What advdl_ops.explain says of each layer against what runs: operators by the profiler, oneDNN by its own record.

oneDNN's convolutions are no operators where torch calls them in backward or transposed: its verbose mode tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.conv2d import fixed_thresholds
from torch.profiler import ProfilerActivity, profile

import advdl_ops
from advdl_ops import _library, nn
from advdl_ops._conv import problem
from advdl_ops.models._layers import conv_norm_relu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
OWN, ONEDNN, TORCH = "CPU C++ kernel", "oneDNN", "torch's own"
# What another implementation of a norm or an LSTM than ours would call.
STOCK = {
    "aten::native_batch_norm", "aten::native_group_norm", "aten::native_layer_norm", "aten::var_mean",
    "aten::mm", "aten::addmm", "aten::matmul", "aten::linear", "aten::lstm", "aten::sigmoid", "aten::tanh",
}  # fmt: skip

Run = Callable[[], Any]


class Recorder:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def operators(self, run: Run) -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        return {event.name for event in found.events()}

    def convolution(self, run: Run) -> str:
        """What computed the one convolution that ``run`` is, or the gradient of one."""
        self.capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            names = self.operators(run)
        printed = self.capfd.readouterr().out
        by_onednn = re.search(r"exec,cpu,(de)?convolution,", printed) is not None
        # Of a depthwise transposed one forward is a backward.
        own = any(re.match("advdl_ops::(dense|depthwise|winograd)_conv2d", name) for name in names)
        assert not (own and by_onednn), (names, printed)
        assert own or names & {
            "aten::_convolution", "aten::convolution_backward", "mkldnn::_convolution_pointwise"
        }, names  # fmt: skip
        return OWN if own else ONEDNN if by_onednn else TORCH


@pytest.fixture
def recorder(capfd: pytest.CaptureFixture[str], one_thread: None) -> Iterator[Recorder]:
    with fixed_thresholds():
        yield Recorder(capfd)


def served_by(module: torch.nn.Module, *inputs: torch.Tensor) -> str:
    return advdl_ops.explain(module, *inputs).layers[0].served_by  # type: ignore[union-attr]


def told(text: str) -> dict[str, str]:
    """By part of a convolution what serves it; the forward pass' own stands first."""
    text = re.sub(f"{re.escape(OWN)}, \\w+", OWN, text).replace(" in float32", "")
    forward, *others = text.split("; ")
    parts = {"forward": forward}
    by_name = {
        o.removesuffix(f" {by}"): by
        for o in others
        for by in (OWN, ONEDNN, TORCH)
        if o.endswith(by)
    }
    assert len(by_name) == len(others), text
    for part in ("under gradients", "gradient of x", "gradient of the weight"):
        both = by_name.get("gradients", forward) if part != "under gradients" else forward
        parts[part] = by_name.get(part, both)
    assert all(by in (OWN, ONEDNN, TORCH) for by in parts.values()), text
    return parts


def tensor(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    if len(shape) != 4:
        return x
    return x.contiguous(memory_format=memory_format)


def seen(recorder: Recorder, layer: torch.nn.Module, x: torch.Tensor) -> dict[str, str]:
    """As :func:`told`, of what runs."""

    def without_gradients() -> None:
        with torch.no_grad():
            layer(x)

    found = {"forward": recorder.convolution(without_gradients)}
    found["under gradients"] = recorder.convolution(lambda: layer(x.detach().requires_grad_()))
    # Each alone: a Function computes what requires a gradient, asked for or not.
    layer.requires_grad_(False)
    for part, of in (("gradient of x", x.detach()), ("gradient of the weight", layer.weight)):
        of.requires_grad_()
        sum_ = layer(x if of is layer.weight else of).sum()
        found[part] = recorder.convolution(lambda sum_=sum_, of=of: torch.autograd.grad(sum_, of))
        of.requires_grad_(False)
    layer.requires_grad_()
    return found


# ---- convolutions ----

CONVOLUTIONS: dict[str, tuple[Callable[..., torch.nn.Module], tuple[int, ...]]] = {
    "few channels": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 9, 8)),
    "few pixels": (lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 8, 8)),
    "too few pixels": (lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 5, 5)),
    "few pixels of channels_last": (lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 14, 14)),
    "many pixels": (lambda: nn.Conv2d(64, 32, 3, padding=1, act="relu"), (1, 64, 24, 24)),
    "Winograd's": (lambda: nn.Conv2d(64, 64, 3, padding=1, act="relu"), (1, 64, 40, 41)),
    "Winograd's if in channels_last": (lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 35, 36)),
    "strided": (lambda: nn.Conv2d(64, 64, 3, 2, 1, act="silu"), (1, 64, 40, 36)),
    "gradient of the weight": (lambda: nn.Conv2d(128, 128, 1, bias=False), (1, 128, 22, 22)),
    "1x1 of one image": (lambda: nn.Conv2d(16, 16, 1), (1, 16, 30, 30)),
    "dilated": (lambda: nn.DilatedConv2d(32, 32, 3, dilation=2), (2, 32, 9, 9)),
    "widely dilated": (lambda: nn.DilatedConv2d(32, 32, 3, dilation=8), (1, 32, 20, 20)),
    "grouped": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=2), (1, 64, 8, 8)),
    "depthwise": (lambda: nn.DepthwiseConv2d(8, 3, act="gelu"), (2, 8, 9, 9)),
    "depthwise by groups": (lambda: nn.Conv2d(1, 1, 3), (2, 1, 9, 9)),
    "depthwise, multiplied": (lambda: nn.DepthwiseConv2d(8, 3, multiplier=2), (2, 8, 9, 9)),
    "reflecting": (lambda: nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), (1, 64, 8, 8)),
    "circular": (lambda: nn.Conv2d(64, 64, 3, padding=3, padding_mode="circular"), (1, 64, 4, 4)),
    "same, of an even kernel": (lambda: nn.Conv2d(64, 64, 2, padding="same"), (1, 64, 8, 8)),
    "unbatched": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, act="relu"), (2, 8, 9, 9)),
    "transposed, few pixels": (lambda: nn.ConvTranspose2d(64, 64, 3, padding=1), (1, 64, 8, 8)),
    "transposed, Winograd's": (lambda: nn.ConvTranspose2d(64, 64, 3, padding=1), (1, 64, 40, 41)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(8, 8, 3, groups=2), (2, 8, 9, 9)),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=8), (2, 8, 9, 9)),
    "transposed, depthwise, no gradient": (
        lambda: nn.ConvTranspose2d(8, 8, 2, output_padding=1, dilation=2, groups=8),
        (2, 8, 9, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(
    recorder: Recorder, name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    make, shape = CONVOLUTIONS[name]
    layer = make().to(dtype)
    x = tensor(shape, dtype, memory_format)
    found = seen(recorder, layer, x)
    assert told(served_by(layer, x)) == found
    # Without an input it names every one there may be, and none that there cannot be.
    known = served_by(layer)
    assert all(by in known for by in found.values()), (known, found)
    if OWN in known and ONEDNN not in known:
        assert set(found.values()) == {OWN}


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 9}, {"outputs": 128}], ids=str)
def test_the_numbers_of_pixels(
    recorder: Recorder, options: dict[str, int], memory_format: torch.memory_format
) -> None:
    """Where the text says from how many to how many, right there what runs changes."""
    channels = options.get("outputs", 32)
    stride, dilation = options.get("stride", 1), options.get("dilation", 1)
    layer = nn.Conv2d(channels, channels, 3, stride, 0, dilation)
    text = served_by(layer)
    contiguous = memory_format == torch.contiguous_format
    edges: dict[str, tuple[int, int]] = {}
    for clause in text.partition(f"by pixels of the output {OWN}")[2].split(", ")[1:]:
        clause = (
            clause.partition(": ")[2] if not edges and ": " in clause.split(" at ")[0] else clause
        )
        parts, _, span = (
            clause.rpartition(" at ") if "(" not in clause else clause.partition(" at ")
        )
        first, last = map(int, re.findall(r"(\d+) to (\d+)", span)[-1 if contiguous else 0])
        edges |= {part: (first, last) for part in parts.split(" and ")}
    assert set(edges) == {"forward", "gradient of x", "gradient of the weight"}, text
    for part, (first, last) in edges.items():
        for pixels in (first - 1, first, last, last + 1):
            width = (pixels - 1) * stride + 2 * dilation + 1
            x = tensor((1, channels, 2 * dilation + 1, width), torch.float32, memory_format)
            by = seen(recorder, layer, x)[part]
            assert (by == OWN) == (first <= pixels <= last), (part, pixels, by, text)


def test_a_call_with_an_output_size(recorder: Recorder) -> None:
    class Up(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, dilation=4, groups=8)

        def forward(self, x: torch.Tensor, size: int) -> torch.Tensor:
            return self.up(x, match=(size, size))

    model, x = Up(), torch.randn(1, 8, 5, 5)
    for size, by in ((18, OWN), (19, TORCH)):  # an output padding of the stride is no gradient's
        run = torch.no_grad()(lambda size=size: model(x, size))
        found = recorder.convolution(run)
        assert told(served_by(model, x, size))["forward"] == found  # type: ignore[arg-type]
        assert (found == OWN) == (by == OWN)


# ---- convolution and norm ----


def hooked() -> torch.nn.Module:
    layer = nn.ConvBNReLU(8, 8, 3)
    layer.conv.register_forward_hook(lambda *_: None)
    return layer


PAIRS: dict[str, tuple[Callable[..., torch.nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.ConvBNReLU(8, 8, 3), (2, 8, 40, 40)),
    "few pixels": (lambda: nn.ConvBNAct(64, 64, 3, act="silu"), (1, 64, 8, 8)),
    "Winograd's": (lambda: nn.ConvBNAct(64, 64, 3, act="silu"), (1, 64, 30, 31)),
    "with a bias": (lambda: nn.ConvBNReLU(8, 8, 3, bias=True, affine=False), (2, 8, 9, 9)),
    "activation first": (lambda: nn.ConvBNAct(8, 8, 3, act="relu", order="conv-act-bn"), (2, 8, 9, 9)),
    "reflecting": (lambda: nn.ConvBNReLU(8, 8, 3, padding_mode="reflect"), (2, 8, 9, 9)),
    "same, of an even kernel": (lambda: nn.ConvBNReLU(64, 64, 2, padding="same"), (1, 64, 8, 8)),
    "no running statistics": (lambda: nn.ConvBNReLU(8, 8, 3, track_running_stats=False), (2, 8, 9, 9)),
    "hooked": (hooked, (2, 8, 9, 9)),
    "grouped": (lambda: nn.ConvBNReLU(8, 8, 3, groups=2), (2, 8, 9, 9)),
    "depthwise": (lambda: nn.ConvBNReLU(8, 8, 3, groups=8), (2, 8, 9, 9)),
    "depthwise, short rows": (lambda: nn.ConvBNReLU(8, 8, 3, groups=8), (2, 8, 9, 8)),
    "1x1 of one image": (lambda: nn.ConvBNReLU(16, 16, 1), (1, 16, 30, 30)),
}  # fmt: skip
FOLDED = "; in evaluation without gradients one convolution, the norm folded into it: "


def no_gradients(layer: torch.nn.Module, x: torch.Tensor) -> Run:
    return torch.no_grad()(lambda: layer(x))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_convolution_and_norm(
    recorder: Recorder, name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    make, shape = PAIRS[name]
    layer = make().to(dtype)
    x = tensor(shape, dtype, memory_format)
    for training in (True, False):
        layer.train(training)
        with_input, without = served_by(layer, x), served_by(layer)
        layers, _, by = with_input.partition(FOLDED)
        assert "its two layers" in layers
        assert (FOLDED in without) == bool(by)
        # Under gradients, and in training, the norm's kernel follows.
        assert "advdl_ops::batch_norm_act_" in recorder.operators(lambda: layer(x))
    layer.eval()
    names = recorder.operators(no_gradients(layer, x))
    assert ("advdl_ops::batch_norm_act_" not in names) == bool(by), names
    found = recorder.convolution(no_gradients(layer, x))
    if by:
        assert told(by)["forward"] == found
        assert found in without.partition(FOLDED)[2]


def test_a_pair_without_the_native_library(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, no_native_required: None
) -> None:
    layer, x = nn.ConvBNReLU(8, 8, 3).eval(), torch.randn(2, 8, 40, 40)
    monkeypatch.setitem(_library._status, "cpu", "it was not built")
    text = served_by(layer)
    assert text.endswith("; of those the reference, in plain PyTorch: it was not built")
    assert f"{FOLDED}oneDNN or torch's own" in text
    names = recorder.operators(no_gradients(layer, x))
    assert not any("batch_norm" in name for name in names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_optimize_joined(recorder: Recorder, dtype: torch.dtype) -> None:
    layers = torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    model = advdl_ops.optimize(torch.nn.Sequential(*layers).to(dtype).eval())
    x = torch.randn(2, 8, 40, 40).to(dtype)
    names = recorder.operators(no_gradients(model, x))
    for inputs in ((x,), ()):
        (note,) = (t for t in advdl_ops.explain(model, *inputs).notes[""] if t.startswith("one op"))  # type: ignore[union-attr]
        assert (FOLDED in note) == ("advdl_ops::batch_norm_act_" not in names), note
        assert "its two layers" in note
    if FOLDED in note:
        assert recorder.convolution(no_gradients(model, x)) in note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_model_joins_itself(
    recorder: Recorder, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "_INSTRUCTIONS", {})  # as if the CPU had those for bf16

    model = conv_norm_relu(64, 64, 3, nn.BatchNormAct2d).to(dtype).eval()
    x = torch.randn(1, 64, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    names = recorder.operators(no_gradients(model, x))
    found = recorder.convolution(no_gradients(model, x))
    alone, _, joined = served_by(model, x).partition("; with 1 in training its two layers")
    assert told(alone)["forward"] == (OWN if dtype == torch.float32 else found)
    assert bool(joined) == ("advdl_ops::batch_norm_act_" not in names)
    if joined:
        assert joined == f"{FOLDED}{found}" and found == ONEDNN


# ---- the others ----

OTHERS: dict[str, tuple[Callable[..., torch.nn.Module], tuple[int, ...], str]] = {
    "batch norm": (lambda: nn.BatchNormAct2d(8, act="relu"), (2, 8, 5, 5), "batch_norm_act_"),
    "batch norm, averaging": (lambda: nn.BatchNormAct2d(8, momentum=None), (2, 8, 5, 5), "batch_norm_act_"),
    "batch norm without statistics": (
        lambda: nn.BatchNormAct2d(8, track_running_stats=False, affine=False), (2, 8, 5, 5), "batch_norm_act_",
    ),
    "group norm": (lambda: nn.GroupNorm(2, 8, act="silu"), (2, 8, 5, 5), "group_norm"),
    "layer norm": (lambda: nn.LayerNorm2d(8), (2, 8, 5, 5), "group_norm"),
    "instance norm": (lambda: nn.InstanceNorm2d(8), (2, 8, 5, 5), "group_norm"),
    "instance norm, 1d": (lambda: nn.InstanceNorm1d(8, affine=True), (8, 5), "group_norm"),
    "instance norm, 3d": (lambda: nn.InstanceNorm3d(8), (1, 8, 3, 3, 3), "group_norm"),
    "LSTM": (lambda: nn.LSTM(3, 4), (5, 2, 3), "lstm"),
    "LSTM of layers": (
        lambda: nn.LSTM(3, 4, 2, dropout=0.5, bidirectional=True, batch_first=True), (5, 2, 3), "lstm",
    ),
    "LSTM, projected": (lambda: nn.LSTM(3, 4, proj_size=2, bias=False), (5, 2, 3), "lstm"),
    "LSTM with zoneout": (lambda: nn.LSTM(3, 4, zoneout=0.1, recurrent_dropout=0.1), (5, 2, 3), "lstm"),
    "LSTM with layer norm": (lambda: nn.LSTM(3, 4, layer_norm=True), (5, 2, 3), "lstm"),
    "LSTM cell": (lambda: nn.LSTMCell(3, 4), (2, 3), "lstm_cell"),
}  # fmt: skip


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_a_norm_or_an_lstm(
    recorder: Recorder, name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    make, shape, operator = OTHERS[name]
    if len(shape) != 4 and memory_format != torch.contiguous_format:
        return
    layer = make().to(dtype)
    x = tensor(shape, dtype, memory_format).requires_grad_()
    for training in (True, False):
        layer.train(training)
        text = served_by(layer)
        assert served_by(layer, x) == text
        assert text.startswith(OWN)

        def train() -> None:
            out = layer(x)
            (out if isinstance(out, torch.Tensor) else out[0]).float().square().sum().backward()

        for run in (no_gradients(layer, x), train):
            names = recorder.operators(run)
            assert f"advdl_ops::{operator}" in names, names
            others = names & STOCK
            assert ("product with the input, and its norm, torch's own" in text) == bool(others), (
                others
            )


def test_an_instance_norm_by_running_statistics(recorder: Recorder) -> None:
    layer, x = nn.InstanceNorm2d(8, track_running_stats=True), torch.randn(2, 8, 5, 5)
    for training, operator in ((True, "group_norm"), (False, "batch_norm_act_")):
        layer.train(training)
        assert served_by(layer, x).startswith(OWN)
        names = recorder.operators(no_gradients(layer, x))
        assert f"advdl_ops::{operator}" in names and not names & (STOCK - {"aten::var_mean"})


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *PAIRS, *OTHERS])
def test_the_reference(recorder: Recorder, name: str) -> None:
    make, shape, *_ = {**CONVOLUTIONS, **PAIRS, **OTHERS}[name]
    layer, x = make(), torch.randn(shape)
    with advdl_ops.use_backend("reference"):
        assert served_by(layer, x).startswith("the reference, in plain PyTorch: ")
        for training in (True, False):
            layer.train(training)
            names = recorder.operators(no_gradients(layer, x))
            ours = {n for n in names if n.startswith("advdl_ops::")} - {"advdl_ops::convert_layout"}
            assert not ours


def test_under_autocast(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "_INSTRUCTIONS", {})  # as if the CPU had those for bf16
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 8, 8)
    assert OWN in served_by(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert OWN not in served_by(layer)
        assert told(served_by(layer, x))["forward"] == recorder.convolution(no_gradients(layer, x))
    block = nn.ConvBNReLU(8, 8, 3).eval()
    assert FOLDED in served_by(block)
    with torch.autocast("cpu", torch.bfloat16):
        assert served_by(block) == served_by(block, torch.randn(2, 8, 9, 9)) == "its two layers"


def test_a_layer_that_is_called_twice(recorder: Recorder) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x)[..., ::2, ::2].contiguous())

    model = Twice()
    text = served_by(model, torch.randn(1, 64, 20, 20))
    first, _, second = text.partition("; in another call ")
    assert told(first)["forward"] != OWN and told(second)["forward"] == OWN


def test_a_compiled_module_is_run_without_our_hooks() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.append(graph)
        return graph.forward

    model = torch.compile(nn.Conv2d(64, 64, 3, padding=1), backend=backend, fullgraph=True)
    assert "by pixels of the output" in served_by(model, torch.randn(1, 64, 8, 8))
    assert len(calls) == 1
