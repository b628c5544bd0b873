"""The text, the picture and the section of docs/accuracy.md that are made from the records of ``convergence.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import environment
from .convergence import (
    ARMS,
    DEVIATIONS,
    FILE,
    TASKS,
    Epoch,
    Run,
    epochs,
    failures,
    missing,
    of_arm,
    read,
)
from .extras import require
from .record import OURS, STOCK

DOC = "docs/accuracy.md"
PLOT = "losses.png"
BEGIN, END = "<!-- convergence: begin -->", "<!-- convergence: end -->"
NAMES = {STOCK: "stock PyTorch", OURS: "advdl_ops"}
COLORS = {STOCK: "tab:gray", OURS: "tab:red"}
STYLES = {STOCK: "-", OURS: "--"}
WIDTHS = {STOCK: 4, OURS: 1.5}  # ours lies on stock's


def verdicts(runs: Sequence[Run]) -> list[str]:
    """For each task of these runs, whether the criterion holds, and where it does not."""
    lines = []
    for task in TASKS:
        if not of_arm(runs, task, OURS):
            continue
        found = failures(runs, task)
        if missing(runs, task):
            line = f"{TASKS[task].title}: no verdict"
        else:
            shares = [epoch.share for epoch in epochs(runs, task)]
            worst = max(shares, key=abs)
            line = (
                f"{TASKS[task].title}: the criterion {'does not hold' if found else 'holds'}; the largest difference is"
                f" {abs(worst):.2g} of what is permitted, in epoch {shares.index(worst) + 1}"
            )
        lines += [line, *(f"- {text}" for text in found)]
    return lines


# ---- the section of the documentation ----


def block(results: Path) -> list[str]:
    lines = [
        "## Training",
        "",
        "Winograd's convolution in training, against stock PyTorch: two networks, each trained by both from three",
        "seeds. From one seed both have the same initial weights, data, order of the data and optimizer. The",
        "criterion, fixed before the runs: in every epoch the mean loss of `advdl_ops` over the seeds is at most",
        f"{DEVIATIONS} standard deviations (over stock's seeds) from the mean of stock. To repeat it:",
        "`python -m benchmarks convergence`. `python -m benchmarks report` makes this section from the records.",
        "The last column of the scores says how many different convolutions of a training Winograd served. The",
        "criterion finds faults that change how a network learns; a smaller one is found by the tests of values.",
    ]
    files = sorted(results.glob(f"*/{FILE}"))
    for file in files:
        lines += ["", *machine(file)]
    return lines if files else [*lines, "", "Not run yet."]


def machine(file: Path) -> list[str]:
    """The runs of one machine."""
    runs = read(file)
    complete = [task for task in TASKS if not missing(runs, task)]
    last = max(runs, key=lambda run: run.time)
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(run.commit for run in runs))
    lines = [f"{last.device}; commit {commits}, {last.time[:10]}, torch {last.torch}:", ""]
    lines += [f"- {text}" if text[0] != "-" else f"  {text}" for text in verdicts(runs)]
    lines += [
        "",
        "| training | epoch | loss of stock, mean ± permitted | loss of `advdl_ops` | difference / permitted |",
        "|---|---|---|---|---|",
    ]
    for task in complete:
        for number, epoch in enumerate(epochs(runs, task), 1):
            stock = f"{epoch.stock:.4f} ± {epoch.permitted:.4f}"
            lines.append(f"| {task} | {number} | {stock} | {epoch.ours:.4f} | {epoch.share:+.2g} |")
    lines += [
        "",
        "| training | score | stock, each seed | `advdl_ops`, each seed | one label everywhere | by Winograd |",
        "|---|---|---|---|---|---|",
    ]
    for task in complete:
        scores = [", ".join(f"{run.score:.4f}" for run in of_arm(runs, task, arm)) for arm in ARMS]
        first = of_arm(runs, task, OURS)[0]
        served = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in first.winograd.items())
        cells = [TASKS[task].title, TASKS[task].metric, *scores, f"{first.constant:.4f}", served]
        lines.append(f"| {' | '.join(cells)} |")
    plot = file.with_name(PLOT)
    if plot.exists():
        path = plot.relative_to(file.parents[2]).as_posix()
        lines += ["", f"![losses of both, and their difference](../benchmarks/results/{path})"]
    return lines


def with_block(text: str, results: Path) -> str:
    """``text`` of the file with the section from the records, which is appended if there is none."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] or "\n"
    section = "\n".join([BEGIN, *block(results), END])
    return f"{before.rstrip()}\n\n{section}{after}"


def is_outdated(results: Path, root: Path) -> bool:
    text = (root / DOC).read_text(encoding="utf-8")
    return text != with_block(text, results)


def write_doc(results: Path) -> Iterator[Path]:
    """Rewrite the section, only from the results that belong to a checkout."""
    if environment.IN_CHECKOUT and results.resolve() == environment.RESULTS.resolve():
        path = environment.ROOT / DOC
        text = with_block(path.read_text(encoding="utf-8"), results)
        path.write_text(text, encoding="utf-8")
        yield path


# ---- the picture ----


def draw(file: Path) -> Path:
    """Draw a file of runs: the losses of each task, and the difference of their means. The picture lies beside it."""
    require("matplotlib").use("agg")
    pyplot = require("matplotlib.pyplot")
    runs = read(file)
    tasks = [task for task in TASKS if not missing(runs, task)]
    figure, axes = pyplot.subplots(
        2, max(len(tasks), 1), figsize=(12, 7), height_ratios=[3, 1], layout="constrained",
        squeeze=False, sharex="col",
    )  # fmt: skip
    for column, task in enumerate(tasks):
        _losses(axes[0][column], runs, task)
        _differences(axes[1][column], epochs(runs, task))
    last = max(runs, key=lambda run: run.time)
    commits = ", ".join(dict.fromkeys(run.commit for run in runs))
    figure.suptitle(
        f"convergence: {last.device}, torch {last.torch}, {last.time[:10]}, {commits}", fontsize=10
    )
    path = file.with_name(PLOT)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _losses(axis: Any, runs: Sequence[Run], task: str) -> None:
    curve = epochs(runs, task)
    numbers = range(1, len(curve) + 1)
    axis.fill_between(
        numbers,
        [epoch.stock - epoch.permitted for epoch in curve],
        [epoch.stock + epoch.permitted for epoch in curve],
        color=COLORS[STOCK],
        alpha=0.25,
        label=f"stock's mean ± {DEVIATIONS} standard deviations",
    )
    for arm in ARMS:
        for run in of_arm(runs, task, arm):
            axis.plot(numbers, run.curve, STYLES[arm], color=COLORS[arm], linewidth=0.7, alpha=0.6)
        mean = [epoch.stock if arm == STOCK else epoch.ours for epoch in curve]
        axis.plot(
            numbers,
            mean,
            STYLES[arm],
            color=COLORS[arm],
            linewidth=WIDTHS[arm],
            label=NAMES[arm],
        )
    holds = "does not hold" if failures(runs, task) else "holds"
    axis.set_title(f"{TASKS[task].title}: the criterion {holds}", fontsize=10)
    axis.set(yscale="log", ylabel="training loss: each seed (thin), mean")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _differences(axis: Any, curve: Sequence[Epoch]) -> None:
    numbers = range(1, len(curve) + 1)
    shares = [epoch.share for epoch in curve]
    axis.plot(numbers, shares, marker="o", color=COLORS[OURS])
    for limit in (-1, 1):
        axis.axhline(limit, color="black", linewidth=0.8)
    axis.set_xticks(numbers)
    ends = max([1.2, *(1.1 * abs(share) for share in shares if math.isfinite(share))])
    axis.set(xlabel="epoch", ylabel="difference / permitted", ylim=(-ends, ends))
    axis.grid(alpha=0.3)
