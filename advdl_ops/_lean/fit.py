"""``fit_memory``: the fastest levels of lean training whose held bytes fit a budget.

What a part of the model holds depends on its own level and on that of the part behind it, which may need the tensor
between the two. Both are counted for each pair of levels, and dynamic programming along the parts finds all choices of
which no other one has less bytes and less work. The final choice is counted as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .counts import Count, Counting, checked_arguments
from .models import set_lean
from .recipes import LEVELS

__all__ = ["fit_memory"]

# So many floating point operations of a 1x1 convolution take the time of a byte that a pass reads or writes.
FLOPS_PER_BYTE = {"cpu": 10, "cuda": 50}
# A front of choices is thinned out beyond this length, which models of up to 8 parts do not reach.
MOST = 20_000

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

    If an error is raised, nothing is changed. The choice is the best one where each part hands its output to the next;
    skips over several parts, as in U-Net, are fitted, but another choice might be a little faster.
    """
    name = "fit_memory"
    args = checked_arguments(model, input, name)
    if isinstance(bytes, bool) or not isinstance(bytes, (int, float)):
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
            first: dict[tuple[int, float], Level] = {}
            self._same.append(
                {level: first.setdefault(self._part(count, name), level) for level, count in uniform.items()}
            )
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
        found: list[Choice] = []
        for rest in self._options(0):
            if len(self.names) == 1:
                found.append(Choice(*self._part(self.count((rest,)), ""), (rest,)))
                continue
            # The fronts up to a part, by its level.
            fronts = {
                level: [Choice(*self._pair(0, rest, level, level), (rest, level))]
                for level in self._options(1)
            }
            for at in range(1, len(self.names) - 1):
                longer: dict[Level, list[Choice]] = {}
                for after in self._options(at + 1):
                    longer[after] = front(
                        Choice(c.held + held, c.cost + cost, (*c.levels, after))
                        for level, choices in fronts.items()
                        for held, cost in [self._pair(at, rest, level, after)]
                        for c in choices
                    )
                fronts = longer
            for level, choices in fronts.items():
                held, cost = self._pair(len(self.names) - 1, rest, level, level)
                found += [Choice(c.held + held, c.cost + cost, c.levels) for c in choices]
        return front(found)

    def _pair(self, at: int, rest: Level, level: Level, after: Level) -> tuple[int, float]:
        """Bytes and cost of a part at ``level`` if the next part has the level ``after``; of the rest: the first two.

        Counted with these two levels in turn for all parts, so that one count serves all of them.
        """
        in_turn = [level if index % 2 == at % 2 else after for index in range(1, len(self.names))]
        levels = tuple(same[of] for same, of in zip(self._same, (rest, *in_turn), strict=True))
        return self._part(self.count(levels), self.names[at])

    def _options(self, at: int) -> Iterable[Level]:
        return dict.fromkeys(self._same[at].values())


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
        for child, layer in model.get_submodule(name).named_children():
            path = f"{name}.{child}" if name else child
            if layer._modules and any(is_in(each, path) for each in busy):
                found += [path] if path in order else children(path)
        return found

    called = _until(children)
    return sorted(called, key=order.index)


def _until(children: Callable[[str], list[str]]) -> list[str]:
    parts = children("")
    while len(parts) == 1 and children(parts[0]):
        parts = children(parts[0])
    return parts
