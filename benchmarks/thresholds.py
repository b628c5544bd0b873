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
        used: the value in use, and
        supported: the one whose choices take the least time.
        lost_used, lost_supported: by how much their choices are slower than the fastest candidate of each problem, the
            geometric mean over the problems; 0.02 is 2 %.
        worst_used: the largest of them, and
        at: the problem that it is of.
    """

    threshold: str
    used: int
    supported: int
    lost_used: float
    lost_supported: float
    worst_used: float
    at: str


def times_of(records: Sequence[Record]) -> dict[str, Times]:
    """By case."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for item in records:
        if item.suite == "choice" and item.metric == "time":
            found.setdefault(item.case, {}).setdefault(item.mode, {})[item.provider] = item.p50
    return dict(found)


def support(sweep: Sweep, times: Times, thresholds: Thresholds) -> Support:
    """The value of the sweep's threshold that loses the least, the others as they are; of equals the one in use."""
    used = getattr(thresholds, sweep.threshold)
    losses = {
        value: _losses(sweep, times, thresholds._replace(**{sweep.threshold: value}))
        for value in {used, *sweep.values}
    }
    means = {value: sum(lost.values()) / len(lost) for value, lost in losses.items()}
    # A tenth of a percent is nothing: the value nearest to the one in use then.
    best = min(means.values())
    supported = min(
        (value for value, mean in means.items() if mean <= best + 0.001),
        key=lambda value: abs(math.log((value + 1) / (used + 1))),
    )
    at = max(losses[used], key=losses[used].__getitem__)
    return Support(
        sweep.threshold,
        used,
        supported,
        lost_used=math.expm1(means[used]),
        lost_supported=math.expm1(means[supported]),
        worst_used=math.expm1(losses[used][at]),
        at=at,
    )


def _losses(sweep: Sweep, times: Times, thresholds: Thresholds) -> dict[str, float]:
    """By mode, the logarithm of the time of the rules' choice over that of the fastest candidate."""
    import torch

    from advdl_ops._conv import choice

    found = {}
    for mode, problem in sweep.problems().items():
        if mode in times:
            accepting = choice.candidates(problem, torch.device("cpu"))
            name = choice.by_rule(problem, accepting, thresholds).name
            seconds = times[mode]
            found[mode] = math.log(seconds[name] / min(seconds.values()))
    return found


def show(records: Sequence[Record]) -> None:
    """A table of every threshold that the records are of."""
    from advdl_ops._conv import choice

    found = times_of(records)
    grid = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, pad_edge=False)
    for title in ("threshold", "in use", "supported", "lost in use", "lost then", "worst in use"):
        grid.add_column(title, overflow="fold")
    for sweep in SWEEPS:
        times = found.get(f"choice/{sweep.threshold}")
        if times:
            s = support(sweep, times, choice.thresholds())
            shares = (f"{100 * lost:.1f} %" for lost in (s.lost_used, s.lost_supported))
            worst = f"{100 * s.worst_used:.0f} %: {s.at}"
            grid.add_row(s.threshold, str(s.used), str(s.supported), *shares, worst)
    console = table.new_console()
    console.print(f"thresholds of {choice.capability()} (advdl_ops/_conv/choice.py)")
    console.print(grid)
