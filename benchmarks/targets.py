"""Whether the target of a case, which is a text that ``list`` shows, was reached.

A target is a list of parts such as ``>= 1.35x eager``, ``held <= 0.80x stock``, ``raw <= 10 us``. ``stretch`` marks an
optional part. `` / `` separates the parts for the forward pass from those for forward and backward.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from . import report, table
from .record import CHANNELS_LAST, OURS, STOCK, STOCK_COMPILED, Record, is_stock


class Row(NamedTuple):
    """A provider of advdl_ops against stock in one mode of a case. There is no ratio if stock has no such provider."""

    case: str
    mode: str
    label: str  # of networks: zoo or optimize()
    ours: str
    stock: str | None
    ratio: Record | None
    items: list[Record]  # all of the case


# What a ratio refers to. Other texts are names of providers.
RIVALS: dict[str, Callable[[str], bool]] = {
    "": is_stock,
    "best stock": is_stock,
    "best eager": lambda name: name.startswith(STOCK),
    "compile": lambda name: name.startswith(STOCK_COMPILED),
    "compile with freezing": lambda name: name.startswith(STOCK_COMPILED),
    "packed": lambda name: name == STOCK,
    "padded": lambda name: name == f"{STOCK} padded",
    "eager": lambda name: name == STOCK,
    "eager channels_last": lambda name: name == STOCK + CHANNELS_LAST,
}
UNITS = {"us": 1e-6, "ms": 1e-3, "min": 60.0, "MB": 1e6}

RATIO = re.compile(
    rf"(stretch |fwd \+ bwd )?(?:>= )?([\d.]+)x(?: ({'|'.join(filter(None, RIVALS))}))?"
)
HELD = re.compile(r"held <= ([\d.]+)x stock")
AMOUNT = re.compile(
    r"(raw |no gradients )?<= ([\d.]+) (us|ms|min|MB)(?: beyond torch| on 2 cores)?"
)
BELOW_STOCK = "gradients below stock"
WITHOUT_GRADIENTS = ("eval fwd", "train fwd")


def parts(target: str) -> list[tuple[str | None, str]]:
    """The text of every part, with its mode if it applies to a single mode."""
    sides = target.split(" / ")
    modes = ("fwd", "full") if len(sides) == 2 else (None,)
    return [
        (mode, part) for mode, side in zip(modes, sides, strict=True) for part in side.split(", ")
    ]


def verdicts(target: str, row: Row) -> list[str]:
    """For every part of the target that applies to this row: its value, and whether it was reached."""
    found = [_verdict(part, mode or row.mode, row) for mode, part in parts(target)]
    return [text for text in found if text]


def _said(part: str, value: str, reached: bool) -> str:
    return f"{part}: {value}, {'reached' if reached else 'missed'}"


def _verdict(part: str, mode: str, row: Row) -> str | None:
    without = row.mode in WITHOUT_GRADIENTS
    if part == BELOW_STOCK:
        if without or row.ratio is None:
            return None
        return _said(part, f"{row.ratio.p50:.3f} of its speed", row.ratio.p50 > 1)
    if match := RATIO.fullmatch(part):
        mode = "full" if match[1] == "fwd + bwd " else mode
        value = _against(row, mode, RIVALS[match[3] or ""])
        if value is None:
            return f"{part}: not measured"
        return _said(part, f"{value:.3f}", value >= float(match[2]))
    if match := HELD.fullmatch(part):
        least = held(row)
        if least is None:
            return f"{part}: not measured"
        return _said(part, f"{1 / least[1]:.3f}", 1 / least[1] <= float(match[1]))
    if match := AMOUNT.fullmatch(part):
        if match[1] and not without:  # the cost of a call without gradients
            return None
        value = _amount(row, "raw operator" if match[1] == "raw " else OURS, match[3])
        if value is None:
            return f"{part}: not measured"
        shown = f"{value / 1e6:.1f} MB" if match[3] == "MB" else table.seconds(value)
        return _said(part, shown, value <= float(match[2]) * UNITS[match[3]])
    raise ValueError(f"benchmarks: {row.case}: nobody can tell whether {part!r} was reached")


def _against(row: Row, mode: str, wanted: Callable[[str], bool]) -> float | None:
    """The time of the fastest of some stock providers over that of the row's provider."""
    times = {i.provider: i.p50 for i in row.items if (i.mode, i.metric) == (mode, "time")}
    rival = min(filter(wanted, times), key=lambda name: times[name], default=None)
    if rival is None or row.ours not in times:
        return None
    taken = {i.provider: i.p50 for i in row.items if (i.mode, i.metric) == (mode, "speedup")}
    if mode == row.mode and rival == row.stock and row.ratio:
        return row.ratio.p50
    # Ratios of rounds against other stock providers exist for one provider of advdl_ops only. For others, use the
    # medians.
    is_taken = rival in taken and row.ours == OURS and not row.label
    return taken[rival] if is_taken else times[rival] / times[row.ours]


def held(row: Row) -> tuple[str, float] | None:
    """The stock provider that holds the fewest bytes for backward, and its bytes over those of the row's provider."""
    size = {i.provider: i.p50 for i in row.items if (i.mode, i.metric) == (row.mode, "held")}
    least = min(filter(is_stock, size), key=lambda name: size[name], default=None)
    return (least, size[least] / size[row.ours]) if least and size.get(row.ours) else None


def _amount(row: Row, provider: str, unit: str) -> float | None:
    if unit == "MB":
        return sum(i.p50 for i in row.items if i.metric == "size") or None
    wanted = (provider, row.mode, "time")
    return next((i.p50 for i in row.items if (i.provider, i.mode, i.metric) == wanted), None)


def rows(case: str, items: list[Record], every_mode: bool = False) -> list[Row]:
    """The rows of a case: of mode `full` if there is one, else of the first mode; with `every_mode`, of all."""
    modes = list(dict.fromkeys(i.mode for i in items if i.metric == "time" and i.mode != "compile"))
    if not every_mode:
        modes = ["full"] if "full" in modes else modes[:1]
    found = []
    for mode in modes:
        stock = report.fastest_stock(items, mode)
        ratios = report.ratios(items, mode)
        networks = any(i.suite == "models" for i in items)
        for label, ratio in ratios.items():
            ours = ratio.provider if ratio.metric == "over_stock" else OURS
            named = {"": "zoo", "optimize ": "optimize()"}[label] if networks else ""
            found.append(Row(case, mode, named, ours, stock, ratio, items))
        if not ratios:
            found.append(Row(case, mode, "", OURS, stock, None, items))
    return found
