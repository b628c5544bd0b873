"""All cases. Nothing here imports torch, so that ``list`` and ``--help`` are fast."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .session import Session

SUITES = {
    "quick": "BN + activation and the training of a small ResNet on real images, a few minutes",
    "ops": "each operator against stock PyTorch, the cost of one call, of the import, of the build",
    "models": "whole networks: inference, training steps, bytes held for backward",
    "memory": "lean training: bytes held for backward at each level, and the time of a step",
    "choice": "every implementation of a convolution around each threshold by which one is chosen on CPU",
}


@dataclass(frozen=True)
class Case:
    """One row of the report: an op or a model at one shape, dtype and layout on one kind of device.

    ``bytes`` and ``flops`` give, for each mode, the least that the op must move and compute. For a case
    without them (a model), flops are counted while it runs.
    """

    name: str
    suites: tuple[str, ...]
    op: str
    modes: tuple[str, ...]
    dtype: str
    layout: str
    shape: tuple[int, ...]
    device: str  # "cpu" or "cuda"
    run: Callable[[Case, Session], None] = field(compare=False)
    bytes: Mapping[str, int] = field(default_factory=dict, compare=False)
    flops: Mapping[str, int] = field(default_factory=dict, compare=False)
    passes: Mapping[str, int] = field(default_factory=dict, compare=False)  # of the floor provider
    target: str = ""
    rounds: int = 11
    compile: bool = True  # whether the torch.compile providers take part
    # Whether advdl_ops is compiled too. Not in the secondary rows, which saves minutes.
    compile_ours: bool = True
    hidden: bool = False
    extras: tuple[str, ...] = ()  # modules that it imports besides torch
    opt_in: str = ""  # the case runs only with this switch
    options: Mapping[str, object] = field(default_factory=dict, compare=False)


_cases: dict[str, Case] = {}


def register(case: Case) -> Case:
    if case.name in _cases:
        raise ValueError(f"benchmarks: case {case.name!r} is registered twice")
    unknown = set(case.suites) - set(SUITES)
    if unknown:
        raise ValueError(f"benchmarks: case {case.name!r} names unknown suites {sorted(unknown)}")
    _cases[case.name] = case
    return case


def all_cases() -> dict[str, Case]:
    """Every registered case by name, in the order of registration."""
    package = importlib.import_module(f"{__package__}.cases")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _cases


def select(
    suite: str | None = None,
    patterns: Iterable[str] = (),
    device: str | None = None,
    hidden: bool = False,
    opted_in: Iterable[str] = (),
) -> list[Case]:
    """Cases of a suite (or of all) whose name matches one of the patterns (or any name).

    A hidden case is only found by its full name. The cases of the suite `choice`, which do not compare with stock, are
    only found by the suite's name.
    """
    patterns = list(patterns)
    found = []
    for case in all_cases().values():
        if suite is not None and suite not in case.suites and not case.hidden:
            continue
        if suite is None and case.suites == ("choice",):
            continue
        if device is not None and case.device != device:
            continue
        if case.opt_in and case.opt_in not in opted_in:
            continue
        if case.hidden and not hidden and case.name not in patterns:
            continue
        if patterns and not any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns):
            continue
        found.append(case)
    return found
