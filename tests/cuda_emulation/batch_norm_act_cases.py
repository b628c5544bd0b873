"""The cases of batch_norm_act for the emulated kernels and for a real GPU, and its part of the common tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import batch_norm_act
from .batch_norm_act import ACTS, DTYPES, Case
from .norm_suite import Expected, Suite, all_nan, empty_cases

# Blocks of a GPU without room for a slab: the paths that split a channel over blocks.
SPLIT = {"shared_limit": 8 * 1024}

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


def backward_variants(case: Case, i: int) -> Case:
    residual = case.residual
    return dataclasses.replace(
        case,
        want_dresidual=residual and i % 4 != 1,
        want_dx=i % 6 != 5,
        z_output=case.act == "relu" and i % 2 == 0,
    )


BACKWARD = [backward_variants(case, i) for i, case in enumerate(CASES)]


def evaluated(cases: list[Case]) -> list[Case]:
    return [dataclasses.replace(case, training=False) for case in cases]


def split_kernels(case: Case) -> int:
    """Of a call in training mode that is not fused."""
    return 2 if case.layout == "first" else 3


def expected(direction: str, case: Case, path: str) -> Expected:
    if direction == "forward":
        if path == "split":
            return Expected(split_kernels(case), workspace=True)
        return Expected(1, workspace=False)
    if path == "eval" or not case.want_dx:
        return Expected(2, workspace=True)
    fused = path == "fused"
    return Expected(1 if fused else split_kernels(case), workspace=not fused)


MORE = {"residual": True, "want_dresidual": True, "z_output": True}
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


def poison(
    case: Case, inputs: dict[str, Tensor], _: dict[str, Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """NaN in channel 1 and Inf in channel 3; returns what picks the values of the other channels."""
    clean = [0, 2, *range(4, case.c)]
    for position in (0, case.s - 1):
        inputs["x"][1, 1, position] = float("nan")
        inputs["x"][1, 3, position] = float("inf")
    return lambda name, v: v[:, clean] if v.dim() == 3 else v[clean]


def check_poisoned(case: Case, result: dict[str, Any]) -> None:
    assert all_nan(result["out"][:, 1])
    assert result["out"][:, 3].isnan().any()
    assert result["dweight"][1].isnan()


def check_empty_forward(case: Case, result: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    assert result["out"].numel() == 0
    if case.c and not case.training:
        assert torch.equal(result["mean"], inputs["running_mean"])
        assert result["rstd"].isfinite().all()


SUITE = Suite(
    name="batch_norm_act",
    family=batch_norm_act,
    settings={"fused": {}, "split": SPLIT, "eval": {}},
    forward={"fused": one_block(CASES), "split": CASES, "eval": evaluated(CASES)},
    backward={"fused": one_block(BACKWARD), "split": BACKWARD, "eval": evaluated(BACKWARD)},
    expected=expected,
    far_mean=[
        (
            path,
            Case(
                4, 8, 750, layout, dtype, "identity", mean=1e4,
                param_dtype="f64" if dtype == "f64" else "f32",
            ),
        )
        for path in ("fused", "split")
        for layout in ("first", "last")
        for dtype in ("f32", "f64")
    ],
    order=[
        (path, case)
        for path in ("fused", "split")
        for case in (
            # The first two are split in any case.
            Case(3, 2, 12321, "first", "f32", "silu", residual=True, want_dresidual=True),
            Case(2, 1, 20000, "first", "bf16", "relu", residual=True, want_dresidual=True),
            Case(3, 2, 3333, "first", "f32", "silu", residual=True, want_dresidual=True),
            Case(33, 6, 49, "first", "bf16", "gelu", residual=True, want_dresidual=True),
            Case(1, 72, 900, "last", "f16", "relu", residual=True, want_dresidual=True),
            Case(2, 33, 700, "last", "f32", "silu", residual=True, want_dresidual=True),
        )
    ],
    dirty=[
        (path, Case(3, c, s, layout, dtype, "relu", residual=True, want_dresidual=True))
        for path in ("fused", "split")
        for dtype in ("f32", "bf16")
        for layout, c, s in (("first", 5, 49), ("first", 4, 64), ("last", 24, 30), ("last", 5, 30))
    ],
    poison=poison,
    check_poisoned=check_poisoned,
    sources=("batch_norm_act_forward", "batch_norm_act_backward"),
    crossings=CROSSINGS,
    spread="rstd",
    empty=[
        case
        for training in (True, False)
        for case in empty_cases(
            lambda n, c, s, layout: Case(n, c, s, layout, "f32", "relu", training=training)  # noqa: B023
        )
    ],
    check_empty_forward=check_empty_forward,
)  # fmt: skip
