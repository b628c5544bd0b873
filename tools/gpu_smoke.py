"""Runs every CUDA operator once, on small odd shapes, forward and backward, for compute-sanitizer.

Values are not checked here but in the tests. This only runs each kernel in each layout and dtype.
"""

from __future__ import annotations

import os
import tempfile

# With torch's caching allocator a read past the end of a tensor would still hit memory of the process.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
os.environ["ADVDL_OPS_REQUIRE_NATIVE"] = "1"

import torch

from advdl_ops import functional as F
from advdl_ops import nn


def batch_norm_act() -> None:
    for shape in ((3, 5, 7, 9), (2, 33, 4, 4), (17, 6)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for channels_last in (False, True) if len(shape) == 4 else (False,):
                layout = torch.channels_last if channels_last else torch.contiguous_format
                x, residual = (
                    torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout)
                    for _ in range(2)
                )
                acc = torch.float64 if dtype == torch.float64 else torch.float32
                mean, var, weight, bias = torch.rand(4, shape[1], device="cuda", dtype=acc).unbind()
                for tensor in (x, residual, weight, bias):
                    tensor.requires_grad_()
                for training in (True, False):
                    for add in (None, residual):
                        out = F.batch_norm_act(
                            x,
                            mean.clone(),
                            var.clone(),
                            weight,
                            bias,
                            training,
                            residual=add,
                            act="relu",
                        )
                        out.float().sum().backward()


def lstm() -> None:
    """Units and rows, odd and aligned sizes, equal and different lengths."""
    for hidden in (7, 64):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for options in ({}, {"layer_norm": True, "zoneout": 0.2}, {"recurrent_dropout": 0.2}):
                for lengths in (None, [4, 1, 3]):
                    module = nn.LSTM(
                        5, hidden, bidirectional=True, device="cuda", dtype=dtype, **options
                    )
                    x = torch.randn(4, 3, 5, device="cuda", dtype=dtype, requires_grad=True)
                    module(x, lengths=lengths)[0].float().sum().backward()
            cell = nn.LSTMCell(5, hidden, device="cuda", dtype=dtype)
            h, c = cell(torch.randn(3, 5, device="cuda", dtype=dtype))
            (h.float().sum() + c.float().sum()).backward()
            projected = nn.LSTM(5, hidden, proj_size=3, device="cuda", dtype=dtype)
            projected(torch.randn(4, 3, 5, device="cuda", dtype=dtype))[0].float().sum().backward()


def conv2d() -> None:
    """Every implementation of each direction, because measuring a choice runs all of them."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ADVDL_OPS_CACHE"] = cache
        for shape, outputs, groups in (
            ((2, 7, 9, 8), 5, 1),
            ((2, 6, 9, 8), 4, 2),
            ((2, 5, 9, 8), 5, 5),
        ):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for layout in (torch.contiguous_format, torch.channels_last):
                    for stride, dilation in ((1, 2), (2, 1)):
                        x = torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout)
                        layer = nn.Conv2d(
                            shape[1], outputs, 3, stride, dilation, dilation, groups, act="silu",
                            device="cuda", dtype=dtype,
                        )  # fmt: skip
                        residual = torch.randn_like(layer(x))
                        layer(x.requires_grad_(), residual).float().sum().backward()


if __name__ == "__main__":
    batch_norm_act()
    lstm()
    conv2d()
    torch.cuda.synchronize()
    print("gpu_smoke: done")
