"""The LSTM on a real GPU beyond its values (test_lstm_values.py): graph capture, streams, determinism, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from advdl_ops import nn

pytestmark = pytest.mark.gpu

LENGTHS = (None, [9, 3, 12, 1])


def step(module: torch.nn.Module, x: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Output, states and gradients."""
    y, states = module(x, lengths=lengths)
    out = (y, *states)
    grads = torch.autograd.grad(out, [x, *module.parameters()], [torch.ones_like(t) for t in out])
    return [t.detach() for t in (*out, *grads)]


def make(dtype: torch.dtype, **options: object) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    module = nn.LSTM(16, 40, device="cuda", dtype=dtype, **options)
    return module, torch.randn(12, 4, 16, device="cuda", dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("options", [{}, {"proj_size": 8}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_capture(dtype: torch.dtype, options: dict[str, object]) -> None:
    module, x = make(dtype, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(module, x, None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x, None)
    with torch.no_grad():
        x.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, step(module, x, None), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_two_runs_and_another_stream_are_bitwise_equal(lengths: list[int] | None) -> None:
    module, x = make(torch.bfloat16, bidirectional=True)
    counted = None if lengths is None else torch.tensor(lengths)
    first = step(module, x, counted)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        again = step(module, x, counted)
    side.synchronize()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_the_anchor_s_size_against_cudnn() -> None:
    torch.manual_seed(0)
    stock = torch.nn.LSTM(768, 768, device="cuda")
    ours = nn.LSTM(768, 768, device="cuda")
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(64, 16, 768, device="cuda")
    with torch.no_grad():
        exact = stock.double()(x.double())[0]
        error, limit = ((m.float()(x)[0] - exact).abs().max() for m in (ours, stock))
    assert error <= limit + 4 * torch.finfo(torch.float32).eps
