"""``advdl_ops.tune``: measures which implementation of each convolution of a model is the fastest on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tuning
from ._conv import choice
from ._conv.problem import Problem
from ._optimize.copies import copy_without_hooks

__all__ = ["Tuned", "TunedConvolution", "tune"]


@dataclass(frozen=True)
class TunedConvolution:
    """One direction of one convolution that the model ran.

    Attributes:
        problem: direction, shapes and options, see ``_conv/problem.py``.
        before: the candidate that served before: on CPU by the rules, on CUDA the first, or by an earlier measurement.
        after: the candidate that serves now.
        seconds: median time of each candidate.
    """

    problem: Problem
    before: str
    after: str
    seconds: dict[str, float]

    @property
    def speedup(self) -> float:
        """The time of ``before`` over that of ``after``; 1 if either was not timed."""
        before, after = self.seconds.get(self.before), self.seconds.get(self.after)
        return before / after if before and after else 1.0

    def __str__(self) -> str:
        p = self.problem
        of = f"{p.direction} of {'x'.join(map(str, p.x))} by {'x'.join(map(str, p.weight))}, {p.layout}"
        return f"{of}: {self.before} -> {self.after}, {self.speedup:.2f}x"


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` measured. As text: the rows that changed, those with the largest gain first."""

    rows: tuple[TunedConvolution, ...]

    @property
    def changed(self) -> tuple[TunedConvolution, ...]:
        rows = (row for row in self.rows if row.before != row.after)
        return tuple(sorted(rows, key=lambda row: -row.speedup))

    def __iter__(self) -> Iterator[TunedConvolution]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = f"{len(self.rows)} convolutions measured, {len(self.changed)} served by another kernel now"
        return "\n".join([head, *map(str, self.changed)])


def tune(model: torch.nn.Module, *inputs: Any) -> Tuned:
    """Measure every candidate for each convolution that ``model`` runs on ``inputs``, and store the fastest.

    The stored candidate serves from now on, in this process and in later ones on the same machine with the same
    versions and number of threads (see ``advdl_ops.tuning``). :func:`.explain` shows it. Without ``tune``, the rules of
    ``_conv/choice.py`` decide on CPU; they were measured on another machine. On CUDA, candidates are measured at the
    first call even without ``tune``, unless ``ADVDL_OPS_TUNE=0``.

    Args:
        model: any module. A copy of it runs: forward and backward in training mode, else forward without gradients. The
            model and the state of the random number generators do not change.
        inputs: arguments of its forward, with the shapes to be measured.

    Returns:
        What was measured. ``print`` shows what changed. If `rich` is installed, a bar shows the progress.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no input.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"tune: model ({type(model).__name__}) must be a torch.nn.Module")
    if not inputs:
        raise ValueError("tune: inputs (none) must be those of the model's forward")
    # Finds the problems to be measured on CPU.
    with choice.every_direction_asked():
        _run(model, inputs)
        met = choice.met()
    before = {problem: choice.expected(problem).name for problem in met}
    missing = [problem for problem in met if choice.is_open(problem)]
    measured: dict[Problem, tuning.Choice] = {}
    with _progress(len(missing)) as advance:

        def measuring(key: Any, found: tuning.Choice) -> None:
            if isinstance(key, Problem):
                measured[key] = found
            advance()

        with choice.every_direction_asked(), tuning.on(measuring):
            _run(model, inputs)
    rows = []
    for problem, found in measured.items():
        first = before.get(problem, next(iter(found.seconds), found.name))
        rows.append(TunedConvolution(problem, first, found.name, found.seconds))
    return Tuned(tuple(rows))


def _run(model: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    ran = copy_without_hooks(model)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(gpus), torch.set_grad_enabled(ran.training):
        outputs = [t for t in _tensors(ran(*inputs)) if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in the output of a forward, which may be nested."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], Any]]:
    """A progress bar on stderr if rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring convolutions", total=total or None)
        yield lambda: bar.advance(task)
