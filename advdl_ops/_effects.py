"""What a forward, or a node of its graph, may write, and whether its result may be memory that it was given."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ._trace import IN_PLACE_OPERATORS, is_torchs

# Operators whose result is memory of its own.
NEW_RESULTS = {
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.cat,
    torch.relu, torch.sigmoid, "add", "sub", "mul", "div", "relu", "sigmoid", "mean", "sum",
}  # fmt: skip
# Of torch.nn.
_NEW_MODULES = {
    "activation", "batchnorm", "conv", "linear", "normalization", "pooling", "upsampling",
}  # fmt: skip


class Effect(NamedTuple):
    """Of a forward.

    Attributes:
        writes: whether it may write an argument.
        returns: whether what it returns may be an argument, or a view of one.
    """

    writes: bool
    returns: bool


class Effects:
    """Of the modules of a model.

    Args:
        known: ids of layers that write none of their arguments and return none.
        graphs: by id of a module those of its own forward. They are read here and now, and may be changed later.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        known: Collection[int],
        graphs: Mapping[int, Sequence[fx.Graph]],
    ) -> None:
        self._known = known
        self._graphs = graphs
        self._found: dict[int, Effect] = {}
        for layer in model.modules():
            self.of(layer)

    def of(self, layer: torch.nn.Module) -> Effect:
        key = id(layer)
        if key not in self._found:
            self._found[key] = Effect(True, True)  # of a module within itself
            found = [self._of_graph(graph, layer) for graph in self._graphs.get(key, ())]
            if layer._forward_hooks or layer._forward_pre_hooks:
                found = [Effect(True, True)]
            elif key in self._known:
                found = [Effect(False, False)]
            elif not found:
                package = type(layer).__module__.rpartition(".")[2]
                new = is_torchs(layer) and package in _NEW_MODULES
                inplace = bool(getattr(layer, "inplace", False))
                found = [Effect(inplace or not is_torchs(layer), inplace or not new)]
            self._found[key] = Effect(*(any(parts) for parts in zip(*found, strict=True)))
        return self._found[key]

    def writes(self, node: fx.Node, owner: torch.nn.Module) -> bool:
        """Whether a node of ``owner``'s graph may write one of its inputs."""
        if node.op == "call_module":
            return self.of(owner.get_submodule(str(node.target))).writes
        if node.op == "call_method":
            return str(node.target).endswith("_")
        named = getattr(node.target, "__name__", "")
        return bool(
            node.kwargs.get("inplace") or node.kwargs.get("out") or named.endswith("_")
            or node.target in IN_PLACE_OPERATORS
        )  # fmt: skip

    def _of_graph(self, graph: fx.Graph, layer: torch.nn.Module) -> Effect:
        given: set[fx.Node] = set()  # what may be an argument, under whatever name
        written = returned = False
        for node in graph.nodes:
            of_given = [source for source in node.all_input_nodes if source in given]
            if node.op == "placeholder":
                given.add(node)
            elif node.op == "output":
                returned = bool(of_given)
            elif node.op == "call_module":
                effect = self.of(layer.get_submodule(str(node.target)))
                written |= bool(of_given) and effect.writes
                if of_given and effect.returns:
                    given.add(node)
            elif of_given:
                written |= self.writes(node, layer) and written_by(node) in of_given
                if node.target not in NEW_RESULTS:
                    given.add(node)
        return Effect(written, returned)


def written_by(node: fx.Node) -> fx.Node | None:
    """What an operator that writes writes."""
    target: Any = node.kwargs.get("out", node.args[0] if node.args else None)
    return target if isinstance(target, fx.Node) else None
