"""Runs cases in new processes and collects what they report.

On CPU each case has its own process, so that no case inherits the heap of another. On CUDA one process runs all
cases, as its start takes seconds. If a case ends it, a new one continues with the next case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import environment, record, registry
from .extras import MissingExtra, require
from .session import Settings, new_record

Event = dict[str, Any]


def batches(cases: list[registry.Case]) -> list[list[str]]:
    """Names of the cases that share a process."""
    alone = [[case.name] for case in cases if case.device == "cpu"]
    shared = [case.name for case in cases if case.device == "cuda"]
    return alone + ([shared] if shared else [])


def events(names: list[str], suite: str, settings: Settings, timeout: float) -> Iterator[Event]:
    """Events of one process. Every case that was started ends with ``done`` or ``failed``."""
    command = [sys.executable, "-m", f"{__package__}.session", "--suite", suite]
    command += ["--settings", json.dumps(dataclasses.asdict(settings)), *names]
    device = "cuda" if names[0].endswith("/cuda") else "cpu"
    current = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment.worker_environment(device),
        )
        watchdog = threading.Timer(timeout, process.kill)
        watchdog.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "start":
                    current = event["case"]
                    watchdog.cancel()
                    watchdog = threading.Timer(timeout, process.kill)
                    watchdog.start()
                elif event["event"] in ("done", "failed"):
                    current = ""
                yield event
            code = process.wait()
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        tail = "".join(errors.readlines()[-15:]).strip()
    if current or code not in (0, 1):
        why = f"the process ended with {code} (killed after {timeout:g} s, if -9)\n{tail}"
        yield {"event": "failed", "case": current or names[0], "why": why}


def collect(
    names: list[str],
    suite: str,
    settings: Settings,
    timeout: float,
    see: Callable[[Event], None],
    deadline: float = float("inf"),
) -> None:
    """Run one batch to its end. If a case ends the process, a new one continues.

    After the deadline (of time.monotonic) no case is started.
    """
    left = list(names)
    while left:
        for event in events(left, suite, settings, timeout):
            see(event)
            if event["event"] in ("done", "failed") and event["case"] in left:
                left = left[left.index(event["case"]) + 1 :]
                if time.monotonic() > deadline:
                    return


class Collector:
    """Records, refusals and failures of a run."""

    def __init__(self, suite: str, results: Path | None = None) -> None:
        self.suite = suite
        self.results = results  # where the records of each case are stored as soon as it has ended
        self.ended: set[str] = set()
        self.records: list[record.Record] = []
        self.artifacts: dict[str, Any] = {}
        self.refused: list[tuple[str, str, str]] = []
        self.failed: dict[str, str] = {}

    def see(self, event: Event) -> None:
        kind = event["event"]
        if kind in ("done", "failed"):
            self.ended.add(event["case"])
        if kind == "record":
            self.records.append(record.from_dict(event["record"]))
        elif kind == "artifact":
            self.artifacts[event["name"]] = event["data"]
        elif kind == "refused":
            self.refused.append((event["case"], event["provider"], event["why"]))
        elif kind == "failed":
            self.fail(event["case"], event["why"])
        if kind in ("done", "failed") and self.results is not None:
            own = [item for item in self.records if item.case == event["case"]]
            if own:
                record.merge(file_of(self.results, own[0]), own)

    def fail(self, name: str, why: str) -> None:
        """For a failed case, keep only the reason and no figures, neither of this run nor of an earlier one."""
        self.failed[name] = why
        self.records = [
            item for item in self.records if item.case != name or item.metric == record.REFUSED
        ]
        case, reason = registry.all_cases()[name], " ".join(why.split())
        self.records.append(new_record(case, self.suite, "-", "-", record.FAILED, "-", why=reason))


def file_of(results: Path, item: record.Record) -> Path:
    return results / record.slug(item.device) / f"{item.suite}.jsonl"


NOT_STORED = (
    "tracked files differ from the commit: this run is shown but not stored, as nobody could tell what was measured. "
    "Commit first, or name a file (--output FILE) or another folder (--results DIR)"
)


def storable(results: Path) -> bool:
    """Whether records may be stored there. The checkout's own folder only takes those of a commit."""
    own = environment.IN_CHECKOUT and results.resolve() == environment.RESULTS
    return not (own and environment.commit().endswith("-dirty"))


def default_device() -> str:
    torch = require("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


def without_missing_extras(cases: list[registry.Case]) -> list[registry.Case]:
    """The cases whose modules are installed. Prints to stderr what the others need, or raises if no case is left."""
    kept = []
    missing: dict[str, list[str]] = {}
    for case in cases:
        try:
            for module in case.extras:
                require(module)
            kept.append(case)
        except MissingExtra as why:
            missing.setdefault(str(why), []).append(case.name)
    if not kept:
        raise MissingExtra("; ".join(missing))
    for reason, names in missing.items():
        print(f"left out: {', '.join(names)}: {reason}", file=sys.stderr)
    return kept


def run(arguments: argparse.Namespace) -> int:
    """``benchmarks run``. Exit status 1 if a case or a provider failed, or a provider returned wrong values."""
    from . import table

    device = arguments.device or default_device()
    if device == "cuda" and not require("torch").cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    suite = None if arguments.suite == "all" else arguments.suite
    opted_in = ("build",) if arguments.include_build else ()
    cases = registry.select(suite, arguments.case, device, opted_in=opted_in)
    if not cases:
        raise ValueError(
            f"no case of suite {arguments.suite!r} on {device} matches {arguments.case or 'anything'}"
        )
    saves = not (arguments.no_save or arguments.smoke)
    # Anything missing is reported before the long run.
    if saves and not storable(arguments.results):
        print(f"benchmarks: {NOT_STORED}", file=sys.stderr)
        saves = False
    if saves:
        require("matplotlib")
    cases = without_missing_extras(cases)
    settings = Settings(
        rounds=arguments.rounds,
        smoke=arguments.smoke,
        compile=not arguments.no_compile,
        threads=arguments.threads,
        providers=tuple(arguments.provider),
    )
    found = Collector(arguments.suite, arguments.results if saves else None)
    deadline = time.monotonic() + (arguments.budget or float("inf"))
    with table.progress(cases, quiet=arguments.json) as show:

        def see(event: Event) -> None:
            found.see(event)
            show(event)

        for names in batches(cases):
            if time.monotonic() > deadline:
                break
            collect(names, arguments.suite, settings, arguments.timeout, see, deadline)

    if arguments.json:
        for item in found.records:
            print(record.to_json(item))
    elif arguments.suite == "choice":
        from . import thresholds

        thresholds.show(found.records)
    else:
        table.show_records(found.records)
    if arguments.output is not None:
        record.write(arguments.output, found.records)
    if saves:
        finish(arguments.results, found, print if not arguments.json else lambda text: None)
    return tell(cases, found)


def tell(cases: list[registry.Case], found: Collector) -> int:
    """Print to stderr what was left out, refused or failed. Returns the exit status."""
    left = [case.name for case in cases if case.name not in found.ended]
    if left:
        print(f"left out, as the budget was spent: {', '.join(left)}", file=sys.stderr)
    for case, provider, why in found.refused:
        print(f"refused: {case}: {provider}: {why}", file=sys.stderr)
    for name, why in found.failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if found.failed or found.refused else 0


def finish(results: Path, found: Collector, say: Callable[[str], None]) -> None:
    """Redraw the plot of the stored records and the README of the results, and print their paths."""
    from . import plots, report

    if found.records:
        file = file_of(results, found.records[0])
        say(f"records: {file}")
        for name, data in found.artifacts.items():
            (file.parent / f"{name}.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
        if found.suite == "choice":
            return  # it has a table only
        say(f"plot: {plots.draw(file.parent, file.stem)}")
    say(f"overview: {report.write_readme(results)}")
