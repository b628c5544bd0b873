"""``memory_report``: where the bytes are that a training forward leaves held for backward, by module and level."""

from __future__ import annotations

import importlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .counts import Count, Counting, Work, checked_arguments
from .models import lean_of
from .recipes import LEVELS

__all__ = ["MemoryReport", "memory_report"]

STOCK, PLAIN, AS_SET = "stock", "plain", "as set"
ITSELF = "(the model itself)"
OTHERS = "others"
WIDTH = 200  # of text without a terminal; a table takes what it needs
# Of the plot: matplotlib's without grey, which the sum of the other parts has.
COLOURS = tuple(
    f"tab:{name}"
    for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, repr=False)
class MemoryReport:
    """The bytes of each level. ``print`` shows a table, :meth:`plot` draws bars.

    Attributes:
        title: the class of the model, and its input.
        counts: ``held`` bytes by the name of the module that made them, and the work of backward; by column:
            ``"stock"``, ``"plain"`` (level ``None``), the levels, and ``"as set"`` if parts have levels of their own.
        depth: of the rows: how many names lead from the model to a module.
    """

    title: str
    counts: dict[str, Count]
    depth: int

    def total(self, column: str) -> int:
        """All held bytes of a column."""
        return self.counts[column].total

    def rows(self, depth: int | None = None) -> dict[str, dict[str, int]]:
        """Bytes by column, of each module with all that is in it, by its name; ``""``: the model's own.

        Modules deeper than ``depth`` are in the row of the module at that depth. Rows sum to :meth:`total`.
        """
        depth = self.depth if depth is None else depth
        found: dict[str, dict[str, int]] = {}
        names = dict.fromkeys(name for count in self.counts.values() for name in count.order)
        for name in names:
            row = found.setdefault(_above(name, depth), dict.fromkeys(self.counts, 0))
            for column, count in self.counts.items():
                row[column] += count.held.get(name, 0)
        return {name: row for name, row in found.items() if any(row.values())}

    def __rich__(self) -> Any:
        """The table, for ``rich.print``."""
        table = _require("rich.table", "the table")
        unit = _unit_of(self.total(PLAIN))
        grid = table.Table(
            title=f"{self.title}: {_UNITS[unit]} held for backward",
            box=_require("rich.box", "the table").SIMPLE_HEAD,
            title_justify="left",
            pad_edge=False,
        )
        grid.add_column("module", no_wrap=True)
        for column in self.counts:
            grid.add_column(column, justify="right", no_wrap=True)
        rows = self.rows()
        for name, row in rows.items():
            grid.add_row(name or ITSELF, *(_text(size, unit) for size in row.values()))
        grid.add_section()
        totals = [self.total(column) for column in self.counts]
        grid.add_row("total", *(_text(size, unit) for size in totals))
        grid.add_row("of stock", *(f"{size / max(totals[0], 1):.0%}" for size in totals))
        grid.add_section()
        works = [_work(count) for count in self.counts.values()]
        grid.add_row("passes of backward", *(_text(work.bytes, unit) for work in works))
        grid.add_row(
            "its products, GFLOP",
            *(f"{work.flops / 1e9:.2f}" if work.flops else "-" for work in works),
        )
        return grid

    def __str__(self) -> str:
        file = io.StringIO()
        console = _require("rich.console", "the table").Console(file=file, width=WIDTH)
        console.print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().strip("\n").splitlines())

    def __repr__(self) -> str:
        totals = ", ".join(f"{column} {self.total(column)}" for column in self.counts)
        return f"<MemoryReport of {self.title}: {totals} bytes>"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws a bar for each column, of the model's largest parts, into an image file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        self._figure().savefig(path, dpi=150)

    def _figure(self) -> Any:
        # Not by pyplot, which would change the user's backend and keep the figure.
        figure = _require("matplotlib.figure", "the plot").Figure(
            figsize=(3.7 + 1.1 * len(self.counts), 4.5), layout="constrained"
        )
        axes = figure.subplots()
        unit = _unit_of(self.total(PLAIN))
        at = range(len(self.counts))
        bottom = [0.0] * len(self.counts)
        colours = iter(COLOURS)
        for name, row in self._parts().items():
            heights = [size / 1024**unit for size in row.values()]
            colour = "lightgrey" if name == OTHERS else next(colours)
            axes.bar(at, heights, bottom=bottom, width=0.7, label=name or ITSELF, color=colour)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for x, (column, top) in enumerate(zip(self.counts, bottom, strict=True)):
            share = self.total(column) / max(self.total(STOCK), 1)
            axes.annotate(
                f"{top:.3g}\n{share:.0%}", (x, top), (0, 3), textcoords="offset points",
                ha="center", va="bottom", fontsize=9,
            )  # fmt: skip
        axes.set_xticks(list(at), list(self.counts))
        axes.set_ylabel(f"held for backward, {_UNITS[unit]}")
        axes.set_ylim(0, 1.15 * max(*bottom, 1e-9))
        axes.set_title(self.title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        # In the order of the parts of a bar, the last on top.
        figure.legend(
            handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=9
        )
        return figure

    def _parts(self) -> dict[str, dict[str, int]]:
        """The rows of the plot: of the first depth with some, the largest ones, and the others in sum."""
        deepest = max(name.count(".") + 1 for count in self.counts.values() for name in count.order)
        rows = self.rows(1)
        for depth in range(2, deepest + 1):
            if len(rows) >= 6:
                break
            rows = self.rows(depth)
        largest = sorted(rows, key=lambda name: max(rows[name].values()), reverse=True)
        seen = max(self.total(column) for column in self.counts) / 200
        drawn = {name for name in largest[: len(COLOURS)] if max(rows[name].values()) > seen}
        parts = {name: row for name, row in rows.items() if name in drawn}
        if len(rows) > len(parts):
            parts[OTHERS] = {
                column: sum(row[column] for name, row in rows.items() if name not in parts)
                for column in self.counts
            }
        return parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)


def memory_report(model: torch.nn.Module, input: Any, *, depth: int = 2) -> MemoryReport:
    """The bytes that a training forward leaves held for backward, module by module, at each level of lean training.

    They are counted by a forward on tensors without data: of any size, without a run, on any machine. Counted is each
    storage that the forward allocates and that is alive at its end, with the output, without parameters, buffers and
    the input, as an allocator would count it. A row has what its module made, whoever keeps it. Columns: what torch's
    own operators would keep in the same model (stock), this package's without a level (plain), and each level; under
    them, what backward reads, writes and multiplies to make the rest again.

    Args:
        model: any module; only this package's layers, from ``create_model`` or ``optimize``, have levels. On the CPU,
            CUDA or the meta device (counted as on the CPU). It is counted in its mode: call it before ``eval()``. The
            model, its gradients and the state of the random number generators do not change. Its hooks do not run.
        input: a tensor, or a tuple of the arguments of the model's forward. It may be on the meta device.
        depth: of the rows; 1: the children of the model, 2: also theirs.

    Returns:
        A report; ``print`` shows it as a table, ``plot(path)`` draws it. They need rich and matplotlib.

    Raises:
        TypeError: ``model`` is not a module, ``input`` neither a tensor nor a tuple.
        ValueError: the model is compiled, or ``depth`` is not positive.
        RuntimeError: the forward asks for values of its input.
    """
    name = "memory_report"
    args = checked_arguments(model, input, name)
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"{name}: depth ({depth!r}) must be a positive integer")
    counting = Counting(model, args, name)
    counts = {STOCK: counting.count_stock(), PLAIN: counting.count(None)}
    counts |= {level: counting.count(level) for level in LEVELS}
    levels = lean_of(model)
    if levels.keys() - {""}:
        counts[AS_SET] = counting.count(levels)
    shapes = [
        f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"
        for t in pytree.tree_leaves(args)
        if isinstance(t, Tensor)
    ]
    return MemoryReport(f"{type(model).__name__}, {', '.join(shapes)}", counts, depth)


def _above(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _work(count: Count) -> Work:
    return Work(
        sum(w.bytes for w in count.work.values()), sum(w.flops for w in count.work.values())
    )


def _unit_of(size: int) -> int:
    """The power of 1024 in which ``size`` has two digits before the point, or one."""
    return min(max(int(math.log(max(size, 1) / 4, 1024)), 0), len(_UNITS) - 1)


def _text(size: int, unit: int) -> str:
    return f"{size / 1024**unit:.{2 if unit else 0}f}" if size else "-"


def _require(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"memory_report: {what} needs {package}, which is not installed: python -m pip install {package}"
        ) from error
