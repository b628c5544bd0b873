"""Values of csrc/cuda/layer_norm_2d.cu on machines without a GPU: every path through the host emulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cuda_emulation import Emulator, unavailable
from cuda_emulation import layer_norm_2d as ln
from cuda_emulation.layer_norm_2d import ACTS, DTYPES, Case
from cuda_emulation.norms import assert_order_changes_no_bit

MAX_TEAM = 512  # kMaxTeam
# Blocks of a GPU without room for a tile, and then without room for a block's sums either.
SMALL = {"shared_limit": 12 * 1024}

FIRST = [
    (1, 1, 1), (2, 1, 5), (3, 3, 2), (2, 7, 8), (5, 3, 49), (2, 7, 196), (1, 33, 64), (2, 64, 49),
    (3, 96, 56), (1, 130, 24), (2, 768, 16), (1, 1000, 7), (1, 2049, 8),
]  # fmt: skip
LAST = [
    (1, 1, 1), (2, 3, 7), (3, 7, 49), (33, 8, 3), (5, 16, 7), (2, 64, 49), (1, 96, 56), (3, 130, 5),
    (2, 264, 9), (3, 768, 7), (1, 1000, 8), (2, 2048, 2), (1, 2049, 3),
]  # fmt: skip


def cases() -> list[Case]:
    """Each shape in each dtype; activations, residual, parameters and alignment take turns."""
    acts = itertools.cycle(ACTS)
    turn = itertools.count()
    result = []
    for layout, shapes in (("first", FIRST), ("last", LAST)):
        for (n, c, s), dtype in itertools.product(shapes, DTYPES):
            i = next(turn)
            half = dtype in ("f16", "bf16")
            act = next(acts)
            residual = i % 3 == 1
            result.append(
                Case(
                    n, c, s, layout, dtype, act,
                    residual=residual,
                    affine=i % 5 != 4,
                    bias=i % 7 != 5,
                    param_dtype=dtype if dtype == "f64" or (half and i % 2) else "f32",
                    offset=(0, 1, 2)[i % 11 - 8] if i % 11 > 8 else 0,
                    want_dresidual=residual and i % 4 != 1,
                    want_dx=i % 6 != 5,
                    want_dweight=i % 8 != 7,
                    z_output=act == "relu" and i % 4 == 1,
                )
            )  # fmt: skip
    # Packs have kernels of their own for relu and identity: with and without residual, for each activation
    for layout, dtype, act in itertools.product(("first", "last"), ("f32", "bf16"), ACTS):
        result.append(Case(3, 40, 24, layout, dtype, act))
        result.append(Case(3, 24, 40, layout, dtype, act, residual=True, want_dresidual=True))
        result.append(Case(2, 5, 27, layout, dtype, act, residual=True, want_dresidual=True))
    return sorted(set(result), key=str)


CASES = cases()


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    if unavailable():
        pytest.skip(str(unavailable()))
    with Emulator() as running:
        yield running


def kernels(result: dict) -> int:
    return sum(is_kernel for is_kernel, *_ in result["launches"])


def check_forward(emulator: Emulator, case: Case, **settings) -> dict:
    inputs = ln.make_inputs(case)
    result = ln.run_forward(emulator, case, inputs, **settings)
    ln.assert_within(result, ln.forward_reference(case, inputs))
    assert kernels(result) == 1
    assert result["workspace"] == 0
    return result


def check_backward(emulator: Emulator, case: Case, **settings) -> dict:
    inputs = ln.make_inputs(case)
    extra = ln.backward_inputs(case, inputs)
    result = ln.run_backward(emulator, case, inputs, extra, **settings)
    ln.assert_within(result, ln.backward_reference(case, inputs, extra))
    assert kernels(result) == (2 if case.want_dweight else 1)
    assert (result["workspace"] > 0) == case.want_dweight
    return result


def in_tiles(case: Case) -> bool:
    """Whether a block takes tiles, in packs or single elements; the others take rows."""
    lanes = 16 // DTYPES[case.dtype].itemsize if case.dtype != "f64" else 1
    if case.layout == "first" and case.s > 1:
        return True
    packs = case.offset == 0 and case.c % lanes == 0 and case.c // lanes <= MAX_TEAM
    return not packs and case.c > MAX_TEAM


# ---- values ----


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(emulator: Emulator, case: Case) -> None:
    check_forward(emulator, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(emulator: Emulator, case: Case) -> None:
    check_backward(emulator, case)


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
    (Case(128, 4104, 49, "last", "bf16"), (6272, 256, 8316), (392, 256, 57528), 12870144),
    # tiles, kept in shared memory
    (Case(128, 96, 3136, "first", "bf16"), (3136, 256, 38400), (1056, 256, 59136), 811008),
    (Case(128, 384, 196, "first", "bf16"), (392, 256, 56064), (784, 256, 54528), 3244032),
    (Case(128, 768, 49, "first", "bf16"), (392, 256, 26304), (392, 512, 82048), 2408448),
    (Case(128, 768, 49, "first", "f32"), (392, 256, 50880), (392, 256, 55872), 2408448),
    (Case(128, 2048, 64, "first", "bf16"), (512, 256, 67264), (512, 512, 149632), 8388608),
    (Case(128, 2048, 64, "first", "bf16", "gelu"), (512, 256, 67264), (512, 512, 215168), 8388608),
    (Case(1 << 20, 3, 1 << 12, "first", "f16"), (33554432, 128, 8448), (1056, 128, 6680), 25344),
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
    sums = 2 * case.c * 4
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


# ---- what values alone do not show ----


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 64, 40, "last", "f32", mean=1e4),
        Case(2, 768, 9, "last", "f32", mean=1e4),
        Case(1, 2048, 5, "last", "f32", "relu", residual=True, mean=1e4),
        Case(1, 2049, 4, "last", "f32", mean=1e4),
        Case(2, 64, 40, "first", "f32", mean=1e4),
        Case(1, 768, 23, "first", "f32", mean=1e4),
        Case(2, 200, 9, "last", "f64", mean=1e4, param_dtype="f64"),
        Case(2, 200, 9, "first", "f64", mean=1e4, param_dtype="f64"),
    ],
    ids=str,
)
def test_statistics_of_a_mean_far_from_zero(emulator: Emulator, case: Case) -> None:
    """Mean 1e4, deviation about 1: E[x^2] - E[x]^2 in fp32 would keep no digit of the variance."""
    inputs = ln.make_inputs(case)
    reference = ln.forward_reference(case, inputs)
    result = check_forward(emulator, case)
    var = reference["var"][0]
    error = ((result["var"].double() - var).abs() / var).max()
    assert error < (1e-11 if case.dtype == "f64" else 1e-4)
    check_backward(emulator, case)


@pytest.mark.parametrize("limit", [{}, SMALL], ids=["fits", "read again"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "c", "s"), [("first", 65, 9), ("first", 65, 32), ("last", 72, 9), ("last", 2050, 4)]
)
def test_nan_and_inf_stay_at_their_position(
    emulator: Emulator, layout: str, c: int, s: int, dtype: str, limit: dict
) -> None:
    case = Case(2, c, s, layout, dtype, "relu", residual=True, want_dresidual=True)
    inputs = ln.make_inputs(case)
    extra = ln.backward_inputs(case, inputs)
    reference = ln.forward_reference(case, inputs)
    reference |= {
        name: value
        for name, value in ln.backward_reference(case, inputs, extra).items()
        if name in ("dx", "dresidual")
    }
    bad = torch.zeros(2, s, dtype=torch.bool)
    bad[1, 1] = bad[0, s - 1] = True
    inputs["x"][1, c - 1, 1] = float("nan")
    inputs["x"][0, 0, s - 1] = float("inf")
    extra["mean"][bad.flatten()] = float("nan")
    result = ln.run_forward(emulator, case, inputs, **limit)
    result |= ln.run_backward(emulator, case, inputs, extra, **limit)
    for name, (value, allowed) in reference.items():
        pick = ~bad[:, None].expand(2, c, s) if value.dim() == 3 else ~bad.flatten()
        expected = {name: (value[pick], allowed.expand_as(value)[pick])}
        ln.assert_within({name: result[name][pick]}, expected)
    assert result["out"][bad[:, None].expand(2, c, s)].isnan().all()
    assert result["var"][bad.flatten()].isnan().all()
    assert result["dweight"].isnan().all()


@pytest.mark.parametrize("limit", [{}, SMALL], ids=["fits", "read again"])
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 96, 100, "first", "bf16", "silu", residual=True, want_dresidual=True),
        Case(2, 520, 25, "first", "f32", "relu", residual=True, want_dresidual=True),
        Case(3, 96, 100, "last", "bf16", "silu", residual=True, want_dresidual=True),
        Case(2, 768, 30, "last", "f16", "relu", residual=True, want_dresidual=True),
        Case(1, 2050, 18, "last", "f32", "gelu", residual=True, want_dresidual=True),
    ],
    ids=str,
)
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulator: Emulator, case: Case, limit: dict
) -> None:
    assert_order_changes_no_bit(ln, emulator, case, limit)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("n", "c", "s"), [(0, 4, 3), (3, 4, 0), (3, 0, 5)])
@pytest.mark.parametrize("want_dweight", [True, False])
def test_empty_tensors(
    emulator: Emulator, layout: str, n: int, c: int, s: int, want_dweight: bool
) -> None:
    case = Case(n, c, s, layout, "f32", "relu", want_dweight=want_dweight)
    inputs = ln.make_inputs(case)
    assert ln.run_forward(emulator, case, inputs)["launches"] == []
    extra = {"mean": torch.zeros(n * s), "var": torch.ones(n * s)}
    result = ln.run_backward(emulator, case, inputs, extra)
    assert kernels(result) == result["workspace"] == 0
    if want_dweight:
        assert torch.equal(result["dweight"], torch.zeros(c))
        assert torch.equal(result["dbias"], torch.zeros(c))
