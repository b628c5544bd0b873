"""What a forward, or a node of its graph, may write, and whether its result may share memory with an argument.

`convert.py` calls :func:`find_effects` once; `fuse.py` and `memory_format.py` then query single nodes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .plan import Effect, Plan
from .proxies import IN_PLACE_OPERATORS
from .trace import has_graph_for, is_torchs

# Operators whose result is always new memory.
NEW_RESULTS = {
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.cat,
    torch.relu, torch.sigmoid, "add", "sub", "mul", "div", "relu", "sigmoid", "mean", "sum",
}  # fmt: skip
# The modules of torch.nn whose layers always return new memory.
_NEW_MODULES = {
    "activation", "batchnorm", "conv", "linear", "normalization", "pooling", "upsampling",
}  # fmt: skip


def find_effects(plan: Plan) -> None:
    """Fills in the effect of every module, from the current graphs, which `fuse.py` rewrites later."""
    for layer in plan:
        _effect(plan, layer.module)


def effect_of(plan: Plan, module: torch.nn.Module) -> Effect:
    """What :func:`find_effects` found."""
    effect = plan[module].effect
    assert effect is not None
    return effect


def writes(plan: Plan, node: fx.Node, owner: torch.nn.Module) -> bool:
    """Whether a node of a graph of ``owner`` may write one of its inputs."""
    if node.op == "call_module":
        return _effect_of_call(plan, node, owner).writes
    if node.op == "call_method":
        return str(node.target).endswith("_")
    named = getattr(node.target, "__name__", "")
    return bool(
        node.kwargs.get("inplace") or node.kwargs.get("out") or named.endswith("_")
        or node.target in IN_PLACE_OPERATORS
    )  # fmt: skip


def written_by(node: fx.Node) -> fx.Node | None:
    """The input that an operator writes, if it writes one."""
    target: Any = node.kwargs.get("out", node.args[0] if node.args else None)
    return target if isinstance(target, fx.Node) else None


def _effect_of_call(plan: Plan, node: fx.Node, owner: torch.nn.Module) -> Effect:
    module = owner.get_submodule(str(node.target))
    graphs = plan[module].graphs
    if graphs and not has_graph_for(module, graphs, node.args, node.kwargs):
        return Effect(True, True)  # this call may run code without a graph
    return _effect(plan, module)


def _effect(plan: Plan, module: torch.nn.Module) -> Effect:
    layer = plan[module]
    if layer.effect is None:
        layer.effect = Effect(True, True)  # during the search, in case a module contains itself
        found = [_effect_of_graph(plan, v.graph, module) for v in layer.graphs]
        if module._forward_hooks or module._forward_pre_hooks:
            found = [Effect(True, True)]
        elif layer.counterpart is not None:
            found = [Effect(False, False)]
        elif not found:
            package = type(module).__module__.rpartition(".")[2]
            new = is_torchs(module) and package in _NEW_MODULES
            inplace = bool(getattr(module, "inplace", False))
            found = [Effect(inplace or not is_torchs(module), inplace or not new)]
        layer.effect = Effect(*(any(parts) for parts in zip(*found, strict=True)))
    return layer.effect


def _effect_of_graph(plan: Plan, graph: fx.Graph, owner: torch.nn.Module) -> Effect:
    given: set[fx.Node] = set()  # nodes whose value may be an argument, or share its memory
    written = returned = False
    for node in graph.nodes:
        of_given = [source for source in node.all_input_nodes if source in given]
        if node.op == "placeholder":
            given.add(node)
        elif node.op == "output":
            returned = bool(of_given)
        elif node.op == "call_module":
            effect = _effect_of_call(plan, node, owner)
            written |= bool(of_given) and effect.writes
            if of_given and effect.returns:
                given.add(node)
        elif of_given:
            written |= writes(plan, node, owner) and written_by(node) in of_given
            if node.target not in NEW_RESULTS:
                given.add(node)
    return Effect(written, returned)
