"""The tables of lean training in README.md and docs/lean_training.md, made from the records of the suite `memory`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .record import CHANNELS_LAST, OURS, STOCK, STOCK_COMPILED, Record

SUITE = "memory"
CHECKPOINTED = f"{STOCK} checkpointed"
LEVELS = ("block", "stage", "deep", "deepest")
README_CASES = ("memory/resnet50/8x3x224x224/float32/cpu", "memory/unet/1x3x256x256/float32/cpu")


def lean_name(level: str) -> str:
    return f"{OURS} lean={level}"


class Target(NamedTuple):
    """Upper limits, ``None``: there is none. ``held`` is of eager's; ``time`` is of the provider in ``of``."""

    held: float | None = None
    time: float | None = None
    of: str = OURS


_RESNET50 = {
    "block": Target(0.81, 1.0),
    "stage": Target(0.62, 1.05),
    "deep": Target(0.48, 1.05, STOCK),
    "deepest": Target(0.30, 1.12, STOCK),
}
# By case without dtype and device, and level.
TARGETS = {
    "memory/resnet50/8x3x224x224": _RESNET50,
    "memory/resnet50/8x3x112x112": _RESNET50,
    "memory/resnet18/8x3x224x224": {"block": Target(0.75, 1.0)},
    "memory/unet/1x3x256x256": {"block": Target(0.65, 1.0)},
}


def short(case: str) -> str:
    return "/".join(case.split("/")[:3])


_ORDER = (
    STOCK, STOCK + CHANNELS_LAST, STOCK_COMPILED, STOCK_COMPILED + CHANNELS_LAST,
    CHECKPOINTED, OURS, *map(lean_name, LEVELS),
)  # fmt: skip


def _values(items: Iterable[Record], metric: str) -> dict[str, float]:
    return {i.provider: i.p50 for i in items if i.metric == metric}


def _of_plain(items: list[Record]) -> dict[str, float]:
    """Times over those of the plain network: medians of the ratios of the rounds."""
    return {**_values(items, "speedup"), OURS: 1.0}


def _of_eager(items: list[Record]) -> dict[str, float]:
    """Times over those of the eager stock network in its faster layout."""
    relative = _of_plain(items)
    eager = min(relative[name] for name in (STOCK, STOCK + CHANNELS_LAST) if name in relative)
    return {name: value / eager for name, value in relative.items()}


def table(case: str, kinds: dict[str, list[Record]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines. ``kinds``: the records of the case by kind of machine. Bytes are those of the first one."""
    first = next(iter(kinds.values()))
    held, peak = _values(first, "held"), _values(first, "peak")
    eager = held[STOCK], peak[STOCK]
    head = ["", "held", "of eager's", "peak, of eager's"]
    for kind in kinds:
        head += [f"time, of plain's, {kind}", f"of eager's, {kind}"]
    relatives = [f(items) for items in kinds.values() for f in (_of_plain, _of_eager)]
    lines = []
    for name in _ORDER:
        if not any(name in relative for relative in relatives):
            continue
        line = [f"`{name}`"]
        if name in held:
            shares = f"{held[name] / eager[0]:.3f}x", f"{peak[name] / eager[1]:.2f}x"
            line += [f"{held[name] / 1e6:.1f} MB", *shares]
        else:
            line += ["-"] * 3
        line += [f"{each[name]:.2f}x" if name in each else "-" for each in relatives]
        lines.append(line)
    return head, lines


def verdicts(case: str, kinds: dict[str, list[Record]]) -> list[str]:
    """Each target of a case: its value, and whether it was reached."""
    found = []
    for level, target in TARGETS.get(short(case), {}).items():
        name = lean_name(level)
        parts = []
        for kind, items in kinds.items():
            held = _values(items, "held")
            relative = _of_plain(items) if target.of == OURS else _of_eager(items)
            if name not in relative:
                parts.append(f"not measured on {kind}")
                continue
            if target.held is not None and not parts:
                parts.append(_said("held", held[name] / held[STOCK], target.held, 3))
            if target.time is not None:
                of = "plain" if target.of == OURS else "eager"
                parts.append(_said(f"time of {of} on {kind}", relative[name], target.time, 2))
        found.append(f"- `lean={level}`: " + "; ".join(parts))
    return found


def _said(what: str, value: float, limit: float, digits: int) -> str:
    reached = "reached" if round(value, digits) <= limit else "missed"
    return f"{what} {value:.{digits}f}x (target {limit:g}x, {reached})"
