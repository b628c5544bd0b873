"""Which thresholds the records of the suite `choice` support: of made-up times, whose best table is known."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.conv2d import THRESHOLDS

from advdl_ops._conv import choice, winograd
from advdl_ops._conv.choice import Thresholds
from benchmarks import record, registry, thresholds
from benchmarks.cases.choice import SWEEPS, Sweep
from benchmarks.environment import ROOT

CPU = torch.device("cpu")
BY_NAME = {sweep.threshold: sweep for sweep in SWEEPS}


def test_every_threshold_has_a_sweep() -> None:
    assert sorted(BY_NAME) == sorted(Thresholds._fields) and len(SWEEPS) == len(BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_sweep_stands_on_both_sides_of_its_threshold(name: str) -> None:
    """Else its records could say nothing: the rules choose differently for the smallest value and the largest."""
    sweep, table = BY_NAME[name], THRESHOLDS
    if name.startswith("depthwise_strided"):
        table = table._replace(depthwise_cached_bytes=0)
    names = [
        [_by_rule(sweep, problem, table._replace(**{name: value})) for problem in _problems(sweep)]
        for value in (min(sweep.values), max(sweep.values))
    ]
    assert names[0] != names[1]


def _problems(sweep: Sweep) -> list[choice.Problem]:
    return list(sweep.problems().values())


def _by_rule(sweep: Sweep, problem: choice.Problem, table: Thresholds) -> str:
    return choice.by_rule(problem, choice.candidates(problem, CPU), table).name


def made(sweep: Sweep, table: Thresholds) -> thresholds.Measured:
    """Records of a machine on which the choices of ``table`` are the fastest, by half."""
    times = {}
    for mode, problem in sweep.problems().items():
        accepting = choice.candidates(problem, CPU)
        best = choice.by_rule(problem, accepting, table).name
        times[mode] = {c.name: 1.0 if c.name == best else 1.5 for c in accepting}
    return thresholds.Measured(sweep, times)


@pytest.mark.parametrize(
    ("name", "value"),
    [("large_dilation", 12), ("pixels", 512), ("pixels_strided", 196), ("short_row", 7)],
)
def test_the_value_of_the_machine_is_found(name: str, value: int) -> None:
    start = THRESHOLDS._replace(short_row=14)
    machine = start._replace(**{name: value})
    (row,) = thresholds.support([made(BY_NAME[name], machine)], start)
    used = getattr(start, name)
    assert (row.used, row.supported) == (used, value) and used != value
    assert row.lost_used > 0.01 and row.lost_supported == row.worst == 0


def test_thresholds_that_depend_on_each_other_are_found_together() -> None:
    start = choice.THRESHOLDS["default"]._replace(few_channels=96, pixels=64)
    machine = start._replace(few_channels=32, pixels=512)
    sweeps = [made(BY_NAME[name], machine) for name in ("pixels", "few_channels")]
    found = thresholds.fitted(sweeps, start)
    assert sum(sweep.loss(found) for sweep in sweeps) == 0


def test_what_gains_nothing_keeps_its_value() -> None:
    start = choice.THRESHOLDS["default"]
    assert thresholds.fitted([made(sweep, start) for sweep in SWEEPS[:3]], start) == start


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_the_tables_are_those_that_their_records_support(
    monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    # Which tiles are as exact as torch depends on torch's instructions: those of the records.
    monkeypatch.setattr(winograd, "_torch_has_avx512", lambda: capability == "avx512")
    """Within what two runs differ by."""
    file = ROOT / choice.RECORDS[capability].partition(",")[0]
    sweeps = thresholds.measured(record.read(file))
    assert {m.sweep.threshold for m in sweeps} == set(Thresholds._fields)
    table = choice.THRESHOLDS[capability]
    used, best = (
        sum(m.loss(t) for m in sweeps) / len(sweeps)
        for t in (table, thresholds.fitted(sweeps, table))
    )
    assert used - best < 0.005


def test_its_cases_are_no_rows_of_the_report() -> None:
    assert not [case for case in registry.select() if case.name.startswith("choice/")]
    assert len(registry.select("choice")) == len(SWEEPS)


def test_a_run_prints_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "--suite", "choice", "--smoke",
         "--case", "choice/few_channels"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "few_channels" in done.stdout and "supported" in done.stdout
