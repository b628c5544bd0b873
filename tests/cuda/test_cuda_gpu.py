"""batch_norm_act on a real GPU: the value cases of the emulation, streams, graph capture, large tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cuda_emulation import batch_norm_act as bna
from cuda_emulation.batch_norm_act import ACTS, DTYPES, Case
from cuda_emulation.batch_norm_act_cases import BACKWARD, CASES
from support.checks import check_error_is_at_most_that_of_stock
from torch import Tensor
from torch.nn import functional as F

import advdl_ops

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

# What the emulation is too slow for: many splits, ResNet-50's sizes at a small batch.
BIG = [
    Case(8, 64, 112 * 112, "first", "bf16", "relu"),
    Case(8, 64, 112 * 112, "last", "bf16", "relu"),
    Case(
        8, 256, 56 * 56, "first", "f32", "relu", residual=True, want_dresidual=True, z_output=True
    ),
    Case(4, 256, 56 * 56, "last", "f32", "relu", residual=True, want_dresidual=True, z_output=True),
    Case(
        128,
        512,
        28 * 28,
        "first",
        "bf16",
        "relu",
        residual=True,
        want_dresidual=True,
        z_output=True,
    ),
    Case(128, 512, 7 * 7, "first", "f16", "silu"),
    Case(128, 512, 7 * 7, "last", "f16", "silu"),
    Case(1, 1, 3_000_001, "first", "f32", "gelu"),
    Case(2, 3, 1_500_001, "last", "bf16", "gelu"),
    Case(70_000, 5, 1, "last", "f32", "tanh"),
    Case(2, 70_001, 3, "first", "bf16", "relu"),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """On the GPU: the fp64 reference is computed there too."""
    return {name: value.to(DEVICE) for name, value in bna.make_inputs(case).items()}


def place(case: Case, value: Tensor, whole: bool = True) -> Tensor:
    """On the GPU in the case's layout, shifted from 16-byte alignment as the case asks."""
    if not whole:
        return value.to(DEVICE)
    laid = value.transpose(1, 2).contiguous() if case.layout == "last" else value.contiguous()
    room = torch.empty(laid.numel() + case.offset, dtype=value.dtype, device=DEVICE)
    room[case.offset :] = laid.flatten().to(DEVICE)
    placed = room[case.offset :].view(laid.shape)
    return placed.transpose(1, 2) if case.layout == "last" else placed


def on_gpu(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: place(case, t, t.dim() == 3) for name, t in tensors.items()}


def forward(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    code, param, _ = ACTS[case.act]
    given = (t.get(name) for name in ("residual", "weight", "bias", "running_mean", "running_var"))
    out, stats, running = torch.ops.advdl_ops.batch_norm_act(
        t["x"], *given, case.training, 0.1, bna.EPS, code, param
    )
    names = ("mean", "rstd", "running_mean_out", "running_var_out")
    return {"out": out, **dict(zip(names, (*stats, *running), strict=True))}


def backward(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    code, param, _ = ACTS[case.act]
    source = bna.Z_OUTPUT if case.z_output else bna.Z_RESIDUAL if case.residual else bna.Z_INPUT
    outputs = torch.ops.advdl_ops.batch_norm_act_backward(
        t["dout"], t["x"], t.get("saved"), t.get("weight"), t.get("bias"),
        torch.stack([t["mean"], t["rstd"]]),
        case.training, code, param, source, case.want_dx, case.want_dresidual,
    )  # fmt: skip
    return dict(zip(("dx", "dresidual", "dweight", "dbias"), outputs, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", [*CASES, *BIG], ids=str)
def test_forward(case: Case, training: bool) -> None:
    case = dataclasses.replace(case, training=training)
    inputs = make_inputs(case)
    bna.assert_within(forward(case, on_gpu(case, inputs)), bna.forward_reference(case, inputs))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", [*BACKWARD, *BIG], ids=str)
def test_backward(case: Case, training: bool) -> None:
    case = dataclasses.replace(case, training=training)
    inputs = make_inputs(case)
    extra = bna.backward_inputs(case, inputs)
    kept = {k: v for k, v in inputs.items() if k in ("x", "dout", "weight", "bias")}
    result = backward(case, on_gpu(case, {**kept, **extra}))
    bna.assert_within(result, bna.backward_reference(case, inputs, extra))


@pytest.mark.parametrize("case", [*CASES[::3], *BIG], ids=str)
def test_parts_of_forward_alone(case: Case) -> None:
    """The statistics, and the last pass with given ones."""
    case = dataclasses.replace(case, running=False)
    inputs = make_inputs(case)
    t = on_gpu(case, inputs)
    reference = bna.forward_reference(case, inputs)
    mean, squares = torch.ops.advdl_ops.batch_norm_moments(t["x"])
    rstd = (squares.double() / (case.n * case.s) + bna.EPS).rsqrt()
    bna.assert_within({"mean": mean, "rstd": rstd}, {k: reference[k] for k in ("mean", "rstd")})
    whole = forward(case, t)
    code, param, _ = ACTS[case.act]
    given = (t.get(name) for name in ("residual", "weight", "bias"))
    stats = torch.stack([whole["mean"], whole["rstd"]])
    again = torch.ops.advdl_ops.batch_norm_act_apply(t["x"], *given, stats, code, param)
    assert torch.equal(again, whole["out"])


@pytest.mark.parametrize("case", [*BACKWARD[::3], *BIG], ids=str)
def test_input_gradient_by_means_of_a_larger_batch(case: Case) -> None:
    case = dataclasses.replace(case, want_dx=True, want_dresidual=False)
    inputs = make_inputs(case)
    extra = bna.backward_inputs(case, inputs)
    kept = {k: v for k, v in inputs.items() if k in ("x", "dout", "weight", "bias")}
    reference = bna.backward_reference(case, inputs, extra)
    t = on_gpu(case, {**kept, **extra})
    means = torch.stack([reference[name][0] for name in ("dweight", "dbias")]) / (case.n * case.s)
    code, param, _ = ACTS[case.act]
    source = bna.Z_OUTPUT if case.z_output else bna.Z_RESIDUAL if case.residual else bna.Z_INPUT
    dx = torch.ops.advdl_ops.batch_norm_act_input_gradient(
        t["dout"], t["x"], t.get("saved"), t.get("weight"), t.get("bias"),
        torch.stack([t["mean"], t["rstd"]]), means.to(t["mean"].dtype), code, param, source,
    )  # fmt: skip
    bna.assert_within({"dx": dx}, {"dx": reference["dx"]})


@pytest.mark.parametrize("case", BIG, ids=str)
def test_two_runs_agree_bit_for_bit(case: Case) -> None:
    inputs = make_inputs(case)
    tensors = on_gpu(case, {**inputs, **bna.backward_inputs(case, inputs)})
    runs = [{**forward(case, tensors), **backward(case, tensors)} for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


def network(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, fused: bool) -> Tensor:
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    if fused:
        return advdl_ops.functional.batch_norm_act(
            x, mean, var, weight, bias, True, residual=residual, act="relu"
        )
    return F.relu(F.batch_norm(x, mean, var, weight, bias, True) + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_error_is_at_most_that_of_stock(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x, residual, dout = (
        torch.randn(16, 48, 28, 28, device="cuda").to(dtype).to(memory_format=layout)
        for _ in range(3)
    )
    weight, bias = torch.rand(48, device="cuda") + 0.5, torch.randn(48, device="cuda")

    def run(fused: bool, to: torch.dtype) -> list[Tensor]:
        leaves = [
            v.detach().to(to).requires_grad_()
            for v in (x, weight.to(to) if to == torch.float64 else weight, bias, residual)
        ]
        if to != torch.float64:
            leaves[1:3] = [v.detach().clone().requires_grad_() for v in (weight, bias)]
        out = network(*leaves, fused=fused)
        return [out, *torch.autograd.grad(out, leaves, dout.to(to))]

    check_error_is_at_most_that_of_stock(run, dtype)


def test_second_stream() -> None:
    """Kernels run on the current stream: behind the work queued there, not beside it."""
    case = Case(16, 64, 56 * 56, "first", "f32", "relu")
    inputs = make_inputs(case)
    tensors = on_gpu(case, inputs)
    reference = bna.forward_reference(case, inputs)
    x = tensors["x"]
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        result = forward(case, {**tensors, "x": late})
    side.synchronize()
    bna.assert_within(result, reference)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_graph_capture(layout: str) -> None:
    # fused, and split over blocks
    for n, s in ((4, 49), (64, 3136)):
        case = Case(n, 64, s, layout, "bf16", "silu", residual=True, want_dresidual=True)
        first = make_inputs(case)
        tensors = on_gpu(case, {**first, **bna.backward_inputs(case, first)})
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward(case, tensors), backward(case, tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result: dict[str, Any] = {
                **forward(case, tensors),
                **{k: v for k, v in backward(case, tensors).items()},
            }
        other = make_inputs(dataclasses.replace(case, mean=2.0))
        extra = bna.backward_inputs(case, other)
        for name, value in on_gpu(case, {**other, **extra}).items():
            tensors[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        reference = bna.forward_reference(case, other) | bna.backward_reference(case, other, extra)
        bna.assert_within(result, reference)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["first", "last"])
def test_more_than_2_to_the_31_elements(layout: str) -> None:
    n, c, s = 3, 8, 90_000_000  # 2.16e9 elements, 4.3 GB each
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free GPU memory")
    case = Case(n, c, s, layout, "bf16", "relu")
    x = torch.empty(
        (n, s, c) if layout == "last" else (n, c, s), dtype=DTYPES["bf16"], device="cuda"
    )
    x = x.transpose(1, 2) if layout == "last" else x
    for i in range(n):  # a channel has one value per image: its statistics are known
        for channel in range(c):
            x[i, channel] = float(i + channel)
    result = forward(case, {"x": x})
    mean = torch.arange(c, dtype=torch.float64) + 1
    rstd = torch.full((c,), (2 / 3 + bna.EPS) ** -0.5, dtype=torch.float64)
    torch.testing.assert_close(result["mean"].double().cpu(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(result["rstd"].double().cpu(), rstd, rtol=1e-5, atol=0)
    for i in range(n):
        expected = max(0.0, (i - 1) * rstd[0].item())
        out = result["out"][i]
        assert (out[:, [0, s // 2, s - 1]].float() - expected).abs().max() < 0.01
        assert (out[c - 1].float() - expected).abs().max() < 0.01
