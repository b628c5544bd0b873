"""The CUDA kernels of layer norm 2d through the host emulation: what test_cuda_norms.py does not ask."""

from __future__ import annotations

from typing import Any

import pytest
from cuda_emulation import Emulator
from cuda_emulation import layer_norm_2d as ln
from cuda_emulation.layer_norm_2d import Case
from cuda_emulation.layer_norm_2d_cases import CASES, SMALL, SUITE, in_tiles


def check_forward(emulator: Emulator, case: Case, **settings: int) -> dict[str, Any]:
    return SUITE.check_forward(emulator, case, "fits", **settings)


def check_backward(emulator: Emulator, case: Case, **settings: int) -> dict[str, Any]:
    return SUITE.check_backward(emulator, case, "fits", **settings)


# Those that leave room for what a block merges, but not for their tile.
WITHOUT_ROOM = [
    *[c for c in CASES if in_tiles(c) and c.c * c.s * c.n > 4000],
    Case(1, 2049, 3, "last", "f64", "silu", param_dtype="f64"),
    Case(2, 4100, 2, "last", "f16", "relu", residual=True, want_dresidual=True),
]


@pytest.mark.parametrize("case", WITHOUT_ROOM, ids=str)
def test_a_tile_without_room_is_read_again(emulator: Emulator, case: Case) -> None:
    roomy = ln.dry_run(emulator, case, "forward")["launches"][0][3]
    limit = max(SMALL["shared_limit"], roomy // 4)
    check_forward(emulator, case, shared_limit=limit)
    check_backward(emulator, case, shared_limit=limit)


# Blocks with more to do than one round of rows or one tile, and how many there are.
MANY = [
    ("forward", Case(1, 520, 2200, "last", "bf16"), 1056),  # 2 rows at a time
    ("backward", Case(1, 520, 200, "last", "bf16", "silu"), 132),  # 1 row
    ("backward", Case(1, 3, 600, "first", "f64", param_dtype="f64"), 132),  # tiles of 4 positions
    ("backward", Case(150, 513, 1, "first", "f32"), 132),  # and of 1
]


@pytest.mark.parametrize(("direction", "case", "blocks"), MANY, ids=str)
def test_blocks_take_more_than_one_turn(
    emulator: Emulator, direction: str, case: Case, blocks: int
) -> None:
    check = check_forward if direction == "forward" else check_backward
    assert check(emulator, case)["launches"][0][1] == blocks


# ---- launches ----

FINALIZE = (
    1024,
    2112,
)  # threads and shared bytes of finalize_grads where there are many rows of sums
# Shapes of ConvNeXt at batch 128, and at the limits: forward, backward (blocks, threads, shared bytes), and the
# workspace of backward.
LAUNCHES = [
    # rows: teams of 16, 96 and 512 threads
    (Case(128, 96, 3136, "last", "bf16"), (3136, 128, 64), (1056, 128, 4160), 811008),
    (Case(128, 768, 49, "last", "bf16"), (1056, 96, 48), (392, 96, 6192), 2408448),
    (Case(128, 768, 49, "last", "f32"), (1056, 192, 192), (392, 192, 6336), 2408448),
    (Case(128, 4096, 49, "last", "bf16"), (1056, 512, 256), (392, 512, 33024), 12845056),
    (Case(4096, 1, 1 << 20, "last", "f16"), (1048576, 128, 128), (1056, 128, 288), 8448),
    # a long row: tiles of one position
    (Case(128, 4104, 49, "last", "bf16"), (6272, 256, 8320), (392, 256, 57536), 12870144),
    # tiles, kept in shared memory
    (Case(128, 96, 3136, "first", "bf16"), (3136, 256, 38400), (1056, 256, 59136), 811008),
    (Case(128, 384, 196, "first", "bf16"), (392, 256, 56064), (784, 256, 54528), 3244032),
    (Case(128, 768, 49, "first", "bf16"), (392, 256, 26304), (392, 512, 82048), 2408448),
    (Case(128, 768, 49, "first", "f32"), (392, 256, 50880), (392, 256, 55872), 2408448),
    (Case(128, 2048, 64, "first", "bf16"), (512, 256, 67264), (512, 512, 149632), 8388608),
    (Case(128, 2048, 64, "first", "bf16", "gelu"), (512, 256, 67264), (512, 512, 215168), 8388608),
    (Case(1 << 20, 3, 1 << 12, "first", "f16"), (33554432, 128, 8448), (1056, 128, 6688), 25344),
    # and read again; without room for the sums of a block either
    (Case(2, 8192, 64, "first", "bf16"), (8, 512, 3264), (8, 512, 67712), 8388608),
    (Case(2, 64000, 8, "first", "f64"), (4, 512, 1632), (4, 512, 1088), 16384000),
]


@pytest.mark.parametrize(("case", "forward", "backward", "workspace"), LAUNCHES, ids=str)
def test_launches(
    emulator: Emulator, case: Case, forward: tuple, backward: tuple, workspace: int
) -> None:
    result = ln.dry_run(emulator, case, "forward")
    assert [launch[1:] for launch in result["launches"]] == [forward]
    assert result["workspace"] == 0
    result = ln.dry_run(emulator, case, "backward")
    first, (blocks, *config) = (launch[1:] for launch in result["launches"])
    assert first == backward
    assert blocks == (case.c + 7) // 8
    if backward[0] >= 256:
        assert tuple(config) == FINALIZE
    assert result["workspace"] == workspace


def test_a_gpu_with_less_shared_memory_reads_again(emulator: Emulator) -> None:
    """A100: 163 KB. The tile of 2048 channels with exact dz in fp32 does not fit there."""
    case = Case(128, 2048, 64, "first", "bf16", "gelu")
    result = ln.dry_run(emulator, case, "backward", shared_limit=163 * 1024)
    assert result["launches"][0][3] == 215168 - 2048 * 2 * 16 - 2048 * 2 * 32


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 600, 16, "first", "bf16", "silu", residual=True, want_dresidual=True),
        Case(1, 600, 16, "first", "f32", "relu", residual=True, want_dresidual=True),
        Case(1, 601, 7, "first", "f16", "relu"),
        Case(1, 4105, 2, "last", "bf16", "silu"),
    ],
    ids=str,
)
def test_a_tile_is_kept_where_it_just_fits(emulator: Emulator, case: Case) -> None:
    """And a block's sums for dweight and dbias beside it; then the sums go first."""
    needed = ln.dry_run(emulator, case, "forward")["launches"][0][3]
    for limit, fits in ((needed, True), (needed - 1, False)):
        shared = check_forward(emulator, case, shared_limit=limit)["launches"][0][3]
        assert (shared == needed) == fits
    sums = (2 * case.c * 4 + 15) // 16 * 16
    needed = ln.dry_run(emulator, case, "backward")["launches"][0][3]
    for limit, kept in (
        (needed, needed),
        (needed - 1, needed - sums),
        (needed - sums, needed - sums),
    ):
        shared = check_backward(emulator, case, shared_limit=limit)["launches"][0][3]
        assert shared == kept
    shared = check_backward(emulator, case, shared_limit=needed - sums - 1)["launches"][0][3]
    assert shared < needed - sums
