"""What the common tests of tests/cuda/test_cuda_norms.py ask of each norm family.

A *path* is one way through the kernels, as "fused" or "split" over blocks. The emulated shared memory chooses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .norms import assert_within, kernels


@dataclasses.dataclass(frozen=True)
class Expected:
    """Launched kernels, and whether the call needs a workspace; ``None``: not said."""

    kernels: int | None
    workspace: bool | None = None

    def check(self, result: dict[str, Any]) -> None:
        if self.kernels is not None:
            assert kernels(result) == self.kernels
        if self.workspace is not None:
            assert (result["workspace"] > 0) == self.workspace


@dataclasses.dataclass(frozen=True)
class Suite:
    """One norm family: its module of this package, its paths and its cases."""

    name: str
    family: ModuleType
    settings: dict[str, dict[str, Any]]  # of each path
    forward: dict[str, list[Any]]  # the cases of each path
    backward: dict[str, list[Any]]
    expected: Callable[[str, Any, str], Expected]  # of direction, case, path
    far_mean: list[tuple[str, Any]]  # path and case
    order: list[tuple[str, Any]]
    dirty: list[tuple[str, Any]]
    poison: Callable[[Any, dict[str, Tensor], dict[str, Tensor]], Callable[[str, Tensor], Tensor]]
    sources: tuple[str, ...]  # the .cu files with its kernels
    crossings: list[tuple[str, Any, str, int, bool]] = dataclasses.field(default_factory=list)
    spread: str = "var"  # the statistic beside the mean
    check_poisoned: Callable[[Any, dict[str, Any]], None] = lambda case, result: None
    empty: list[Any] = dataclasses.field(default_factory=list)
    check_empty_forward: Callable[[Any, dict[str, Any], dict[str, Tensor]], None] = (
        lambda case, result, inputs: None
    )

    def check_forward(self, emulator: Any, case: Any, path: str, **settings: Any) -> dict[str, Any]:
        inputs = self.family.make_inputs(case)
        settings = {**self.settings[path], **settings}
        result = self.family.run_forward(emulator, case, inputs, **settings)
        assert_within(result, self.family.forward_reference(case, inputs))
        self.expected("forward", case, path).check(result)
        return result

    def check_backward(
        self, emulator: Any, case: Any, path: str, **settings: Any
    ) -> dict[str, Any]:
        inputs = self.family.make_inputs(case)
        extra = self.family.backward_inputs(case, inputs)
        settings = {**self.settings[path], **settings}
        result = self.family.run_backward(emulator, case, inputs, extra, **settings)
        assert_within(result, self.family.backward_reference(case, inputs, extra))
        self.expected("backward", case, path).check(result)
        return result


def sides(crossings: list[tuple[str, Any, str, int, bool]]) -> list[tuple[str, Any, str]]:
    """(direction, case, path) just before and at each crossing.

    A crossing is a direction, a case, and the first size of a dimension from which on it is fused, or is not.
    """
    return [
        (
            direction,
            dataclasses.replace(case, **{dimension: size - before}),
            "fused" if fused != bool(before) else "split",
        )
        for direction, case, dimension, size, fused in crossings
        for before in (1, 0)
    ]


def empty_cases(make: Callable[[int, int, int, str], Any]) -> list[Any]:
    """``make(n, c, s, layout)`` of every kind of empty tensor."""
    return [
        make(n, c, s, layout)
        for n, c, s in ((0, 4, 3), (3, 4, 0), (3, 0, 5))
        for layout in ("first", "last")
    ]


def all_nan(v: Tensor) -> bool:
    return bool(torch.isnan(v).all())
