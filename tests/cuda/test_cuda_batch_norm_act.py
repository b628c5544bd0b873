"""Values of csrc/cuda/batch_norm_act.cu on machines without a GPU: every path through the host emulation."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation import Emulator, unavailable
from cuda_emulation import batch_norm_act as bna
from cuda_emulation.batch_norm_act import ACTS, DTYPES, Case
from cuda_emulation.norms import assert_order_changes_no_bit

ROOT = Path(__file__).resolve().parents[2]
# Blocks of a GPU without room for a slab: the paths that split a channel over blocks.
SPLIT = {"shared_limit": 8 * 1024}
RESERVE = 8 * 1024  # kScratchReserve

FIRST = [
    (1, 1, 2), (2, 3, 1), (1, 2, 7), (3, 5, 33), (2, 3, 130), (4, 3, 64), (2, 8, 49), (5, 2, 16),
    (7, 3, 8), (3, 2, 196), (130, 2, 3), (2, 1, 1030), (33, 4, 17),
]  # fmt: skip
LAST = [
    (2, 1, 1), (3, 3, 1), (7, 8, 1), (2, 16, 33), (5, 33, 7), (3, 64, 20), (2, 130, 9), (1, 40, 130),
    (2, 264, 5), (3, 24, 49), (1, 520, 3), (2, 272, 40), (130, 2, 3),
]  # fmt: skip
# Large enough that a channel is split over several blocks; for one block per tile most are too large.
LARGE = [
    ((2, 1, 20000), "first", "bf16"), ((3, 2, 12321), "first", "f32"), ((3, 1, 6000), "first", "f64"),
    ((5, 1, 6007), "first", "f16"), ((1, 8, 5000), "last", "bf16"), ((2, 3, 6001), "last", "f32"),
    ((1, 264, 150), "last", "f16"), ((2, 5, 2000), "last", "f64"),
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
            result.append(
                Case(
                    n, c, s, layout, dtype, next(acts),
                    residual=i % 3 == 1,
                    affine=i % 5 != 4,
                    running=i % 7 != 6,
                    param_dtype=dtype if dtype == "f64" or (half and i % 2) else "f32",
                    offset=(0, 1, 2)[i % 11 - 8] if i % 11 > 8 else 0,
                )
            )  # fmt: skip
    for i, ((n, c, s), layout, dtype) in enumerate(LARGE):
        param = "f64" if dtype == "f64" else "f32"
        act = ("relu", "silu", "identity")[i % 3]
        result.append(Case(n, c, s, layout, dtype, act, residual=i % 2 == 0, param_dtype=param))
    # relu and identity have kernels of their own: each with and without residual, vectors and single elements
    for layout, dtype, act, residual in itertools.product(
        ("first", "last"), ("f32", "bf16"), ("identity", "relu"), (False, True)
    ):
        for c, s in ((16, 64), (16, 23), (9, 40)):
            result.append(Case(3, c, s, layout, dtype, act, residual=residual))
    return sorted(set(result), key=str)


CASES = cases()


def one_block(cases: list[Case]) -> list[Case]:
    """Those that are fused wherever a slab fits."""
    return [c for c in cases if ((c.n, c.c, c.s), c.layout, c.dtype) not in LARGE]


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    if unavailable():
        pytest.skip(str(unavailable()))
    with Emulator() as running:
        yield running


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


def kernels(result: dict) -> int:
    return sum(is_kernel for is_kernel, *_ in result["launches"])


def split_kernels(case: Case) -> int:
    """Of a call in training mode that is not fused."""
    return 2 if case.layout == "first" else 3


# ---- forward ----


@pytest.mark.parametrize("case", one_block(CASES), ids=str)
def test_forward_training_fused(emulator: Emulator, case: Case) -> None:
    inputs = bna.make_inputs(case)
    result = bna.run_forward(emulator, case, inputs)
    bna.assert_within(result, bna.forward_reference(case, inputs))
    assert kernels(result) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_training_split(emulator: Emulator, case: Case) -> None:
    inputs = bna.make_inputs(case)
    result = bna.run_forward(emulator, case, inputs, **SPLIT)
    bna.assert_within(result, bna.forward_reference(case, inputs))
    assert kernels(result) == split_kernels(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_eval(emulator: Emulator, case: Case) -> None:
    case = dataclasses.replace(case, training=False)
    inputs = bna.make_inputs(case)
    result = bna.run_forward(emulator, case, inputs)
    bna.assert_within(result, bna.forward_reference(case, inputs))
    assert kernels(result) == 1


# ---- backward ----


def backward_variants(case: Case, i: int) -> Case:
    residual = case.residual
    return dataclasses.replace(
        case,
        want_dresidual=residual and i % 4 != 1,
        want_dx=i % 6 != 5,
        z_output=case.act == "relu" and i % 2 == 0,
    )


BACKWARD = [backward_variants(case, i) for i, case in enumerate(CASES)]


def check_backward(emulator: Emulator, case: Case, **settings) -> dict:
    inputs = bna.make_inputs(case)
    extra = bna.backward_inputs(case, inputs)
    result = bna.run_backward(emulator, case, inputs, extra, **settings)
    bna.assert_within(result, bna.backward_reference(case, inputs, extra))
    return result


@pytest.mark.parametrize("case", one_block(BACKWARD), ids=str)
def test_backward_training_fused(emulator: Emulator, case: Case) -> None:
    result = check_backward(emulator, case)
    assert kernels(result) == (1 if case.want_dx else 2)


MORE = {"residual": True, "want_dresidual": True, "z_output": True}
ONE_SLAB = [
    *[case for case in one_block(BACKWARD) if case.want_dx],
    Case(1, 3, 12001, "first", "bf16", **MORE),
    Case(1, 8, 3001, "last", "bf16", **MORE),
]


@pytest.mark.parametrize("case", ONE_SLAB, ids=str)
def test_backward_training_fused_without_room_for_dz(emulator: Emulator, case: Case) -> None:
    result = check_backward(emulator, case, shared_limit=RESERVE + slab(case) * 3 // 2)
    assert kernels(result) == 1


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward_training_split(emulator: Emulator, case: Case) -> None:
    result = check_backward(emulator, case, **SPLIT)
    assert kernels(result) == (split_kernels(case) if case.want_dx else 2)


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward_eval(emulator: Emulator, case: Case) -> None:
    result = check_backward(emulator, dataclasses.replace(case, training=False))
    assert kernels(result) == 2


# ---- which path ----

# Cases and the first size (of the named dimension) on the other side of the rule: docs/kernels.md, "Fused or split".
CROSSINGS = [
    # direction, case, dimension, first size, whether it is fused from there on
    ("forward", Case(1, 64, 3136, "first", "bf16"), "n", 17, False),
    ("forward", Case(1, 64, 3136, "first", "bf16", **MORE), "n", 11, False),
    ("forward", Case(128, 1, 784, "first", "bf16"), "c", 85, True),
    ("forward", Case(128, 1, 784, "first", "bf16"), "c", 133, False),
    ("forward", Case(128, 1, 784, "first", "bf16"), "c", 181, True),
    ("forward", Case(128, 1, 784, "first", "bf16", **MORE), "c", 99, True),
    ("forward", Case(1, 64, 49, "last", "bf16"), "n", 81, False),
    ("forward", Case(1, 64, 49, "last", "bf16", **MORE), "n", 61, False),
    ("forward", Case(128, 1, 49, "last", "bf16"), "c", 1021, True),
    ("forward", Case(128, 1, 49, "last", "bf16"), "c", 2113, False),
    ("backward", Case(1, 64, 3136, "first", "bf16"), "n", 12, False),
    ("backward", Case(1, 64, 3136, "first", "bf16", **MORE), "n", 7, False),
    ("backward", Case(128, 1, 784, "first", "bf16"), "c", 99, True),
    ("backward", Case(128, 1, 784, "first", "bf16", **MORE), "c", 108, True),
    ("backward", Case(128, 1, 784, "first", "bf16"), "c", 133, False),
    ("backward", Case(1, 64, 49, "last", "bf16"), "n", 68, False),
    ("backward", Case(1, 64, 49, "last", "bf16", **MORE), "n", 48, False),
    ("backward", Case(128, 1, 49, "last", "bf16"), "c", 1423, True),
]
# The same for few channels, small enough for values.
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


def sides(crossings: list) -> list:
    """(direction, case, fused) just before and at each crossing."""
    return [
        (direction, dataclasses.replace(case, **{dimension: size - before}), fused != bool(before))
        for direction, case, dimension, size, fused in crossings
        for before in (1, 0)
    ]


@pytest.mark.parametrize(("direction", "case", "fused"), sides(CROSSINGS), ids=str)
def test_the_path_follows_from_bytes(
    emulator: Emulator, direction: str, case: Case, fused: bool
) -> None:
    for offset in (0, 1):  # packs of 16 bytes and single elements: the same path
        result = bna.dry_run(emulator, dataclasses.replace(case, offset=offset), direction)
        assert kernels(result) == (1 if fused else split_kernels(case))
        assert (result["workspace"] == 0) == fused


@pytest.mark.parametrize(("direction", "case", "fused"), sides(SMALL_CROSSINGS), ids=str)
def test_values_on_both_sides_of_the_rule(
    emulator: Emulator, direction: str, case: Case, fused: bool
) -> None:
    if direction == "forward":
        inputs = bna.make_inputs(case)
        result = bna.run_forward(emulator, case, inputs)
        bna.assert_within(result, bna.forward_reference(case, inputs))
    else:
        result = check_backward(emulator, case)
    assert kernels(result) == (1 if fused else split_kernels(case))


# ---- what values alone do not show ----


@pytest.mark.parametrize("settings", [{}, SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_statistics_of_a_mean_far_from_zero(
    emulator: Emulator, settings: dict, layout: str, dtype: str
) -> None:
    """Mean 1e4, deviation about 1: E[x^2] - E[x]^2 in fp32 would keep no digit of the variance."""
    param = "f64" if dtype == "f64" else "f32"
    case = Case(4, 8, 750, layout, dtype, "identity", mean=1e4, param_dtype=param)
    inputs = bna.make_inputs(case)
    result = bna.run_forward(emulator, case, inputs, **settings)
    assert kernels(result) == (split_kernels(case) if settings else 1)
    bna.assert_within(result, bna.forward_reference(case, inputs))
    rstd = bna.forward_reference(case, inputs)["rstd"][0]
    assert ((result["rstd"].double() - rstd).abs() / rstd).max() < (
        1e-11 if dtype == "f64" else 1e-4
    )


@pytest.mark.parametrize("settings", [{}, SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "c", "s"), [("first", 5, 49), ("first", 4, 64), ("last", 24, 30), ("last", 5, 30)]
)
def test_nan_and_inf_stay_in_their_channel(
    emulator: Emulator, settings: dict, dtype: str, layout: str, c: int, s: int
) -> None:
    case = Case(3, c, s, layout, dtype, "relu", residual=True, want_dresidual=True)
    inputs = bna.make_inputs(case)
    extra = bna.backward_inputs(case, inputs)
    reference = bna.forward_reference(case, inputs)
    backward = bna.backward_reference(case, inputs, extra)
    clean = [0, 2, *range(4, c)]
    for position in (0, s - 1):
        inputs["x"][1, 1, position] = float("nan")
        inputs["x"][1, 3, position] = float("inf")
    result = bna.run_forward(emulator, case, inputs, **settings)
    result |= bna.run_backward(emulator, case, inputs, extra, **settings)
    for name, (value, allowed) in {**reference, **backward}.items():
        whole = value.dim() == 3
        pick = (lambda v: v[:, clean]) if whole else (lambda v: v[clean])
        bna.assert_within(
            {name: pick(result[name])}, {name: (pick(value), pick(allowed.expand_as(value)))}
        )
    assert result["out"][:, 1].isnan().all()
    assert result["out"][:, 3].isnan().any()
    assert result["dweight"][1].isnan()


@pytest.mark.parametrize("settings", [{}, SPLIT], ids=["fits", "split"])
@pytest.mark.parametrize(
    "case",
    [
        # The first two are split in any case.
        Case(3, 2, 12321, "first", "f32", "silu", residual=True, want_dresidual=True),
        Case(2, 1, 20000, "first", "bf16", "relu", residual=True, want_dresidual=True),
        Case(3, 2, 3333, "first", "f32", "silu", residual=True, want_dresidual=True),
        Case(33, 6, 49, "first", "bf16", "gelu", residual=True, want_dresidual=True),
        Case(1, 72, 900, "last", "f16", "relu", residual=True, want_dresidual=True),
        Case(2, 33, 700, "last", "f32", "silu", residual=True, want_dresidual=True),
    ],
    ids=str,
)
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulator: Emulator, case: Case, settings: dict
) -> None:
    assert_order_changes_no_bit(bna, emulator, case, settings)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("n", "c", "s"), [(0, 4, 3), (3, 4, 0), (3, 0, 5)])
def test_empty_tensors(emulator: Emulator, layout: str, n: int, c: int, s: int) -> None:
    case = Case(n, c, s, layout, "f32", "relu", training=False)
    inputs = bna.make_inputs(case)
    result = bna.run_forward(emulator, case, inputs)
    assert result["out"].numel() == 0
    if c:
        assert torch.equal(result["mean"], inputs["running_mean"])
        assert result["rstd"].isfinite().all()
    for training in (True, False):
        case = dataclasses.replace(case, training=training)
        extra = {"mean": torch.zeros(c), "rstd": torch.ones(c)}
        result = bna.run_backward(emulator, case, inputs, extra)
        assert kernels(result) == 0
        assert torch.equal(result["dweight"], torch.zeros(c))
        assert torch.equal(result["dbias"], torch.zeros(c))


def test_a_large_slab_is_read_once(emulator: Emulator) -> None:
    """7x7 at batch 128, channels_last: a tile of 16 channels fills 196 KB of shared memory, in one launch."""
    case = Case(128, 1024, 49, "last", "bf16", "relu")
    inputs = bna.make_inputs(case)
    result = bna.run_forward(emulator, case, inputs)
    bna.assert_within(result, bna.forward_reference(case, inputs))
    ((_, grid, _, shared),) = result["launches"]
    assert grid == 64
    assert 196 * 1024 <= shared <= 227 * 1024


# ---- what ptxas says ----


def ptxas_report(tmp_path: Path) -> str:
    """Of the build where there is one, else of one architecture compiled here."""
    for report in ROOT.glob("build/native/**/batch_norm_act.cu.o.ptxas"):
        return report.read_text()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs a CUDA build or nvcc")
    source, target = ROOT / "csrc" / "cuda" / "batch_norm_act.cu", tmp_path / "kernels.cubin"
    command = [
        nvcc,
        "-std=c++20",
        "-O3",
        "-arch=sm_90",
        "-cubin",
        "-Xptxas=-v",
        str(source),
        "-o",
        str(target),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.slow
def test_no_kernel_has_a_stack_frame_or_spills(tmp_path: Path) -> None:
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    report = re.findall(rf"Function properties for (\w+)\n.*?{frame}", ptxas_report(tmp_path))
    assert len(report) >= 100
    assert [line for line in report if line[1:] != ("0", "0", "0")] == []
