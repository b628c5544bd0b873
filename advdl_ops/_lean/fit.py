"""``fit_memory``: the fastest levels of lean training whose held bytes fit a budget.

What a part of the model holds depends on its own level and on those of the parts that read its tensors, and on whether
the rest of the model has a level, because only then recipes pass from part to part. It is counted for all of these
levels; one count of the model serves all parts. Dynamic programming along the parts then finds the choices of which no
other one has less bytes and less work, and the final one is counted as a whole.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .counts import Count, Counting, checked_arguments
from .models import set_lean
from .recipes import LEVELS

__all__ = ["fit_memory"]

# So many floating point operations of a 1x1 convolution take the time of a byte that a pass reads or writes.
FLOPS_PER_BYTE = {"cpu": 10, "cuda": 50}
# Limits for models of many parts: of a front of choices, which is thinned out, and of the entries of a table.
MOST, ENTRIES = 2_000, 250

Level = str | None
_ALL: tuple[Level, ...] = (None, *LEVELS)


def fit_memory(model: torch.nn.Module, input: Any, bytes: float) -> dict[str, Level]:
    """Sets the fastest levels of lean training at which a training forward holds no more than ``bytes`` for backward.

    Each part of the model gets a level of its own: each child in which backward could make something again, such as a
    stage of a ResNet, and the rest of the model. Levels are compared by counts (see :func:`.memory_report`): the bytes
    that backward reads and writes to make tensors again, and the flops of the products, of which 10 (on CUDA 50) count
    as a byte. Nothing is run or timed.

    Args:
        model: of this package's layers: from ``create_model``, or from ``optimize``; on the CPU, CUDA or the meta
            device, in the mode in which it will run. Its level changes, and nothing else.
        input: a tensor, or a tuple of the arguments of the model's forward, of the shapes to be trained. It may be on
            the meta device.
        bytes: the budget for what the forward leaves held, with the output, without parameters, buffers and the input.
            The peak of a step is higher: it also has gradients and workspaces.

    Returns:
        The level of each part by the name of its module (``""``: the rest), as :func:`.set_lean` takes them. It has
        been set.

    Raises:
        ValueError: nothing fits; the error names the least number of bytes that does. Or ``bytes`` is not positive, or
            the model is compiled.
        TypeError: ``model`` is not a module, ``input`` neither a tensor nor a tuple, ``bytes`` not a number.
        RuntimeError: the forward asks for values of its input.

    If an error is raised, nothing is changed. The choice is the best one by these counts for up to about 8 parts; with
    more of them another one may cost a little less.
    """
    name = "fit_memory"
    args = checked_arguments(model, input, name)
    if isinstance(bytes, bool) or not isinstance(bytes, numbers.Real):
        raise TypeError(f"{name}: bytes ({bytes!r}) must be a number")
    if not bytes > 0:
        raise ValueError(f"{name}: bytes ({bytes}) must be positive")
    first = next(model.parameters(), None)
    device = "cpu" if first is None else first.device.type
    search = Search(Counting(model, args, name), FLOPS_PER_BYTE.get(device, 10))
    levels = search.within(bytes)
    if levels is None:
        raise ValueError(
            f"{name}: bytes ({bytes}) must be at least {search.least}, the least that a level of this model holds for "
            "this input"
        )
    set_lean(model, levels, caller=name)
    return levels


class Choice(NamedTuple):
    """Levels of the parts, the rest first; the bytes they hold, and the cost of the work in backward, in bytes."""

    held: int
    cost: float
    levels: tuple[Level, ...]


class Search:
    """All choices of levels for a model that are worth it.

    Args:
        counting: of the model.
        flops_per_byte: how many flops cost as much as a byte.

    Attributes:
        names: of the parts, ``""`` (the rest) first, then in the order in which they run.
        least: the least bytes that a choice holds.
    """

    def __init__(self, counting: Counting, flops_per_byte: float) -> None:
        self._counting, self._flops_per_byte = counting, flops_per_byte
        uniform = {level: counting.count(level) for level in _ALL}
        self.names = ("", *parts_of(counting.model, list(uniform.values())))
        self._known: dict[tuple[Level, ...], Count] = {}
        for level, count in uniform.items():
            self._known[(level,) * len(self.names)] = count
        # For each part the first of the levels that are the same in it, by each level.
        self._same: list[dict[Level, Level]] = []
        for name in self.names:
            first: dict[Any, Level] = {}
            same = {}
            for level, count in uniform.items():
                # Whether the rest has a level at all matters to the parts.
                like = self._part(count, name), name == "" and level is None
                same[level] = first.setdefault(like, level)
            self._same.append(same)
        self._axes = self._axes_of(uniform[None].reads)
        self.choices = self._choices()
        smallest = [choice.levels for choice in self.choices[-1:]]
        self._smallest = min([*smallest, *self._known], key=lambda levels: self.count(levels).total)
        self.least = self.count(self._smallest).total

    def within(self, budget: float) -> dict[str, Level] | None:
        """The levels by name of the choice of least cost that fits; ``None`` if there is none."""
        for choice in self.choices:
            if choice.held <= budget and self.count(choice.levels).total <= budget:
                return self._by_name(choice.levels)
        return self._by_name(self._smallest) if self.least <= budget else None

    def count(self, levels: tuple[Level, ...]) -> Count:
        """The count of the whole model at these levels of the parts."""
        if levels not in self._known:
            self._known[levels] = self._counting.count(self._by_name(levels))
        return self._known[levels]

    def cost(self, count: Count) -> float:
        """The work that backward does to make tensors again, in bytes."""
        return sum(self._cost(count, name) for name in count.work)

    def _cost(self, count: Count, name: str) -> float:
        work = count.work[name]
        return work.bytes + work.flops / self._flops_per_byte

    def _by_name(self, levels: Sequence[Level]) -> dict[str, Level]:
        return dict(zip(self.names, levels, strict=True))

    def _part(self, count: Count, part: str) -> tuple[int, float]:
        """Bytes and cost of the modules that belong to a part."""
        held = sum(size for name, size in count.held.items() if self._part_of(name) == part)
        cost = sum(self._cost(count, name) for name in count.work if self._part_of(name) == part)
        return held, cost

    def _part_of(self, name: str) -> str:
        return next((part for part in self.names[1:] if is_in(name, part)), "")

    def _choices(self) -> list[Choice]:
        """By cost, each with less bytes than all before it."""
        tables = self._tables()
        # By the levels of those parts that a later table needs: the choices so far.
        fronts: dict[tuple[Level, ...], list[Choice]] = {(): [Choice(0, 0, ())]}
        waiting = list(enumerate(self._axes))
        for at in range(len(self.names)):
            ready = [part for part, axes in waiting if max(axes) == at]
            waiting = [(part, axes) for part, axes in waiting if max(axes) > at]
            needed = sorted({axis for _, axes in waiting for axis in axes if axis <= at})
            longer: dict[tuple[Level, ...], list[Choice]] = {}
            for choices in fronts.values():
                for choice in choices:
                    for level in self._options(at):
                        held, cost, levels = choice.held, choice.cost, (*choice.levels, level)
                        for part in ready:
                            own = tables[part][tuple([levels[axis] for axis in self._axes[part]])]
                            held, cost = held + own[0], cost + own[1]
                        key = tuple([levels[axis] for axis in needed])
                        longer.setdefault(key, []).append(Choice(held, cost, levels))
            fronts = {key: front(choices) for key, choices in longer.items()}
        return fronts[()]

    def _tables(self) -> list[dict[tuple[Level, ...], tuple[int, float]]]:
        """For each part its bytes and cost, by the levels of its axes."""
        tables: list[dict[tuple[Level, ...], tuple[int, float]]] = [{} for _ in self.names]
        missing = [
            dict.fromkeys(itertools.product(*[self._options(axis) for axis in axes]))
            for axes in self._axes
        ]

        def enter(levels: tuple[Level, ...]) -> None:
            count = self.count(levels)
            for part, axes in enumerate(self._axes):
                key = tuple([levels[axis] for axis in axes])
                if key in missing[part]:
                    del missing[part][key]
                    tables[part][key] = self._part(count, self.names[part])

        for level in _ALL:
            enter(tuple([same[level] for same in self._same]))
        while any(missing):
            # As many of the missing entries as go together.
            levels: dict[int, Level] = {}
            for axes, keys in zip(self._axes, missing, strict=True):
                for key in keys:
                    if all(
                        levels.get(axis, own) == own for axis, own in zip(axes, key, strict=True)
                    ):
                        levels.update(zip(axes, key, strict=True))
                        break
            enter(tuple([levels.get(part) for part in range(len(self.names))]))
        return tables

    def _axes_of(self, reads: Iterable[tuple[str, str]]) -> list[tuple[int, ...]]:
        """For each part the parts on whose levels its bytes depend: the rest, itself, and those that read of it."""
        index = {name: at for at, name in enumerate(self.names)}
        readers: list[set[int]] = [set() for _ in self.names]
        for maker, user in reads:
            readers[index[self._part_of(maker)]].add(index[self._part_of(user)])
        found = []
        for at, reading in enumerate(readers):
            axes = {0, at}
            for reader in sorted(reading):
                sizes = [len(self._options(axis)) for axis in axes | {reader}]
                if math.prod(sizes) <= ENTRIES:
                    axes.add(reader)
            found.append(tuple(sorted(axes)))
        return found

    def _options(self, at: int) -> list[Level]:
        return list(dict.fromkeys(self._same[at].values()))


def front(choices: Iterable[Choice]) -> list[Choice]:
    """Those of which no other one holds less and costs less, by their cost."""
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.held)):
        if not best or choice.held < best[-1].held:
            best.append(choice)
    return best if len(best) <= MOST else best[:: math.ceil(len(best) / MOST)] + best[-1:]


def is_in(name: str, part: str) -> bool:
    """Whether the module ``name`` is ``part`` or in it."""
    return name == part or name.startswith(f"{part}.")


def parts_of(model: torch.nn.Module, counts: Sequence[Count]) -> list[str]:
    """The names of the modules that get a level of their own, in the order in which they run.

    They are the children that hold modules and in which backward makes something again. If there is only one, its own
    children are taken. Only a module that is called can have a level.
    """
    order = counts[0].order
    busy = {name for count in counts for name in count.work}

    def children(name: str) -> list[str]:
        found = []
        for child, _ in model.get_submodule(name).named_children():
            path = f"{name}.{child}" if name else child
            if any(each.startswith(f"{path}.") for each in busy):
                found += [path] if path in order else children(path)
        return found

    called = _until(children)
    return sorted(called, key=order.index)


def _until(children: Callable[[str], list[str]]) -> list[str]:
    parts = children("")
    while len(parts) == 1 and children(parts[0]):
        parts = children(parts[0])
    return parts
