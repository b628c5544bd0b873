"""Terminal output with rich: the list of cases, the progress while they run, the table of results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .extras import require
from .record import NOT_TIMED, OPTIMIZED, OURS, Record
from .registry import Case

WIDTH = 100


def new_console() -> Any:
    console = require("rich.console").Console()
    # Redirected output has no width, and rich's default would cut the table.
    return console if console.is_terminal else require("rich.console").Console(width=WIDTH)


def show_cases(cases: Sequence[Case]) -> None:
    console, grid = new_console(), require("rich.table").Table(box=require("rich.box").SIMPLE)
    grid.add_column("case", no_wrap=True)
    grid.add_column("suites")
    grid.add_column("target", overflow="fold")
    for case in cases:
        note = f" (--include-{case.opt_in})" if case.opt_in else ""
        grid.add_row(case.name + note, ", ".join(case.suites), case.target)
    console.print(grid)
    console.print(f"{len(cases)} cases")


@contextlib.contextmanager
def progress(
    cases: Sequence[Case], quiet: bool = False
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Progress bars on stderr: the cases, and the rounds of the one that runs."""
    if quiet:
        yield lambda event: None
        return
    rich = require("rich.progress")
    console = require("rich.console").Console(stderr=True)
    columns = (rich.BarColumn(20), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    text = rich.TextColumn("{task.description}")
    with rich.Progress(*columns, text, console=console, transient=True) as bars:
        overall = bars.add_task("cases", total=len(cases))
        inner = bars.add_task("", total=1)

        def show(event: dict[str, Any]) -> None:
            kind = event["event"]
            if kind == "start":
                bars.update(overall, description=event["case"])
                bars.reset(inner)
            elif kind == "progress":
                total = event["total"] or 1
                bars.update(inner, description=event["what"], completed=event["done"], total=total)
            elif kind in ("done", "failed"):
                bars.advance(overall)
                if not console.is_terminal:
                    console.print(f"{kind}: {event['case']}")

        yield show


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 0.9995:
            return f"{three_digits(value * factor)} {unit}"
    return f"{three_digits(value * 1e9)} ns"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}" if value < 1e9 else f"{value / 1e6:.0f}"


def _spread(item: Record | None, form: Callable[[float], str]) -> str:
    return "" if item is None else f"{form(item.p50)} ({form(item.p20)}-{form(item.p80)})"


def _plain_time(item: Record | None) -> str:
    """Median and spread in the median's unit: ``2.31 ms (2.25-2.40)``."""
    if item is None:
        return ""
    number, unit = seconds(item.p50).split(" ")
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit]
    low, high = (three_digits(value * factor) for value in (item.p20, item.p80))
    return f"{number} {unit} ({low}-{high})"


def _rate(rate: Record | None, share: Record | None) -> str:
    return "" if rate is None else f"{rate.p50:.1f}" + (f" {share.p50:.0%}" if share else "")


def show_records(records: Sequence[Record]) -> None:
    """Print one block per case: each mode and provider, and how much faster advdl_ops is than this provider."""
    console = new_console()
    by_case: dict[str, list[Record]] = {}
    for item in records:
        by_case.setdefault(item.case, []).append(item)
    for name, items in by_case.items():
        console.print(case_table(name, items))
    if by_case:
        console.print(
            "faster: time of the row over time of advdl_ops, median of the rounds (p20-p80); over best stock: time "
            "of the fastest eager\nor torch.compile over time of the row; GB/s and GFLOP/s: what the op must at "
            "least move and compute, over its time, and the\nshare of the measured copy and matrix product; held: "
            "MB left for backward.",
            soft_wrap=True,
            style="dim",
        )


def case_table(name: str, items: Sequence[Record]) -> Any:
    metrics = {(i.provider, i.mode, i.metric): i for i in items}
    machine = {i.metric: i.p50 for i in items if i.provider == "machine"}
    caption = (
        f"copy {machine['copy']:.1f} GB/s, matrix product {machine['matmul']:.0f} GFLOP/s"
        if machine
        else ""
    )
    grid = require("rich.table").Table(
        title=f"{name}", caption=caption, box=require("rich.box").SIMPLE_HEAD, title_justify="left", pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    grid.add_column("mode", no_wrap=True)
    grid.add_column("provider", overflow="fold")
    grid.add_column("time (p20-p80)", no_wrap=True)
    # Networks have two providers of advdl_ops, the zoo's and the optimized one, so each row is compared with stock.
    of_networks = any(i.metric == "over_stock" for i in items)
    ratio_metric = "over_stock" if of_networks else "speedup"
    grid.add_column("over best stock" if of_networks else "advdl_ops faster", no_wrap=True)
    extra = {"GB/s": "bandwidth", "GFLOP/s": "throughput", "held, peak MB": "peak"}
    shown = {title for title, metric in extra.items() if any(i.metric == metric for i in items)}
    for title in extra:
        if title in shown:
            grid.add_column(title, no_wrap=True, justify="right")
    rows = dict.fromkeys((i.mode, i.provider) for i in items if i.provider != "machine")
    previous = None
    for mode, provider in sorted(
        rows, key=lambda row: list(dict.fromkeys(r[0] for r in rows)).index(row[0])
    ):
        get = {
            metric: metrics.get((provider, mode, metric)) for metric in {i.metric for i in items}
        }.get
        cells = [
            mode if mode != previous else "",
            provider,
            _plain_time(get("time")),
            _spread(get(ratio_metric), ratio) + (" x" if get(ratio_metric) else ""),
        ]
        previous = mode
        if "GB/s" in shown:
            cells.append(_rate(get("bandwidth"), get("copy_share")))
        if "GFLOP/s" in shown:
            cells.append(_rate(get("throughput"), get("matmul_share")))
        if "held, peak MB" in shown:
            held, peak = get("held"), get("peak")
            # Inference holds nothing.
            cells.append(
                ", ".join(megabytes(i.p50) if i else "-" for i in (held, peak)) if peak else ""
            )
        for metric in NOT_TIMED:
            if item := get(metric):
                cells[1] += f", {metric}: {item.why}"
        if accuracy := get("accuracy"):
            cells[1] += f", accuracy {accuracy.p50:.2%}"
        if size := get("size"):
            cells[2] = f"{megabytes(size.p50)} MB"
        grid.add_row(*cells, style="bold" if provider in (OURS, OPTIMIZED) else None)
    return grid
