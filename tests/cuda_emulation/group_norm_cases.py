"""The cases of group_norm for the emulated kernels and for a real GPU, and its part of the common tests."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import group_norm
from .group_norm import Case
from .norm_suite import Expected, Suite, all_nan, empty_cases
from .norms import ACTS, DTYPES, kernels

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


def backward_variants(case: Case, i: int) -> Case:
    return dataclasses.replace(
        case,
        want_dresidual=case.residual and i % 4 != 1,
        want_dx=i % 6 != 5,
        want_dweight=i % 7 != 3,
        z_output=case.act == "relu" and i % 2 == 0,
    )


BACKWARD = [backward_variants(case, i) for i, case in enumerate(CASES)]


def forward_kernels(case: Case, fused: bool) -> int:
    return 1 if fused else 3 if in_columns(case) else 2


def backward_kernels(case: Case, fused: bool) -> int:
    if not case.want_dx:
        return 1 + case.want_dweight
    return 1 + case.want_dweight if fused else 3


def expected(direction: str, case: Case, path: str) -> Expected:
    fused = path == "fused"
    if direction == "forward":
        return Expected(forward_kernels(case, fused), workspace=not fused)
    # Without dx there is nothing to fuse.
    workspace = not (fused and case.want_dx) or case.want_dweight
    return Expected(backward_kernels(case, fused), workspace)


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


def poison(
    case: Case, inputs: dict[str, Tensor], _: dict[str, Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """NaN in group 1 and Inf in group 3 of sample 1; returns what picks the values of the other sets."""
    channels = case.c // case.groups
    dirty = torch.zeros(case.n, case.groups, dtype=torch.bool)
    dirty[1, 1] = dirty[1, 3] = True
    for position in (0, case.s - 1):
        inputs["x"][1, 1 * channels, position] = float("nan")
        inputs["x"][1, 4 * channels - 1, position] = float("inf")

    def pick(name: str, v: Tensor) -> Tensor:
        if name in ("dweight", "dbias"):
            return v[~dirty.any(0).repeat_interleave(channels)]
        if v.dim() == 3:
            return v[~dirty.repeat_interleave(channels, 1)]
        return v[~dirty.flatten()]

    return pick


def check_poisoned(case: Case, result: dict[str, Any]) -> None:
    channels = case.c // case.groups
    assert all_nan(result["out"][1, channels : 2 * channels])
    assert result["out"][1, 3 * channels : 4 * channels].isnan().any()
    assert all_nan(result["dx"][1, channels : 2 * channels])
    assert result["dweight"][channels].isnan()


def check_empty_forward(case: Case, result: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    assert kernels(result) == 0
    assert torch.equal(result["mean"], torch.zeros(case.n * case.groups))
    assert torch.equal(result["var"], torch.zeros(case.n * case.groups))


SUITE = Suite(
    name="group_norm",
    family=group_norm,
    settings={"fused": {}, "split": SPLIT},
    forward={"fused": [case for case in CASES if fusable(case)], "split": CASES},
    backward={"fused": [case for case in BACKWARD if fusable(case)], "split": BACKWARD},
    expected=expected,
    far_mean=[
        (path, Case(2, 8, 750, 2, layout, dtype, "identity", mean=1e4))
        for path in ("fused", "split")
        for layout in ("first", "last")
        for dtype in ("f32", "f64")
    ],
    order=[
        (path, case)
        for path in ("fused", "split")
        for case in (
            Case(2, 3, 12321, 1, "first", "f32", "silu", residual=True, want_dresidual=True),
            Case(1, 2, 20000, 1, "first", "bf16", "relu", residual=True, want_dresidual=True),
            Case(3, 10, 333, 5, "first", "f32", "silu", residual=True, want_dresidual=True),
            Case(33, 12, 5, 4, "first", "bf16", "gelu", residual=True, want_dresidual=True),
            Case(1, 80, 900, 8, "last", "f16", "relu", residual=True, want_dresidual=True),
            Case(2, 36, 701, 4, "last", "f32", "silu", residual=True, want_dresidual=True),
            Case(2, 264, 40, 8, "last", "bf16", "silu", residual=True, want_dresidual=True),
        )
    ],
    dirty=[
        (path, Case(3, c, s, groups, layout, dtype, "relu", residual=True, want_dresidual=True))
        for path in ("fused", "split")
        for dtype in ("f32", "bf16")
        for layout, c, s, groups in (
            ("first", 12, 49, 6), ("first", 12, 64, 6), ("first", 18, 1, 6),
            ("last", 48, 30, 6), ("last", 18, 30, 6), ("last", 60, 8, 6),
        )
    ],
    poison=poison,
    check_poisoned=check_poisoned,
    sources=(
        "group_norm", "group_norm_runs", "group_norm_rows", "group_norm_columns",
        "group_norm_backward_columns",
    ),
    crossings=CROSSINGS,
    empty=empty_cases(lambda n, c, s, layout: Case(n, c, s, 2, layout, "f32", "relu")),
    check_empty_forward=check_empty_forward,
)  # fmt: skip
