"""The plan that ``optimize`` makes of a model before it changes anything: one entry per module, printable.

`convert.py` fills the plan step by step and carries it out; `aliasing.py`, `fuse.py` and `memory_format.py` read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from ..activation import qualified_name
from .layers import Counterpart
from .trace import Variant


class Effect(NamedTuple):
    """What a forward does with the memory of its arguments.

    Attributes:
        writes: whether it may write an argument.
        returns: whether what it returns may be an argument, or a view of one.
    """

    writes: bool
    returns: bool


class Group(NamedTuple):
    """Layers that run as one op: convolution, norm or both, then an addition and an activation, if they follow.

    Attributes:
        layers: convolution, norm, or both.
        names: of the layers, and of the addition and activation that are fused with them.
        nodes: of the graph, first to last.
        residual: the node that is added, or ``None``.
        in_place: whether it is added in place, which keeps the dtype.
        act: the name of the activation, or the node of its module; ``None`` if none follows.
    """

    layers: list[torch.nn.Module]
    names: list[str]
    nodes: list[fx.Node]
    residual: fx.Node | None
    in_place: bool
    act: str | fx.Node | None


@dataclass(eq=False)
class LayerPlan:
    """What ``optimize`` knows about one module, and what it will do to it.

    Attributes:
        name: in the model, as from ``named_modules``.
        module: the module.
        counterpart: the layer of this package that it becomes; ``None``: it keeps its class.
        left: why a layer of a known kind keeps its class.
        alone: why the layer may not be fused with others.
        is_activation: whether it is an activation that a group may include.
        graphs: of its own forward. Those in ``forward`` are rewritten for its groups.
        untraceable: why it has no graphs.
        effect: of its forward, filled in by `aliasing.py`.
        groups: layers that its forward will run as one op each.
        forward: the variants of its new forward; if empty, it keeps its own.
        notes: for the report.
    """

    name: str
    module: torch.nn.Module
    counterpart: Counterpart | None = None
    left: str | None = None
    alone: str | None = None
    is_activation: bool = False
    graphs: list[Variant] = field(default_factory=list)
    untraceable: str | None = None
    effect: Effect | None = None
    groups: list[Group] = field(default_factory=list)
    forward: list[Variant] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kind = type(self.module).__name__
        done = [f"one op: {' + '.join(group.names)}" for group in self.groups]
        if self.counterpart is not None:
            done.insert(0, f"becomes {qualified_name(self.counterpart.layer)}")
        if self.left is not None:
            done.append(f"left as it was: {self.left}")
        done += self.notes
        return f"{self.name or '(the model itself)'}  {kind}: {'; '.join(done) or 'kept'}"


class Plan:
    """The plan for a model: its :class:`LayerPlan` by module. Its text has one line per module.

    Args:
        model: the model; each of its modules gets an entry, under the first of its names.

    Attributes:
        model: the model.
        channels_last: when its forward will convert an image to channels_last: ``"always"``, ``"in evaluation"`` or
            ``"never"``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.channels_last = "never"
        # By id, because a module may define its own equality.
        self._layers = {id(m): LayerPlan(name, m) for name, m in model.named_modules()}

    def __getitem__(self, module: torch.nn.Module) -> LayerPlan:
        return self._layers[id(module)]

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self._layers.values())

    def __str__(self) -> str:
        return "\n".join([*map(str, self), f"channels_last inside on CPU: {self.channels_last}"])
