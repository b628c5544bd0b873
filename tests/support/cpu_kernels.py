"""Shared by the tests of the CPU kernels without torch (`_C.cpu`, the fixture `cpu`)."""

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ACTIVATIONS = {
    "identity": (0, lambda z: z),
    "relu": (1, torch.relu),
    "silu": (4, torch.nn.functional.silu),
    "gelu": (5, torch.nn.functional.gelu),
    "tanh": (8, torch.tanh),
}
# Each activation with or without a residual. relu with a residual uses the saved output (OUTPUT).
PAIRS = [
    ("identity", False),
    ("relu", False),
    ("relu", True),
    ("silu", True),
    ("gelu", False),
    ("tanh", True),
]
INPUT, RESIDUAL, OUTPUT = 0, 1, 2  # ZSource of csrc/common/tensor_types.h


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
