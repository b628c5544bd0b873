"""``python -m benchmarks list | run | compare | convergence | report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import convergence, environment, registry
from .extras import MissingExtra


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="benchmarks",
        description="Measure advdl_ops against stock PyTorch on this machine, providers interleaved.",
        epilog="suites: " + "; ".join(f"{name}: {text}" for name, text in registry.SUITES.items()),
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser("list", help="the cases and what they are measured for")
    run = commands.add_parser("run", help="measure a suite, show the table, store the records")
    for command in (show, run):
        command.add_argument(
            "--suite",
            choices=[*registry.SUITES, "all"],
            default=None if command is show else "quick",
        )
        command.add_argument(
            "--case",
            action="append",
            default=[],
            metavar="GLOB",
            help="only cases of this name; may be repeated",
        )
        command.add_argument(
            "--device",
            choices=("cpu", "cuda"),
            help="default: list both; run cuda where there is one",
        )
        command.add_argument(
            "--include-build", action="store_true", help="also time the native build from clean"
        )
    run.add_argument(
        "--json",
        action="store_true",
        help="print the records to stdout, one JSON object a line, and no table",
    )
    run.add_argument(
        "--rounds", type=int, metavar="N", help="rounds per case instead of the case's own"
    )
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    run.add_argument(
        "--no-compile", action="store_true", help="leave the torch.compile providers out"
    )
    run.add_argument(
        "--provider",
        action="append",
        default=[],
        metavar="NAME",
        help="only these beside eager and advdl_ops",
    )
    run.add_argument(
        "--smoke", action="store_true", help="two short rounds, no torch.compile, nothing stored"
    )
    run.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        metavar="S",
        help="seconds for one case (default: %(default)s)",
    )
    run.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="start no case after S seconds; the others keep their results",
    )
    compare = commands.add_parser("compare", help="two result files: the ratio of every case")
    compare.add_argument("before", type=Path, help="a .jsonl file, or a folder of them")
    compare.add_argument("after", type=Path)
    compare.add_argument("--all", action="store_true", help="every provider, not only advdl_ops")

    train = commands.add_parser(
        "convergence",
        help="train two networks with Winograd's convolution and in stock PyTorch, and compare their losses",
    )
    train.add_argument(
        "--task", action="append", choices=convergence.TASKS, help="default: both; may be repeated"
    )
    train.add_argument(
        "--seed",
        action="append",
        type=int,
        choices=convergence.SEEDS,
        help="default: all; may be repeated; the other seeds keep their records",
    )
    train.add_argument(
        "--smoke", action="store_true", help="two steps from one seed, no verdict, nothing stored"
    )

    report = commands.add_parser(
        "report",
        help="regenerate README.md and the plots of the results folder, and the figures of README.md and docs",
    )
    report.add_argument("--no-plots", action="store_true", help="the texts only")
    for command in (run, train):
        command.add_argument(
            "--output", type=Path, metavar="FILE", help="also write this run's records to a file"
        )
        command.add_argument("--no-save", action="store_true", help="do not store under --results")
    for command in (run, train, report):
        command.add_argument("--results", type=Path, default=environment.RESULTS, metavar="DIR")
    return top


def positive(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise SystemExit(f"benchmarks: --{name} ({value}) must be positive")


def command_list(arguments: argparse.Namespace) -> int:
    from . import table

    suite = None if arguments.suite in (None, "all") else arguments.suite
    cases = registry.select(suite, arguments.case, arguments.device, opted_in=("build",))
    table.show_cases(cases)
    return 0 if cases else 1


def command_run(arguments: argparse.Namespace) -> int:
    from . import runner

    positive(arguments, "rounds", "threads", "timeout", "budget")
    return runner.run(arguments)


def command_compare(arguments: argparse.Namespace) -> int:
    from . import compare

    return compare.compare(arguments.before, arguments.after, arguments.all)


def command_convergence(arguments: argparse.Namespace) -> int:
    return convergence.run(arguments)


def command_report(arguments: argparse.Namespace) -> int:
    from . import convergence_report, figures, report

    written = report.report(arguments.results, with_plots=not arguments.no_plots)
    docs = (*figures.write(arguments.results), *convergence_report.write_doc(arguments.results))
    for path in (*written, *docs):
        print(f"wrote {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return globals()[f"command_{arguments.command}"](arguments)
    except (MissingExtra, FileNotFoundError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
