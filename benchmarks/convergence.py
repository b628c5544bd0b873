"""Does a network train with Winograd's convolution as it does in stock PyTorch?  ``benchmarks convergence``.

Two trainings (``trainings.py``) by two arms, the zoo's network and the stock one. From one seed both have the same
initial weights, data, order of the data and optimizer. The criterion: in every epoch, the mean of our losses over the
seeds is at most two standard deviations from the mean of stock's, the deviation being that of stock's seeds. For this
to say anything, Winograd must serve in each direction and every run must learn; otherwise that is a failure as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import environment
from .extras import require
from .record import OURS, STOCK, slug

ARMS = STOCK, OURS
SEEDS = 0, 1, 2
DIRECTIONS = "forward", "input_gradient", "weight_gradient"
DEVIATIONS = 2
FILE = "convergence/runs.jsonl"  # in the folder of a device


@dataclass(frozen=True)
class Task:
    """One training, as the report shows it.

    Attributes:
        title: network and images.
        metric: the score of a run, 1 at best.
        least: a run with a lower score has not learned.
        epochs: of one run.
    """

    title: str
    metric: str
    least: float
    epochs: int


TASKS = {
    "digits": Task("convnet on handwritten digits", "accuracy", 0.97, 6),
    "unet": Task("U-Net on discs and rectangles in noise", "mean IoU", 0.7, 6),
}


@dataclass(frozen=True)
class Run:
    """One training by one arm from one seed.

    Attributes:
        task: a key of ``TASKS``.
        arm: ``record.STOCK`` or ``record.OURS``.
        weights: a digest of the initial weights.
        losses: of every step, by epoch.
        score: on images that were not trained on.
        constant: the score of the most frequent label, predicted everywhere.
        winograd: by direction, how many different convolutions of the training Winograd served; empty for stock.
        seconds: of the training. No measurement of speed: the arms do not take turns.
    """

    task: str
    arm: str
    seed: int
    weights: str
    losses: list[list[float]]
    score: float
    constant: float
    winograd: dict[str, int]
    seconds: float
    device: str
    torch: str
    commit: str
    time: str

    @property
    def curve(self) -> list[float]:
        """The mean loss of each epoch."""
        return [statistics.fmean(epoch) for epoch in self.losses]


# ---- the criterion ----


@dataclass(frozen=True)
class Epoch:
    """Means of the losses over the seeds, and how far apart they may be."""

    stock: float
    ours: float
    permitted: float

    @property
    def share(self) -> float:
        """The difference over what is permitted."""
        return (self.ours - self.stock) / self.permitted

    @property
    def holds(self) -> bool:
        return abs(self.share) <= 1

    def __str__(self) -> str:
        return f"{self.ours:.4f}, stock {self.stock:.4f} +- {self.permitted:.4f}"


def of_arm(runs: Sequence[Run], task: str, arm: str) -> list[Run]:
    return sorted((r for r in runs if (r.task, r.arm) == (task, arm)), key=lambda r: r.seed)


def epochs(runs: Sequence[Run], task: str) -> list[Epoch]:
    """Of a task with two seeds or more."""
    stock, ours = (zip(*(r.curve for r in of_arm(runs, task, a)), strict=True) for a in ARMS)
    return [
        Epoch(statistics.fmean(a), statistics.fmean(b), DEVIATIONS * statistics.stdev(a))
        for a, b in zip(stock, ours, strict=True)
    ]


def missing(runs: Sequence[Run], task: str) -> list[str]:
    """The seeds without both arms."""
    found = [{r.seed for r in of_arm(runs, task, arm)} for arm in ARMS]
    return [str(seed) for seed in SEEDS if not all(seed in seeds for seeds in found)]


def failures(runs: Sequence[Run], task: str) -> list[str]:
    """Where the criterion does not hold, and what keeps the runs from showing anything."""
    if seeds := missing(runs, task):
        return [f"not run: seed {', '.join(seeds)}"]
    found = []
    for epoch, means in enumerate(epochs(runs, task), 1):
        if not means.holds:
            found.append(f"epoch {epoch}: loss {means}")
    metric, least = TASKS[task].metric, TASKS[task].least
    for stock, ours in zip(*(of_arm(runs, task, arm) for arm in ARMS), strict=True):
        if stock.weights != ours.weights:
            found.append(f"seed {ours.seed}: the arms start from different weights")
        found += [f"seed {ours.seed}: {why}" for why in unserved(ours)]
        for run in (stock, ours):
            if not run.score > least:
                found.append(
                    f"seed {run.seed}, {run.arm}: {metric} {run.score:.4f} must be above {least}"
                )
    return found


def unserved(ours: Run) -> list[str]:
    """The directions in which Winograd served nothing."""
    return [
        f"Winograd serves no {direction.replace('_', ' ')}"
        for direction in DIRECTIONS
        if not ours.winograd.get(direction)
    ]


# ---- records ----


def read(path: Path) -> list[Run]:
    """Runs of a JSON-lines file; the error names the file and the line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Run(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def write(path: Path, runs: Sequence[Run]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(run)) + "\n" for run in runs)
    path.write_text("".join(lines), encoding="utf-8")


def merge(path: Path, runs: Sequence[Run]) -> None:
    """Add runs to a file. They replace those of the same task and seed, and of the same task at another commit."""
    new = {(run.task, run.seed) for run in runs}
    commits = {run.task: run.commit for run in runs}
    kept = [
        run
        for run in (read(path) if path.exists() else [])
        if (run.task, run.seed) not in new and run.commit == commits.get(run.task, run.commit)
    ]
    write(path, sorted([*kept, *runs], key=lambda run: (run.task, run.seed, run.arm)))


# ---- the command ----


def runs_of(task: str, seed: int, number: int, steps: int) -> list[Run]:
    """Both arms from one seed, of ``number`` epochs and up to ``steps`` steps (0: all).

    Raises:
        ValueError: Winograd does not serve in every direction, so that the run would show nothing.
    """
    from . import trainings

    training = trainings.TRAININGS[task]
    train_set, test_set = training.datasets()
    ours, stock = trainings.networks(training, seed)
    found = []
    for arm, model in ((STOCK, stock), (OURS, ours)):
        weights, begin = trainings.digest(model), time.perf_counter()
        trainings.forget_choices()
        losses = trainings.trained(model, training, train_set, number, seed, steps)
        seconds, winograd = time.perf_counter() - begin, trainings.served_by_winograd()
        score, constant = trainings.scores(model, training, test_set)
        run = Run(
            task=task,
            arm=arm,
            seed=seed,
            weights=weights,
            losses=losses,
            score=score,
            constant=constant,
            winograd=winograd if arm == OURS else {},
            seconds=round(seconds, 1),
            device=environment.cpu_name(),
            torch=str(environment.versions()["torch"]),
            commit=environment.commit(),
            time=environment.now(),
        )
        if arm == OURS and (why := unserved(run)):
            raise ValueError(f"{task}: {'; '.join(why)} here, so that this run would show nothing")
        found.append(run)
        print(
            f"{task}, seed {seed}, {arm}: loss {' '.join(f'{loss:.4f}' for loss in run.curve)},"
            f" {TASKS[task].metric} {score:.4f}, {seconds:.0f} s",
            flush=True,
        )
    return found


def run(arguments: argparse.Namespace) -> int:
    """``benchmarks convergence``. Exit status 1 if the criterion does not hold, or nothing was shown."""
    from . import convergence_report, runner

    saves = not (arguments.no_save or arguments.smoke)
    if saves and not runner.storable(arguments.results):
        print(f"benchmarks: {runner.NOT_STORED}", file=sys.stderr)
        saves = False
    tasks = arguments.task or list(TASKS)
    if "digits" in tasks:
        require("sklearn")
    if saves:
        require("matplotlib")
    # As for every measurement on CPU: required kernels, and no choice that was stored on this machine.
    os.environ.update(environment.worker_environment("cpu"))
    file = arguments.results / slug(environment.cpu_name()) / FILE
    found: list[Run] = []
    for task in tasks:
        for seed in (SEEDS[0],) if arguments.smoke else (arguments.seed or SEEDS):
            number, steps = (1, 2) if arguments.smoke else (TASKS[task].epochs, 0)
            runs = runs_of(task, seed, number, steps)
            found += runs
            if saves:
                merge(file, runs)
    if arguments.output is not None:
        write(arguments.output, found)
    if arguments.smoke:
        return 0
    if saves:
        found = read(file)
        print(f"records: {file}")
        print(f"plot: {convergence_report.draw(file)}")
        for path in convergence_report.write_doc(arguments.results):
            print(f"section: {path}")
    print("\n".join(convergence_report.verdicts(found)))
    return 1 if any(failures(found, task) for task in tasks) else 0
