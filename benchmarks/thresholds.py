"""Which value of each threshold of ``advdl_ops/_conv/choice.py`` the records of the suite `choice` support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import table
from .cases.choice import SWEEPS, Sweep
from .extras import require
from .record import Record

if TYPE_CHECKING:
    from advdl_ops._conv.choice import Thresholds

# By mode, the median time of every candidate in seconds.
Times = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Support:
    """What the records say of one threshold.

    Attributes:
        threshold: its name.
        used: the value in use.
        supported: that of the table which the records support, see :func:`fitted`.
        lost_used, lost_supported: by how much the choices of the two tables are slower than the fastest candidate, the
            geometric mean over the problems of the sweep; 0.02 is 2 %.
        worst: the largest of them, with the supported table.
        at: the problem that it is of.
    """

    threshold: str
    used: int
    supported: int
    lost_used: float
    lost_supported: float
    worst: float
    at: str


class Measured:
    """A sweep with its records: problems, their candidates and the times of those."""

    def __init__(self, sweep: Sweep, times: Times) -> None:
        import torch

        from advdl_ops._conv import choice

        self.sweep = sweep
        self.rows = [
            (mode, problem, choice.candidates(problem, torch.device("cpu")), times[mode])
            for mode, problem in sweep.problems().items()
            if mode in times
        ]

    def losses(self, thresholds: Thresholds) -> dict[str, float]:
        """By mode, the logarithm of the time of the rules' choice over that of the fastest candidate."""
        from advdl_ops._conv import choice

        return {
            mode: math.log(
                times[choice.by_rule(problem, accepting, thresholds).name] / min(times.values())
            )
            for mode, problem, accepting, times in self.rows
        }

    def loss(self, thresholds: Thresholds) -> float:
        """Their mean."""
        found = self.losses(thresholds).values()
        return sum(found) / len(found)


def times_of(records: Sequence[Record]) -> dict[str, Times]:
    """By case."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for item in records:
        if item.suite == "choice" and item.metric == "time":
            found.setdefault(item.case, {}).setdefault(item.mode, {})[item.provider] = item.p50
    return dict(found)


def measured(records: Sequence[Record]) -> list[Measured]:
    """The sweeps that the records are of."""
    found = times_of(records)
    sweeps = (sweep for sweep in SWEEPS if f"choice/{sweep.threshold}" in found)
    return [Measured(sweep, found[f"choice/{sweep.threshold}"]) for sweep in sweeps]


def fitted(sweeps: Sequence[Measured], thresholds: Thresholds) -> Thresholds:
    """The table whose choices lose the least over all sweeps, found one threshold after the other.

    Thresholds depend on each other, so they are gone through until none changes. One that gains less than a
    thousandth keeps its value: times of two runs differ by more.
    """

    def total(table: Thresholds) -> float:
        return sum(sweep.loss(table) for sweep in sweeps)

    best, least = thresholds, total(thresholds)
    before = None
    while best != before:
        before = best
        for sweep in sweeps:
            for value in sweep.sweep.values:
                table = best._replace(**{sweep.sweep.threshold: value})
                found = total(table)
                if found < least - 0.001:
                    best, least = table, found
    return best


def support(sweeps: Sequence[Measured], thresholds: Thresholds) -> list[Support]:
    """A row for each sweep."""
    table = fitted(sweeps, thresholds)
    found = []
    for sweep in sweeps:
        name = sweep.sweep.threshold
        losses = sweep.losses(table)
        at = max(losses, key=losses.__getitem__)
        found.append(
            Support(
                name,
                getattr(thresholds, name),
                getattr(table, name),
                lost_used=math.expm1(sweep.loss(thresholds)),
                lost_supported=math.expm1(sweep.loss(table)),
                worst=math.expm1(losses[at]),
                at=at,
            )
        )
    return found


def show(records: Sequence[Record]) -> None:
    """A table of every threshold that the records are of."""
    from advdl_ops._conv import choice
    from advdl_ops._library import cpu_capability

    grid = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, pad_edge=False)
    for title in ("threshold", "in use", "supported", "lost in use", "lost then", "worst then"):
        grid.add_column(title, overflow="fold")
    for row in support(measured(records), choice.thresholds()):
        shares = (f"{100 * lost:.1f} %" for lost in (row.lost_used, row.lost_supported))
        worst = f"{100 * row.worst:.0f} %: {row.at}"
        grid.add_row(row.threshold, str(row.used), str(row.supported), *shares, worst)
    console = table.new_console()
    console.print(f"thresholds of {cpu_capability()} (advdl_ops/_conv/choice.py)")
    console.print(grid)
