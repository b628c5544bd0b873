"""Finds the layers that a module's own forward calls one after another, and rewrites its graphs to run them as one op.

`convert.py` calls :func:`plan_fusions`; `codegen.py` makes the new forward of the rewritten graphs, which call
:func:`.run_as_one`.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .. import nn
from ..activation import IDENTITY
from ..nn.run_as_one import CONVOLUTIONS, NORMS, run_as_one
from .aliasing import NEW_RESULTS, writes
from .plan import Group, LayerPlan, Plan
from .reads import passes
from .trace import is_torchs

_ADDITIONS_IN_PLACE = {operator.iadd, "add_"}
_ADDITIONS = {operator.add, torch.add, "add", *_ADDITIONS_IN_PLACE}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_SIGMOIDS = {torch.sigmoid, F.sigmoid, "sigmoid"}
# Functions and methods that are an activation without arguments of their own.
_ACTIVATIONS: dict[Any, str] = {
    torch.relu: "relu", torch.relu_: "relu", F.relu: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.hardswish: "hardswish", F.relu6: "relu6", torch.tanh: "tanh", "tanh": "tanh",
    **dict.fromkeys(_SIGMOIDS, "sigmoid"),
}  # fmt: skip


def plan_fusions(plan: Plan) -> None:
    """Fills in which groups each module's forward will run as one op, and rewrites the graphs of those modules."""
    for owner in plan:
        if owner.graphs and has_parts(plan, owner.module):
            _plan_owner(plan, owner)


def has_parts(plan: Plan, owner: torch.nn.Module) -> bool:
    """Whether some child of ``owner`` may be in a group."""
    children = list(owner.children())
    return len(children) > 1 and any(_may_be_fused(plan[child]) for child in children)


def _may_be_fused(layer: LayerPlan) -> bool:
    found = layer.counterpart
    return (
        found is not None
        and layer.alone is None
        and issubclass(found.layer, (*CONVOLUTIONS, *NORMS))
    )


def _plan_owner(plan: Plan, owner: LayerPlan) -> None:
    found: dict[tuple[str, ...], Group] = {}
    reasons: dict[torch.nn.Module, str] = {}
    for variant in owner.graphs:
        guards = _without_passing(plan, variant.graph, owner.module)
        search = _Search(plan, variant.graph, owner.module)
        groups = search.groups()
        for node in search.layers:
            if node not in search.taken:
                reasons.setdefault(search.modules[node], search.why_alone(node))
        made: dict[fx.Node, fx.Node] = {}
        for group in groups:
            _rewrite(variant.graph, group, made)
            found.setdefault(tuple(group.names), group)
        if groups:
            variant.graph.lint()
            owner.forward.append(variant._replace(guards=(*variant.guards, *guards)))
    owner.groups = list(found.values())
    fused = {id(layer) for group in owner.groups for layer in group.layers}
    for layer, reason in reasons.items():
        if id(layer) not in fused:
            plan[layer].notes.append(f"not fused: {reason}")


def _without_passing(plan: Plan, graph: fx.Graph, owner: torch.nn.Module) -> list[str]:
    """Removes calls behind a layer that return what they are given, such as dropout with probability 0.

    Returns:
        The guards under which they do.
    """
    guards = []
    for node in list(graph.nodes):
        if node.op != "call_module" or not _one_argument(node):
            continue
        path, source = tuple(str(node.target).split(".")), node.args[0]
        behind = source.op == "call_module" and len(source.users) == 1
        if (
            behind
            and _may_be_fused(plan[owner.get_submodule(str(source.target))])
            and passes(owner, path)
        ):
            guards.append(f"passes(self, {path})")
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return guards


class _Search:
    """Looks for groups in a graph of ``owner``'s forward."""

    def __init__(self, plan: Plan, graph: fx.Graph, owner: torch.nn.Module) -> None:
        _join_silu(plan, graph, owner)
        self.plan = plan
        self.owner = owner
        self.nodes = list(graph.nodes)
        self.modules = {
            n: owner.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"
        }
        self.taken: set[fx.Node] = set()  # nodes of the groups that were found
        times = Counter(id(layer) for layer in self.modules.values())
        # In the order of the calls.
        self.layers = dict.fromkeys(
            node
            for node, layer in self.modules.items()
            if _may_be_fused(plan[layer]) and times[id(layer)] == 1 and _one_argument(node)
        )

    def groups(self) -> list[Group]:
        groups: list[Group] = []
        for node in self.layers:
            if node not in self.taken:
                group = self.group(node)
                if len(group.nodes) > 1:
                    groups.append(group)
                    self.taken.update(group.nodes)
        return groups

    def group(self, node: fx.Node) -> Group:
        """The longest group that begins with ``node``."""
        kind, own_act = self.class_and_activation(node)
        nodes, members, names = [node], [self.modules[node]], [str(node.target)]
        residual, in_place, act = None, False, None
        following = self.next_of(nodes)
        if following is not None and issubclass(kind, nn.Conv2d) and following in self.layers:
            norm_kind, norm_act = self.class_and_activation(following)
            if issubclass(norm_kind, nn.BatchNormAct2d):
                nodes.append(following)
                members.append(self.modules[following])
                names.append(str(following.target))
                own_act = norm_act
                following = self.next_of(nodes)
        if own_act is not None:
            return Group(members, [*names, own_act], nodes, None, False, None)
        if following is not None and not issubclass(kind, nn.ConvTranspose2d):
            residual = self.added(following, nodes[-1])
            if residual is not None:
                nodes.append(following)
                names.append("add")
                in_place = following.target in _ADDITIONS_IN_PLACE
                following = self.next_of(nodes)
        if following is not None:
            act = self.activation(following, nodes[-1])
            if act is not None:
                nodes.append(following)
                names.append(act if isinstance(act, str) else str(following.target))
        return Group(members, names, nodes, residual, in_place, act)

    def why_alone(self, node: fx.Node) -> str:
        """Why no group begins with ``node``."""
        readers = len(node.users)
        following = next(iter(node.users), None)
        if following is None or readers > 1:
            return f"{readers} places read its result"
        if following.op == "output":
            return "its result is returned"
        layer = self.modules.get(following)
        name = getattr(following.target, "__name__", str(following.target))
        what = f"{name} ({type(layer).__name__})" if layer is not None else name
        if self.next_of([node]) is None and following not in self.taken:
            return f"before {what} something is written that it may read"
        return f"{what} follows"

    def class_and_activation(self, node: fx.Node) -> tuple[type[torch.nn.Module], str | None]:
        """The class that a layer becomes, and the name of the activation that it applies by itself."""
        counterpart = self.plan[self.modules[node]].counterpart
        assert counterpart is not None
        act = counterpart.act
        return counterpart.layer, None if act == IDENTITY else act.name

    def added(self, node: fx.Node, term: fx.Node) -> fx.Node | None:
        """What ``node`` adds to ``term``, if that is all that it does."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        other = right if left is term else left
        if not isinstance(other, fx.Node) or other is term:
            return None
        if node.target in _ADDITIONS_IN_PLACE and left is other:
            # An input, a buffer or a view of one must really be written.
            return other if self.is_read_here_alone(other) else None
        return other

    def is_read_here_alone(self, node: fx.Node) -> bool:
        """Whether the node's result is new memory that only its single user reads."""
        if len(node.users) != 1:
            return False
        layer = self.modules.get(node)
        converted = layer is not None and self.plan[layer].counterpart is not None
        if node.target in NEW_RESULTS or converted:
            return True
        source = node.args[0] if node.args else None
        # A layer such as nn.Identity may return its input.
        handed_on = layer is not None and is_torchs(layer)
        return handed_on and isinstance(source, fx.Node) and self.is_read_here_alone(source)

    def activation(self, node: fx.Node, of: fx.Node) -> str | fx.Node | None:
        """The activation that ``node`` applies to ``of``: a name, or the node itself if it calls a module."""
        if not node.args or node.args[0] is not of:
            return None
        if node.op == "call_module":
            known = self.plan[self.modules[node]].is_activation
            return node if known and _one_argument(node) else None
        if node.op not in ("call_function", "call_method"):
            return None
        plain = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
        return _ACTIVATIONS.get(node.target) if plain else None

    def next_of(self, nodes: list[fx.Node]) -> fx.Node | None:
        """The only reader of the last node, if the first node may be delayed until then.

        It may not if a node in between writes, possibly an input of the first node. Nor if one in between reads a
        parameter or buffer of these layers, which may be a norm's running statistics.
        """
        if len(nodes[-1].users) != 1:
            return None
        following = next(iter(nodes[-1].users))
        if following in self.taken:
            return None
        between = self.nodes[self.nodes.index(nodes[0]) + 1 : self.nodes.index(following)]
        others = [node for node in between if node not in nodes]
        if any(writes(self.plan, node, self.owner) or _is_of(node, nodes) for node in others):
            return None
        return following


def _is_of(node: fx.Node, layers: list[fx.Node]) -> bool:
    """Whether the node is a parameter or buffer of one of the layers."""
    own = tuple(f"{layer.target}." for layer in layers if layer.op == "call_module")
    return node.op == "get_attr" and str(node.target).startswith(own)


def _join_silu(plan: Plan, graph: fx.Graph, owner: torch.nn.Module) -> None:
    """Rewrites ``x * sigmoid(x)`` as ``silu(x)``, the same function up to rounding."""
    for node in list(graph.nodes):
        gate = next((n for n in node.all_input_nodes if _is_sigmoid(n)), None)
        if gate is None or node.target not in _PRODUCTS or len(gate.users) != 1:
            continue
        x = gate.args[0]
        if node.kwargs or set(node.args) != {x, gate}:
            continue
        between = list(graph.nodes)
        between = between[between.index(x) + 1 : between.index(node)]
        in_place = writes(plan, node, owner)
        if any(writes(plan, n, owner) for n in between) or (in_place and x is not node.args[0]):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(F.silu, (x,), {"inplace": True} if in_place else {})
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        graph.erase_node(gate)


def _is_sigmoid(node: fx.Node) -> bool:
    """Whether it is a sigmoid, as a function or method. A sigmoid module may have hooks, or be replaced later."""
    return (
        _one_argument(node)
        and node.op in ("call_function", "call_method")
        and node.target in _SIGMOIDS
    )


def _one_argument(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _rewrite(graph: fx.Graph, group: Group, made: dict[fx.Node, fx.Node]) -> None:
    """Replaces the group by one call.

    Args:
        made: the calls made so far, by the last node of the group that each replaces.
    """
    first, last = group.nodes[0], group.nodes[-1]
    given: list[Any] = [first.args[0], group.residual]
    x, residual = (made.get(node, node) for node in given)
    with graph.inserting_before(last), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [graph.get_attr(str(node.target)) for node in group.nodes[: len(group.layers)]]
        act = group.act
        if isinstance(act, fx.Node):
            act = graph.get_attr(str(act.target))
        call = graph.call_function(
            run_as_one, (tuple(modules), x, residual, act), {"in_place": group.in_place}
        )
    made[last] = call
    last.replace_all_uses_with(call)
    for node in reversed(group.nodes):
        graph.erase_node(node)
