"""The CUDA kernels of all norms on machines without a GPU: every path through the host emulation, against fp64.

What only one family has is tested in the file of that family, as test_cuda_group_norm.py.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import (
    Emulator,
    batch_norm_act_cases,
    group_norm_cases,
    layer_norm_2d_cases,
)
from cuda_emulation.norm_suite import Suite, sides
from cuda_emulation.norms import assert_order_changes_no_bit, assert_within, kernels

ROOT = Path(__file__).resolve().parents[2]
SUITES = [cases.SUITE for cases in (batch_norm_act_cases, group_norm_cases, layer_norm_2d_cases)]


def per_path(lists: str) -> Any:
    """Parametrizes over (suite, path, case) of the dictionary ``lists`` of each suite."""
    return pytest.mark.parametrize(
        ("suite", "path", "case"),
        [
            pytest.param(suite, path, case, id=f"{suite.name}-{path}-{case}")
            for suite in SUITES
            for path, cases in getattr(suite, lists).items()
            for case in cases
        ],
    )


def chosen(name: str) -> Any:
    """The same of a list of paths and cases."""
    return pytest.mark.parametrize(
        ("suite", "path", "case"),
        [
            pytest.param(suite, path, case, id=f"{suite.name}-{path}-{case}")
            for suite in SUITES
            for path, case in getattr(suite, name)
        ],
    )


@per_path("forward")
def test_forward(emulator: Emulator, suite: Suite, path: str, case: Any) -> None:
    suite.check_forward(emulator, case, path)


@per_path("backward")
def test_backward(emulator: Emulator, suite: Suite, path: str, case: Any) -> None:
    suite.check_backward(emulator, case, path)


@pytest.mark.parametrize(
    ("suite", "direction", "case", "path"),
    [
        pytest.param(suite, *side, id="-".join(map(str, (suite.name, *side))))
        for suite in SUITES
        for side in sides(suite.crossings)
    ],
)
def test_the_path_follows_from_bytes(
    emulator: Emulator, suite: Suite, direction: str, case: Any, path: str
) -> None:
    for offset in (0, 1):  # packs of 16 bytes and single elements: the same path
        placed = dataclasses.replace(case, offset=offset)
        suite.expected(direction, placed, path).check(
            suite.family.dry_run(emulator, placed, direction)
        )


@chosen("far_mean")
def test_statistics_of_a_mean_far_from_zero(
    emulator: Emulator, suite: Suite, path: str, case: Any
) -> None:
    """Mean 1e4, deviation about 1: E[x^2] - E[x]^2 in fp32 would keep no digit of the variance."""
    result = suite.check_forward(emulator, case, path)
    exact = suite.family.forward_reference(case, suite.family.make_inputs(case))[suite.spread][0]
    error = ((result[suite.spread].double() - exact).abs() / exact).max()
    assert error < (1e-11 if case.dtype == "f64" else 1e-4)
    suite.check_backward(emulator, case, path)


@chosen("dirty")
def test_nan_and_inf_stay_where_they_are(
    emulator: Emulator, suite: Suite, path: str, case: Any
) -> None:
    """In their channel, set or position: all other values are as without them."""
    family, settings = suite.family, suite.settings[path]
    inputs = family.make_inputs(case)
    extra = family.backward_inputs(case, inputs)
    reference = family.forward_reference(case, inputs)
    reference |= family.backward_reference(case, inputs, extra)
    pick = suite.poison(case, inputs, extra)
    result = family.run_forward(emulator, case, inputs, **settings)
    result |= family.run_backward(emulator, case, inputs, extra, **settings)
    for name, (value, allowed) in reference.items():
        expected = pick(name, value), pick(name, allowed.expand_as(value))
        assert_within({name: pick(name, result[name])}, {name: expected})
    suite.check_poisoned(case, result)


@chosen("order")
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulator: Emulator, suite: Suite, path: str, case: Any
) -> None:
    assert_order_changes_no_bit(suite.family, emulator, case, suite.settings[path])


@pytest.mark.parametrize(
    ("suite", "case"),
    [
        pytest.param(suite, case, id=f"{suite.name}-{case}")
        for suite in SUITES
        for case in suite.empty
    ],
)
def test_empty_tensors(emulator: Emulator, suite: Suite, case: Any) -> None:
    family = suite.family
    inputs = family.make_inputs(case)
    forward = family.run_forward(emulator, case, inputs)
    suite.check_empty_forward(case, forward, inputs)
    extra = {name: torch.zeros(forward[name].shape) for name in ("mean", suite.spread)}
    result = family.run_backward(emulator, case, inputs, extra)
    assert kernels(result) == result["workspace"] == 0
    for name in ("dweight", "dbias"):
        assert getattr(case, "want_dweight", True) == (name in result)
        if name in result:
            assert torch.equal(result[name], torch.zeros(case.c))


# ---- what ptxas says ----


def ptxas_report(source: str, tmp_path: Path) -> str:
    """Of the build where there is one, else of one architecture compiled here."""
    for report in ROOT.glob(f"build/native/**/{source}.cu.o.ptxas"):
        return report.read_text()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs a CUDA build or nvcc")
    target = tmp_path / "kernels.cubin"
    flags = ["-std=c++20", "-O3", "-arch=sm_90", "-cubin", "-Xptxas=-v"]
    command = [nvcc, *flags, str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_no_kernel_has_a_stack_frame_or_spills(suite: Suite, tmp_path: Path) -> None:
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    report = [
        line
        for source in suite.sources
        for line in re.findall(
            rf"Function properties for (\w+)\n.*?{frame}", ptxas_report(source, tmp_path)
        )
    ]
    assert len(report) >= 40
    assert [line for line in report if line[1:] != ("0", "0", "0")] == []
