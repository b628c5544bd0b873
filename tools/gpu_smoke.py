"""Every CUDA operator once, on small odd shapes, forward and backward: what compute-sanitizer runs.

Values are the tests' matter; this only makes each kernel run in each layout and dtype.
"""

from __future__ import annotations

import os

# With torch's caching allocator a read past the end of a tensor would still hit memory of the process.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
os.environ["ADVDL_OPS_REQUIRE_NATIVE"] = "1"

import torch

from advdl_ops import functional as F


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


if __name__ == "__main__":
    batch_norm_act()
    torch.cuda.synchronize()
    print("gpu_smoke: done")
