"""One JSON object per measurement, and the files that keep them."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Providers. Those of a network also run in channels_last (CHANNELS_LAST after the name) and compiled.
OURS, OPTIMIZED, OURS_COMPILED, STOCK, STOCK_COMPILED, FLOOR = (
    "advdl_ops",
    "advdl_ops optimize",
    "advdl_ops + torch.compile",
    "eager",
    "torch.compile",
    "floor",
)
CHANNELS_LAST = " channels_last"
OURS_FUNCTIONAL = "functional"  # in the cost of one call, besides the module
# Metrics without a measurement, with the reason in ``why``: a provider that returned wrong values or raised, and
# a case that ended early.
REFUSED, FAILED = NOT_TIMED = "refused", "failed"


@dataclass(frozen=True)
class Record:
    case: str
    suite: str
    op: str
    provider: str
    mode: str  # fwd | bwd | full, or the name of what was done (import, build)
    dtype: str
    layout: str
    shape: list[int]
    # time, speedup, over_stock, bandwidth, copy_share, throughput, matmul_share, held, peak, ...; refused or failed
    # for a provider that was not timed, with zeros as values.
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    device: str
    torch: str
    triton: str | None
    cuda: str | None
    commit: str
    time: str
    why: str = ""  # for REFUSED and FAILED

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.case, self.provider, self.mode, self.metric)


FIELDS = tuple(field.name for field in dataclasses.fields(Record))
LATER = ("why",)  # fields that older files lack


def is_stock(provider: str) -> bool:
    return provider.startswith((STOCK, STOCK_COMPILED))


def compiled_name(provider: str) -> str:
    """Name of a provider's compiled form: ``eager channels_last`` becomes ``torch.compile channels_last``."""
    if is_stock(provider):
        return STOCK_COMPILED + provider.removeprefix(STOCK)
    return f"{provider} + {STOCK_COMPILED}"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 of the values."""
    if not values:
        raise ValueError("quantiles: no values")
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def to_json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))


def from_dict(data: dict[str, Any]) -> Record:
    missing = [name for name in FIELDS if name not in data and name not in LATER]
    extra = sorted(set(data) - set(FIELDS))
    if missing or extra:
        raise ValueError(f"not a benchmark record: missing {missing}, unexpected {extra}")
    return Record(**data)


def read(path: Path) -> list[Record]:
    """Records of a JSON-lines file; the error names the file and the line."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                records.append(from_dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def write(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_json(record) + "\n" for record in records), encoding="utf-8")


def merge(path: Path, records: Sequence[Record]) -> None:
    """Put records into a file, in place of the earlier ones of the same cases.

    A case is replaced as a whole, because all its ratios must come from one run.
    """
    measured = {record.case for record in records}
    kept = [r for r in read(path) if r.case not in measured] if path.exists() else []
    write(path, sorted([*kept, *records], key=lambda r: r.case))


def slug(device: str) -> str:
    """Folder name of a device: its name in lower case, without trademark signs."""
    text = re.sub(r"\((r|tm|c)\)", "", device.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")
