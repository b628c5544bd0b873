"""Two result files side by side.

Times of two runs are only comparable on a quiet machine. The speedup over eager was measured within each run, so judge
a change by that.
"""

from __future__ import annotations

from pathlib import Path

from . import record, table
from .extras import require

Key = tuple[str, str, str, str]


def load(path: Path) -> dict[Key, record.Record]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    latest: dict[Key, record.Record] = {}
    for file in files:
        for item in record.read(file):
            if item.key not in latest or latest[item.key].time <= item.time:
                latest[item.key] = item
    return latest


def rows(
    before: dict[Key, record.Record], after: dict[Key, record.Record], everything: bool
) -> list[tuple[str, str, str, record.Record, record.Record]]:
    """Case, mode and provider of every time in both files, with the two records."""
    found = []
    for key, old in before.items():
        new = after.get(key)
        ours = old.provider.startswith(record.OURS)
        if new is not None and old.metric == "time" and (everything or ours):
            found.append((old.case, old.mode, old.provider, old, new))
    return found


def compare(before_path: Path, after_path: Path, everything: bool = False) -> int:
    """Print the ratio after / before of every case in both files. Returns 1 if they have none in common."""
    before, after = load(before_path), load(after_path)
    common = rows(before, after, everything)
    if not common:
        print("the two files have no case in common")
        return 1
    devices = {item.device for item in (*before.values(), *after.values())}
    grid = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, pad_edge=False)
    for title in ("case", "mode", "provider", "before", "after", "after / before", "over eager"):
        grid.add_column(title, overflow="fold")
    for case, mode, provider, old, new in common:
        speedups = [d.get((case, "eager", mode, "speedup")) for d in (before, after)]
        shown = provider == "advdl_ops" and all(speedups)
        grid.add_row(
            case,
            mode,
            provider,
            table.seconds(old.p50),
            table.seconds(new.p50),
            f"{new.p50 / old.p50:.2f}",
            " -> ".join(f"{s.p50:.2f}x" for s in speedups if s) if shown else "",
        )
    console = table.new_console()
    console.print(grid)
    if len(devices) > 1:
        console.print("different devices: " + "; ".join(sorted(devices)))
    return 0
