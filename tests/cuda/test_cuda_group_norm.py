"""The CUDA kernels of group norm through the host emulation: what test_cuda_norms.py does not ask."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_emulation import Emulator
from cuda_emulation import group_norm as gn
from cuda_emulation.group_norm import Case
from cuda_emulation.group_norm_cases import (
    BACKWARD,
    SPLIT,
    backward_kernels,
    fusable,
    in_columns,
)
from cuda_emulation.norms import DTYPES, assert_within, kernels


@pytest.mark.parametrize(
    "case",
    [
        *[case for case in BACKWARD if fusable(case) and case.want_dx][::3],
        Case(1, 6, 2001, 3, "first", "bf16", residual=True, want_dresidual=True, z_output=True),
        Case(1, 8, 901, 2, "last", "bf16", residual=True, want_dresidual=True),
    ],
    ids=str,
)
def test_backward_fused_without_room_for_dz(emulator: Emulator, case: Case) -> None:
    most = gn.dry_run(emulator, case, "backward")["launches"][0][-1]
    inputs = gn.make_inputs(case)
    extra = gn.backward_inputs(case, inputs)
    result = gn.run_backward(emulator, case, inputs, extra, shared_limit=most - 1)
    assert_within(result, gn.backward_reference(case, inputs, extra))
    if case.act in ("identity", "relu"):  # else dz is not kept in any case
        assert kernels(result) == backward_kernels(case, True)
        assert result["launches"][0][-1] < most


# N, C, S, groups: UNets, ResNets, 3-D volumes; very many tiny sets; one set of everything; more than 2^31 elements.
BIG = [
    (1, 128, 20 * 256 * 256, 32), (2, 320, 4096, 32), (2, 640, 1024, 32), (2, 1280, 256, 32), (2, 1280, 64, 32),
    (8, 256, 3136, 32), (128, 2048, 49, 32), (16, 64, 3136, 64), (65536, 256, 1, 32), (64, 65536, 1, 1),
    (1, 1, 3_000_000_000, 1), (70_000, 320, 49, 32), (3, 100_000, 7, 1), (1, 96, 3_000_001, 3), (4096, 2048, 4, 2048),
]  # fmt: skip


@pytest.mark.parametrize(("n", "c", "s", "groups"), BIG)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_size_can_be_launched(
    emulator: Emulator, n: int, c: int, s: int, groups: int, layout: str, offset: int
) -> None:
    for dtype in DTYPES:
        case = Case(n, c, s, groups, layout, dtype, "silu", offset=offset)
        for direction in ("forward", "backward"):
            result = gn.dry_run(emulator, case, direction)
            most = 3 if direction == "backward" or in_columns(case) else 2
            assert 1 <= kernels(result) <= most
            # partial results are small beside the tensor, but for channels of very few elements
            size = n * c * s * DTYPES[dtype].itemsize
            assert result["workspace"] <= max(
                size // 4, 16 * n * c * (dtype == "f64") + 8 * n * c * 2
            )


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_backward_sees_the_preactivation_of_forward(
    emulator: Emulator, layout: str, dtype: str
) -> None:
    """relu's mask from z, recomputed, is that of the output, bit for bit: on every path z is the same arithmetic."""
    case = Case(3, 12, 37, 4, layout, dtype, "relu", want_dresidual=True)
    inputs = gn.make_inputs(case)
    inputs["dout"] = torch.ones_like(inputs["dout"])
    for forward_settings, backward_settings in itertools.product(({}, SPLIT), repeat=2):
        forward = gn.run_forward(emulator, case, inputs, **forward_settings)
        extra = {name: forward[name] for name in ("mean", "var")}
        backward = gn.run_backward(emulator, case, inputs, extra, **backward_settings)
        assert torch.equal(backward["dresidual"] > 0, forward["out"] > 0)
