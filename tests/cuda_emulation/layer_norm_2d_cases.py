"""The cases of layer_norm_2d for the emulated kernels, and its part of the common tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import layer_norm_2d
from .layer_norm_2d import ACTS, DTYPES, Case
from .norm_suite import Expected, Suite, all_nan, empty_cases

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


def in_tiles(case: Case) -> bool:
    """Whether a block takes tiles, in packs or single elements; the others take rows."""
    lanes = 16 // DTYPES[case.dtype].itemsize if case.dtype != "f64" else 1
    if case.layout == "first" and case.s > 1:
        return True
    packs = case.offset == 0 and case.c % lanes == 0 and case.c // lanes <= MAX_TEAM
    return not packs and case.c > MAX_TEAM


def expected(direction: str, case: Case, path: str) -> Expected:
    if direction == "forward":
        return Expected(1, workspace=False)
    return Expected(2 if case.want_dweight else 1, workspace=case.want_dweight)


def poison(
    case: Case, inputs: dict[str, Tensor], extra: dict[str, Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """NaN at one position and Inf at another; returns what picks the values of the other positions."""
    bad = bad_positions(case)
    inputs["x"][1, case.c - 1, 1] = float("nan")
    inputs["x"][0, 0, case.s - 1] = float("inf")
    extra["mean"][bad.flatten()] = float("nan")

    def pick(name: str, v: Tensor) -> Tensor:
        if name in ("dweight", "dbias"):
            return v[:0]  # sums over all positions
        return v[~bad[:, None].expand(v.shape)] if v.dim() == 3 else v[~bad.flatten()]

    return pick


def bad_positions(case: Case) -> Tensor:
    bad = torch.zeros(case.n, case.s, dtype=torch.bool)
    bad[1, 1] = bad[0, case.s - 1] = True
    return bad


def check_poisoned(case: Case, result: dict[str, Any]) -> None:
    bad = bad_positions(case)
    assert all_nan(result["out"][bad[:, None].expand(case.n, case.c, case.s)])
    assert all_nan(result["var"][bad.flatten()])
    assert all_nan(result["dweight"])


def check_empty_forward(case: Case, result: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    assert result["launches"] == []


SUITE = Suite(
    name="layer_norm_2d",
    family=layer_norm_2d,
    settings={"fits": {}, "read again": SMALL},
    forward={"fits": CASES},
    backward={"fits": CASES},
    expected=expected,
    far_mean=[
        ("fits", case)
        for case in (
            Case(2, 64, 40, "last", "f32", mean=1e4),
            Case(2, 768, 9, "last", "f32", mean=1e4),
            Case(1, 2048, 5, "last", "f32", "relu", residual=True, mean=1e4),
            Case(1, 2049, 4, "last", "f32", mean=1e4),
            Case(2, 64, 40, "first", "f32", mean=1e4),
            Case(1, 768, 23, "first", "f32", mean=1e4),
            Case(2, 200, 9, "last", "f64", mean=1e4, param_dtype="f64"),
            Case(2, 200, 9, "first", "f64", mean=1e4, param_dtype="f64"),
        )
    ],
    order=[
        (path, case)
        for path in ("fits", "read again")
        for case in (
            Case(3, 96, 100, "first", "bf16", "silu", residual=True, want_dresidual=True),
            Case(2, 520, 25, "first", "f32", "relu", residual=True, want_dresidual=True),
            Case(3, 96, 100, "last", "bf16", "silu", residual=True, want_dresidual=True),
            Case(2, 768, 30, "last", "f16", "relu", residual=True, want_dresidual=True),
            Case(1, 2050, 18, "last", "f32", "gelu", residual=True, want_dresidual=True),
        )
    ],
    dirty=[
        (path, Case(2, c, s, layout, dtype, "relu", residual=True, want_dresidual=True))
        for path in ("fits", "read again")
        for dtype in ("f32", "bf16")
        for layout, c, s in (("first", 65, 9), ("first", 65, 32), ("last", 72, 9), ("last", 2050, 4))
    ],
    poison=poison,
    check_poisoned=check_poisoned,
    sources=("layer_norm_2d_rows", "layer_norm_2d_tiles"),
    empty=[
        case
        for want in (True, False)
        for case in empty_cases(
            lambda n, c, s, layout: Case(n, c, s, layout, "f32", "relu", want_dweight=want)  # noqa: B023
        )
    ],
    check_empty_forward=check_empty_forward,
)  # fmt: skip
