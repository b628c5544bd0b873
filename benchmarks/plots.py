"""Plots of a device's results with matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import record
from .extras import require

COLORS = {
    "eager": "tab:gray",
    "eager channels_last": "black",
    "torch.compile": "tab:blue",
    "torch.compile channels_last": "tab:cyan",
    "advdl_ops": "tab:red",
    "advdl_ops optimize": "tab:orange",
    "advdl_ops optimize channels_last": "gold",
    "floor": "tab:green",
}
OTHER = ("tab:purple", "tab:brown", "tab:pink", "tab:olive", "navy", "teal")


def _colors(providers: list[str]) -> dict[str, str]:
    """A different color for each provider, and for those in COLORS the same in every plot."""
    others = [provider for provider in providers if provider not in COLORS]
    return COLORS | {provider: OTHER[i % len(OTHER)] for i, provider in enumerate(others)}


def title(suite: str, records: list[record.Record]) -> str:
    """Suite, device, and the commit of the shown records, or the number of commits, the oldest and the newest."""
    shown = sorted((item for item in records if item.metric not in record.NOT_TIMED), key=_time)
    first, last = (shown or records)[0], (shown or records)[-1]
    commits = dict.fromkeys(item.commit for item in shown)
    text = f"{suite}: {last.device}, torch {last.torch}, "
    if len(commits) < 2:
        return text + f"{last.time[:10]}, {last.commit}"
    oldest, newest = (f"{item.commit} of {item.time[:10]}" for item in (first, last))
    return text + f"{len(commits)} commits, oldest {oldest}, newest {newest}"


def _time(item: record.Record) -> str:
    return item.time


def draw(folder: Path, suite: str) -> Path:
    """Draw ``folder/<suite>.jsonl`` to ``folder/<suite>.png``."""
    matplotlib = require("matplotlib")
    matplotlib.use("agg")
    pyplot = require("matplotlib.pyplot")
    records = record.read(folder / f"{suite}.jsonl")
    curves = folder / "digits.json"
    training = [item for item in records if item.case.startswith("digits/")]
    speedups = [item for item in records if item.metric == "speedup" and item not in training]
    trained = any(item.metric == "time" for item in training)  # it ran and did not fail
    with_training = bool(trained and suite == "quick" and curves.exists())
    labels = list(dict.fromkeys((item.case, item.mode) for item in speedups))
    height = 1.2 + 0.34 * len(labels)
    if with_training:
        figure, axes = pyplot.subplot_mosaic(
            [["loss", "time", "memory"], ["ops", "ops", "ops"]],
            figsize=(12, 4 + height),
            height_ratios=[4, height],
            width_ratios=[3, 1, 1],
            layout="constrained",
        )
        _training(axes, training, json.loads(curves.read_text(encoding="utf-8")))
        bars = axes["ops"]
    else:
        figure, bars = pyplot.subplots(figsize=(12, height + 0.6), layout="constrained")
    _speedups(bars, speedups, labels)
    figure.suptitle(title(suite, records), fontsize=10)
    path = folder / f"{suite}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _speedups(axis: Any, speedups: list[record.Record], labels: list[tuple[str, str]]) -> None:
    """One row per case and mode; a mark per provider with its p20-p80."""
    providers = list(dict.fromkeys(item.provider for item in speedups))
    colors = _colors(providers)
    for provider in providers:
        own = [item for item in speedups if item.provider == provider]
        rows = [labels.index((item.case, item.mode)) for item in own]
        middle = [item.p50 for item in own]
        low = [item.p50 - item.p20 for item in own]
        high = [item.p80 - item.p50 for item in own]
        axis.errorbar(
            middle,
            rows,
            xerr=(low, high),
            fmt="o",
            color=colors[provider],
            label=provider,
            alpha=0.8,
        )
    axis.axvline(1.0, color="black", linewidth=0.8)
    shown = [value for item in speedups for value in (item.p20, item.p80) if value > 0]
    if shown and max(shown) > 3 * min(shown):  # a smaller range has few round ratios to label
        axis.set_xscale("log")
        ticker = require("matplotlib.ticker")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_yticks(range(len(labels)), [f"{case} {mode}" for case, mode in labels], fontsize=7)
    axis.set_ylim(len(labels) - 0.5, -0.5)  # the first on top
    axis.set_xlabel(
        "time over that of advdl_ops, or of advdl_ops optimize where the zoo has no such network"
        " (right of 1: advdl_ops is faster)"
    )
    axis.grid(axis="x", which="both", alpha=0.3)
    if providers:
        axis.legend(
            fontsize=7, ncols=min(4, len(providers)), loc="lower left", bbox_to_anchor=(0, 1)
        )


def _training(axes: dict[str, Any], training: list[record.Record], curves: dict[str, Any]) -> None:
    """Loss curves, time per step and bytes held of the digits training."""
    names = {"eager": "stock PyTorch", "advdl_ops": "advdl_ops"}
    styles = {"eager": "-", "advdl_ops": "--"}
    for provider, losses in curves["losses"].items():
        axes["loss"].plot(losses, styles[provider], color=COLORS[provider], label=names[provider])
    axes["loss"].set(title="digits, loss", xlabel="step", yscale="log")
    axes["loss"].legend()
    for panel, metric, factor, title in (
        ("time", "time", 1e3, "ms per step"),
        ("memory", "held", 1e-6, "MB held for backward"),
    ):
        found = {item.provider: item for item in training if item.metric == metric}
        kept = [provider for provider in names if provider in found]
        values = [found[provider].p50 * factor for provider in kept]
        bars = axes[panel].bar(
            [names[p].replace(" ", "\n") for p in kept], values, color=[COLORS[p] for p in kept]
        )
        axes[panel].bar_label(bars, fmt="%.1f")
        axes[panel].set_title(title)
