"""The figures in README.md and docs/performance.md, made from records of one commit for each suite (a GPU: its own)."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import environment, lean_figures, record, registry, report, table, targets
from .record import Record
from .registry import Case
from .targets import Row

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
SLOWER = 0.97

# Title and a pattern for the names of its cases. A case belongs to the first that matches. Each network has two rows.
FAMILIES = (
    ("batch norm + activation", r"batch_norm_(?!add)"),
    ("batch norm + addition + activation", r"batch_norm_add"),
    ("group norm", r"group_norm"),
    ("instance norm", r"instance_norm"),
    ("layer norm 2d", r"layer_norm_2d"),
    ("LSTM cell", r"lstm_cell/"),
    ("LSTM", r"lstm/"),
    ("LSTM with lengths", r"lstm_lengths/"),
    ("depthwise convolution", r"conv2d_depthwise"),
    ("dilated dense convolution", r"conv2d_\w+_d\d"),
    ("other dense convolution", r"conv2d_"),
    ("cost of one call", r"overhead/"),
    ("network, training", r"models/\w+/train/"),
    ("network, inference", r"models/\w+/inference/"),
    ("other", r""),
)
HELD = "bytes held for backward"

# The rows of README.md's table, slower ones included: a description, and the name as from :func:`name`. All other rows
# are in docs/performance.md.
README_ROWS = {
    "batch norm + ReLU, training": "batch_norm_relu/train/16x64x56x56/contiguous full",
    "group norm + SiLU, training": "group_norm_silu/train/16x64x56x56/contiguous full",
    "instance norm + leaky ReLU, training": (
        "instance_norm_leaky_relu/train/16x64x56x56/contiguous full"
    ),
    "depthwise 7x7 convolution, training": "conv2d_depthwise_7x7/16x64x56x56/channels_last full",
    "dilated 3x3 convolution + ReLU, training": (
        "conv2d_3x3_d2_bias_relu/16x64x56x56/channels_last full"
    ),
    "LSTM, training": "lstm/train/100x64x256x256 full",
    "LSTM over padded sequences, training": "lstm_lengths/train/200x32x128x256 full",
    "one call on a tiny input, group norm + SiLU": "overhead/group_norm_silu full",
    "one call on a tiny input, convolution + ReLU": "overhead/conv2d_relu full",
    "ResNet-50, training": "resnet50/train/8x3x112x112 full optimize()",
    "ResNet-50, inference": "resnet50/inference/8x3x224x224 fwd optimize()",
    "EfficientNet-B0, training": "efficientnet_b0/train/16x3x128x128 full optimize()",
    "EfficientNet-B0, inference": "efficientnet_b0/inference/8x3x224x224 fwd optimize()",
}


@dataclass(frozen=True)
class Machine:
    kind: str
    folder: str
    device: str
    records: list[Record]  # of one commit for each suite

    @property
    def commits(self) -> dict[str, str]:
        """By suite."""
        return {item.suite: item.commit for item in self.records}

    @property
    def cases(self) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        for item in self.records:
            found.setdefault(item.case, []).append(item)
        return found

    @property
    def text(self) -> str:
        last = max(self.records, key=lambda i: i.time)
        commits = self.commits
        at = [f"`{commit}` ({suite})" for suite, commit in commits.items()]
        if len(set(commits.values())) == 1:
            at = [f"`{last.commit}`"]
        return f"{self.device}; commit {', '.join(at)}, {last.time[:10]}, torch {last.torch}"


def machines(results: Path) -> list[Machine]:
    """The last measured machine with AVX-512, with AVX2, and GPU, with the newest commit of each suite.

    The suite `quick` does not count: it compiles nothing, and `make bench` stores it on any machine.
    """
    newest: dict[str, Machine] = {}
    for folder, items in report.load(results).items():
        items = [i for i in items if i.suite != "quick"]
        if not items:
            continue
        last = max(items, key=lambda i: i.time)
        kind = "CUDA" if last.case.endswith("/cuda") else last.device.rsplit(", ", 1)[-1]
        own = _of_commits(_newest(items), items)
        if kind not in newest or _time(newest[kind].records) < _time(own):
            newest[kind] = Machine(kind, folder, last.device, own)
    return [newest[kind] for kind in ("AVX512", "AVX2", "CUDA") if kind in newest]


def at_one_commit(every: list[Machine]) -> tuple[list[Machine], list[Machine]]:
    """The CPUs, each suite at one commit for all, and the GPU; and the CPUs without records of these commits."""
    commits = _newest([i for m in every if m.kind != "CUDA" for i in m.records])
    found, older = [], []
    for machine in every:
        if machine.kind != "CUDA":
            own = _of_commits(commits, machine.records)
            if not own:
                older.append(machine)
                continue
            machine = replace(machine, records=own)
        found.append(machine)
    return found, older


def _newest(items: list[Record]) -> dict[str, str]:
    """The commit last measured, by suite."""
    return {item.suite: item.commit for item in sorted(items, key=lambda i: i.time)}


def _of_commits(commits: dict[str, str], items: list[Record]) -> list[Record]:
    """The records of these commits."""
    return [i for i in items if i.commit == commits[i.suite]]


def _time(items: list[Record]) -> str:
    return max(i.time for i in items)


def registered(kind: str) -> list[Case]:
    """The cases that a machine should have, sorted by name. Cases only in `quick` do not count.

    Lean training has tables of its own.
    """
    device = "cuda" if kind == "CUDA" else "cpu"
    cases = registry.select(device=device, opted_in=("build",))
    asked = [case for case in cases if not set(case.suites) <= {"quick", lean_figures.SUITE}]
    return sorted(asked, key=lambda case: case.name)  # their order is otherwise that of the imports


def family(case: Case) -> str:
    name = ("models/" if case.suites == ("models",) else "") + case.name
    return next(title for title, pattern in FAMILIES if re.match(pattern, name))


def rows(case: Case, machine: Machine, every_mode: bool = False) -> list[Row]:
    every_mode |= case.name.startswith("overhead/")
    return targets.rows(case.name, machine.cases.get(case.name, []), every_mode)


def name(row: Row, *more: str) -> str:
    case = row.case.removesuffix("/cpu").removesuffix("/float32")
    mode = row.mode if row.mode != case else ""  # the import, the build
    return f"`{' '.join(filter(None, (case, mode, row.label, *more)))}`"


@dataclass(frozen=True)
class Figure:
    """One ratio of times or of bytes held."""

    title: str
    name: str
    value: float
    spread: str
    stock: str


def figures(machine: Machine, every_mode: bool = False) -> Iterator[Figure]:
    for case in registered(machine.kind):
        for row in rows(case, machine, every_mode):
            by = f", {row.label}" if row.label else ""
            if row.ratio is not None:
                shown = report.spread(row.ratio)
                yield Figure(family(case) + by, name(row), row.ratio.p50, shown, row.stock or "-")
            if least := targets.held(row):
                stock, value = least
                yield Figure(HELD, name(row, "bytes"), value, f"{table.ratio(value)}x", stock)


def both(title: str) -> list[str]:
    return [f"{title}, {label}" for label in ("zoo", "optimize()")]


def titles(kind: str) -> list[str]:
    """Every family with cases, in order. For networks, the zoo's and the optimized ones separately."""
    present = {family(case) for case in registered(kind)}
    present.discard("other")  # the import and the build have no stock to compare with
    found = []
    for title in (title for title, _ in FAMILIES if title in present):
        found += both(title) if title.startswith("network") else [title]
    return [*found, HELD]


def unmeasured(machine: Machine) -> list[Case]:
    return [case for case in registered(machine.kind) if case.name not in machine.cases]


def lost(machine: Machine) -> list[Case]:
    """The cases that failed or in which a provider of advdl_ops was refused."""
    return [
        case
        for case in registered(machine.kind)
        if any(
            i.metric in record.NOT_TIMED and not record.is_stock(i.provider)
            for i in machine.cases.get(case.name, [])
        )
    ]


def cell(title: str, machine: Machine, found: list[Figure]) -> str:
    """Median, best and worst of a family."""
    own = sorted((f for f in found if f.title == title), key=lambda f: f.value)
    fallen = [c for c in lost(machine) if title in (family(c), *both(family(c)))]
    refused = [f"cases that failed or in which ours was refused: {len(fallen)}"] if fallen else []
    if not own:
        return "<br>".join(refused) or "not measured at this commit"
    below = sum(f.value < 1 for f in own)
    middle = table.ratio(statistics.median(f.value for f in own))
    parts = [
        f"median {middle}x of {len(own)} rows, {below} below 1",
        f"best {table.ratio(own[-1].value)}x {own[-1].name}",
        f"worst {table.ratio(own[0].value)}x {own[0].name}",
    ]
    if len(own) == 1:
        parts = [f"{middle}x {own[0].name}, the only row"]
    missing = [c for c in unmeasured(machine) if title in (family(c), *both(family(c)))]
    if missing:
        parts.append(f"cases not measured at this commit: {len(missing)}")
    return "<br>".join(parts + refused)


def grid(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def heading(found: list[Machine], older: list[Machine]) -> list[str]:
    """The machines, and a digest that shows any change of a record."""
    records = "".join(record.to_json(i) + "\n" for machine in found for i in machine.records)
    lines = [f"<!-- records: {hashlib.sha256(records.encode()).hexdigest()[:16]} -->"]
    lines += [f"- {machine.kind}: {machine.text}" for machine in found]
    lines += [f"- {m.kind}: not measured at this commit; last at {m.text}" for m in older]
    kinds = {machine.kind for machine in (*found, *older)}
    return lines + [f"- {k}: not measured" for k in ("AVX512", "AVX2", "CUDA") if k not in kinds]


def readme_block(results: Path) -> list[str]:
    """One short table, and the number of rows that are slower than stock."""
    found, older = at_one_commit(machines(results))
    shown = [{figure.name: figure.value for figure in figures(machine)} for machine in found]
    lines = [
        "Time of the fastest stock provider in the same run (eager or `torch.compile`), divided by the time of",
        "`advdl_ops`. Above 1, `advdl_ops` is faster. Training is forward and backward. A network is `optimize(stock)`",
        "against the stock network.",
        "",
        *heading(found, older),
        "",
    ]
    lines += grid(
        ["", "case and mode", *(machine.kind for machine in found)],
        [
            [title, f"`{row}`", *(_shown(values.get(f"`{row}`")) for values in shown)]
            for title, row in README_ROWS.items()
        ],
    )
    lines.append("")
    for machine in found:
        every = list(figures(machine, every_mode=True))
        slower = sum(f.value < SLOWER for f in every)
        lines.append(
            f"On {machine.kind}, {slower} of {len(every)} rows are below {SLOWER} (every mode counts: forward alone,"
            f" backward alone, bytes held). [docs/performance.md](docs/performance.md) names each."
        )
    lines += [
        "",
        "Training with `lean=`: bytes that forward leaves for backward, and the time of a step. Plain is the zoo's",
        "network without it, eager the stock network in its faster layout.",
    ]
    for case, kinds in _lean_cases(found):
        if case in lean_figures.README_CASES:
            lines += [
                "",
                f"`{lean_figures.short(case)}`",
                "",
                *grid(*lean_figures.table(case, kinds)),
            ]
    return lines


def _lean_cases(found: list[Machine]) -> Iterator[tuple[str, dict[str, list[Record]]]]:
    """Each case of lean training and its records, by kind of machine."""
    names = dict.fromkeys(
        case
        for machine in found
        for case, items in machine.cases.items()
        if items[0].suite == lean_figures.SUITE
    )
    for case in names:
        yield case, {m.kind: m.cases[case] for m in found if case in m.cases}


def lean_block(results: Path) -> list[str]:
    """A table for each network with each level."""
    found, older = at_one_commit(machines(results))
    lines = heading(found, older)
    for case, kinds in _lean_cases(found):
        lines += ["", f"`{lean_figures.short(case)}`, fp32, a training step:", ""]
        lines += grid(*lean_figures.table(case, kinds))
        if said := lean_figures.verdicts(case, kinds):
            lines += ["", *said]
        refused = [text for items in kinds.values() for text in report.refusals(items)]
        if refused:
            lines += ["", "Refused or failed:", "", *(f"- {text}" for text in refused)]
    return lines


def _shown(value: float | None) -> str:
    return "not measured at this commit" if value is None else f"{table.ratio(value)}x"


def families(found: list[Machine]) -> list[str]:
    """A table of median, best and worst of every family of cases."""
    shown = {machine.kind: list(figures(machine)) for machine in found}
    named = dict.fromkeys(title for kind in ("AVX512", *shown) for title in titles(kind))
    return grid(
        ["", *(machine.kind for machine in found)],
        [
            [title, *(cell(title, machine, shown[machine.kind]) for machine in found)]
            for title in named
        ],
    )


def target_rows(machine: Machine) -> Iterator[list[str]]:
    for case in registered(machine.kind):
        if not case.target:
            continue
        for row in rows(case, machine):
            ratio = report.spread(row.ratio) if row.ratio else "-"
            verdicts = "; ".join(targets.verdicts(case.target, row))
            yield [name(row), machine.kind, ratio, row.stock or "-", verdicts]


def performance_block(results: Path) -> list[str]:
    found, older = at_one_commit(machines(results))
    lines = [
        *heading(found, older),
        "",
        "Families of cases. For cases that train, the figure is the time of forward and backward (`full`). For bytes,",
        "it is the fewest bytes that a stock provider holds, divided by those that `advdl_ops` holds:",
        "",
        *families(found),
    ]
    plots = [f"{machine.folder}/ops.png" for machine in found]
    plots = [plot for plot in plots if (results / plot).exists()][:1]
    lines += [
        f"\n![time of each provider over that of advdl_ops](../benchmarks/results/{plot})"
        for plot in plots
    ]
    lines += ["", "Every row with a target:", ""]
    lines += grid(
        ["case and mode", "machine", "ratio (p20-p80)", "fastest stock", "target: value"],
        [line for machine in found if machine.kind != "CUDA" for line in target_rows(machine)],
    )
    for machine in found:
        if missing := [f"`{case.name}`" for case in unmeasured(machine) if case.target]:
            said = f"With a target, not measured at this commit on {machine.kind}: "
            lines += ["", said + ", ".join(missing) + "."]
    lines += ["", f"Every row below {SLOWER}, of every mode, with a target or without:", ""]
    lines += grid(
        ["case and mode", "machine", "ratio (p20-p80)", "fastest stock"],
        [
            [figure.name, machine.kind, figure.spread, figure.stock]
            for machine in found
            for figure in figures(machine, every_mode=True)
            if figure.value < SLOWER
        ],
    )
    refused = [
        f"- {machine.kind}, `{case}`: {text}"
        for machine in found
        for case, items in machine.cases.items()
        for text in report.refusals(items)
    ]
    if refused:
        lines += [
            "",
            "Providers that gave wrong values or raised, and so have no time:",
            "",
            *refused,
        ]
    return lines


FILES = {
    "README.md": readme_block,
    "docs/performance.md": performance_block,
    "docs/lean_training.md": lean_block,
}


def texts(results: Path, root: Path) -> Iterator[tuple[Path, str, str]]:
    """Each file with a block, its current text and the text from the records."""
    for file, make in FILES.items():
        text = (root / file).read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"benchmarks: {root / file} has no block {BEGIN} ... {END}")
        block = "\n".join(make(results))
        yield root / file, text, f"{before}{begin}\n{block}\n{end}{after}"


def outdated(results: Path, root: Path) -> list[Path]:
    """The files whose blocks do not match the records."""
    return [path for path, old, new in texts(results, root) if old != new]


def write(results: Path) -> list[Path]:
    """Rewrite the blocks. This is done only from the results that belong to a checkout."""
    if not environment.IN_CHECKOUT or results.resolve() != environment.RESULTS.resolve():
        return []
    written = []
    for path, _, new in texts(results, environment.ROOT):
        path.write_text(new, encoding="utf-8")
        written.append(path)
    return written
