"""The interface of a case while it runs, and the process that runs it.

``python -m benchmarks.session`` measures the given cases and writes one JSON event per line:
``{"event": "record" | "progress" | "refused" | "artifact" | "start" | "done" | "failed", ...}``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from . import environment, registry
from .record import REFUSED, Record, quantiles


def in_one_line(error: BaseException) -> str:
    """Type and first line of an error, because some of torch's messages are pages long."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


class Refused(RuntimeError):
    """A provider that returned wrong values. It is reported and never timed."""


@dataclasses.dataclass
class Settings:
    rounds: int | None = None
    smoke: bool = False
    compile: bool = True
    threads: int | None = None
    providers: tuple[str, ...] = ()

    def wants(self, provider: str) -> bool:
        """Whether a provider runs. ``eager`` and ``advdl_ops`` always do, because values and ratios need them."""
        return not self.providers or provider in (*self.providers, "eager", "advdl_ops")


def new_record(
    case: registry.Case,
    suite: str,
    provider: str,
    mode: str,
    metric: str,
    unit: str,
    values: Sequence[float] = (0.0,),
    why: str = "",
) -> Record:
    """A record of one value per round, or with ``why`` the reason that there is none."""
    p20, p50, p80 = quantiles([float(value) for value in values])
    return Record(
        case=case.name,
        suite=suite,
        op=case.op,
        provider=provider,
        mode=mode,
        dtype=case.dtype,
        layout=case.layout,
        shape=list(case.shape),
        metric=metric,
        unit=unit,
        p20=p20,
        p50=p50,
        p80=p80,
        device=environment.device_name(case.device),
        commit=environment.commit(),
        time=environment.now(),
        why=why,
        **environment.versions(),  # type: ignore[arg-type]
    )


class Session:
    """Collects the measurements of one case."""

    def __init__(self, case: registry.Case, suite: str, settings: Settings, stream: TextIO) -> None:
        self.case, self.suite, self.settings, self.stream = case, suite, settings, stream

    @property
    def rounds(self) -> int:
        return 2 if self.settings.smoke else self.settings.rounds or self.case.rounds

    @property
    def block_seconds(self) -> float:
        if self.settings.smoke:
            return 0.002
        return 0.06 if self.case.device == "cpu" else 0.02  # events on a GPU scatter less

    @property
    def compiles(self) -> bool:
        # On CPU a compilation takes up to a minute, so `quick`, which must end soon on a new machine, has none. The
        # suite in its records shows that the compiled rivals are missing.
        quick = self.suite == "quick" and self.case.device == "cpu"
        return self.settings.compile and self.case.compile and not (self.settings.smoke or quick)

    @property
    def compiles_ours(self) -> bool:
        return self.compiles and self.case.compile_ours

    def event(self, event: str, **data: Any) -> None:
        self.stream.write(json.dumps({"event": event, "case": self.case.name, **data}) + "\n")
        self.stream.flush()

    def progress(self, what: str, done: int = 0, total: int = 0) -> None:
        self.event("progress", what=what, done=done, total=total)

    def each_round(self, what: str) -> Callable[[int, int], None]:
        """The callback for timing.measure after each round."""
        return lambda done, total: self.progress(what, done, total)

    def refuse(self, provider: str, why: str) -> None:
        self.event("refused", provider=provider, why=why)
        refusal = new_record(self.case, self.suite, provider, "-", REFUSED, "-", why=why)
        self.event("record", record=dataclasses.asdict(refusal))

    def record(
        self, provider: str, mode: str, metric: str, unit: str, values: float | Sequence[float]
    ) -> None:
        """Records one measurement, given as a value or as one value per round."""
        given = list(values) if isinstance(values, Sequence) else [values]
        record = new_record(self.case, self.suite, provider, mode, metric, unit, given)
        self.event("record", record=dataclasses.asdict(record))


def run_cases(names: Iterable[str], suite: str, settings: Settings, stream: TextIO) -> int:
    """Run cases one after the other. A failed case is reported and does not stop the next."""
    failed = 0
    cases = registry.all_cases()
    for name in names:
        session = Session(cases[name], suite, settings, stream)
        session.event("start")
        try:
            cases[name].run(cases[name], session)
        except Exception as error:  # any failure of a case is a result to report, not to hide
            failed += 1
            session.event("failed", why=in_one_line(error), trace=traceback.format_exc())
        else:
            session.event("done")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.session", description="internal: one measuring process"
    )
    parser.add_argument("--suite", required=True)
    parser.add_argument("--settings", default="{}")
    parser.add_argument("cases", nargs="+")
    arguments = parser.parse_args()
    settings = Settings(**json.loads(arguments.settings))

    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True  # stock runs at its best
    stream, sys.stdout = sys.stdout, sys.stderr  # other output must not break the event stream
    return run_cases(arguments.cases, arguments.suite, settings, stream)


if __name__ == "__main__":
    sys.exit(main())
