"""``python -m benchmarks`` as a user runs it: in a process of its own, on a tiny hidden case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record, registry

ROOT = Path(__file__).resolve().parents[2]
TINY = "batch_norm_relu/train/2x8x4x4/contiguous/float32/cpu"


def run(*arguments: str, code: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "benchmarks", *arguments]
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder after one run of the tiny case, without torch.compile."""
    results = tmp_path_factory.mktemp("results")
    done = run(
        *("run", "--suite", "ops", "--case", TINY, "--device", "cpu", "--rounds", "3"),
        *("--results", str(results), "--output", str(results / "once.jsonl")),
    )
    assert done.returncode == 0, done.stderr
    # The table, the rates and where the files are.
    for text in (TINY, "advdl_ops faster", "GB/s", "floor", "records: ", "plot: ", "ops.png"):
        assert text in done.stdout
    assert max(map(len, done.stdout.split("records: ")[0].splitlines())) <= 125
    return results


def test_help_and_list_import_neither_torch_nor_an_extra() -> None:
    code = (
        "import sys, benchmarks.__main__ as b\n"
        "try: b.main(['run', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "b.registry.select('ops')\n"
        "found = {'torch', 'rich', 'matplotlib', 'sklearn', 'advdl_ops'} & set(sys.modules)\n"
        "assert not found, found"
    )
    done = run(code=code)
    assert done.returncode == 0, done.stderr


def test_list_names_cases_and_targets() -> None:
    done = run("list", "--suite", "models", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "resnet50/inference" in done.stdout
    assert "1.2x" in done.stdout
    assert "2x3x32x32" not in done.stdout  # hidden


@pytest.mark.parametrize("extra", ["rich", "matplotlib"])
def test_a_missing_extra_is_one_sentence(extra: str, measured: Path) -> None:
    arguments = ["list"] if extra == "rich" else ["report", "--results", str(measured)]
    code = (
        f"import sys; sys.modules[{extra!r}] = None\n"
        f"import benchmarks.__main__ as b\nsys.exit(b.main({arguments!r}))"
    )
    done = run(code=code)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"benchmarks: this needs {extra}, which is not installed: python -m pip install {extra}"
    )


def test_records_have_the_fields_of_the_design(measured: Path) -> None:
    records = record.read(measured / "once.jsonl")
    fields = {
        *(
            "op",
            "provider",
            "mode",
            "dtype",
            "layout",
            "shape",
            "metric",
            "unit",
            "p20",
            "p50",
            "p80",
        ),
        *("device", "torch", "triton", "cuda", "commit", "time"),
    }
    data = json.loads((measured / "once.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(data) == fields | {"case", "suite", "why"}
    providers = {item.provider for item in records if item.metric == "time"}
    assert providers == {"eager", "advdl_ops", "floor"}
    for mode in ("fwd", "bwd", "full"):
        times = {i.provider: i for i in records if i.mode == mode and i.metric == "time"}
        assert set(times) == providers
        assert all(0 < i.p20 <= i.p50 <= i.p80 for i in times.values())
    found = {i.metric for i in records if i.provider == "eager" and i.mode == "full"}
    assert found == {
        *(
            "time",
            "speedup",
            "bandwidth",
            "copy_share",
            "throughput",
            "matmul_share",
            "held",
            "peak",
        )
    }
    ratio = next(
        i for i in records if (i.provider, i.mode, i.metric) == ("eager", "full", "speedup")
    )
    assert ratio.unit == "x"
    assert not any(i.provider == "advdl_ops" and i.metric == "speedup" for i in records)
    assert {i.metric for i in records if i.provider == "machine"} == {"copy", "matmul"}


def test_readme_shows_what_was_measured_and_what_was_not(measured: Path) -> None:
    folder = next(path for path in measured.iterdir() if path.is_dir())
    item = record.read(folder / "ops.jsonl")[0]
    shown = "batch_norm_relu/train/16x64x56x56/contiguous/float32/cpu"
    record.merge(
        folder / "ops.jsonl", [_renamed(r, shown) for r in record.read(folder / "ops.jsonl")]
    )
    done = run("report", "--results", str(measured), "--no-plots")
    assert done.returncode == 0, done.stderr
    rows = [
        r
        for r in (measured / "README.md").read_text(encoding="utf-8").splitlines()
        if r[0:1] == "|"
    ]
    row = next(r for r in rows if r.startswith(f"| {shown} "))
    assert folder.name in row
    assert item.time[:10] in row
    assert item.commit in row
    assert "vs eager" in row
    missing = [r for r in rows if "not measured" in r]
    assert any("/cuda " in r for r in missing)
    names = {case.name for case in registry.select(opted_in=("build",))}
    assert {r.split("|")[1].strip() for r in rows[2:]} == names


def _renamed(item: record.Record, case: str) -> record.Record:
    import dataclasses

    return dataclasses.replace(item, case=case)


def test_report_draws_the_plots(measured: Path) -> None:
    plot = next(measured.glob("*/ops.png"))
    plot.unlink()
    done = run("report", "--results", str(measured))
    assert done.returncode == 0, done.stderr
    assert str(plot) in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_compare_gives_the_ratio_of_every_case(measured: Path, tmp_path: Path) -> None:
    import dataclasses

    slower = tmp_path / "slower.jsonl"
    records = record.read(measured / "once.jsonl")
    record.write(
        slower,
        [dataclasses.replace(i, p50=i.p50 * (2 if i.metric == "time" else 1)) for i in records],
    )
    done = run("compare", str(measured / "once.jsonl"), str(slower))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2.00") == 3  # fwd, bwd, full of advdl_ops
    assert run("compare", str(slower), str(tmp_path / "none.jsonl")).returncode == 2
    slower.write_text('{"op": 1}\n', encoding="utf-8")
    assert "line 1: not a benchmark record" in run("compare", str(slower), str(slower)).stderr


def test_smoke_run_prints_json_and_stores_nothing(tmp_path: Path) -> None:
    done = run(
        *("run", "--suite", "ops", "--case", TINY, "--device", "cpu", "--smoke", "--json"),
        *("--results", str(tmp_path / "kept")),
    )
    assert done.returncode == 0, done.stderr
    assert all(record.from_dict(json.loads(line)).case == TINY for line in done.stdout.splitlines())
    assert not (tmp_path / "kept").exists()


def test_a_run_of_an_uncommitted_tree_is_shown_and_not_stored(tmp_path: Path) -> None:
    results = tmp_path / "results"
    arguments = ["run", "--suite", "ops", "--case", TINY, "--device", "cpu", "--rounds", "2"]
    arguments += ["--results", str(results)]
    code = (
        "import sys, pathlib\n"
        "from benchmarks import __main__ as b, environment as e\n"
        f"e.RESULTS, e.IN_CHECKOUT, e.commit = pathlib.Path({str(results)!r}), True, lambda: '0-dirty'\n"
        f"sys.exit(b.main({arguments!r}))"
    )
    done = run(code=code)
    assert done.returncode == 0, done.stderr
    assert "tracked files differ from the commit: this run is shown but not stored" in done.stderr
    assert "--output FILE" in done.stderr
    assert TINY in done.stdout
    assert "records: " not in done.stdout
    assert not results.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "--case", "no such case"), "no case of suite 'quick'"),
        (("run", "--rounds", "0"), "--rounds (0) must be positive"),
        (("run", "--suite", "slow"), "invalid choice"),
    ],
)
def test_bad_arguments_are_said(arguments: tuple[str, ...], text: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert text in done.stderr
