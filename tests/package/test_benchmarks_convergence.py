"""``benchmarks convergence``: both arms start alike, the records suffice for the report, the criterion can fail."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, convergence, convergence_report, environment, report, trainings
from benchmarks.convergence import ARMS, DIRECTIONS, FILE, SEEDS, TASKS, Run
from benchmarks.record import OURS, STOCK, slug

in_checkout = pytest.mark.skipif(
    not environment.IN_CHECKOUT or not (environment.ROOT / "README.md").exists(),
    reason="the figures and the example belong to a checkout",
)


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "convergence", *arguments],
        cwd=environment.ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# ---- two real steps ----


@in_checkout
@pytest.mark.slow
def test_two_steps_of_every_task(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = command("--smoke", "--output", str(tmp_path / "runs.jsonl"), "--results", str(results))
    assert done.returncode == 0, done.stderr
    assert not results.exists()
    runs = convergence.read(tmp_path / "runs.jsonl")
    assert {(run.task, run.arm) for run in runs} == {(task, arm) for task in TASKS for arm in ARMS}
    for task in TASKS:
        (stock,), (ours,) = (convergence.of_arm(runs, task, arm) for arm in ARMS)
        assert stock.weights == ours.weights
        assert (
            [len(epoch) for epoch in stock.losses] == [len(epoch) for epoch in ours.losses] == [2]
        )
        # The same weights and the same images: the first losses differ by rounding, the second ones by its effect.
        first, second = (abs(a - b) for a, b in zip(stock.losses[0], ours.losses[0], strict=True))
        assert first < 1e-5 and second < 1e-3
        assert stock.losses[0][0] != stock.losses[0][1]
        assert not stock.winograd and set(ours.winograd) == set(DIRECTIONS)
        assert min(ours.winograd.values()) > 0
        assert 0 <= stock.score <= 1 and 0 < stock.constant < TASKS[task].least
        assert stock.commit == environment.commit() and stock.torch == torch.__version__
        assert convergence.failures(runs, task) == ["not run: seed 1, 2"]


@in_checkout
@pytest.mark.slow
def test_a_run_without_winograd_is_refused() -> None:
    done = command("--smoke", "--task", "digits", ADVDL_OPS_CONVOLUTION="exact")
    assert done.returncode == 2
    said = ", ".join(f"Winograd serves no {name.replace('_', ' ')}" for name in DIRECTIONS)
    assert done.stderr.strip() == (
        f"benchmarks: digits: {said.replace(', ', '; ')} here, so that this run would show nothing"
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_weights_of_both_arms(task: str) -> None:
    training = trainings.TRAININGS[task]
    (a, b), (c, d) = (map(trainings.digest, trainings.networks(training, seed)) for seed in (0, 1))
    assert a == b and c == d and a != c


def test_the_images_of_the_unet_come_from_the_seed() -> None:
    first, again, other = (trainings.shapes(4, seed).tensors for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    images, labels = first
    means = [images[:, 0][labels == kind].mean() for kind in range(trainings.CLASSES)]
    assert means[2] < -0.4 < -0.1 < means[0] < 0.1 < 0.4 < means[1]


def test_the_mean_iou_of_known_labels() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    assert trainings.mean_iou(labels, labels) == 1
    assert trainings.mean_iou(torch.tensor([0, 1, 1, 0]), labels) == pytest.approx(
        (1 / 3 + 1 / 2 + 0) / 3
    )


# ---- the criterion, on made-up runs ----

MEANS = [1.0, 0.5, 0.25]
SPREAD = 0.01  # between neighbouring seeds, which is their standard deviation, too


def made(shift: float = 0.0, epoch: int = 1, **changed: object) -> list[Run]:
    """Every task, arm and seed. In ``epoch``, from 0, our losses are higher by ``shift`` standard deviations."""
    runs = []
    for task in TASKS:
        for arm in ARMS:
            for seed in SEEDS:
                curve = [mean + SPREAD * (seed - 1) for mean in MEANS]
                if arm == OURS:
                    curve[epoch] += shift * SPREAD
                run = Run(
                    task=task, arm=arm, seed=seed, weights=f"of seed {seed}",
                    losses=[[loss - 0.1, loss + 0.1] for loss in curve],
                    score=0.99, constant=0.1,
                    winograd=dict.fromkeys(DIRECTIONS, 2) if arm == OURS else {},
                    seconds=1.0, device="A CPU, 2 cores, AVX512", torch="2", commit="aaaaaaaaaa",
                    time="2026-01-02T00:00:00",
                )  # fmt: skip
                runs.append(run)
    return [dataclasses.replace(run, **changed) for run in runs]  # type: ignore[arg-type]


def with_one_changed(arm: str, **values: object) -> list[Run]:
    """Of the digits, seed 1 of ``arm``."""
    return [
        dataclasses.replace(run, **values)  # type: ignore[arg-type]
        if (run.task, run.arm, run.seed) == ("digits", arm, 1)
        else run
        for run in made()
    ]


@pytest.mark.parametrize("shift", [0.0, 1.9, -1.9])
def test_a_difference_within_the_spread_is_permitted(shift: float) -> None:
    runs = made(shift)
    assert not any(convergence.failures(runs, task) for task in TASKS)
    assert [epoch.share for epoch in convergence.epochs(runs, "unet")] == pytest.approx(
        [0, shift / 2, 0], abs=1e-9
    )
    assert convergence_report.verdicts(runs)[0].startswith(
        f"{TASKS['digits'].title}: the criterion holds; the largest difference is {abs(shift) / 2:.2g} of"
    )


@pytest.mark.parametrize(("shift", "loss"), [(2.1, "0.5210"), (-2.1, "0.4790"), (math.nan, "nan")])
@pytest.mark.parametrize("epoch", range(len(MEANS)))
def test_a_shifted_loss_is_found_in_its_epoch(shift: float, loss: str, epoch: int) -> None:
    runs = made(shift, epoch)
    (found,) = convergence.failures(runs, "unet")
    assert found.startswith(f"epoch {epoch + 1}: loss ")
    assert "+- 0.0200" in found
    if epoch == 1:
        assert found == f"epoch 2: loss {loss}, stock 0.5000 +- 0.0200"
    lines = convergence_report.verdicts(runs)
    assert "the criterion does not hold" in lines[0] and lines[1] == f"- {found}"


def test_one_seed_alone_can_break_it() -> None:
    runs = with_one_changed(OURS, losses=[[1.0], [0.57], [0.25]])
    assert convergence.failures(runs, "digits") == ["epoch 2: loss 0.5233, stock 0.5000 +- 0.0200"]
    assert not convergence.failures(runs, "unet")


@pytest.mark.parametrize(
    ("arm", "values", "said"),
    [
        (OURS, {"weights": "others"}, "seed 1: the arms start from different weights"),
        (
            OURS,
            {"winograd": {"forward": 2, "input_gradient": 2, "weight_gradient": 0}},
            "seed 1: Winograd serves no weight gradient",
        ),
        (OURS, {"score": 0.97}, "seed 1, advdl_ops: accuracy 0.9700 must be above 0.97"),
        (STOCK, {"score": math.nan}, "seed 1, eager: accuracy nan must be above 0.97"),
    ],
)
def test_runs_that_show_nothing_are_failures(
    arm: str, values: dict[str, object], said: str
) -> None:
    assert convergence.failures(with_one_changed(arm, **values), "digits") == [said]


def test_a_missing_seed_is_said() -> None:
    runs = [run for run in made() if (run.arm, run.seed) != (STOCK, 2)]
    assert convergence.failures(runs, "digits") == ["not run: seed 2"]
    assert convergence_report.verdicts(runs)[0] == f"{TASKS['digits'].title}: no verdict"


# ---- records, picture, section ----


def test_runs_replace_those_of_their_seed_and_of_other_commits(tmp_path: Path) -> None:
    file = tmp_path / FILE
    convergence.merge(file, made())
    assert convergence.read(file) == sorted(made(), key=lambda r: (r.task, r.seed, r.arm))
    again = [
        dataclasses.replace(run, score=0.5)
        for run in made()
        if (run.task, run.seed) == ("digits", 1)
    ]
    convergence.merge(file, again)
    runs = convergence.read(file)
    assert len(runs) == len(made())
    assert {(run.task, run.seed) for run in runs if run.score == 0.5} == {("digits", 1)}
    convergence.merge(file, [dataclasses.replace(run, commit="b") for run in again])
    runs = convergence.read(file)
    assert {(run.task, run.seed) for run in runs} == {
        ("digits", 1), *(("unet", seed) for seed in SEEDS)
    }  # fmt: skip


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"task": "digits"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1: "):
        convergence.read(file)


@pytest.mark.parametrize(("shift", "status"), [(0.0, 0), (3.0, 1), (math.inf, 1), (math.nan, 1)])
def test_the_command_stores_draws_and_judges(
    shift: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def runs_of(task: str, seed: int, number: int, steps: int) -> list[Run]:
        assert (number, steps) == (TASKS[task].epochs, 0)
        return [run for run in made(shift) if (run.task, run.seed) == (task, seed)]

    monkeypatch.setattr(convergence, "runs_of", runs_of)
    monkeypatch.setattr(environment, "worker_environment", lambda device: {})
    monkeypatch.setattr(environment, "cpu_name", lambda: "A CPU")
    options = argparse.Namespace(
        task=None, seed=None, smoke=False, no_save=False, output=None, results=tmp_path
    )
    assert convergence.run(options) == status
    folder = tmp_path / slug("A CPU")
    assert len(convergence.read(folder / FILE)) == len(made())
    plot = folder / "convergence" / "losses.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert said.count("the criterion holds") == (2 if status == 0 else 0)
    assert said.count("the criterion does not hold") == (0 if status == 0 else 2)
    # These are no records of times.
    assert report.load(tmp_path) == {} and compare.load(folder) == {}
    plot.unlink()
    assert plot in report.report(tmp_path) and plot.exists()


def test_the_section_shows_every_epoch_and_score(tmp_path: Path) -> None:
    convergence.write(tmp_path / "machine" / FILE, made(3.0))
    text = "\n".join(convergence_report.block(tmp_path))
    assert "the criterion does not hold" in text
    assert "  - epoch 2: loss 0.5300, stock 0.5000 +- 0.0200" in text
    assert "| digits | 2 | 0.5000 ± 0.0200 | 0.5300 | +1.5 |" in text
    assert "| mean IoU | 0.9900, 0.9900, 0.9900 | 0.9900, 0.9900, 0.9900 | 0.1000 |" in text
    assert "forward 2, input gradient 2, weight gradient 2" in text


@in_checkout
def test_the_section_is_that_of_the_records(tmp_path: Path) -> None:
    results, root = environment.RESULTS, environment.ROOT
    remedy = "python -m benchmarks report makes it anew"
    assert not convergence_report.is_outdated(results, root), remedy
    text = (root / convergence_report.DOC).read_text(encoding="utf-8")
    changed = tmp_path / convergence_report.DOC
    changed.parent.mkdir()
    row = next(line for line in text.splitlines() if line.startswith("| digits | 1 |"))
    changed.write_text(text.replace(row, row.replace(".", ".9", 1)), encoding="utf-8")
    assert convergence_report.is_outdated(results, tmp_path)
    # A file without the section gets it at its end, as `tools/accuracy.py` writes the file without.
    before = text.partition(convergence_report.BEGIN)[0].rstrip() + "\n"
    assert convergence_report.with_block(before, results) == text


@in_checkout
def test_the_criterion_holds_in_the_stored_records() -> None:
    shown = set()
    for file in environment.RESULTS.glob(f"*/{FILE}"):
        runs = convergence.read(file)
        for task in {run.task for run in runs}:
            assert convergence.failures(runs, task) == [], (file, task)
            shown.add(task)
        assert not any(run.commit.endswith("-dirty") for run in runs)
    assert shown == set(TASKS)
