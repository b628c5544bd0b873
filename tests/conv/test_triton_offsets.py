"""Where Triton's kernels read and write in tensors of more than 2^31 elements, which exist only as addresses.

Triton's interpreter runs the last program of a launch. What it would load or store is noted instead: it has to be the
end of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

BATCH, OUT, IN, CHANNELS, BLOCK = 3, 20_000, 40_000, 32, 16
X = BATCH * IN * IN * CHANNELS  # elements; 4.8e9 pixels
Z = BATCH * OUT * OUT * CHANNELS
PIXELS = BATCH * OUT * OUT
BLOCKS = PIXELS // BLOCK
WEIGHT = 9 * CHANNELS
GEOMETRY = {
    "KH": 3, "KW": 3, "STRIDE_H": 2, "STRIDE_W": 2, "PAD_H": 1, "PAD_W": 1, "DIL_H": 1, "DIL_W": 1,
    "in_h": IN, "in_w": IN, "out_h": OUT, "out_w": OUT,
}  # fmt: skip
STEPS = {"STEP_H": 2, "STEP_W": 2, "batch": BATCH}
DENSE = GEOMETRY | {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "group_in": CHANNELS, "group_out": CHANNELS,
    "PRECISION": "ieee", "BLOCK_M": BLOCK, "BLOCK_N": CHANNELS, "BLOCK_K": BLOCK,
}  # fmt: skip
DEPTHWISE = GEOMETRY | {"channels": CHANNELS, "BLOCK_M": BLOCK, "BLOCK_N": CHANNELS}
SPLITS = {"pixels": PIXELS, "split_pixels": BLOCK}
FEW, MANY = 200, 2**25  # rows and columns of a workspace

# The kernel, its program, its numbers, the elements of its far tensors; elements of those that are not far.
LAUNCHES = {
    "forward": (
        "forward_kernel", (BLOCKS - 1, 0), DENSE | {"pixels": PIXELS, "ACT": 1, "PROLOGUE_ACT": 1},
        {"x_ptr": X, "out_ptr": Z, "residual_ptr": Z, "partial_ptr": 2 * BLOCKS * CHANNELS},
        {"w_ptr": CHANNELS * WEIGHT},
    ),
    "input gradient": (
        "input_gradient_kernel", (BLOCKS - 1, 3), DENSE | STEPS, {"dz_ptr": Z, "dx_ptr": X},
        {"w_ptr": CHANNELS * WEIGHT},
    ),
    "weight gradient": (
        "weight_gradient_kernel", (17, BLOCKS - 1), DENSE | SPLITS | {"PROLOGUE_ACT": 1},
        {"dz_ptr": Z, "x_ptr": X, "partial_ptr": BLOCKS * CHANNELS * WEIGHT}, {},
    ),
    "merged statistics": (
        "merge_statistics_kernel", (MANY // 16 - 1, 0),
        {"blocks": FEW, "pixels": FEW * BLOCK, "channels": MANY, "ROWS": BLOCK, "BLOCK_R": 64, "BLOCK_C": 16},
        {"partial_ptr": 2 * FEW * MANY}, {"sums_ptr": 2 * MANY},
    ),
    "sum of splits": (
        "sum_splits_kernel", (MANY // 64 - 1, 0), {"splits": FEW, "size": MANY, "BLOCK": 64},
        {"partial_ptr": FEW * MANY}, {"out_ptr": MANY},
    ),
    "depthwise forward": (
        "depthwise_forward_kernel", (BLOCKS - 1, 0), DEPTHWISE | {"pixels": PIXELS, "ACT": 1},
        {"x_ptr": X, "out_ptr": Z, "residual_ptr": Z}, {"w_ptr": WEIGHT},
    ),
    "depthwise input gradient": (
        "depthwise_input_gradient_kernel", (BLOCKS - 1, 3), DEPTHWISE | STEPS,
        {"dz_ptr": Z, "dx_ptr": X}, {"w_ptr": WEIGHT},
    ),
    "depthwise weight gradient": (
        "depthwise_weight_gradient_kernel", (8, BLOCKS - 1), DEPTHWISE | SPLITS,
        {"dz_ptr": Z, "x_ptr": X, "partial_ptr": BLOCKS * WEIGHT}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_last_program_reaches_the_ends(interpreted: Callable[..., Any], name: str) -> None:
    *_, far, near = LAUNCHES[name]
    assert all(elements > 2**31 for elements in far.values())
    touched = interpreted(touched_by, name)
    assert set(touched) == set(far) | set(near)
    for tensor, (least, most) in touched.items():
        elements = (far | near)[tensor]
        assert 0 <= least <= most < elements, tensor
        if tensor in far:
            assert most == elements - 1, tensor
        if tensor in far and not (
            tensor == "partial_ptr" and elements != BLOCKS * CHANNELS * WEIGHT
        ):
            assert least >= elements - 4 * IN * CHANNELS, tensor  # a few lines of the image


# --- In the worker --------------------------------------------------------------------------------------------------


class Addresses:
    """Stands in for a tensor of any size."""

    dtype = torch.float32

    def __init__(self, base: int) -> None:
        self.base = base

    def data_ptr(self) -> int:
        return self.base


def touched_by(name: str) -> dict[str, tuple[int, int]]:
    """The first and the last element of each tensor that one program would touch."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    from advdl_ops.triton import conv2d_kernels, depthwise_conv2d_kernels

    kernel, program, numbers, far, near = LAUNCHES[name]
    arguments: dict[str, Any] = {tensor: Addresses((i + 1) << 46) for i, tensor in enumerate(far | near)}  # fmt: skip
    touched: dict[str, list[int]] = {tensor: [] for tensor in arguments}

    def note(pointers: Any, mask: Any) -> None:
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(
            np.int64
        )
        if at.size == 0:
            return
        tensor = list(arguments)[(int(at.max()) + (1 << 45) >> 46) - 1]
        offsets = (at - arguments[tensor].base) // 4
        touched[tensor] += [int(offsets.min()), int(offsets.max())]

    def load(self: Any, pointers: Any, mask: Any, *_: Any) -> Any:
        note(pointers, mask)
        return TensorHandle(np.zeros(pointers.data.shape, np.float32), pointers.get_element_ty())

    before = {
        (InterpreterBuilder, "create_masked_load"): load,
        (InterpreterBuilder, "create_masked_store"): lambda _, p, __, mask, *___: note(p, mask),
        (InterpreterBuilder, "create_get_program_id"): lambda _, axis: TensorHandle(
            np.array([program[axis]], dtype=np.int32), int32()
        ),
        (GridExecutor, "_init_args_hst"): lambda _, *given: given,
        (GridExecutor, "_restore_args_dev"): lambda *_: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for (owner, attribute), function in before.items():
            patch.setattr(owner, attribute, function)
        module = conv2d_kernels if hasattr(conv2d_kernels, kernel) else depthwise_conv2d_kernels
        function = getattr(module, kernel)
        given = arguments | numbers
        function[(1,)](**{argument: given.get(argument) for argument in function.arg_names})
    return {tensor: (min(found), max(found)) for tensor, found in touched.items()}


def int32() -> Any:
    import triton.language as tl

    return tl.int32
