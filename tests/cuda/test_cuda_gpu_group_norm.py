"""group_norm on a real GPU: the value cases of the emulation, streams, graph capture, large tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cuda_emulation import group_norm as gn
from cuda_emulation.group_norm import Case
from cuda_emulation.group_norm_cases import BACKWARD, CASES
from cuda_emulation.norms import ACTS, DTYPES, EPS, Z_INPUT, Z_OUTPUT, Z_RESIDUAL, assert_within
from support.checks import check_error_is_at_most_that_of_stock
from test_cuda_gpu import DEVICE, on_gpu
from torch import Tensor
from torch.nn import functional as F

import advdl_ops

pytestmark = pytest.mark.gpu

MORE = {"residual": True, "want_dresidual": True}
# What the emulation is too slow for: UNet's and ResNet's sizes, many splits, very many tiny sets.
BIG = [
    Case(2, 320, 64 * 64, 32, "first", "bf16", "silu"),
    Case(2, 320, 64 * 64, 32, "last", "bf16", "silu"),
    Case(2, 640, 32 * 32, 32, "last", "bf16", "silu", **MORE),
    Case(2, 1280, 16 * 16, 32, "first", "bf16", "silu", **MORE),
    Case(2, 1280, 8 * 8, 32, "last", "f16", "silu"),
    Case(8, 256, 56 * 56, 32, "first", "bf16", "relu", z_output=True, **MORE),
    Case(8, 256, 56 * 56, 32, "last", "bf16", "relu", z_output=True, **MORE),
    Case(16, 64, 112 * 112, 64, "first", "f32", "leaky_relu"),
    Case(16, 64, 112 * 112, 64, "last", "f32", "leaky_relu"),
    Case(1, 32, 20 * 64 * 64, 8, "first", "bf16", "silu"),
    Case(1, 32, 20 * 64 * 64, 1, "last", "bf16", "gelu"),
    Case(64, 2048, 7 * 7, 32, "first", "bf16", "relu"),
    Case(64, 2048, 7 * 7, 32, "last", "bf16", "relu"),
    Case(65536, 256, 1, 32, "first", "bf16", "silu"),
    Case(3, 70_001, 3, 1, "first", "bf16", "relu"),
    Case(1, 1, 3_000_001, 1, "first", "f32", "gelu"),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """On the GPU: the fp64 reference is computed there too."""
    return {name: value.to(DEVICE) for name, value in gn.make_inputs(case).items()}


def forward(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    code, param, _ = ACTS[case.act]
    given = (t.get(name) for name in ("residual", "weight", "bias"))
    out, stats = torch.ops.advdl_ops.group_norm(t["x"], *given, case.groups, EPS, code, param)
    return {"out": out, "mean": stats[0], "var": stats[1]}


def backward(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    code, param, _ = ACTS[case.act]
    source = Z_OUTPUT if case.z_output else Z_RESIDUAL if case.residual else Z_INPUT
    outputs = torch.ops.advdl_ops.group_norm_backward(
        t["dout"], t["x"], t.get("saved"), t.get("weight"), t.get("bias"),
        torch.stack([t["mean"], t["var"]]),
        case.groups, EPS, code, param, source, case.want_dx, case.want_dresidual,
    )  # fmt: skip
    return dict(zip(("dx", "dresidual", "dweight", "dbias"), outputs, strict=True))


def backward_tensors(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {k: v for k, v in inputs.items() if k in ("x", "dout", "weight", "bias")}
    return kept | gn.backward_inputs(case, inputs)


@pytest.mark.parametrize("case", [*CASES, *BIG], ids=str)
def test_forward(case: Case) -> None:
    inputs = make_inputs(case)
    assert_within(forward(case, on_gpu(case, inputs)), gn.forward_reference(case, inputs))


@pytest.mark.parametrize("case", [*BACKWARD, *BIG], ids=str)
def test_backward(case: Case) -> None:
    inputs = make_inputs(case)
    tensors = backward_tensors(case, inputs)
    assert_within(
        backward(case, on_gpu(case, tensors)), gn.backward_reference(case, inputs, tensors)
    )


@pytest.mark.parametrize("case", BIG, ids=str)
def test_two_runs_agree_bit_for_bit(case: Case) -> None:
    inputs = make_inputs(case)
    tensors = on_gpu(case, {**inputs, **backward_tensors(case, inputs)})
    runs = [{**forward(case, tensors), **backward(case, tensors)} for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_error_is_at_most_that_of_stock(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x, dout = (
        torch.randn(8, 48, 28, 28, device=DEVICE).to(dtype).to(memory_format=layout)
        for _ in range(2)
    )
    weight, bias = torch.rand(48, device=DEVICE) + 0.5, torch.randn(48, device=DEVICE)

    def run(fused: bool, to: torch.dtype) -> list[Tensor]:
        leaves = [v.detach().to(to).requires_grad_() for v in (x, weight, bias)]
        if fused:
            out = advdl_ops.functional.group_norm(leaves[0], 8, *leaves[1:], act="silu")
        else:
            out = F.silu(F.group_norm(leaves[0], 8, *leaves[1:]))
        return [out, *torch.autograd.grad(out, leaves, dout.to(to))]

    check_error_is_at_most_that_of_stock(run, dtype)


def test_second_stream() -> None:
    """Kernels run on the current stream: behind the work queued there, not beside it."""
    case = Case(8, 64, 56 * 56, 32, "first", "f32", "silu")
    inputs = make_inputs(case)
    tensors = on_gpu(case, inputs)
    late = torch.full_like(tensors["x"], float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(tensors["x"])
        result = forward(case, {**tensors, "x": late})
    side.synchronize()
    assert_within(result, gn.forward_reference(case, inputs))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("n", "s"), [(4, 49), (2, 64 * 1024)], ids=["fused", "split"])
def test_graph_capture(layout: str, n: int, s: int) -> None:
    case = Case(n, 64, s, 32, layout, "bf16", "silu", **MORE)
    inputs = make_inputs(case)
    tensors = on_gpu(case, {**inputs, **backward_tensors(case, inputs)})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward(case, tensors), backward(case, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result: dict[str, Any] = {**forward(case, tensors), **backward(case, tensors)}
    other = make_inputs(dataclasses.replace(case, mean=2.0))
    given = {**other, **backward_tensors(case, other)}
    for name, value in on_gpu(case, given).items():
        tensors[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    reference = gn.forward_reference(case, other) | gn.backward_reference(case, other, given)
    assert_within(result, reference)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["first", "last"])
def test_more_than_2_to_the_31_elements(layout: str) -> None:
    n, c, s = 3, 8, 90_000_000  # 2.16e9 elements, 4.3 GB each
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free GPU memory")
    case = Case(n, c, s, 4, layout, "bf16", "relu")
    x = torch.empty(
        (n, s, c) if layout == "last" else (n, c, s), dtype=DTYPES["bf16"], device=DEVICE
    )
    x = x.transpose(1, 2) if layout == "last" else x
    for i in range(
        n
    ):  # the two channels of a group are i + g and i + g + 2: mean i + g + 1, variance 1
        for channel in range(c):
            x[i, channel] = float(i + channel // 2 + channel % 2 * 2)
    result = forward(case, {"x": x})
    mean = torch.arange(n).double()[:, None] + torch.arange(4).double()[None, :] + 1
    torch.testing.assert_close(result["mean"].double().cpu(), mean.flatten(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        result["var"].double().cpu(), torch.ones(n * 4).double(), rtol=1e-5, atol=0
    )
    out = result["out"][:, :, [0, s // 2, s - 1]].float()
    assert (out[:, ::2] == 0).all()
    assert (out[:, 1::2] - (1 + EPS) ** -0.5).abs().max() < 0.01
