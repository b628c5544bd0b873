"""The CUDA kernels of batch norm through the host emulation: what test_cuda_norms.py does not ask."""

from __future__ import annotations

import pytest
from cuda_emulation import Emulator
from cuda_emulation.batch_norm_act import DTYPES, Case
from cuda_emulation.batch_norm_act_cases import BACKWARD, MORE, SUITE, one_block
from cuda_emulation.norm_suite import sides

RESERVE = 8 * 1024  # kScratchReserve
ROOMY = 227 * 1024  # of a GPU where the size alone decides the path


def slab(case: Case) -> int:
    """Bytes that one fused tile keeps of x (slab_bytes of the .cu)."""
    size = DTYPES[case.dtype].itemsize
    lanes = 1 if case.dtype == "f64" else 16 // size
    if case.layout == "last":
        channels = 1 << (case.c - 1).bit_length()
        return case.n * case.s * min(32, channels * size) + 16
    packs = case.s // lanes if case.s % lanes == 0 else (case.s + lanes - 2) // lanes + 1
    vectors = case.n * packs * lanes * size if case.s % lanes == 0 or case.s >= 2 * lanes else 0
    return max(case.n * case.s * size, vectors) + 16


ONE_SLAB = [
    *[case for case in one_block(BACKWARD) if case.want_dx],
    Case(1, 3, 12001, "first", "bf16", **MORE),
    Case(1, 8, 3001, "last", "bf16", **MORE),
]


@pytest.mark.parametrize("case", ONE_SLAB, ids=str)
def test_backward_fused_without_room_for_dz(emulator: Emulator, case: Case) -> None:
    SUITE.check_backward(emulator, case, "fused", shared_limit=RESERVE + slab(case) * 3 // 2)


# Crossings as those of the common tests, for few channels: small enough for values.
SMALL_CROSSINGS = [
    ("forward", Case(1, 1, 1, "first", "bf16"), "s", 39569, False),
    ("forward", Case(1, 1, 1, "first", "f32", "silu", residual=True), "s", 19785, False),
    ("forward", Case(1, 1, 1, "first", "f64", "gelu", param_dtype="f64"), "s", 19711, False),
    ("forward", Case(1, 9, 1, "last", "f32", "silu", residual=True), "s", 3641, False),
    ("forward", Case(1, 8, 1, "last", "bf16"), "s", 7920, False),
    ("forward", Case(1, 5, 1, "last", "f64", "tanh", param_dtype="f64"), "s", 6579, False),
    ("backward", Case(1, 3, 1, "first", "bf16", **MORE), "s", 26084, False),
    ("backward", Case(1, 1, 1, "first", "f16", "silu"), "s", 26413, False),
    ("backward", Case(1, 9, 1, "last", "f32", "silu", residual=True), "s", 3504, False),
    ("backward", Case(1, 8, 1, "last", "bf16", **MORE), "s", 4097, False),
    ("backward", Case(1, 5, 1, "last", "f64", "tanh", param_dtype="f64"), "s", 5644, False),
]


@pytest.mark.parametrize(("direction", "case", "path"), sides(SMALL_CROSSINGS), ids=str)
def test_values_on_both_sides_of_the_rule(
    emulator: Emulator, direction: str, case: Case, path: str
) -> None:
    check = SUITE.check_forward if direction == "forward" else SUITE.check_backward
    check(emulator, case, path, shared_limit=ROOMY)


def test_a_large_slab_is_read_once(emulator: Emulator) -> None:
    """7x7 at batch 128, channels_last: a tile of 16 channels fills 196 KB of shared memory, in one launch."""
    case = Case(128, 1024, 49, "last", "bf16", "relu")
    result = SUITE.check_forward(emulator, case, "fused")
    ((_, grid, _, shared),) = result["launches"]
    assert grid == 64
    assert 196 * 1024 <= shared <= 227 * 1024
