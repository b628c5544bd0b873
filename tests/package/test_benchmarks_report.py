"""The report: every published figure is what the stored records make, and says what they do not."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import (
    environment,
    figures,
    lean_figures,
    measure_model,
    measure_op,
    plots,
    record,
    registry,
    report,
    targets,
)
from benchmarks.record import Record
from benchmarks.session import Session, Settings

TINY = "batch_norm_relu/train/2x8x4x4/contiguous/float32/cpu"
ROW = "batch_norm_relu/train/16x64x56x56/contiguous/float32/cpu"
MACHINE = "A CPU, 2 cores, AVX512"

in_checkout = pytest.mark.skipif(
    not environment.IN_CHECKOUT or not (environment.ROOT / "README.md").exists(),
    reason="the figures belong to a checkout",
)


def measured() -> tuple[Session, io.StringIO]:
    stream = io.StringIO()
    return Session(registry.all_cases()[TINY], "ops", Settings(smoke=True), stream), stream


def records(stream: io.StringIO) -> list[Record]:
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [record.from_dict(e["record"]) for e in found if e["event"] == "record"]


def made(case: str, **times: float) -> list[Record]:
    """The records of one case in mode full, with these times per provider; ``torch_compile`` is that one."""
    session, stream = measured()
    names = {name.replace("torch_", "torch."): [value] for name, value in times.items()}
    measure_op.report_times(session, "full", names)
    changed = {
        "case": case,
        "device": MACHINE,
        "commit": "aaaaaaaaaa",
        "time": "2026-01-02T00:00:00",
    }
    return [dataclasses.replace(item, **changed) for item in records(stream)]


def store(results: Path, items: list[Record]) -> None:
    for item in items:
        path = results / record.slug(item.device) / f"{item.suite}.jsonl"
        known = record.read(path) if path.exists() else []
        record.write(path, [*known, item])


def changed(items: list[Record], **values: object) -> list[Record]:
    return [dataclasses.replace(item, **values) for item in items]  # type: ignore[arg-type]


@in_checkout
def test_the_published_figures_are_those_of_the_records() -> None:
    stale = figures.outdated(environment.RESULTS, environment.ROOT)
    assert not stale, f"python -m benchmarks report makes them anew: {stale}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files with figures, and of the records."""
    (tmp_path / "docs").mkdir()
    for file in figures.FILES:
        shutil.copy(environment.ROOT / file, tmp_path / file)
    for file in environment.RESULTS.glob("*/*.*"):
        copy = tmp_path / "results" / file.relative_to(environment.RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path


@in_checkout
@pytest.mark.parametrize("file", figures.FILES)
def test_a_figure_changed_by_hand_is_noticed(file: str, checkout: Path) -> None:
    text = (checkout / file).read_text(encoding="utf-8")
    begin = text.index(figures.BEGIN)
    found = re.compile(r"(\d\.\d)(\d)x").search(text, begin, text.index(figures.END))
    assert found is not None
    other = str((int(found[2]) + 1) % 10)
    text = text[: found.start(2)] + other + text[found.end(2) :]
    (checkout / file).write_text(text, encoding="utf-8")
    assert figures.outdated(checkout / "results", checkout) == [checkout / file]


@in_checkout
def test_a_record_changed_by_hand_is_noticed(checkout: Path) -> None:
    results = checkout / "results"
    assert not figures.outdated(results, checkout)
    machine = figures.at_one_commit(figures.machines(results))[0][0]
    last = machine.records[-1]
    for path in (results / machine.folder).glob("*.jsonl"):
        items = record.read(path)
        record.write(
            path, [dataclasses.replace(i, p80=i.p80 * 1.0001) if i == last else i for i in items]
        )
    assert figures.outdated(results, checkout) == [checkout / file for file in figures.FILES]


LEAN = "memory/resnet18/8x3x224x224/float32/cpu"


def lean_records(held: dict[str, float], seconds: dict[str, float]) -> list[Record]:
    session, stream = measured()
    measure_op.report_times(session, "full", {name: [value] for name, value in seconds.items()})
    for name, value in held.items():
        session.record(name, "full", "held", "B", value)
        session.record(name, "full", "peak", "B", 2 * value)
    changes = {"case": LEAN, "suite": "memory", "device": MACHINE, "commit": "aaaaaaaaaa"}
    return changed(records(stream), **changes)


def test_the_table_of_lean_training_takes_bytes_and_times_of_the_right_providers() -> None:
    items = lean_records(
        {"eager": 100e6, "advdl_ops": 100e6, "advdl_ops lean=block": 75.4e6},
        {"eager": 3.0, "eager channels_last": 2.4, "advdl_ops": 2.0, "advdl_ops lean=block": 2.01},
    )
    head, lines = lean_figures.table(LEAN, {"AVX512": items})
    assert head[-2:] == ["time, of plain's, AVX512", "of eager's, AVX512"]
    assert lines == [
        ["`eager`", "100.0 MB", "1.000x", "1.00x", "1.50x", "1.25x"],
        ["`eager channels_last`", "-", "-", "-", "1.20x", "1.00x"],
        ["`advdl_ops`", "100.0 MB", "1.000x", "1.00x", "1.00x", "0.83x"],
        ["`advdl_ops lean=block`", "75.4 MB", "0.754x", "0.75x", "1.00x", "0.84x"],
    ]
    (verdict,) = lean_figures.verdicts(LEAN, {"AVX512": items})
    assert verdict == (
        "- `lean=block`: held 0.754x (target 0.75x, missed); time of plain on AVX512 1.00x (target 1x, reached)"
    )
    assert lean_figures.short(LEAN) in lean_figures.TARGETS


def test_the_tables_of_lean_training_are_those_of_the_suite(tmp_path: Path) -> None:
    items = lean_records(
        {"eager": 2.0, "advdl_ops": 2.0, "advdl_ops lean=block": 1.0},
        {"eager": 2.0, "advdl_ops": 1.0, "advdl_ops lean=block": 1.0},
    )
    store(tmp_path, items)
    assert any(lean_figures.short(LEAN) in line for line in figures.lean_block(tmp_path))
    registered = {case.name for case in figures.registered("AVX512")}
    assert LEAN in registry.all_cases() and LEAN not in registered


def test_a_family_shows_its_best_its_worst_and_its_median(tmp_path: Path) -> None:
    names = [c.name for c in figures.registered("AVX512") if figures.family(c) == "group norm"]
    for name, time in zip(names[:3], (0.9, 4.0, 2.0), strict=True):
        store(tmp_path, made(name, eager=9.0, torch_compile=time, advdl_ops=1.0))
    block = "\n".join(figures.performance_block(tmp_path))
    row = next(line for line in block.splitlines() if line.startswith("| group norm |"))
    best, worst = (f"`{name.removesuffix('/float32/cpu')} full`" for name in (names[1], names[0]))
    assert f"median 2.00x of 3 rows, 1 below 1<br>best 4.00x {best}<br>worst 0.90x {worst}" in row
    assert f"cases not measured at this commit: {len(names) - 3} |" in row
    only = next(c.name for c in figures.registered("AVX512") if c.name.startswith("lstm_cell/"))
    store(tmp_path, made(only, eager=2.0, advdl_ops=1.0))
    rows = figures.performance_block(tmp_path)
    assert any(
        r.startswith(
            f"| LSTM cell | 2.00x `{only.removesuffix('/float32/cpu')} full`, the only row"
        )
        for r in rows
    )
    assert "| instance norm | not measured at this commit |" in block
    assert "- AVX2: not measured\n- CUDA: not measured" in block
    slower = block.partition("Every row below")[2]
    assert f"| {worst} | AVX512 | 0.90x (0.90-0.90) | torch.compile |" in slower
    assert names[1].removesuffix("/float32/cpu") not in slower


def test_the_readme_has_one_short_table(tmp_path: Path) -> None:
    store(tmp_path, made(ROW, eager=9.0, torch_compile=0.9, advdl_ops=1.0))
    lines = figures.readme_block(tmp_path)
    assert (
        "| batch norm + ReLU, training | `batch_norm_relu/train/16x64x56x56/contiguous full` | 0.90x |"
        in lines
    )
    other = next(line for line in lines if line.startswith("| LSTM, training |"))
    assert other.endswith("| not measured at this commit |")
    assert sum(line.startswith("| ---") for line in lines) == 1
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(figures.README_ROWS)
    (said,) = (line for line in lines if line.startswith("On "))
    assert said.startswith("On AVX512, 1 of 1 rows")
    assert "are below 0.97" in said
    assert "- AVX2: not measured" in lines
    assert "- CUDA: not measured" in lines


def test_every_row_of_the_readme_is_a_row_of_a_case() -> None:
    cases = {case.name: case for case in figures.registered("AVX512")}
    for title, row in figures.README_ROWS.items():
        of, mode, *label = row.split()
        case = cases.get(f"{of}/float32/cpu") or cases[f"{of}/cpu"]
        assert mode in case.modes, title
        items = changed(made(case.name, eager=1.0), mode=mode, suite=case.suites[0])
        shown = targets.Row(case.name, mode, *label or [""], "advdl_ops", "eager", None, items)
        assert figures.name(shown) == f"`{row}`"
        assert label == (["optimize()"] if case.suites == ("models",) else []), title


def test_only_one_commit_of_one_machine_of_a_kind_counts(tmp_path: Path) -> None:
    first = made(ROW.replace("contiguous", "channels_last"), eager=7.0, advdl_ops=1.0)
    second = made(ROW, eager=5.0, advdl_ops=1.0)
    newer = changed(second, commit="bbbbbbbbbb", time="2026-01-03T00:00:00")
    other = changed(first, device="B CPU, 2 cores, AVX512", time="2026-01-01T00:00:00")
    quick = made(ROW.replace("relu", "add_relu"), eager=9.0, advdl_ops=1.0)
    quick = changed(quick, suite="quick", commit="cccccccccc", time="2026-01-04T00:00:00")
    held_to_avx2 = changed(first, device="A CPU, 2 cores, AVX2")
    store(tmp_path, [*first, *newer, *other, *quick, *held_to_avx2])
    found = figures.machines(tmp_path)
    assert [(m.kind, m.device, m.commits) for m in found] == [
        ("AVX512", MACHINE, {"ops": "bbbbbbbbbb"}),
        ("AVX2", "A CPU, 2 cores, AVX2", {"ops": "aaaaaaaaaa"}),
    ]
    assert [f.value for f in figures.figures(found[0])] == [5.0]
    # Nor do two machines at two commits stand side by side.
    for make in (figures.readme_block, figures.performance_block):
        block = "\n".join(make(tmp_path))
        assert (
            "- AVX2: not measured at this commit; last at A CPU, 2 cores, AVX2; commit `aaaaaaaaaa`"
            in block
        )
        assert "5.00x" in block
        assert "7.00x" not in block
    later = made(ROW.replace("relu", "add_relu"), eager=3.0, advdl_ops=1.0)
    later = changed(later, commit="bbbbbbbbbb", time="2026-01-04T00:00:00")
    store(tmp_path, changed(later, device="A CPU, 2 cores, AVX2"))
    assert "3.00x" in "\n".join(figures.performance_block(tmp_path))


def test_each_suite_has_a_commit_of_its_own(tmp_path: Path) -> None:
    """The networks take as long to measure as all single layers, and neither makes the other's records old."""
    layer = made(ROW, eager=5.0, advdl_ops=1.0)
    network = changed(layer, case="resnet50/inference/8x3x224x224/float32/cpu", suite="models")
    newer = changed(layer, commit="bbbbbbbbbb", time="2026-01-03T00:00:00")
    on_avx2 = changed([*layer, *network], device="A CPU, 2 cores, AVX2")
    store(tmp_path, [*layer, *network, *newer, *on_avx2])
    found, older = figures.at_one_commit(figures.machines(tmp_path))
    commits = [(m.kind, m.commits) for m in found]
    assert commits == [
        ("AVX512", {"models": "aaaaaaaaaa", "ops": "bbbbbbbbbb"}),
        ("AVX2", {"models": "aaaaaaaaaa"}),
    ]
    assert not older
    block = "\n".join(figures.performance_block(tmp_path))
    assert "commit `aaaaaaaaaa` (models), `bbbbbbbbbb` (ops), 2026-01-03" in block


def test_the_cost_of_a_call_has_a_row_for_each_mode(tmp_path: Path) -> None:
    items = made("overhead/conv2d_relu/cpu", eager=0.5, advdl_ops=1.0)
    store(tmp_path, [*items, *changed(items, mode="fwd")])
    (machine,) = figures.machines(tmp_path)
    assert [f.name for f in figures.figures(machine)] == [
        "`overhead/conv2d_relu full`",
        "`overhead/conv2d_relu fwd`",
    ]


def test_the_faster_of_function_and_module_is_the_cost_of_a_call(tmp_path: Path) -> None:
    session, stream = measured()
    times = {"eager": [3.0], "eager functional": [2.0], "functional": [1.0], "advdl_ops": [4.0]}
    measure_op.report_times(session, "fwd", times)
    measure_op.report_over_stock(session, "fwd", times)
    case = "overhead/conv2d_relu/cpu"
    store(tmp_path, changed(records(stream), case=case, device=MACHINE, commit="aaaaaaaaaa"))
    (machine,) = figures.machines(tmp_path)
    (figure,) = figures.figures(machine)
    assert (figure.title, figure.value, figure.stock) == (
        "cost of one call",
        2.0,
        "eager functional",
    )
    assert figure.title in figures.titles("AVX512")
    assert "| cost of one call | 2.00x `overhead/conv2d_relu fwd`" in "\n".join(
        figures.performance_block(tmp_path)
    )


def test_a_slow_forward_is_listed_beside_a_fast_whole(tmp_path: Path) -> None:
    whole = made(ROW, eager=3.0, advdl_ops=1.0)
    alone = changed(made(ROW, eager=0.5, advdl_ops=1.0), mode="fwd")
    store(tmp_path, [*whole, *alone])
    name = ROW.removesuffix("/float32/cpu")
    slower = "\n".join(figures.performance_block(tmp_path)).partition("Every row below")[2]
    assert f"| `{name} fwd` | AVX512 | 0.50x" in slower
    assert "On AVX512, 1 of 2 rows" in "\n".join(figures.readme_block(tmp_path))


def test_a_case_that_failed_is_counted_in_its_family(tmp_path: Path) -> None:
    other = ROW.replace("contiguous", "channels_last")
    failed = made(other, eager=3.0)[:1]
    failed = changed(failed, provider="-", mode="-", metric="failed", why="it raised")
    store(tmp_path, [*made(ROW, eager=3.0, advdl_ops=1.0), *failed])
    block = "\n".join(figures.performance_block(tmp_path))
    assert "cases that failed or in which ours was refused: 1 |" in block


def test_bytes_held_stand_beside_the_fewest_of_stock() -> None:
    items = made(ROW, eager=3.0, torch_compile=4.0, advdl_ops=1.0)
    sizes = {"eager": 30.0, "torch.compile": 10.0, "advdl_ops": 20.0}
    items += [
        dataclasses.replace(items[0], provider=provider, metric="held", p50=size)
        for provider, size in sizes.items()
    ]
    (row,) = targets.rows(ROW, items)
    assert targets.held(row) == ("torch.compile", 0.5)


@pytest.mark.parametrize(
    ("target", "times", "said"),
    [
        (">= 2.5x", {"eager": 3.0, "torch_compile": 2.4}, ">= 2.5x: 2.400, missed"),
        (">= 2.5x", {"eager": 2.5}, ">= 2.5x: 2.500, reached"),
        (
            ">= 1.8x, stretch 2.2x",
            {"eager": 2.0},
            ">= 1.8x: 2.000, reached; stretch 2.2x: 2.000, missed",
        ),
        (
            ">= 1.3x eager, >= 1.0x compile",
            {"eager": 1.4, "torch_compile": 0.9},
            ">= 1.3x eager: 1.400, reached; >= 1.0x compile: 0.900, missed",
        ),
        (">= 1.0x compile", {"eager": 2.0}, ">= 1.0x compile: not measured"),
        # The forward pass stands before the slash; it was not measured here.
        (
            ">= 1.3x eager / >= 1.4x eager",
            {"eager": 1.35},
            ">= 1.3x eager: not measured; >= 1.4x eager: 1.350, missed",
        ),
        (
            "gradients below stock",
            {"eager": 0.9},
            "gradients below stock: 0.900 of its speed, missed",
        ),
        ("raw <= 10 us", {"eager": 0.9}, ""),
        ("<= 50 ms beyond torch", {"eager": 0.9}, "<= 50 ms beyond torch: 1 s, missed"),
        ("held <= 0.80x stock", {"eager": 0.9}, "held <= 0.80x stock: not measured"),
    ],
)
def test_a_target_is_reached_or_missed(target: str, times: dict[str, float], said: str) -> None:
    (row,) = targets.rows(ROW, made(ROW, **times, advdl_ops=1.0))
    assert "; ".join(targets.verdicts(target, row)) == said


def test_every_target_can_be_judged() -> None:
    items = made(ROW, eager=2.0, advdl_ops=1.0)
    for case in registry.all_cases().values():
        if case.device == "cpu" and case.target and set(case.suites) != {"quick"}:
            for mode in ("full", "eval fwd"):
                row = targets.Row(case.name, mode, "", "advdl_ops", "eager", items[0], items)
                assert targets.verdicts(case.target, row)
    with pytest.raises(ValueError, match="much faster"):
        targets.verdicts("much faster", row)


def test_a_quick_run_stands_in_the_place_of_no_other(tmp_path: Path) -> None:
    full = made(ROW, eager=3.0, torch_compile=2.0, advdl_ops=1.0)
    quick = changed(made(ROW, eager=9.0, advdl_ops=1.0), suite="quick", time="2026-01-09T00:00:00")
    store(tmp_path, [*full, *quick])
    assert report.load(tmp_path)[record.slug(MACHINE)] == full
    row = next(line for line in report.readme(tmp_path).splitlines() if line[2:].startswith(ROW))
    assert "full 2.00x (2.00-2.00) vs torch.compile" in row
    assert "quick" not in row
    (tmp_path / record.slug(MACHINE) / "ops.jsonl").unlink()
    row = next(line for line in report.readme(tmp_path).splitlines() if line[2:].startswith(ROW))
    assert "aaaaaaaaaa (quick, without torch.compile)" in row


def test_an_older_commit_and_a_dirty_one_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = {("aaaaaaaaaa-dirty", "bbbbbbbbbb"): 3}
    monkeypatch.setattr(environment, "commits_between", lambda *pair: ages.get(pair, 0))
    items = changed(made(ROW, eager=3.0, advdl_ops=1.0), commit="aaaaaaaaaa-dirty")
    assert report.source(items, "bbbbbbbbbb") == "aaaaaaaaaa-dirty (3 commits older)"
    assert report.source(items, "aaaaaaaaaa-dirty") == "aaaaaaaaaa-dirty"


@pytest.mark.skipif(not (environment.ROOT / ".git").exists(), reason="needs git's history")
def test_git_counts_the_commits_between() -> None:
    head = environment._git("rev-parse", "HEAD")
    parents = environment._git("rev-list", "--max-count=2", "--first-parent", "HEAD").split()
    if len(parents) < 2:
        pytest.skip("the history has one commit")
    assert environment.commits_between(parents[1] + "-dirty", head) >= 1
    assert environment.commits_between(head, head) == 0
    assert environment.commits_between("0" * 40, head) == 0


def test_a_refused_provider_is_named_with_its_reason() -> None:
    items = made(ROW, eager=3.0, advdl_ops=1.0)
    refused = dataclasses.replace(
        items[0], provider="torch.compile", metric="refused", unit="", p20=0.0, p50=0.0, p80=0.0,
        why="output is off |\nby 1",
    )  # fmt: skip
    assert report.summary([*items, refused]) == (
        r"full 3.00x (3.00-3.00) vs eager; refused: torch.compile: output is off \| by 1"
    )
    # It has no time that could be the fastest.
    assert report.fastest_stock([refused, *items], "full") == "eager"


def test_a_record_of_before_has_no_reason() -> None:
    data = dataclasses.asdict(made(ROW, eager=3.0, advdl_ops=1.0)[0])
    del data["why"]
    assert record.from_dict(data).why == ""
    del data["p50"]
    with pytest.raises(ValueError, match="p50"):
        record.from_dict(data)


def test_a_plot_says_of_how_many_commits_it_is() -> None:
    items = made(ROW, eager=3.0, advdl_ops=1.0)
    assert plots.title("ops", items).endswith("2026-01-02, aaaaaaaaaa")
    newer = changed(items, commit="bbbbbbbbbb", time="2026-01-03T00:00:00")
    refused = changed(items[:1], commit="cccccccccc", metric="failed")
    text = plots.title("ops", [*newer, *items, *refused])
    assert text.endswith(
        "2 commits, oldest aaaaaaaaaa of 2026-01-02, newest bbbbbbbbbb of 2026-01-03"
    )


def test_best_stock_is_the_fastest_stock_provider() -> None:
    session, stream = measured()
    times = {"eager": [3.0], "torch.compile": [2.0], "advdl_ops": [1.0], "floor": [0.5]}
    measure_op.report_times(session, "fwd", times)
    items = records(stream)
    best = report.best_stock(items, "fwd")
    assert best is not None
    assert (best.provider, best.p50) == ("torch.compile", 2.0)


def test_the_report_tells_the_zoo_from_the_optimized_network() -> None:
    session, stream = measured()
    times = {
        "eager": [3.0],
        "torch.compile channels_last": [2.0],
        "advdl_ops": [1.0],
        "advdl_ops channels_last": [0.5],
        "advdl_ops optimize": [4.0],
        "advdl_ops optimize + torch.compile": [0.1],
    }
    measure_op.report_times(session, "fwd", times, "advdl_ops channels_last")
    before = records(stream)
    # As networks were recorded before optimize competed.
    assert report.summary([i for i in before if "optimize" not in i.provider]) == (
        "fwd 4.00x (4.00-4.00) vs torch.compile channels_last"
    )
    measure_model.report_over_stock(session, "fwd", times)
    items = records(stream)
    assert report.summary(items) == (
        "fwd 4.00x (4.00-4.00) vs torch.compile channels_last; "
        "fwd optimize 0.50x (0.50-0.50) vs torch.compile channels_last"
    )
    # Without the zoo's.
    assert report.summary([i for i in items if not i.provider.startswith("advdl_ops")]) == "-"
    alone = [i for i in items if i.provider not in ("advdl_ops", "advdl_ops channels_last")]
    assert report.summary(alone).startswith("fwd optimize 0.50x")


def test_a_slow_round_does_not_choose_the_fastest_stock_provider() -> None:
    session, stream = measured()
    # The machine is four times as slow in the last two of five rounds, and in the third while eager runs.
    times = {
        "eager": [1.0, 1.0, 4.0, 4.0, 4.0],
        "torch.compile": [1.1, 1.1, 1.1, 4.4, 4.4],
        "advdl_ops": [0.5, 0.5, 0.5, 2.0, 2.0],
    }
    measure_op.report_times(session, "full", times)
    found = records(stream)
    assert report.fastest_stock(found, "full") == "eager"
    measure_op.report_over_stock(session, "full", times)
    assert report.fastest_stock(records(stream), "full") == "eager"
