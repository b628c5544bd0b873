"""Values of csrc/cuda/group_norm.cu on machines without a GPU: every path through the host emulation."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation import Emulator, unavailable
from cuda_emulation import group_norm as gn
from cuda_emulation.group_norm import Case
from cuda_emulation.norms import ACTS, DTYPES, assert_order_changes_no_bit, assert_within, kernels

ROOT = Path(__file__).resolve().parents[2]
# Blocks of a GPU without room for a slab: the paths that split a set over blocks.
SPLIT = {"shared_limit": 64}

# N, C, S, groups
FIRST = [
    (1, 1, 1, 1), (2, 4, 1, 2), (3, 6, 1, 2), (70, 16, 1, 2), (40, 24, 1, 3), (3, 40, 1, 5), (2, 6, 7, 3),
    (5, 20, 3, 2), (33, 12, 5, 4), (2, 6, 49, 3), (3, 4, 64, 4), (2, 5, 33, 5), (2, 8, 16, 2), (1, 3, 130, 1),
    (2, 20, 9, 2), (1, 64, 4, 4), (2, 20, 64, 10), (2, 2, 1030, 1), (3, 10, 100, 2), (1, 70, 31, 7),
    (2, 20, 5, 2), (2, 10, 6, 2), (2, 6, 7, 1), (1, 1, 31, 1),
]  # fmt: skip
LAST = [
    (1, 1, 2, 1), (2, 4, 3, 2), (2, 8, 7, 4), (3, 16, 33, 2), (2, 40, 9, 4), (1, 24, 49, 3), (2, 12, 8, 3),
    (2, 3, 16, 1), (2, 12, 7, 4), (3, 33, 5, 3), (1, 64, 20, 64), (2, 130, 9, 2), (1, 264, 5, 8), (1, 520, 3, 1),
    (2, 80, 12, 8), (1, 256, 6, 1), (4, 6, 4, 6), (1, 20, 40, 2), (2, 72, 130, 9), (70, 8, 2, 2), (5, 16, 1, 4),
]  # fmt: skip
# Large enough that a set is split over several blocks.
LARGE = [
    ((1, 2, 20000, 1), "first", "bf16"), ((2, 3, 12321, 1), "first", "f32"), ((1, 1, 36000, 1), "first", "f64"),
    ((1, 3, 6007, 1), "first", "f16"), ((1, 2100, 1, 1), "first", "bf16"), ((2, 2053, 3, 1), "first", "f32"),
    ((1, 8, 5000, 2), "last", "bf16"), ((2, 3, 6001, 3), "last", "f32"), ((1, 264, 150, 8), "last", "f16"),
    ((2, 5, 4000, 1), "last", "f64"), ((1, 12, 4002, 2), "last", "bf16"), ((1, 80, 420, 8), "last", "f32"),
]  # fmt: skip


def cases() -> list[Case]:
    """Each shape in each dtype; activations, residual, parameters and alignment take turns."""
    acts = itertools.cycle(ACTS)
    turn = itertools.count()
    result = []
    for layout, shapes in (("first", FIRST), ("last", LAST)):
        for (n, c, s, groups), dtype in itertools.product(shapes, DTYPES):
            i = next(turn)
            params = ("f32", "f64" if dtype == "f64" else "f32", dtype, "bf16", "f16")
            result.append(
                Case(
                    n, c, s, groups, layout, dtype, next(acts),
                    residual=i % 3 == 1,
                    weight=i % 5 != 4,
                    bias=i % 7 != 6,
                    param_dtype=params[i % 5],
                    offset=(0, 1, 2)[i % 11 - 8] if i % 11 > 8 else 0,
                )
            )  # fmt: skip
    for i, ((n, c, s, groups), layout, dtype) in enumerate(LARGE):
        act = ("relu", "silu", "identity")[i % 3]
        result.append(Case(n, c, s, groups, layout, dtype, act, residual=i % 2 == 0))
    # relu and identity have kernels of their own: each with and without residual, vectors and single elements
    for layout, dtype, act, residual in itertools.product(
        ("first", "last"), ("f32", "bf16"), ("identity", "relu"), (False, True)
    ):
        for c, s in ((16, 64), (16, 23), (10, 12)):
            result.append(Case(3, c, s, 2, layout, dtype, act, residual=residual))
    return sorted(set(result), key=str)


CASES = cases()


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    if unavailable():
        pytest.skip(str(unavailable()))
    with Emulator() as running:
        yield running


def in_columns(case: Case) -> bool:
    return case.layout == "last" and case.s > 1


def fusable(case: Case) -> bool:
    """Whether whole sets and whole packs make a tile of at most 256 channels; what is small enough is fused then."""
    if ((case.n, case.c, case.s, case.groups), case.layout, case.dtype) in LARGE:
        return False
    if not in_columns(case):
        return True
    lanes = {"f64": 1, "f32": 4}.get(case.dtype, 8)
    repeats = lanes // math.gcd(case.c, lanes)
    if case.s % repeats:
        repeats, lanes = 1, 1
    tile = case.c * repeats if repeats > 1 else math.lcm(case.c // case.groups, lanes)
    return tile <= 256


FUSABLE = [case for case in CASES if fusable(case)]


def forward_kernels(case: Case, fused: bool) -> int:
    return 1 if fused else 3 if in_columns(case) else 2


def backward_kernels(case: Case, fused: bool) -> int:
    if not case.want_dx:
        return 1 + case.want_dweight
    return 1 + case.want_dweight if fused else 3


# ---- values ----


def check_forward(emulator: Emulator, case: Case, fused: bool | None, **settings) -> None:
    inputs = gn.make_inputs(case)
    result = gn.run_forward(emulator, case, inputs, **settings)
    assert_within(result, gn.forward_reference(case, inputs))
    if fused is not None:
        assert kernels(result) == forward_kernels(case, fused)
        assert (result["workspace"] == 0) == fused


def check_backward(emulator: Emulator, case: Case, fused: bool | None, **settings) -> dict:
    inputs = gn.make_inputs(case)
    extra = gn.backward_inputs(case, inputs)
    result = gn.run_backward(emulator, case, inputs, extra, **settings)
    assert_within(result, gn.backward_reference(case, inputs, extra))
    if fused is not None:
        assert kernels(result) == backward_kernels(case, fused)
    return result


@pytest.mark.parametrize("case", FUSABLE, ids=str)
def test_forward_fused(emulator: Emulator, case: Case) -> None:
    check_forward(emulator, case, True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_split(emulator: Emulator, case: Case) -> None:
    check_forward(emulator, case, False, **SPLIT)


def backward_variants(case: Case, i: int) -> Case:
    return dataclasses.replace(
        case,
        want_dresidual=case.residual and i % 4 != 1,
        want_dx=i % 6 != 5,
        want_dweight=i % 7 != 3,
        z_output=case.act == "relu" and i % 2 == 0,
    )


BACKWARD = [backward_variants(case, i) for i, case in enumerate(CASES)]


@pytest.mark.parametrize("case", [case for case in BACKWARD if fusable(case)], ids=str)
def test_backward_fused(emulator: Emulator, case: Case) -> None:
    result = check_backward(emulator, case, True)
    assert (result["workspace"] == 0) == (case.want_dx and not case.want_dweight)


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward_split(emulator: Emulator, case: Case) -> None:
    check_backward(emulator, case, False, **SPLIT)


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
    result = check_backward(emulator, case, None, shared_limit=most - 1)
    if case.act in ("identity", "relu"):  # else dz is not kept in any case
        assert kernels(result) == backward_kernels(case, True)
        assert result["launches"][0][-1] < most


# ---- which path ----

MORE = {"residual": True, "want_dresidual": True, "z_output": True}
# Cases and the first size (of the named dimension) on the other side of the rule: docs/kernels.md, "Fused or split".
CROSSINGS = [
    # direction, case, dimension, first size, whether it is fused from there on
    ("forward", Case(1, 32, 1, 32, "first", "bf16"), "s", 35425, False),
    ("forward", Case(1, 32, 1, 32, "first", "bf16", **MORE), "s", 32769, False),
    ("forward", Case(1, 320, 4096, 32, "first", "bf16"), "n", 2, True),
    ("forward", Case(1, 64, 1, 32, "last", "bf16"), "s", 3925, False),
    ("forward", Case(1, 64, 1, 32, "last", "bf16", **MORE), "s", 2953, False),
    ("backward", Case(1, 32, 1, 32, "first", "bf16"), "s", 24577, False),
    ("backward", Case(1, 32, 1, 32, "first", "bf16", **MORE), "s", 18433, False),
    ("backward", Case(1, 320, 4096, 32, "first", "bf16"), "n", 6, True),
    ("backward", Case(1, 64, 1, 32, "last", "bf16"), "s", 2410, False),
    ("backward", Case(1, 64, 1, 32, "last", "bf16", **MORE), "s", 1793, False),
    ("backward", Case(1, 640, 1024, 32, "last", "bf16"), "n", 5, True),
    ("backward", Case(1, 640, 1024, 32, "last", "bf16"), "n", 9, False),
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
        result = gn.dry_run(emulator, dataclasses.replace(case, offset=offset), direction)
        count = forward_kernels if direction == "forward" else backward_kernels
        assert kernels(result) == count(case, fused)


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


# ---- what values alone do not show ----


@pytest.mark.parametrize("settings", [{}, SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_statistics_of_a_mean_far_from_zero(
    emulator: Emulator, settings: dict, layout: str, dtype: str
) -> None:
    """Mean 1e4, deviation about 1: E[x^2] - E[x]^2 in fp32 would keep no digit of the variance."""
    case = Case(2, 8, 750, 2, layout, dtype, "identity", mean=1e4)
    inputs = gn.make_inputs(case)
    result = gn.run_forward(emulator, case, inputs, **settings)
    reference = gn.forward_reference(case, inputs)
    assert kernels(result) == forward_kernels(case, not settings)
    assert_within(result, reference)
    var = reference["var"][0]
    assert ((result["var"].double() - var).abs() / var).max() < (1e-11 if dtype == "f64" else 1e-4)


@pytest.mark.parametrize("settings", [{}, SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "c", "s", "groups"),
    [
        ("first", 12, 49, 6), ("first", 12, 64, 6), ("first", 18, 1, 6),
        ("last", 48, 30, 6), ("last", 18, 30, 6), ("last", 60, 8, 6),
    ],
)  # fmt: skip
def test_nan_and_inf_stay_in_their_set(
    emulator: Emulator, settings: dict, dtype: str, layout: str, c: int, s: int, groups: int
) -> None:
    case = Case(3, c, s, groups, layout, dtype, "relu", residual=True, want_dresidual=True)
    inputs = gn.make_inputs(case)
    extra = gn.backward_inputs(case, inputs)
    references = gn.forward_reference(case, inputs) | gn.backward_reference(case, inputs, extra)
    channels = c // groups
    dirty = torch.zeros(3, groups, dtype=torch.bool)
    dirty[1, 1] = dirty[1, 3] = True
    for position in (0, s - 1):
        inputs["x"][1, 1 * channels, position] = float("nan")
        inputs["x"][1, 4 * channels - 1, position] = float("inf")
    result = gn.run_forward(emulator, case, inputs, **settings)
    result |= gn.run_backward(emulator, case, inputs, extra, **settings)
    for name, (value, allowed) in references.items():
        if name in ("dweight", "dbias"):
            clean = ~dirty.any(0).repeat_interleave(channels)
        elif value.dim() == 3:
            clean = ~dirty.repeat_interleave(channels, 1)
        else:
            clean = ~dirty.flatten()
        assert_within({name: result[name][clean]}, {name: (value[clean], allowed[clean])})
    assert result["out"][1, channels : 2 * channels].isnan().all()
    assert result["out"][1, 3 * channels : 4 * channels].isnan().any()
    assert result["dx"][1, channels : 2 * channels].isnan().all()
    assert result["dweight"][channels].isnan()


@pytest.mark.parametrize("settings", [{}, SPLIT], ids=["fits", "split"])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 12321, 1, "first", "f32", "silu", residual=True, want_dresidual=True),
        Case(1, 2, 20000, 1, "first", "bf16", "relu", residual=True, want_dresidual=True),
        Case(3, 10, 333, 5, "first", "f32", "silu", residual=True, want_dresidual=True),
        Case(33, 12, 5, 4, "first", "bf16", "gelu", residual=True, want_dresidual=True),
        Case(1, 80, 900, 8, "last", "f16", "relu", residual=True, want_dresidual=True),
        Case(2, 36, 701, 4, "last", "f32", "silu", residual=True, want_dresidual=True),
        Case(2, 264, 40, 8, "last", "bf16", "silu", residual=True, want_dresidual=True),
    ],
    ids=str,
)
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulator: Emulator, case: Case, settings: dict
) -> None:
    assert_order_changes_no_bit(gn, emulator, case, settings)


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


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("n", "c", "s"), [(0, 4, 3), (3, 4, 0), (3, 0, 5)])
def test_empty_tensors(emulator: Emulator, layout: str, n: int, c: int, s: int) -> None:
    case = Case(n, c, s, 2, layout, "f32", "relu")
    inputs = gn.make_inputs(case)
    result = gn.run_forward(emulator, case, inputs)
    assert kernels(result) == 0
    assert torch.equal(result["mean"], torch.zeros(n * 2))
    assert torch.equal(result["var"], torch.zeros(n * 2))
    extra = {name: result[name] for name in ("mean", "var")}
    result = gn.run_backward(emulator, case, inputs, extra)
    assert kernels(result) == 0
    assert torch.equal(result["dweight"], torch.zeros(c))
    assert torch.equal(result["dbias"], torch.zeros(c))


# ---- what ptxas says ----


def ptxas_report(tmp_path: Path) -> str:
    """Of the build where there is one, else of one architecture compiled here."""
    for report in ROOT.glob("build/native/**/group_norm.cu.o.ptxas"):
        return report.read_text()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs a CUDA build or nvcc")
    source, target = ROOT / "csrc" / "cuda" / "group_norm.cu", tmp_path / "kernels.cubin"
    flags = ["-std=c++20", "-O3", "-arch=sm_90", "-cubin", "-Xptxas=-v"]
    command = [nvcc, *flags, str(source), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.slow
def test_no_kernel_has_a_stack_frame_or_spills(tmp_path: Path) -> None:
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    report = re.findall(rf"Function properties for (\w+)\n.*?{frame}", ptxas_report(tmp_path))
    assert len(report) >= 50
    assert [line for line in report if line[1:] != ("0", "0", "0")] == []
